"""A tiny world on disk for recipe tests: a random Wan in diffusers layout, random latents with
prompts, and the arguments of a chain over them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from scd_sf.checkpoint import find
from scd_sf.data.latents import LatentClip, LatentWriter
from scd_sf.data.prompts import Prompt, encode_prompts
from scd_sf.data.shards import ShardWriter
from scd_sf.models.wan.transformer import Wan, WanConfig
from scd_sf.models.wan.weights import save_wan
from scd_sf.tensor_files import read_tensors
from scd_sf.tools.runs.curve import is_portable
from scd_sf.train.metric_names import meaning
from scd_sf.types import VideoShape

WAN = WanConfig(2, 12, 4, 4, 8, 16, 32, 6)
SHAPE = VideoShape(frames=3, channels=4, height=4, width=4)
STEPS2, STEPS3 = 6, 4
SCRIPTS = {"stage2": "recipes/stage2_flow_matching.py", "stage3": "recipes/stage3_self_forcing.py"}
BACKWARD = "scd_sf.train.local:LocalEngine.backward"
PLACES, MOTIONS = ("meadow", "hall"), ("left", "right", "still")


def write_wan(root: Path, seed: int = 0, width: int = WAN.text_dim) -> Path:
    """A whole random model in diffusers layout: 6-layer Wan, video autoencoder (x4 in time, x8 in
    space), umT5 of ``width``."""
    torch.manual_seed(seed)
    save_wan(Wan(WAN).state_dict(), WAN, root / "transformer", torch.float32)
    AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=WAN.in_channels,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        patch_size=2,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * WAN.in_channels,
        latents_std=[1.0] * WAN.in_channels,
    ).save_pretrained(root / "vae")
    write_text_encoder(root, width)
    return root


def write_text_encoder(root: Path, width: int = WAN.text_dim) -> None:
    """``root/text_encoder`` and ``root/tokenizer``: a random umT5 over the words of the prompts."""
    words = ["<pad>", "<unk>", "</s>", "in", *PLACES, *MOTIONS]
    text = UMT5Config(
        vocab_size=len(words), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    UMT5EncoderModel(text).save_pretrained(root / "text_encoder")
    tokens = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    fast.save_pretrained(root / "tokenizer")


def write_latents(
    root: Path,
    count: int = 12,
    seed: int = 0,
    *,
    shape: VideoShape = SHAPE,
    width: int = WAN.text_dim,
    held_out: bool = False,
    huge: int | None = None,
) -> Path:
    """``count`` random clips; prompt i goes with clips i, i+6, .. ``width``: of the text states.

    ``held_out``: every clip also has a wording that no training sees, and neighbours share their
    prompts. ``huge``: a clip whose latents overflow any loss.
    """
    rng = torch.Generator().manual_seed(seed)
    tags = [{"place": place, "motion": motion} for place in PLACES for motion in MOTIONS]
    prompts = [
        Prompt(f"p{i}", f"{tag['motion']} in {tag['place']}", False, tag)
        for i, tag in enumerate(tags)
    ]
    if held_out:
        prompts += [
            Prompt(f"h{i}", f"{tag['place']} {tag['motion']}", True, tag)
            for i, tag in enumerate(tags)
        ]
    writer = ShardWriter(root, {"seed": seed})
    text = encode_prompts(
        writer, prompts, lambda texts: [_states(text, width) for text in texts], max_length=5
    )
    dtype = torch.float16 if huge is None else torch.bfloat16
    latents = LatentWriter(writer, shape, dtype=dtype, per_shard=8)
    values = torch.randn(shape.latent(count), generator=rng)
    if huge is not None:
        values[huge] *= 1e30
    latents.append(values)
    kinds = [(i // 2 if held_out else i) % 6 for i in range(count)]
    rows = [
        LatentClip(f"c{i}", kind, 6 + kind if held_out else None, tags[kind])
        for i, kind in enumerate(kinds)
    ]
    latents.finish(rows, text)
    return root


def _states(text: str, width: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(len(text) + sum(map(ord, text)))
    return torch.randn(1 + len(text.split()), width, generator=rng)


@dataclass(frozen=True)
class Chain:
    """Directories of the session's chain, and the arguments of its stages."""

    root: Path

    @property
    def wan(self) -> Path:
        return self.root / "wan"

    @property
    def train(self) -> Path:
        return self.root / "train"

    @property
    def stage1(self) -> Path:
        return self.root / "stage1"

    def stage2(self, run: Path) -> list[str]:
        """Arguments of stage 2: two micro-batches per update, a checkpoint after every second."""
        train = f"train={{steps: {STEPS2}, global_batch: 4, micro_batch: 2, save_every: 2, validate_every: 3}}"
        inputs = [f"init={self.stage1}", f"data={self.train}", f"val={self.root}/val"]
        sampler = "sampler={name: euler, steps: 2}"
        return [
            *inputs,
            f"run.dir={run}",
            train,
            "run.log_every=1",
            "engine={backend: torch, lr: 1e-2}",
            sampler,
        ]

    def stage3(self, run: Path) -> list[str]:
        """Arguments of stage 3, from stage 2's result: two critic updates per student update."""
        train = f"train={{steps: {STEPS3}, global_batch: 2, micro_batch: 1, save_every: 2, validate_every: 2}}"
        wans = [f"teacher={self.wan}", f"critic={self.wan}", f"prompts={self.train}"]
        engines = [
            f"{name}={{backend: torch, lr: 1e-2}}" for name in ("student_engine", "critic_engine")
        ]
        engines.append("teacher_engine={backend: torch}")
        size = ["video={frames: 9, height: 32, width: 32}", "ratio=2", "run.log_every=1"]
        return [f"init={self.root}/stage2", *wans, *engines, *size, f"run.dir={run}", train]


def metrics(run: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without the clock and the machine."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name != "time" and is_portable(name)}
        for row in rows
    ]


def check_words(out: str, run: Path, *labels: str) -> None:
    """A training's output says what it trains, and at its end where it is (``labels``: what else);
    every metric of the run has a meaning."""
    lines = [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  ")]
    words = {line[0]: line[1] for line in lines if len(line) == 2}
    expected = {"data", "device", "batch", "steps", "lands", "last", "figures", *labels}
    assert not expected - words.keys(), out
    assert "parameters trained" in words["model"] and "micro-batch" in words["batch"]
    assert str(run) in words["lands"] and words["figures"] == f"scd runs show {run}"
    assert Path(words["last"]).is_dir()
    names = {name for row in metrics(run) for name in row} - {"step"}
    assert names and [name for name in sorted(names) if not meaning(name)] == []


def same_as_uninterrupted(chain: Chain, stage: str, run: Path) -> None:
    """Per-step metrics, weights, averages and optimizer state, to the last bit."""
    assert metrics(run) == metrics(chain.root / stage)
    one, two = find(chain.root / stage), find(run)
    assert one.name == two.name
    files = sorted(file.relative_to(one) for file in one.rglob("*.safetensors"))
    assert files == sorted(file.relative_to(two) for file in two.rglob("*.safetensors"))
    for file in files:
        left, right = read_tensors(one / file), read_tensors(two / file)
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []
