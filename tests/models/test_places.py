"""Where exports, conversions and transplants write: beside their place, never inside what they
read; what is copied."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors.torch import load_file, save_file

from scd_sf.checkpoint import Checkpoints, provenance, verify
from scd_sf.config import to_yaml
from scd_sf.generation.pipeline import export_pipeline
from scd_sf.models.build import (
    CheckpointConfig,
    ModelConfig,
    SamplerConfig,
    base_of,
    describe_checkpoint,
)
from scd_sf.models.export import convert_wan, export_weights
from scd_sf.models.scd.transplant import TransplantConfig, run_transplant
from scd_sf.models.wan.components import copy_components
from scd_sf.models.wan.text import REFERENCE, TextEncoderConfig, text_config, write_reference
from scd_sf.models.wan.weights import save_wan, shard_size
from scd_sf.types import UserError

RENOISE = SamplerConfig("renoise", 4, 5.0)
PARTS = ["text_encoder", "tokenizer", "transformer", "vae"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny Wan in ``wan`` and a causal student of it in ``run``."""
    root = tmp_path_factory.mktemp("places")
    tiny_run.write_wan(root / "wan")
    config = CheckpointConfig(
        ModelConfig("causal", 1, tiny_run.WAN), RENOISE, base=str(root / "wan")
    )
    torch.manual_seed(0)
    states = {"model": tiny_wan_state()}
    record = provenance(
        stage="stage3_self_forcing", step=600, seed=0, extra={"video": {"frames": 9}}
    )
    Checkpoints(root / "run").write(600, states, to_yaml(config), record)
    return root


def tiny_wan_state() -> dict[str, torch.Tensor]:
    from scd_sf.models.wan.transformer import Wan

    return Wan(tiny_run.WAN).state_dict()


def test_nothing_is_written_inside_what_is_read(world: Path, tmp_path: Path) -> None:
    step = world / "run" / "step_00000600"
    (tmp_path / "link").symlink_to(step)
    (tmp_path / "base").symlink_to(world / "wan")
    tried: list[Callable[[], object]] = [
        lambda: export_weights(world / "run", step / "x.safetensors", "single"),
        lambda: export_weights(world / "run", tmp_path / "link" / "deep" / "x", "diffusers"),
        lambda: export_pipeline(world / "run", step / "x"),
        lambda: export_pipeline(world / "run", world / "wan" / "vae" / "out"),
        lambda: export_pipeline(world / "run", tmp_path / "base" / "out"),
        lambda: convert_wan(world / "wan", world / "wan" / "transformer" / "out", "original"),
        lambda: convert_wan(tmp_path / "base", world / "wan" / "out", "original"),
        lambda: run_transplant(
            TransplantConfig(str(world / "wan"), str(tmp_path / "base" / "out"), family="causal")
        ),
    ]
    for attempt in tried:
        with pytest.raises(UserError, match=r"lies in .*choose another place"):
            attempt()
    verify(step)
    assert sorted(path.name for path in (world / "wan").iterdir()) == [
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    ]


def test_a_failure_leaves_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    commands: dict[str, Callable[[], object]] = {
        "scd_sf.generation.pipeline.largest": lambda: export_pipeline(
            world / "run", tmp_path / "pipeline"
        ),
        "scd_sf.models.export.largest": lambda: convert_wan(
            world / "wan", tmp_path / "converted", "original"
        ),
        "scd_sf.models.scd.transplant.write_text": lambda: run_transplant(
            TransplantConfig(str(world / "wan"), str(tmp_path / "stage1"), family="causal")
        ),
    }
    for point, command in commands.items():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(
                point if "pipeline" not in point else "scd_sf.generation.pipeline.write_json", stop
            )
            command()
        assert not list(tmp_path.iterdir()), point
    for command in commands.values():
        command()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "pipeline", "stage1"]


KILLED = """
import os, sys
from pathlib import Path
from scd_sf import files
from scd_sf.models.export import convert_wan, export_weights
from scd_sf.models.scd.transplant import TransplantConfig, run_transplant
from scd_sf.generation.pipeline import export_pipeline

root, out = Path(sys.argv[1]), Path(sys.argv[2])
COMMANDS = {
    "pipeline": lambda place: export_pipeline(root / "run", place),
    "single": lambda place: export_weights(root / "run", place / "x.safetensors", "single"),
    "converted": lambda place: convert_wan(root / "wan", place, "original", max_shard=4000),
    "stage1": lambda place: run_transplant(TransplantConfig(str(root / "wan"), str(place), family="causal")),
}

def killed_at(call):
    '''The process ends without any cleaning up at its call-th flush to the disk.'''
    flush, count = os.fsync, 0
    def fsync(handle):
        nonlocal count
        count += 1
        if count == call:
            os._exit(9)
        flush(handle)
    os.fsync = fsync

for name, command in COMMANDS.items():
    for call in (1, 0) if name == "single" else (1, 2, 4, 9, 0):  # a file's second flush is that of its place
        if (child := os.fork()) == 0:
            try:
                killed_at(call)
                command(out / name)
            except files.UserError as error:
                print(name, call, error, flush=True)
                os._exit(2)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(name, call, code, flush=True)
        if code == 0:
            break
"""


def test_killed_and_run_again(world: Path, tmp_path: Path) -> None:
    """A kill at any flush to the disk: the same command then works, and what the dead process made
    is gone."""
    script = tmp_path / "kill.py"
    script.write_text(KILLED)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, str(script), str(world), str(out)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = done.stdout.splitlines()
    ends = {
        name: [line.split()[-1] for line in lines if line.startswith(f"{name} ")]
        for name in ("pipeline", "single", "converted", "stage1")
    }
    assert all(
        codes[0] == "9" and codes[-1] == "0" and set(codes) == {"9", "0"} for codes in ends.values()
    ), done
    assert not list(out.rglob(".part-*")) and not list(out.rglob("*.tmp"))
    assert sorted(path.name for path in out.iterdir()) == sorted(ends)


def test_a_second_transplant_does_nothing(world: Path, tmp_path: Path) -> None:
    cfg = TransplantConfig(str(world / "wan"), str(tmp_path / "stage1"), family="causal")
    run_transplant(cfg)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert "finished before" in run_transplant(cfg)
    other = shutil.copytree(world / "wan", tmp_path / "other")
    for changed, message in (
        (
            replace(cfg, seed=4),
            "seed is 0 there but 4 now; nothing is overwritten: choose another out=",
        ),
        (replace(cfg, base=str(other)), f"base is '{world}/wan' there but '{other}' now"),
        (replace(cfg, sampler=SamplerConfig(steps=9)), "sampler.steps is 50 there but 9 now"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            run_transplant(changed)
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_only_named_files_are_copied_and_no_link_leaves(world: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    copy_components(world / "wan", make(base))
    secret = tmp_path / "id_rsa"
    secret.write_text("PRIVATE KEY")
    for name in (
        "vae/evil.py",
        "vae/model.pt",
        "text_encoder/notes.txt",
        "tokenizer/.hidden",
        "vae/diffusion.ckpt",
    ):
        (base / name).write_text("x")
    (base / "vae" / "readme.txt").symlink_to(secret)
    copy_components(base, make(tmp_path / "out"))
    names = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")
    )
    assert names == [
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    link = base / "tokenizer" / "added_tokens.json"
    link.symlink_to(secret)
    with pytest.raises(
        UserError, match=r"added_tokens\.json: leads to .*id_rsa, which is no file of"
    ):
        copy_components(base, make(tmp_path / "second"))
    link.unlink()
    (base / "vae").rename(tmp_path / "elsewhere")
    (base / "vae").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="which is no file of"):
        copy_components(base, make(tmp_path / "third"))


def test_links_of_a_hub_cache_are_the_models_own(world: Path, tmp_path: Path) -> None:
    model = tmp_path / "models--a--b"
    snapshot = model / "snapshots" / "0123"
    for number, file in enumerate(sorted((world / "wan").rglob("*.*"))):
        place = snapshot / file.relative_to(world / "wan")
        place.parent.mkdir(parents=True, exist_ok=True)
        (model / "blobs").mkdir(exist_ok=True)
        (model / "blobs" / str(number)).write_bytes(file.read_bytes())
        place.symlink_to(Path("../../../blobs") / str(number))
    copy_components(snapshot, make(tmp_path / "out"))
    for file in (tmp_path / "out").rglob("*.*"):
        assert not file.is_symlink()
        assert (
            file.read_bytes() == (world / "wan" / file.relative_to(tmp_path / "out")).read_bytes()
        )


def test_a_reference_stays_one(world: Path, tmp_path: Path) -> None:
    """A relative path in it is written out, for it is relative to the folder it came from."""
    base = tmp_path / "base"
    copy_components(world / "wan", make(base))
    (base / "words").mkdir()
    (base / "text_encoder").rename(base / "words" / "text_encoder")
    (base / "tokenizer").rename(base / "words" / "tokenizer")
    write_reference(base, TextEncoderConfig(path="words", max_length=8))
    copy_components(base, make(tmp_path / "out"))
    assert (tmp_path / "out" / REFERENCE).is_file() and not (tmp_path / "out" / "words").exists()
    assert text_config(tmp_path / "out") == TextEncoderConfig(
        path=str(base / "words"), max_length=8
    )


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_broken_weights_are_not_passed_on(world: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    copy_components(world / "wan", make(base))
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"{re.escape(str(file))}: tensor .* holds NaN or infinity"):
        export_pipeline(world / "run", tmp_path / "out", base=str(base))
    state = tiny_wan_state()
    state["trunk.blocks.1.ffn.net.2.weight"][0, 0] = float("inf")
    config = CheckpointConfig(
        ModelConfig("causal", 1, tiny_run.WAN), RENOISE, base=str(world / "wan")
    )
    Checkpoints(tmp_path / "run").write(
        1, {"model": state}, to_yaml(config), provenance(stage="x", step=1, seed=0)
    )
    save_wan(state, tiny_run.WAN, tmp_path / "wan", torch.float32)
    for attempt in (
        lambda: export_weights(tmp_path / "run", tmp_path / "x.safetensors", "single"),
        lambda: export_weights(tmp_path / "run", tmp_path / "x", "diffusers"),
        lambda: export_pipeline(tmp_path / "run", tmp_path / "x"),
        lambda: convert_wan(tmp_path / "wan", tmp_path / "x", "original"),
        lambda: run_transplant(
            TransplantConfig(str(tmp_path / "wan"), str(tmp_path / "x"), family="causal")
        ),
    ):
        with pytest.raises(
            UserError, match=r"blocks\.1\.ffn\.net\.2\.weight' holds NaN or infinity"
        ):
            attempt()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run", "wan"]


def test_the_base_is_found_from_every_folder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    run_transplant(TransplantConfig("wan", str(tmp_path / "stage1"), family="causal"))
    assert describe_checkpoint(tmp_path / "stage1")[0].base == str(world / "wan")
    relative = CheckpointConfig(ModelConfig("causal", 1, tiny_run.WAN), base="wan")
    Checkpoints(tmp_path / "old").write(
        1, {"model": tiny_wan_state()}, to_yaml(relative), {"stage": "x"}
    )
    export_weights(tmp_path / "old", tmp_path / "x.safetensors", "single")
    assert describe_checkpoint(tmp_path / "x.safetensors")[0].base == str(world / "wan")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match=r"old: its base is wan \(seen from .*\), and no such .*; set base= to the Wan",
    ):
        export_pipeline(tmp_path / "old", tmp_path / "out")
    with pytest.raises(UserError, match="does not name its Wan directory; set base="):
        base_of("", "", tmp_path)
    export_pipeline(tmp_path / "old", tmp_path / "out", base=str(world / "wan"))


@pytest.mark.parametrize(
    "text", ["0", "", "-1", "10 apples", "GB", "1e9", "nan", "0.0001B", 0, -5, "9" * 400]
)
def test_sizes_that_are_none(text: str | int) -> None:
    with pytest.raises(UserError, match="max_shard is"):
        shard_size(text)
    assert (shard_size("10GB"), shard_size("1.5 kb"), shard_size(7), shard_size("7")) == (
        10**10,
        1500,
        7,
        7,
    )


def test_descriptions_of_others(world: Path, tmp_path: Path) -> None:
    """Checkpoints whose config or provenance claims what cannot be."""
    config = CheckpointConfig(ModelConfig("causal", 1, tiny_run.WAN), RENOISE)
    for fields, words in (
        ("num_layers: 4000", "describes more than the .* tensors of the weights file"),
        ("ffn_dim: 1000000", "does not fit its config.yaml"),
        ("ffn_dim: 1000000000000000000", r"config\.yaml"),
    ):
        key = fields.split(":")[0]
        run = tmp_path / key / str(len(fields))
        text = re.sub(rf"\b{key}: \d+", fields, to_yaml(config), count=1)
        Checkpoints(run).write(1, {"model": tiny_wan_state()}, text, {"stage": "x"})
        with pytest.raises(UserError, match=words):
            export_weights(run, tmp_path / "x.safetensors", "single")
    records: tuple[dict[str, object], ...] = (
        {"video": {"frames": "x"}},
        {"video": [9]},
        {"video": {"frames": -1}},
        {"stage": 3},
        {"parents": "x"},
    )
    for number, record in enumerate(records):
        run = tmp_path / f"record{number}"
        Checkpoints(run).write(1, {"model": tiny_wan_state()}, to_yaml(config), record)
        with pytest.raises(UserError, match=r"provenance\.json: Expected") as caught:
            describe_checkpoint(run)
        assert next(iter(record)) in str(caught.value)
    file = tmp_path / "single.safetensors"
    save_file(
        {"a": torch.zeros(1)},
        file,
        {"format": "scd_sf.model.1", "config": "", "provenance": "[" * 5000},
    )
    with pytest.raises(UserError, match=r"single\.safetensors: provenance: not JSON"):
        describe_checkpoint(file)
    save_file(
        {"a": torch.zeros(1)},
        file,
        {"format": "scd_sf.model.1", "config": "", "provenance": json.dumps([1])},
    )
    with pytest.raises(UserError, match=r"single\.safetensors: provenance: Expected `object`"):
        describe_checkpoint(file)
