"""encode_latents.py end to end on your own videos: a tiny VAE in Wan's layout and a tiny text
encoder by reference."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import raw_videos
import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from scd_sf.data.clips import ClipSet, write_video
from scd_sf.data.latents import LatentClips
from scd_sf.data.prompts import PromptSet
from scd_sf.files import locked
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


def videos(root: Path) -> Path:
    """Three training clips (two share a caption) and one for validation; returns the captions
    file."""
    root.mkdir()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, (caption, split) in enumerate(
        [("left turn", "train"), ("right turn", "train"), ("left turn", "train"), ("right", "val")]
    ):
        pixels = torch.randint(0, 256, (FRAMES, 3, SIZE, SIZE), generator=generator).to(torch.uint8)
        write_video(root / f"{number}.mp4", pixels, 16)
        rows.append(
            {"file": f"{number}.mp4", "caption": caption, "split": split, "motion": caption}
        )
        if caption == "left turn":
            rows[-1]["held_out_caption"] = "turn left"
    captions = root / "captions.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return captions


def encode(
    script: ModuleType, clips: Path, model: Path, out: Path, captions: Path | None = None
) -> None:
    script.main(
        clips=clips,
        model=model,
        out=out,
        batch=2,
        captions=captions,
        device="cpu",
        store_latents="float32",
    )


def test_own_videos_to_latents(
    script: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = videos(tmp_path / "clips")
    encode(script, tmp_path / "clips", model, tmp_path / "out", captions)
    data = LatentClips(tmp_path / "out" / "train", expected=VideoShape(2, 2, 2, 2))
    clips = ClipSet(tmp_path / "clips", "train")
    pixels = clips.videos(range(3)).float() / 127.5 - 1
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
    encode(script, tmp_path / "clips", model, tmp_path / "out", captions)
    assert capsys.readouterr().out.count("already complete") == 2


def test_an_interrupted_run_goes_on(script: ModuleType, model: Path, tmp_path: Path) -> None:
    captions = videos(tmp_path / "clips")
    encode(script, tmp_path / "clips", model, tmp_path / "whole", captions)
    broken = tmp_path / "clips" / "2.mp4"
    good = broken.read_bytes()
    broken.write_bytes(bytes(len(good)))
    with pytest.raises(UserError, match=r"2\.mp4: cannot be decoded"):
        encode(script, tmp_path / "clips", model, tmp_path / "out")
    broken.write_bytes(good)
    with pytest.raises(UserError, match="encoding was not finished"):
        LatentClips(tmp_path / "out" / "train")
    encode(script, tmp_path / "clips", model, tmp_path / "out")
    assert (
        LatentClips(tmp_path / "out" / "train").hash
        == LatentClips(tmp_path / "whole" / "train").hash
    )


def test_cached_and_negative_prompts(script: ModuleType, model: Path, tmp_path: Path) -> None:
    videos(tmp_path / "clips")
    script.index_folder(tmp_path / "clips", tmp_path / "clips" / "captions.jsonl", 16)

    def made(name: str, **more: str) -> LatentClips:
        script.main(
            clips=tmp_path / "clips",
            model=model,
            out=tmp_path / name,
            batch=2,
            device="cpu",
            **more,
        )
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
    captions = videos(tmp_path / "clips")
    encode(script, tmp_path / "clips", model, tmp_path / "out", captions)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    write_reference(other, TextEncoderConfig(path="words", max_length=8, hidden_layer=1))
    with pytest.raises(UserError, match=r"made from other inputs \(text_config differ\)"):
        encode(script, tmp_path / "clips", other, tmp_path / "out")


def _no_file(rows: list[dict[str, object]]) -> None:
    rows[1]["file"] = "none.mp4"


def _outside(rows: list[dict[str, object]]) -> None:
    rows[1]["file"] = "../x.mp4"


def _twice(rows: list[dict[str, object]]) -> None:
    rows[1]["file"] = "0.mp4"


def _unknown(rows: list[dict[str, object]]) -> None:
    rows[1]["captoin"] = "x"


def _empty(rows: list[dict[str, object]]) -> None:
    rows[1]["caption"] = " "


def _leak(rows: list[dict[str, object]]) -> None:
    rows[1]["held_out_caption"] = "left turn"


def _split(rows: list[dict[str, object]]) -> None:
    rows[1]["split"] = "../../train"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_file, "none.mp4: no such file"),
        (_outside, "which leaves"),
        (_twice, "'file' 0.mp4 is listed twice"),
        (_unknown, "captions.jsonl:2: unknown field 'captoin'"),
        (_empty, "captions.jsonl:2: 'caption' must be a text that is not empty"),
        (_leak, "held-out caption 'left turn' is a training caption"),
        (_split, "split is '../../train', which leaves"),
    ],
)
def test_bad_captions(
    script: ModuleType,
    model: Path,
    tmp_path: Path,
    change: Callable[[list[dict[str, object]]], None],
    message: str,
) -> None:
    captions = videos(tmp_path / "clips")
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    change(rows)
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as caught:
        encode(script, tmp_path / "clips", model, tmp_path / "out", captions)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_of_others_is_overwritten(script: ModuleType, tmp_path: Path) -> None:
    """A manifest.json of another program, the captions file as clips.jsonl, an index of other
    clips."""
    captions = videos(tmp_path / "clips")
    manifest, index = tmp_path / "clips" / "manifest.json", tmp_path / "clips" / "clips.jsonl"
    manifest.write_text('{"name": "mine"}')
    with pytest.raises(
        UserError, match=r"manifest\.json: is not of this command; nothing of others is overwritten"
    ):
        script.index_folder(tmp_path / "clips", captions, 16)
    assert manifest.read_text() == '{"name": "mine"}' and not index.exists()
    manifest.unlink()
    captions.rename(index)
    text = index.read_text()
    with pytest.raises(UserError, match=r"clips\.jsonl: exists with other contents"):
        script.index_folder(tmp_path / "clips", index, 16)
    assert index.read_text() == text and not manifest.exists()
    index.rename(captions)
    script.index_folder(tmp_path / "clips", captions, 16)
    assert ClipSet(tmp_path / "clips").captioned and ClipSet(tmp_path / "clips").fps == 16
    made = json.loads(manifest.read_text()) | {"captioned": False, "request": {}}
    manifest.write_text(json.dumps(made))
    index.unlink()
    with pytest.raises(UserError, match="exists with other contents"):
        script.index_folder(tmp_path / "clips", captions, 16)
    assert json.loads(manifest.read_text()) == made


def test_phones_clips_and_another_rate(script: ModuleType, model: Path, tmp_path: Path) -> None:
    """9 frames of 32 per second, stored lying, are 5 of 16, upright; at another rate the output is
    another."""
    root = tmp_path / "clips"
    root.mkdir()
    raw_videos.write(root / "a.mp4", [raw_videos.corners()] * 9, rate=32, matrix=(0, 1, -1, 0))
    captions = tmp_path / "captions.jsonl"
    captions.write_text('{"file": "a.mp4", "caption": "left\u2028turn"}\n')
    encode(script, root, model, tmp_path / "out", captions)
    clips = ClipSet(root)
    assert (clips.frames, clips.height, clips.width) == (5, 48, 32) and clips[
        0
    ].caption == "left\u2028turn"
    pixels = clips.videos([0]).float() / 127.5 - 1
    assert pixels[0, 0, :, 4, 28].tolist() == pytest.approx([1, -1, -1], abs=0.1), (
        "red: upper right"
    )
    data = LatentClips(tmp_path / "out" / "train")
    torch.testing.assert_close(
        data.latents([0]), load_vae(model).encode(pixels), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(UserError, match=r"--fps differ\); delete it and manifest.json"):
        script.index_folder(root, captions, 24)
    (root / "clips.jsonl").unlink()
    with pytest.raises(UserError, match=r"made from other inputs \(clips_sha256, fps"):
        script.main(
            clips=root, model=model, out=tmp_path / "out", captions=captions, fps=32, device="cpu"
        )
    with (
        pytest.raises(UserError, match=r"is at work in it"),
        locked(tmp_path / "out" / "train", "another job"),
    ):
        encode(script, root, model, tmp_path / "out")


def test_many_captions_are_read_in_linear_time(script: ModuleType, tmp_path: Path) -> None:
    """40,000 lines took 23 s where each looked through all."""
    path = tmp_path / "captions.jsonl"
    path.write_text(
        "".join(json.dumps({"file": f"{n}.mp4", "caption": "x"}) + "\n" for n in range(40_000))
    )
    began = time.process_time()
    assert len(script.read_captions(path)) == 40_000
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{",
        '{"file": 1, "caption": "x"}',
        '{"file": "0.mp4", "caption": "\\ud800"}',
        '{"file": "0.mp4\\u0000", "caption": "x"}',
        '{"file": "' + "a" * 300 + '", "caption": "x"}',
        '{"file": "0.mp4", "caption": "x", "split": ""}',
        '{"file": "0.mp4", "caption": ' + "[" * 10**5,
        '{"file": "0.mp4", "caption": null}',
    ],
)
def test_hostile_captions(script: ModuleType, tmp_path: Path, line: str) -> None:
    videos(tmp_path / "clips")
    path = tmp_path / "captions.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=r"captions\.jsonl:1") as caught:
        script.index_folder(tmp_path / "clips", path, 16)
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()
