"""Wan by its name on the hub, from a hub on this machine: what is downloaded, by whom, and what is
said where nothing can be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch
from diffusers import AutoencoderKLWan
from hub_server import COMMIT, Hub, hub_of

from scd_sf.checkpoint import find, read_provenance
from scd_sf.models.build import describe_checkpoint
from scd_sf.models.scd.transplant import TransplantConfig, run_transplant
from scd_sf.models.wan.hub import (
    FP32,
    PARTS,
    RELEASES,
    VAE_PARAMETERS,
    HubName,
    download_bytes,
    download_command,
    hub_name,
    pinned,
    wan_folder,
)
from scd_sf.models.wan.transformer import WAN_14B, Wan, WanConfig
from scd_sf.types import UserError

ROOT = Path(__file__).resolve().parents[3]
REPO = "someone/tiny-wan"
# prints what each question (a name and parts) is answered with, one a line
ASK = """
import json, sys
from scd_sf.checkpoint import find, read_provenance
from scd_sf.models.build import describe_checkpoint
from scd_sf.models.scd.transplant import TransplantConfig, run_transplant
from scd_sf.models.wan.hub import pinned, wan_folder
from scd_sf.types import UserError
for name, *parts in json.loads(sys.argv[1]):
    try:
        print(pinned(name), wan_folder(name, parts))
    except UserError as error:
        print(f"error: {error}")
"""


def start(home: Path, hub: Hub | None, *command: str) -> subprocess.Popen[str]:
    """A process with its own hub's cache; ``hub`` None: offline."""
    place = (
        {"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    )
    environment = {**os.environ, **place, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        cwd=home,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finished(process: subprocess.Popen[str]) -> tuple[list[str], str]:
    """Lines of its output, and what it said on stderr."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.splitlines(), err


def ask(home: Path, hub: Hub | None, *questions: tuple[str, ...]) -> subprocess.Popen[str]:
    return start(home, hub, "-c", ASK, json.dumps(questions))


def test_names_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that exists is a path; a mistyped folder is never looked for on the hub."""
    monkeypatch.chdir(tmp_path)
    small, large = RELEASES
    assert str(hub_name(small)) == f"{small}@{RELEASES[small].revision}" == pinned(small)
    assert str(hub_name(f"{large}@main")) == f"{large}@main"
    for text in (
        "",
        "a",
        "/a/b",
        "a/b/c",
        "../b",
        "models/Wan2.1-T2V-14B-Diffusers",
        "a/b@",
        "a/b@..",
        "a/b@-x",
        "a/b..c@main",
        "a--b/c@main",  # its folder in the cache would be that of a/b--c
        "a b/c",
    ):
        assert hub_name(text) is None and wan_folder(text) == Path(text)
    (tmp_path / small).mkdir(parents=True)
    assert hub_name(small) is None and wan_folder(small) == Path(small)
    assert pinned(small) == str(tmp_path / small)
    with pytest.raises(UserError, match=r"pickles.*use Wan-AI/Wan2.1-T2V-14B-Diffusers"):
        hub_name("Wan-AI/Wan2.1-T2V-14B")
    with pytest.raises(UserError, match=r"Wan-AI/Wan2.2-X: no such folder.*Wan-AI/Wan2.2-X@main"):
        hub_name("Wan-AI/Wan2.2-X")
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in module.parameters())
            for module in (Wan(WanConfig()), Wan(WAN_14B), AutoencoderKLWan())
        ]
    assert counts == [*(release.parameters for release in RELEASES.values()), VAE_PARAMETERS]
    assert download_bytes(small, ("transformer",)) == FP32 * counts[0]
    # the files that the hub lists of these commits: 28.93 and 80.41 GB
    for repo, listed in zip(RELEASES, (28_928_886_000, 80_406_933_703), strict=True):
        assert download_bytes(repo) == pytest.approx(listed, rel=1e-4)
    assert download_bytes(REPO) is None


def test_offline_says_what_to_do(tmp_path: Path) -> None:
    """The tests' own processes are offline. One line: what is missing, the command, the size."""
    name = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    with pytest.raises(UserError) as caught:
        wan_folder(name, ("transformer",))
    message, command = str(caught.value), download_command(HubName(name, RELEASES[name].revision))
    assert command == (
        f"hf download {name} --revision {RELEASES[name].revision} --local-dir Wan2.1-T2V-14B-Diffusers"
    )
    assert command in message and "HF_HUB_OFFLINE is set" in message and "\n" not in message
    assert "(80.4 GB, computed); of these 57.2 GB are needed here" in message
    with pytest.raises(UserError, match=r"--exclude '\*\.bin' '\*\.pt'"):
        wan_folder(f"{REPO}@main")


def test_a_reference_that_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cache or a hub says is no path."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    reference = tmp_path / "models--someone--else" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    for text in ("../../elsewhere", ""):
        reference.write_text(text)
        with pytest.raises(UserError, match=r"someone/else@main: is at '.*', which is no commit"):
            wan_folder("someone/else@main")


@pytest.mark.slow
def test_one_process_downloads_what_is_asked_for(tmp_path: Path) -> None:
    """Two processes at once, then one that needs more, then one without a network; pickles and code
    stay on the hub."""
    root, home = tiny_run.write_wan(tmp_path / "wan"), tmp_path / "home"
    home.mkdir()
    for stray in (
        "transformer/diffusion_pytorch_model.bin",
        "transformer/x.py",
        "vae/x.pt",
        "a.md",
    ):
        (root / stray).write_bytes(b"no")
    folder = home / "hub" / "models--someone--tiny-wan" / "snapshots" / COMMIT
    answer, main, commit = f"{REPO}@{COMMIT} {folder}", f"{REPO}@main", f"{REPO}@{COMMIT}"
    with hub_of(root, REPO, delay=0.3) as hub:
        both = [ask(home, hub, (main, "transformer")) for _ in range(2)]
        assert [finished(process)[0] for process in both] == [[answer], [answer]]
        expected = ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
        assert sorted(hub.downloads) == expected
        questions = ((commit, "transformer"), (main, *PARTS), ("someone/else@main", "vae"))
        lines, err = finished(ask(home, hub, *questions))
        assert lines[:2] == [answer, answer] and err.count("downloading transformer, vae") == 1, err
        assert {name.split("/")[0] for name in hub.downloads} == set(PARTS)
        assert len(hub.downloads) == len(set(hub.downloads)), "nothing is sent twice"
        assert not any(name.endswith((".bin", ".py", ".pt")) for name in hub.downloads)
        assert "someone/else@main: no such folder here, and the hub does not" in lines[2]
        assert "hf download someone/else --revision main" in lines[2] and len(lines) == 3
    lines, _ = finished(ask(home, None, (main, *PARTS)))
    assert lines == [answer], "offline, main is what it was"
    (folder / "vae" / "config.json").unlink()
    lines, _ = finished(ask(home, None, (main, "vae"), (commit, "transformer")))
    assert "not whole in the hub's cache" in lines[0] and lines[1] == answer


@pytest.mark.slow
def test_the_chain_begins_with_a_name(tmp_path: Path) -> None:
    """Stage 1 from a name: the student that the folder gives, and the commit in its checkpoint."""
    root, home = tiny_run.write_wan(tmp_path / "wan"), tmp_path / "home"
    home.mkdir()
    stage1 = str(ROOT / "recipes" / "stage1_transplant.py")
    run_transplant(TransplantConfig(str(root), str(tmp_path / "local"), family="causal"))
    with hub_of(root, REPO) as hub:
        out = f"out={tmp_path / 'named'}"
        finished(start(home, hub, stage1, f"base={REPO}@main", out, "family=causal"))
        assert {name.split("/")[0] for name in hub.downloads} == {"transformer"}
    named, local = (find(tmp_path / name) for name in ("named", "local"))
    assert (named / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()
    origins = [read_provenance(step) for step in (named, local)]
    assert [origin["base"] for origin in origins] == [f"{REPO}@{COMMIT}", str(root)]
    assert origins[0]["base_sha256"] == origins[1]["base_sha256"]
    assert describe_checkpoint(named)[0].base == f"{REPO}@{COMMIT}"
