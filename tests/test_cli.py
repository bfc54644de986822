"""The console script: version, and what is inside a checkpoint."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from scd_sf import __version__, cli
from scd_sf.checkpoint import Checkpoints
from scd_sf.generation.pipeline import SCDWanPipeline
from scd_sf.models.wan.names import diffusers_to_original, to_diffusers
from scd_sf.types import UserError, device_of


def run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of ``scd ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["scd", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def a_checkpoint(root: Path) -> Path:
    tensors = {"blocks.0.weight": torch.zeros(2, 3), "head.bias": torch.zeros(5)}
    return Checkpoints(root).write(
        7, {"model.safetensors": tensors}, "lr: 0.1\n", {"stage": "2", "step": 7}
    )


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], monkeypatch, capsys) == (0, f"scd-sf {__version__}\n", "")


def test_a_device_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("") == device_of("cpu") == torch.device("cpu")
    for name, words in (
        ("cuda", "no such CUDA device"),
        ("cuda:1", "cpu$"),
        ("gpu", "unknown"),
        ("meta", "nothing here"),
    ):
        with pytest.raises(UserError, match=f"device is '{name}'.*{words}"):
            device_of(name)
    with pytest.raises(UserError, match="no such CUDA device is visible; use cpu"):
        SCDWanPipeline.from_pretrained("anything", device="cuda")


def test_inspect_names_origin_and_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_checkpoint(tmp_path)
    code, out, _ = run(["inspect", str(path), "--tensors"], monkeypatch, capsys)
    assert code == 0
    assert "stage: 2" in out
    assert "model.safetensors: 2 tensors, 11 numbers, F32" in out
    assert "blocks.0.weight  F32 [2, 3]" in out
    assert run(["inspect", str(tmp_path)], monkeypatch, capsys)[0] == 0


def test_inspect_refuses_a_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_checkpoint(tmp_path)
    (path / "model.safetensors").write_bytes(b"short")
    code, _, err = run(["inspect", str(path)], monkeypatch, capsys)
    assert code == 2
    assert err.startswith("error: ")
    assert "model.safetensors" in err
    assert err.count("\n") == 1


def test_inspect_refuses_weights_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a checkpoint whose hashes agree, and in a file of Wan's weights."""
    broken = torch.tensor([1.0, float("inf")])
    Checkpoints(tmp_path / "run").write(
        7, {"model.safetensors": {"head.bias": broken}}, "lr: 0.1\n", {"stage": "2"}
    )
    state = {
        f"model.{diffusers_to_original(to_diffusers(name))}": value
        for name, value in tiny.wan(1, torch.float32).state_dict().items()
    }
    state["model.head.head.bias"][0] = float("nan")
    save_file(state, tmp_path / "wan.safetensors")
    for place, words in (
        ("run", "'head.bias' holds NaN"),
        ("wan.safetensors", "'model.head.head.bias' holds NaN"),
    ):
        code, _, err = run(["inspect", str(tmp_path / place)], monkeypatch, capsys)
        assert code == 2 and words in err and err.count("\n") == 1


def test_inspect_refuses_a_missing_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(["inspect", str(tmp_path / "nowhere")], monkeypatch, capsys)
    assert code == 2
    assert "nowhere" in err


def test_bench_takes_no_file_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is measured: a file that is not its own, and a folder that is not there."""
    (tmp_path / "mine.json").write_text("my notes")
    for out, words in (("mine.json", "mine.json"), ("none/b.json", "there is no such folder")):
        code, _, err = run(
            ["bench", "checkpoints=[x]", f"out={tmp_path / out}"], monkeypatch, capsys
        )
        assert code == 2 and words in err and "Traceback" not in err
    assert (tmp_path / "mine.json").read_text() == "my notes"


def test_escapes_of_others_do_not_reach_the_screen(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In names of tensors, provenance, ``latest``, folders and errors; rich markup is no markup,
    newlines no lines."""
    evil = "\x1b[31m\x9b2J\u202e[bold]x[/bold]\ny"
    root = tmp_path / f"run{evil}"
    tensors = {"model.safetensors": {f"weight {evil}": torch.zeros(2)}}
    Checkpoints(root).write(
        7, tensors, "lr: 0.1\n", {"stage": evil, evil: [evil], "parents": {"a": evil}}
    )
    (root / "latest").write_text(f"step{evil}")
    code, out, err = run(["inspect", str(root), "--tensors"], monkeypatch, capsys)
    assert code == 0 and "[bold]x[/bold]" in out and logging.lastResort is not None
    warned = "\n".join(logging.lastResort.format(record) for record in caplog.records)
    assert "latest" in warned
    missing = run(["inspect", str(tmp_path / evil)], monkeypatch, capsys)
    assert missing[0] == 2 and missing[2].count("\n") == 1
    for text in (out, err, missing[2], warned):
        assert not set(text) & set("\x1b\x9b\u202e") and not any(
            line.startswith("y") for line in text.splitlines()
        )
