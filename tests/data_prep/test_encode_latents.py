"""encode_latents.py on a clip directory: a tiny VAE in Wan's layout and a tiny text encoder by
reference. Folders of videos: test_encode_videos.py."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from scd_sf.data.clips import Clip, ClipSet, write_clips, write_video
from scd_sf.data.latents import LatentClips
from scd_sf.data.prompts import PromptSet
from scd_sf.files import locked, sha256_file
from scd_sf.models.wan.text import (
    WAN_NEGATIVE_PROMPT,
    TextEncoderConfig,
    load_text_encoder,
    write_reference,
)
from scd_sf.models.wan.vae import load_vae
from scd_sf.types import UserError, VideoShape

SCRIPT = Path(__file__).parents[2] / "data_prep" / "encode_latents.py"
FRAMES, SIZE = 5, 16
WORDS = ["[PAD]", "[UNK]", "left", "right", "turn"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("encode_latents", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    AutoencoderKLWan(
        base_dim=4,
        z_dim=2,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, 0.2],
        latents_std=[0.5, 2.0],
    ).save_pretrained(root / "vae")
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(root / "words")
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[PAD] $A", special_tokens=[("[PAD]", 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(root / "words")
    write_reference(root, TextEncoderConfig(path="words", max_length=8, hidden_layer=0))
    return root


def write_clip_directory(root: Path, held_out: str = "turn left") -> Path:
    """Three training clips (two share a caption) and one for validation."""
    root.mkdir()
    generator = torch.Generator().manual_seed(0)
    clips = []
    for number, (caption, split) in enumerate(
        [("left turn", "train"), ("right turn", "train"), ("left turn", "train"), ("right", "val")]
    ):
        pixels = torch.randint(0, 256, (FRAMES, 3, SIZE, SIZE), generator=generator).to(torch.uint8)
        path = root / f"{number}.mp4"
        write_video(path, pixels, 16)
        clips.append(
            Clip(
                id=path.name,
                split=split,
                place="",
                motion=caption,
                actions=(caption,) * FRAMES,
                degrees_per_frame=0.0,
                caption=caption,
                held_out_caption=held_out if caption == "left turn" else "",
                seed=0,
                tries=1,
                path=path.name,
                bytes=path.stat().st_size,
                sha256=sha256_file(path),
            )
        )
    write_clips(root, clips, {"frames": FRAMES, "height": SIZE, "width": SIZE, "fps": 16}, {})
    return root


def encode(script: ModuleType, clips: Path, model: Path, out: Path, **more: object) -> None:
    given = {"batch": 2, "device": "cpu", "store_latents": "float32", "store_text": "float16"}
    script.main(clips=clips, model=model, out=out, **(given | more))


def test_a_clip_directory_to_latents(
    script: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = write_clip_directory(tmp_path / "clips")
    encode(script, clips, model, tmp_path / "out")
    data = LatentClips(tmp_path / "out" / "train", expected=VideoShape(2, 2, 2, 2))
    pixels = ClipSet(clips, "train").videos(range(3)).float() / 127.5 - 1
    torch.testing.assert_close(
        data.latents(range(3)), load_vae(model).encode(pixels), rtol=1e-4, atol=1e-5
    )
    assert [row.prompt for row in data.rows] == [0, 1, 0] and data.rows[1].held_out_prompt is None
    assert data.rows[0].tags == {"motion": "left turn"}
    assert [row.prompt for row in PromptSet(data.root).rows] == ["left turn", "right turn"]
    assert [row.prompt for row in PromptSet(data.root, held_out=True).rows] == ["turn left"]
    wanted = load_text_encoder(model).encode(["left turn", ""]).text_BLE
    torch.testing.assert_close(data.batch([2]).text.text_BLE, wanted[:1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(data.null.text_BLE, wanted[1:], rtol=1e-3, atol=1e-4)
    assert len(LatentClips(tmp_path / "out" / "val")) == 1
    said = capsys.readouterr().out
    assert "clips 3/3, 0 s left" in said and "prompts 3/3, 0 s left" in said
    encode(script, clips, model, tmp_path / "out")
    assert capsys.readouterr().out.count("already complete") == 2
    with (
        pytest.raises(UserError, match="is at work in it"),
        locked(tmp_path / "out" / "train", "another job"),
    ):
        encode(script, clips, model, tmp_path / "out")
    with pytest.raises(UserError, match="is a clip directory, whose clips are cut already"):
        encode(script, clips, model, tmp_path / "out", frames=9)


def test_an_interrupted_run_goes_on(script: ModuleType, model: Path, tmp_path: Path) -> None:
    clips = write_clip_directory(tmp_path / "clips")
    encode(script, clips, model, tmp_path / "whole")
    broken = clips / "2.mp4"
    good = broken.read_bytes()
    broken.write_bytes(bytes(len(good)))
    with pytest.raises(UserError, match=r"2\.mp4: cannot be decoded"):
        encode(script, clips, model, tmp_path / "out")
    broken.write_bytes(good)
    with pytest.raises(UserError, match="encoding was not finished"):
        LatentClips(tmp_path / "out" / "train")
    encode(script, clips, model, tmp_path / "out")
    assert (
        LatentClips(tmp_path / "out" / "train").hash
        == LatentClips(tmp_path / "whole" / "train").hash
    )


def test_cached_and_negative_prompts(script: ModuleType, model: Path, tmp_path: Path) -> None:
    clips = write_clip_directory(tmp_path / "clips")

    def made(name: str, **more: str) -> LatentClips:
        script.main(clips=clips, model=model, out=tmp_path / name, batch=2, device="cpu", **more)
        return LatentClips(tmp_path / name / "train")

    cache = tmp_path / "cache"
    first = made("a", text_cache=str(cache))
    # unless told otherwise, as every tool that encodes
    assert first.prompts.negative_prompt == WAN_NEGATIVE_PROMPT
    # four captions, the empty prompt, Wan's negative one
    assert len(list(cache.rglob("*.safetensors"))) == 6
    wanted = load_text_encoder(model).encode([WAN_NEGATIVE_PROMPT]).text_BLE
    torch.testing.assert_close(first.prompts.negative.text_BLE, wanted, rtol=1e-3, atol=1e-4)
    plain = made("b", negative_prompt="")
    torch.testing.assert_close(
        first.batch([0]).text.text_BLE, plain.batch([0]).text.text_BLE, rtol=1e-3, atol=1e-4
    )
    assert plain.prompts.negative is plain.prompts.null and plain.prompts.negative_prompt == ""
    with pytest.raises(UserError, match=r"made from other inputs \(negative_prompt differ\)"):
        made("b", negative_prompt="wan")


def test_other_inputs_are_refused(script: ModuleType, model: Path, tmp_path: Path) -> None:
    clips = write_clip_directory(tmp_path / "clips")
    encode(script, clips, model, tmp_path / "out")
    other = tmp_path / "other"
    shutil.copytree(model, other)
    write_reference(other, TextEncoderConfig(path="words", max_length=8, hidden_layer=1))
    with pytest.raises(UserError, match=r"made from other inputs \(text_config differ\)"):
        encode(script, clips, other, tmp_path / "out")
    leak = write_clip_directory(tmp_path / "leak", held_out="left turn")
    with pytest.raises(UserError, match="held-out caption 'left turn' is a training caption"):
        encode(script, leak, model, tmp_path / "leaked")
