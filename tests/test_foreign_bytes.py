"""Every descriptor the product reads, mutated: the reader succeeds or raises one UserError line,
nothing else.

Each kind is a valid small file, made by the project's own writers, and the function that reads it.
Mutations keep the form (JSON stays JSON: other types, huge numbers, depth, missing and further
keys) or break it (cut, flipped, NUL). Figures come from a fixed seed, so that a failure repeats.
"""

from __future__ import annotations

import copy
import json
import re
import signal
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import gallery_world
import numpy as np
import pytest
import raw_sets
import tiny_run
import torch
from diffusers import AutoencoderDC
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from scd_sf.checkpoint import Checkpoints, find, provenance, read_provenance
from scd_sf.config import load_config, plain_yaml, to_yaml
from scd_sf.data.clip_files import About, clip_path, read_header, write_clip
from scd_sf.data.clip_index import read_folder_job
from scd_sf.data.clips import read_video
from scd_sf.data.frames import FrameClips, FrameSetInfo, FrameWriter
from scd_sf.data.latents import LatentClips
from scd_sf.data.prompt_files import read_prompt_file
from scd_sf.data.prompts import PromptSet
from scd_sf.data.sources.far import read_far_list
from scd_sf.data.sources.picture_reader import read_picture
from scd_sf.data.sources.raw_files import arrays_of, one_tensor, open_raw
from scd_sf.distributed import Ranks
from scd_sf.evaluation.vbench.aggregate import read_scores
from scd_sf.evaluation.vbench.prompts import load_entries, read_extended
from scd_sf.generation.sampling import SampleConfig
from scd_sf.models.build import (
    CheckpointConfig,
    ModelConfig,
    build_model,
    load_student,
    read_single,
    write_single,
)
from scd_sf.models.tokenizers.tokenizer import Normalisation, load_tokenizer, save_tokenizer
from scd_sf.models.wan.text import load_text_encoder
from scd_sf.models.wan.tiny_vae import TinyDecoder, TinyVaeConfig, load_decoder, save_decoder
from scd_sf.models.wan.transformer import Wan
from scd_sf.models.wan.vae import load_vae
from scd_sf.models.wan.weights import load_wan, open_wan, save_wan
from scd_sf.probes.report import write_probe_report
from scd_sf.tensor_files import read_tensors
from scd_sf.tools.data.foreign import read_tar
from scd_sf.tools.gallery.folders import page_of, read_folder
from scd_sf.tools.runs.curve import read_curve
from scd_sf.tools.runs.state import read_run
from scd_sf.tools.steps import Step, finished_seconds, run_steps
from scd_sf.train.base import read_counters
from scd_sf.train.run import Run, RunConfig
from scd_sf.train.shards import StateFiles
from scd_sf.types import UserError, printable

SECONDS = 60  # that one read may take, on a machine with other work too
DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]
EVIL: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    7,
    2**31,
    2**63,
    10**30,
    -(10**12),
    0.5,
    1e308,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "text",
    "\0",
    "a\nb",
    "\ud800",
    "\x1b[31m",
    "../../etc/passwd",
    "/dev/zero",
    "x" * 5000,
    "${oc.env:HOME}",
    "9" * 400,
    [],
    {},
    [None],
    [[]],
    [-1],
    [10**12],
    [0] * 500,
    {"a": {"b": []}},
    {"": 0},
    DEEP,
]
WAYS = ("value", "value", "value", "delete", "key", "cut", "flip", "empty", "junk", "twice")
Form = Callable[[bytes, str, int, int], bytes]


# ---------------------------------------------------------------------------------------- mutations


def raw(data: bytes, way: str, place: int, more: int) -> bytes:
    """Bytes without a form that is known."""
    at = place % max(1, len(data))
    if way == "empty":
        return b""
    if way == "cut":
        return data[:at]
    if way == "twice":
        return data[:at] + data[at // 2 : at] + data[at:]
    if way == "junk":
        return (
            data[:at]
            + [b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"[" * 5000, b"\x1b[2J"][
                more % 6
            ]
            + data[at:]
        )
    return data[:at] + bytes([data[at] ^ (1 << more % 8)]) + data[at + 1 :] if data else b"\0"


def text(data: bytes, way: str, place: int, more: int) -> bytes:
    """Words of a text file."""
    words = list(re.finditer(rb"[^\s,:=]+", data))
    if way not in ("value", "key", "delete") or not words:
        return raw(data, way, place, more)
    word, evil = words[place % len(words)], EVIL[more % len(EVIL)]
    new = (
        b""
        if way == "delete"
        else (evil if isinstance(evil, str) else json.dumps(evil)).encode("utf-8", "surrogatepass")
    )
    return data[: word.start()] + new + data[word.end() :]


def tree(data: bytes, way: str, place: int, more: int) -> bytes:
    """A JSON value: another type at one place of it, one key less or more."""
    if way not in ("value", "key", "delete"):
        return raw(data, way, place, more)
    root = {"": json.loads(data)}
    spots = list(_spots(root))
    holder, key = spots[place % len(spots)]
    if way == "delete":
        del holder[key]
    elif way == "key" and isinstance(holder, dict):
        holder[["extra", "\0", "\ud800", "x" * 300, "__class__"][more % 5]] = (
            holder.pop(key) if more % 2 else 1
        )
    else:
        holder[key] = copy.copy(EVIL[more % len(EVIL)])
    return json.dumps(root.get("")).encode()


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _spots(value[key])


def lines(data: bytes, way: str, place: int, more: int) -> bytes:
    """JSON lines: one of them."""
    rows = data.splitlines()
    row = place % len(rows)
    return (
        b"\n".join([*rows[:row], tree(rows[row], way, place // 7, more), *rows[row + 1 :]]) + b"\n"
    )


def header(data: bytes, way: str, place: int, more: int) -> bytes:
    """Safetensors: the JSON before the tensors, of the right length or not."""
    (length,) = struct.unpack("<Q", data[:8])
    if way not in ("value", "key", "delete"):
        return (
            raw(data[: 8 + length], way, place, more) + data[8 + length :]
            if place % 2
            else raw(data, way, place, more)
        )
    new = tree(data[8 : 8 + length], way, place, more)
    return struct.pack("<Q", len(new)) + new + data[8 + length :]


# ---------------------------------------------------------------------------------------- the kinds


@dataclass(frozen=True)
class Kind:
    """``file`` below the world, how it is mutated, what reads it (given the world), how often."""

    file: str
    form: Form
    read: Callable[[Path], object]
    examples: int = 60


def _prompts(name: str) -> Kind:
    return Kind(
        name,
        text if not name.endswith("l") else lines,
        lambda world: read_prompt_file(world / name),
        100,
    )


def _arrays(world: Path) -> object:
    where = world / "raw" / "clip.npz"
    return arrays_of(where.read_bytes(), ["video", "actions"], str(where))


def _tar(world: Path) -> object:
    files = open_raw(world / "tars", [".npz"])
    return [files.read(name) for name in files.names], list(read_tar(world / "tars" / "all.tar"))


def _resumed(world: Path) -> object:
    """What a training reads of its own folder when it goes on."""
    run = Run(
        RunConfig(str(world / "own")), ALONE, config=RunConfig(str(world / "own")), may_change=("",)
    )
    try:
        run.start(3)
    finally:
        run.finish()
    return run


ONE = Step("one", ["true"], 1.0)
ALONE = Ranks(0, 1, 0, torch.device("cpu"))
KINDS: dict[str, Kind] = {
    "transformer config": Kind(
        "wan/transformer/config.json", tree, lambda w: open_wan(w / "wan"), 150
    ),
    "transformer weights": Kind(
        "wan/transformer/diffusion_pytorch_model.safetensors",
        header,
        lambda w: load_wan(w / "wan"),
        40,
    ),
    "shard index": Kind(
        "sharded/transformer/diffusion_pytorch_model.safetensors.index.json",
        tree,
        lambda w: open_wan(w / "sharded"),
        100,
    ),
    "torch weights": Kind("weights.pt", raw, lambda w: open_wan(w / "weights.pt", heads=2), 60),
    "vae config": Kind("wan/vae/config.json", tree, lambda w: load_vae(w / "wan"), 60),
    "vae weights": Kind(
        "wan/vae/diffusion_pytorch_model.safetensors", header, lambda w: load_vae(w / "wan"), 30
    ),
    "tiny decoder": Kind(
        "tiny/decoder.safetensors", header, lambda w: load_decoder(w / "tiny"), 60
    ),
    "text config": Kind(
        "wan/text_encoder/config.json", tree, lambda w: load_text_encoder(w / "wan"), 60
    ),
    "text weights": Kind(
        "wan/text_encoder/model.safetensors", header, lambda w: load_text_encoder(w / "wan"), 25
    ),
    "tokenizer": Kind(
        "wan/tokenizer/tokenizer.json", tree, lambda w: load_text_encoder(w / "wan"), 40
    ),
    "tokenizer config": Kind(
        "wan/tokenizer/tokenizer_config.json", tree, lambda w: load_text_encoder(w / "wan"), 40
    ),
    "text reference": Kind(
        "reference/text_encoder.json", tree, lambda w: load_text_encoder(w / "reference"), 40
    ),
    "latents manifest": Kind(
        "latents/manifest.json", tree, lambda w: LatentClips(w / "latents").batch([0, 1]), 150
    ),
    "latents": Kind(
        "latents/latents-00000.safetensors",
        header,
        lambda w: LatentClips(w / "latents").latents([0]),
        60,
    ),
    "prompts manifest": Kind(
        "latents/manifest.json", tree, lambda w: PromptSet(w / "latents"), 100
    ),
    "prompts.jsonl": _prompts("prompts.jsonl"),
    "prompts.csv": _prompts("prompts.csv"),
    "prompts.txt": _prompts("prompts.txt"),
    "checkpoint manifest": Kind(
        "run/checkpoints/step_00000002/manifest.json", tree, lambda w: find(w / "run"), 100
    ),
    "latest": Kind("run/checkpoints/latest", text, lambda w: find(w / "run"), 30),
    "provenance": Kind(
        "run/checkpoints/step_00000002/provenance.json",
        tree,
        lambda w: read_provenance(w / "run/checkpoints/step_00000002"),
        100,
    ),
    "checkpoint config": Kind(
        "run/checkpoints/step_00000002/config.yaml",
        text,
        lambda w: load_config(CheckpointConfig, w / "run/checkpoints/step_00000002/config.yaml"),
        150,
    ),
    "checkpoint weights": Kind(
        "run/checkpoints/step_00000002/model.safetensors",
        header,
        lambda w: read_tensors(w / "run/checkpoints/step_00000002/model.safetensors"),
        60,
    ),
    "exported file": Kind(
        "single.safetensors", header, lambda w: read_single(w / "single.safetensors"), 150
    ),
    "exported weights": Kind(
        "single.safetensors", header, lambda w: load_student(w / "single.safetensors"), 30
    ),
    "run config": Kind(
        "run/config.yaml",
        text,
        lambda w: (read_run(w / "run", 0.0), plain_yaml(w / "run/config.yaml")),
        60,
    ),
    "metrics": Kind(
        "run/metrics.jsonl", lines, lambda w: (read_run(w / "run", 0.0), read_curve(w / "run")), 100
    ),
    "metrics at a resume": Kind("own/metrics.jsonl", lines, _resumed, 60),
    "status": Kind("run/status.json", tree, lambda w: read_run(w / "run", 0.0), 60),
    "heartbeat": Kind(
        "run/heartbeat/rank_00000.json", tree, lambda w: read_run(w / "run", 0.0), 60
    ),
    "skipped": Kind("run/skipped.jsonl", lines, lambda w: read_run(w / "run", 0.0), 60),
    "manifest in a list of runs": Kind(
        "run/checkpoints/step_00000002/manifest.json", tree, lambda w: read_run(w / "run", 0.0), 100
    ),
    "engine counters": Kind("state/engine.json", tree, lambda w: read_counters(w / "state"), 60),
    "engine state": Kind(
        "state/rank0.safetensors", header, lambda w: StateFiles(w / "state", 1), 100
    ),
    "sample manifest": Kind(
        "samples/manifest.json", tree, lambda w: page_of([read_folder(w / "samples")], "T"), 150
    ),
    "sample record": Kind(
        "samples/.done/0000-00.mp4.json",
        tree,
        lambda w: page_of([read_folder(w / "samples")], "T"),
        60,
    ),
    "probe": Kind("probes/x.json", tree, lambda w: write_probe_report(w / "probes", "T", {}), 60),
    "VBench scores": Kind(
        "vbench/summary.json", tree, lambda w: read_scores(w / "vbench/summary.json"), 100
    ),
    "VBench list": Kind(
        "vbench/full.json", tree, lambda w: load_entries(str(w / "vbench/full.json")), 60
    ),
    "VBench wordings": Kind(
        "vbench/long.txt",
        text,
        lambda w: read_extended(w / "vbench/long.txt", load_entries()[:2]),
        60,
    ),
    "yaml": Kind("sample.yaml", text, lambda w: load_config(SampleConfig, w / "sample.yaml"), 200),
    "frame set": Kind("frames/manifest.json", tree, lambda w: FrameClips(w / "frames"), 100),
    "frame set's clips": Kind("frames/clips.jsonl", lines, lambda w: FrameClips(w / "frames"), 60),
    "clip header": Kind(
        f"clips/{'a' * 2}/{'a' * 32}.safetensors",
        header,
        lambda w: read_header(clip_path(w / "clips", "a" * 32)),
        150,
    ),
    "clip job": Kind("clips/job.json", tree, lambda w: read_folder_job(w / "clips"), 60),
    "image tokenizer": Kind("dcae/config.json", tree, lambda w: load_tokenizer(w / "dcae"), 60),
    "step marker": Kind(
        "chain/.done/one.json", tree, lambda w: finished_seconds(w / "chain", ONE), 60
    ),
    "FAR list": Kind(
        "far/latents.json",
        tree,
        lambda w: read_far_list(w / "far/latents.json", "latent_path"),
        100,
    ),
    "npz": Kind("raw/clip.npz", raw, _arrays, 100),
    "tensor file": Kind(
        "raw/clip.pt", raw, lambda w: one_tensor((w / "raw/clip.pt").read_bytes(), "clip.pt"), 100
    ),
    "tar": Kind("tars/all.tar", raw, _tar, 100),
    "video": Kind("samples/0000-00.mp4", raw, lambda w: read_video(w / "samples/0000-00.mp4"), 40),
    "picture": Kind("start.png", raw, lambda w: read_picture(w / "start.png", "start.png"), 60),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One valid file of every kind."""
    root = tmp_path_factory.mktemp("world")
    tiny_run.write_wan(root / "wan")
    state = Wan(tiny_run.WAN).state_dict()
    save_wan(state, tiny_run.WAN, root / "sharded" / "transformer", torch.float32, max_shard="20KB")
    torch.save({name: value.half() for name, value in state.items()}, root / "weights.pt")
    (root / "reference").mkdir()
    reference = {"path": str(root / "wan"), "package": "", "max_length": 512}
    (root / "reference" / "text_encoder.json").write_text(json.dumps(reference))
    save_decoder(TinyDecoder(TinyVaeConfig(widths=(4, 4, 4, 4))), root / "tiny", "")
    tiny_run.write_latents(root / "latents")
    _write_texts(root)
    _write_runs(root)
    _write_evaluations(root)
    _write_sets(root)
    return root


def _write_texts(root: Path) -> None:
    rows = [{"prompt": "a cat", "seed": 3}, {"prompt": "a dog", "then": [[9, "a fox"]]}]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "prompts.csv").write_text('prompt,seed\n"a cat, sitting",3\na dog,4\n')
    (root / "prompts.txt").write_text("a cat\n# a note\na dog\n")
    values = "prompts: [a cat, a dog]\nframes: 9\nfps: 16\nsampler: {name: euler, steps: 4, shift: 5.0}\n"
    (root / "sample.yaml").write_text(
        f"checkpoint: runs/x\nout: runs/y\n{values}guidance: {{text: {{scale: 2.0}}}}\n"
    )
    Image.fromarray(np.arange(3 * 32 * 32, dtype=np.uint8).reshape(32, 32, 3)).save(
        root / "start.png"
    )


def _write_runs(root: Path) -> None:
    config = CheckpointConfig(ModelConfig("causal", wan=tiny_run.WAN))
    model = build_model(config.model)
    record = provenance(stage="stage2_flow_matching", step=2, seed=3, parents=[root / "wan"])
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    Checkpoints(root / "run" / "checkpoints").write(2, {"model": tensors}, to_yaml(config), record)
    write_single(root / "single.safetensors", model, config, record, torch.float32)
    run = root / "run"
    (run / "config.yaml").write_text("train: {steps: 10}\nrun: {heartbeat_seconds: 10.0}\n")
    metrics = [
        {"step": step, "time": 1.7e9 + step, "loss": 1.0 / step, "odd": None} for step in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (run / "status.json").write_text(
        '{"state": "failed", "reason": "why", "step": 3, "total": 10, "time": 1.8e9}\n'
    )
    (run / "heartbeat").mkdir()
    (run / "heartbeat" / "rank_00000.json").write_text(
        '{"time": 1.7e9, "step": 3, "pid": 9, "host": "here"}\n'
    )
    (run / "skipped.jsonl").write_text('{"step": 2, "engine": "model", "samples": [1, 2]}\n')
    (root / "own").mkdir()
    (root / "own" / "config.yaml").write_text(to_yaml(RunConfig(str(root / "own"))))
    (root / "own" / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    (root / "state").mkdir()
    (root / "state" / "engine.json").write_text('{"updates": 2, "skipped": 0, "files": 1}\n')
    from safetensors.torch import save_file

    save_file(
        {"master/w@0": torch.ones(4), "buffer/b": torch.ones(2, 2)},
        root / "state" / "rank0.safetensors",
    )


def _write_evaluations(root: Path) -> None:
    samples = gallery_world.write_folder(root / "samples", ["a fox", "a hall"])
    listed = json.loads((samples / "manifest.json").read_text())
    (samples / ".done").mkdir()
    entry = listed["videos"].pop("0000-00.mp4")
    (samples / ".done" / "0000-00.mp4.json").write_text(json.dumps(entry))
    (samples / "manifest.json").write_text(json.dumps(listed))
    (root / "probes").mkdir()
    (root / "probes" / "x.json").write_text(
        '{"title": "Skip (P5)", "text": "words", "figures": ["x-a.png"]}'
    )
    (root / "probes" / "x-a.png").write_bytes(b"png")
    (root / "vbench").mkdir()
    summary = {
        "scores": {"scene": 0.5, "color": 0.25},
        "reduced": ["few"],
        "protocol": {"settings": {"fps": 16}},
    }
    (root / "vbench" / "summary.json").write_text(json.dumps(summary))
    rows = [{"prompt_en": e.prompt, "dimension": list(e.dimensions)} for e in load_entries()[:3]]
    (root / "vbench" / "full.json").write_text(json.dumps(rows))
    (root / "vbench" / "long.txt").write_text("a long wording\nanother one\n")


def _write_sets(root: Path) -> None:
    run_steps(root / "chain", [[ONE]])
    blocks = ("ResBlock",) * 5
    model = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8,) * 5,
        decoder_block_out_channels=(8,) * 5,
        encoder_layers_per_block=(0, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 1),
        encoder_qkv_multiscales=((),) * 5,
        decoder_qkv_multiscales=((),) * 5,
        scaling_factor=1.0,
    )
    save_tokenizer(model, Normalisation((0.0,) * 4, (1.0,) * 4), root / "dcae")
    info = FrameSetInfo(2, 2, 2, 8, num_actions=3)
    writer = FrameWriter(root / "frames", {"source": "x"}, info)
    for number in range(2):
        writer.append(f"c{number}", torch.randn(4, 2, 2, 2), torch.arange(4) % 3)
    writer.finish()
    write_clip(
        root / "clips",
        torch.randn(3, 4, 4, 4),
        torch.randn(2, 6),
        About("a" * 32, "a cat", tags={"a": "b"}),
    )
    job: dict[str, object] = {
        "shape": {"frames": 3, "channels": 4, "height": 4, "width": 4, "temporal": 4, "spatial": 8},
        "dtype": "float32",
    }
    job |= {
        "width": 6,
        "max_length": 8,
        "settings": {"seed": 1},
        "format": "scd-sf-clip-job",
        "version": 1,
    }
    (root / "clips" / "job.json").write_text(json.dumps(job))
    raw_sets.make_far_latents(root / "far", clips=2)
    (root / "raw").mkdir()
    np.savez(
        root / "raw" / "clip.npz", video=np.zeros((4, 8, 8, 3), np.uint8), actions=np.arange(4)
    )
    torch.save(torch.randn(4, 2, 3, 3), root / "raw" / "clip.pt")
    (root / "tars").mkdir()
    raw_sets.tar_of(
        root / "tars" / "all.tar", root, [root / "raw" / "clip.npz", root / "raw" / "clip.pt"]
    )


# ----------------------------------------------------------------------------------------- the test


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still reading after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", KINDS)
def test_a_reader_succeeds_or_says_one_line(world: Path, name: str) -> None:
    kind = KINDS[name]
    file = world / kind.file
    whole = file.read_bytes()
    kind.read(world)

    @settings(
        max_examples=kind.examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(WAYS), st.integers(0, 10**6), st.integers(0, 10**6))
    def attempt(way: str, place: int, more: int) -> None:
        file.write_bytes(kind.form(whole, way, place, more))
        try:
            with at_most(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind.read(world)
        except UserError as error:
            assert printable(str(error)).encode()  # types.say prints it as one line

    try:
        attempt()
    finally:
        file.write_bytes(whole)
