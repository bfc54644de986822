"""Encoded prompts on disk: equal to the encoder's, keyed by all that decides them, damaged entries
made again."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from safetensors.torch import load_file, save_file

from scd_sf.files import part_of
from scd_sf.models.wan import text_cache
from scd_sf.models.wan.text import TextEncoderConfig, TransformersTextEncoder, load_text_encoder
from scd_sf.models.wan.text_cache import CachedTextEncoder, open_text_encoder
from scd_sf.types import UserError

PROMPTS = ["left in meadow", "still", ""]
WIDTH = tiny_run.WAN.text_dim


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tiny_run.write_text_encoder(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for every time an encoder is loaded."""
    made: list[object] = []

    def counted(config: TextEncoderConfig, **how: object) -> TransformersTextEncoder:
        made.append(config)
        return load_text_encoder(config, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(text_cache, "load_text_encoder", counted)
    return made


def entries(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


def test_known_prompts_need_no_encoder_and_are_bit_equal(
    model: Path, tmp_path: Path, loads: list[object]
) -> None:
    cache = tmp_path / "cache"
    first = CachedTextEncoder(model, cache)
    assert (first.width, first.max_length, loads) == (WIDTH, 512, [])
    text = first.encode([*PROMPTS, f"  {PROMPTS[0]} "]).text_BLE
    assert len(loads) == 1 and len(entries(cache)) == 3  # cleaned alike, kept once
    torch.testing.assert_close(
        text[:3], load_text_encoder(model).encode(PROMPTS).text_BLE, rtol=1e-5, atol=1e-6
    )
    assert torch.equal(text[0], text[3])
    assert sorted(load_file(file)["states"].shape for file in entries(cache)) == [
        (1, WIDTH),
        (2, WIDTH),
        (4, WIDTH),
    ]
    again = CachedTextEncoder(model, cache).encode(PROMPTS[::-1]).text_BLE
    assert len(loads) == 1 and torch.equal(again, text[:3].flip(0))
    assert CachedTextEncoder(model, cache).states([]) == []


def test_states_are_kept_in_bf16_where_that_loses_nothing(
    model: Path, tmp_path: Path, loads: list[object]
) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        cache = tmp_path / str(dtype)
        text = CachedTextEncoder(model, cache, dtype=dtype).encode(PROMPTS).text_BLE
        assert {load_file(file)["states"].dtype for file in entries(cache)} == {dtype}
        again = CachedTextEncoder(model, cache, dtype=dtype).encode(PROMPTS).text_BLE
        assert again.dtype == torch.float32 and torch.equal(again, text)
    assert len(loads) == 2


def retrain(model: Path) -> None:
    file = model / "text_encoder" / "model.safetensors"
    before, tensors = file.stat(), load_file(file)
    tensors["encoder.final_layer_norm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p leaves it
    assert file.stat().st_size == before.st_size


def reword(model: Path) -> None:
    file = model / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["left"], words["right"] = words["right"], words["left"]
    file.write_text(json.dumps(content))


def reconfigure(model: Path) -> None:
    file = model / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_norm_epsilon": 1.0}))


@pytest.mark.parametrize("change", [retrain, reword, reconfigure])
def test_another_encoder_in_the_same_place_is_another_one(
    change: Callable[[Path], None], model: Path, tmp_path: Path
) -> None:
    old = CachedTextEncoder(model, tmp_path / "cache").encode(PROMPTS).text_BLE
    change(model)
    new = CachedTextEncoder(model, tmp_path / "cache").encode(PROMPTS).text_BLE
    torch.testing.assert_close(
        new, load_text_encoder(model).encode(PROMPTS).text_BLE, rtol=1e-5, atol=1e-6
    )
    assert not torch.equal(new, old)


def test_settings_and_computing_type_are_part_of_the_key_and_the_place_is_not(
    model: Path, tmp_path: Path, loads: list[object]
) -> None:
    cache, config = tmp_path / "cache", TextEncoderConfig(path=str(model))
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"hidden_layer": 0},
        {"scale": 2.0},
        {"clean": False},
        {"max_length": 4},
    )
    for change in changes:
        CachedTextEncoder(replace(config, **change), cache).states(PROMPTS[:1])
    CachedTextEncoder(config, cache, dtype=torch.bfloat16).states(PROMPTS[:1])
    assert len(loads) == len(entries(cache)) == 6
    model.rename(tmp_path / "moved")
    CachedTextEncoder(tmp_path / "moved", cache).states(PROMPTS[:1])
    assert len(loads) == 6


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def swap(file: Path) -> None:
    """A whole entry under another's name."""
    other = next(path for path in entries(file.parents[1]) if path != file)
    file.write_bytes(other.read_bytes())


def foreign(file: Path) -> None:
    save_file({"states": torch.zeros(4, WIDTH, dtype=torch.bfloat16)}, file)


@pytest.mark.parametrize("damage", [shorten, flip, swap, foreign])
def test_damaged_entries_are_said_and_made_again(
    damage: Callable[[Path], None], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    good = CachedTextEncoder(model, cache).encode(PROMPTS).text_BLE
    file = max(entries(cache), key=lambda entry: entry.stat().st_size)
    whole = file.read_bytes()
    damage(file)
    assert torch.equal(CachedTextEncoder(model, cache).encode(PROMPTS).text_BLE, good)
    said = capsys.readouterr().out
    assert f"{file}: damaged entry of the text cache" in said and said.count("\n") == 1
    assert file.read_bytes() == whole


def test_damaged_notes_about_weights_are_not_believed(
    model: Path, tmp_path: Path, loads: list[object]
) -> None:
    cache = tmp_path / "cache"
    CachedTextEncoder(model, cache).states(PROMPTS)
    for note in (cache / "weights").iterdir():
        note.write_bytes(b"" if note.stat().st_ino % 2 else b"\xff")
    CachedTextEncoder(model, cache).states(PROMPTS)
    assert len(loads) == 1


def test_writers_at_once_leave_whole_entries_only(model: Path, tmp_path: Path) -> None:
    """What a killed process left of one goes."""
    cache = tmp_path / "cache"
    (cache / "weights").mkdir(parents=True)
    dead = part_of(cache / "weights" / "x")
    dead.with_name(dead.name.replace(f"-{os.getpid()}-", "-999999999-")).write_text("half")
    encoders = [CachedTextEncoder(model, cache) for _ in range(4)]
    workers = [threading.Thread(target=encoder.states, args=(PROMPTS,)) for encoder in encoders]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(entries(cache)) == 3 and not list(cache.rglob(".part-*"))


def test_a_folder_that_cannot_be_written_is_said_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    text = CachedTextEncoder(model, tmp_path / "file" / "cache").encode(PROMPTS).text_BLE
    torch.testing.assert_close(
        text, load_text_encoder(model).encode(PROMPTS).text_BLE, rtol=1e-5, atol=1e-6
    )
    said = capsys.readouterr().out
    assert (
        "cannot be written (Not a directory); new prompts are not kept" in said
        and said.count("\n") == 1
    )


def test_where_it_is(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert isinstance(open_text_encoder(model, "off"), TransformersTextEncoder)
    for given, wanted in (
        ("", tmp_path / "xdg/scd_sf/text"),
        (str(tmp_path / "mine"), tmp_path / "mine"),
    ):
        encoder = open_text_encoder(model, given)
        assert isinstance(encoder, CachedTextEncoder) and encoder.folder == wanted


def test_bad_encoders_are_refused_before_the_first_prompt(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hidden_layer is 9"):
        CachedTextEncoder(TextEncoderConfig(path=str(model), hidden_layer=9), tmp_path / "cache")
    (model / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        CachedTextEncoder(model, tmp_path / "cache")


def test_a_cache_with_a_budget_keeps_what_is_new(
    model: Path, tmp_path: Path, loads: list[object]
) -> None:
    cache = tmp_path / "cache"
    prompts = [f"left in meadow {'still ' * n}" for n in range(12)]
    plain = CachedTextEncoder(model, tmp_path / "plain").encode(prompts).text_BLE
    limit = 4 * max(entry.stat().st_size for entry in entries(tmp_path / "plain"))
    bounded = CachedTextEncoder(model, cache, limit=limit)
    assert torch.equal(bounded.encode(prompts).text_BLE, plain)
    assert 0 < sum(entry.stat().st_size for entry in entries(cache)) <= limit
    assert torch.equal(bounded.encode(prompts).text_BLE, plain) and len(loads) == 2
    CachedTextEncoder(model, cache, limit=limit).states(prompts[-1:])
    assert len(loads) == 2  # the newest is still there
