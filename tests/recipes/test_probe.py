"""``scd probe`` on a chain's checkpoints and a Wan directory: files, one page, refusals before
anything runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import probed
import pytest
import tiny
import torch
from tiny_run import SHAPE, Chain
from typer.testing import CliRunner

from scd_sf.cli import app
from scd_sf.config import load_config
from scd_sf.data.frames import FrameClips, FrameSetInfo, FrameWriter
from scd_sf.files import locked
from scd_sf.models.blocks import BlocksConfig, set_blocks
from scd_sf.models.build import CheckpointConfig, ModelConfig, SamplerConfig, Scd, write_single
from scd_sf.models.scd.config import ScdConfig
from scd_sf.probes.paired import FlowLosses
from scd_sf.probes.report import write_probe_report
from scd_sf.probes.run import PROBES, ProbeConfig, open_subject, run_probes, runnable
from scd_sf.types import UserError

CPU = torch.device("cpu")


def config(chain: Chain, out: Path, *more: str) -> ProbeConfig:
    return load_config(ProbeConfig, None, [f"checkpoint={chain.root}/stage2", f"out={out}", *more])


def test_all_probes_of_a_bidirectional_model(chain: Chain, tmp_path: Path) -> None:
    """A diffusers directory with encoded clips; the command itself."""
    given = [
        f"checkpoint={chain.wan}",
        f"data={chain.train}",
        "sampler={name: euler, steps: 3}",
        "clips=2",
    ]
    chosen = ["probes=[similarity,pca,attention,leave_one_out]", f"out={tmp_path}"]
    result = CliRunner().invoke(app, ["probe", *given, *chosen])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report.html").read_text()
    for name in ("similarity", "pca", "attention", "leave_one_out"):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["figures"] and all(
            (tmp_path / figure).is_file() for figure in found["figures"]
        ), name
        assert f"{name}.json" in page
    assert page.count("data:image/png;base64,") >= 5 and "http" not in page.split("</head>")[1]
    about = json.loads((tmp_path / "probe.json").read_text())
    assert about["latent"] == list(SHAPE.latent(2)) and about["sampler"] == "euler, 3 steps"


def test_a_student_and_its_own_size(chain: Chain, tmp_path: Path) -> None:
    """Prompts alone: the size of the training videos, the checkpoint's own sampler; what cannot run
    is said."""
    cfg = config(chain, tmp_path, 'prompts=["left in meadow"]')
    subject = open_subject(cfg, CPU)
    assert subject.shape == SHAPE and subject.sampler.steps == 2 and subject.cond.batch == 1
    assert run_probes(cfg, CPU).is_file()
    assert {path.stem for path in tmp_path.glob("*.json")} == {
        "similarity",
        "pca",
        "attention",
        "probe",
    }


def test_refusals(chain: Chain, tmp_path: Path) -> None:
    for more, said in (
        (["probes=[simlarity]"], r"simlarity.*choose from similarity"),
        ([], "set data= to encoded clips, or prompts="),
        ([f"data={tmp_path}"], "manifest.json"),
        ([f"checkpoint={tmp_path}", f"data={chain.train}"], "no checkpoint"),
        ([f"data={chain.train}", "similarity.frames=[7]"], r"frames is \[7\]"),
        ([f"data={chain.train}", "probes=[diagonal]"], "diagonal: is for the causal baseline"),
        (
            ['prompts=["a"]', "probes=[similarity,leave_one_out]"],
            "leave_one_out: needs encoded clips.*data=",
        ),
        (
            [f"data={chain.train}", "probes=[similarity,pca]", "pca.blocks=[77]"],
            r"pca.blocks: \[77\]",
        ),
        ([f"data={chain.train}", "attention.first_frame=50"], "first_frame is 50"),
    ):
        with pytest.raises(UserError, match=said):
            run_probes(config(chain, tmp_path / "out", *more), CPU)
        assert not (tmp_path / "out").exists(), "refused before anything ran"
    distilled = [
        f"checkpoint={chain.root}/stage3",
        f"data={chain.train}",
        "sampler={name: euler, steps: 2}",
    ]
    with pytest.raises(UserError, match="distilled for sampler"):
        open_subject(config(chain, tmp_path, *distilled), CPU)
    assert (
        open_subject(config(chain, tmp_path, *distilled, "force=true"), CPU).sampler.name == "euler"
    )


def test_a_skip_layer_checkpoint(tmp_path: Path) -> None:
    """What compares steps is left out of it, unless it is run whole; nothing is mixed with probes
    of another model."""
    model = tiny.student(tiny.SKIPPING, dtype=torch.float32)
    one, cfg = probed.subject(model, None), ProbeConfig("x", "y")
    assert set(runnable(cfg, one)) == {"skip"}
    with pytest.raises(
        UserError, match=r"similarity: blocks 2..3 do not run at every step; whole=true"
    ):
        runnable(replace(cfg, probes=("similarity",)), one)
    with pytest.raises(UserError, match="no probe fits"):
        runnable(cfg, probed.subject(model, None, prompts=1))
    set_blocks(model, BlocksConfig())
    assert set(runnable(cfg, one)) == {"similarity", "pca", "attention", "skip", "diagonal"}


@pytest.mark.parametrize("family", ["causal", "scd"])
def test_a_model_from_scratch(family: str, tmp_path: Path) -> None:
    """On encoded frames with actions, at the noise levels of its own training, which was without a
    shift."""
    fusion = ("paper", "temporal") if family == "scd" else ("", "identical")
    variant = tiny.Variant(family, 1, *fusion, "full", "dit")
    model = tiny.student(variant, dtype=torch.float32)
    info = FrameSetInfo(tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH, 8, tiny.DIT.num_actions, ("a", "b"))
    writer, rng = FrameWriter(tmp_path / "data", {}, info), tiny.generator(0)
    for number in range(5):
        frames = 2 + number  # the first is too short
        actions = torch.randint(0, tiny.DIT.num_actions, (frames,), generator=rng)
        size = (frames, tiny.CHANNELS, tiny.HEIGHT, tiny.WIDTH)
        writer.append(f"c{number}", torch.randn(size, generator=rng), actions, number % 2)
    writer.finish()
    scd = model.scd if isinstance(model, Scd) else ScdConfig()
    kind = ModelConfig(family=family, backbone="dit", dit=tiny.DIT, scd=scd)
    about = CheckpointConfig(kind, SamplerConfig(steps=4, shift=1.0))
    write_single(tmp_path / "model.safetensors", model, about, {"latent": [3]}, torch.float32)

    given = [
        "leave_one_out.loss.clips=3",
        "leave_one_out.loss.levels=2",
        "skip.whole=[0.5]",
        "skip.timing_seconds=0.1",
    ]
    paths = [
        f"checkpoint={tmp_path}/model.safetensors",
        f"data={tmp_path}/data",
        f"out={tmp_path}/out",
    ]
    cfg = load_config(ProbeConfig, None, [*paths, *given])
    subject = open_subject(cfg, CPU)
    run_probes(cfg, CPU)
    found = json.loads((tmp_path / "out" / "leave_one_out.json").read_text())
    assert found["levels"] == [0.25, 0.75] and found["clips"] == 3
    batch = FrameClips(tmp_path / "data").batch([1, 2, 3], [0, 0, 0], 3)
    losses = FlowLosses(batch.latents_BFCHW, batch.cond, (0.25, 0.75))
    assert found["base"] == pytest.approx(losses.measure(subject.model).mean(1).tolist())
    assert (tmp_path / "out" / "similarity.json").is_file() and (
        tmp_path / "out" / "attention.json"
    ).is_file()
    if family == "causal":
        rows = json.loads((tmp_path / "out" / "skip_layer.json").read_text())["rows"]
        clean = 6 * 2 / 3  # passes of finished frames
        assert rows[1]["block_passes_per_frame"] - clean == 2 * 6 + 2 * 3, (
            "2 whole steps of 4, by its own times"
        )


def test_one_folder_is_of_one_model(chain: Chain, tmp_path: Path) -> None:
    """A second probe goes onto the same page; one of another seed is refused."""
    given = [f"data={chain.train}", "clips=1"]
    run_probes(config(chain, tmp_path, *given, "probes=[similarity]"), CPU)
    page = run_probes(config(chain, tmp_path, *given, "probes=[pca]"), CPU).read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        run_probes(
            replace(config(chain, tmp_path, *given, "probes=[pca]"), out=str(tmp_path / "mine")),
            CPU,
        )
    with (
        locked(tmp_path / "held", "these probes"),
        pytest.raises(UserError, match="is at work in it"),
    ):
        run_probes(
            replace(config(chain, tmp_path, *given, "probes=[pca]"), out=str(tmp_path / "held")),
            CPU,
        )
    assert "similarity.json" in page and "pca.json" in page
    with pytest.raises(UserError, match="holds probes of another seed; choose another out="):
        run_probes(config(chain, tmp_path, *given, "probes=[pca]", "seed=1"), CPU)


def test_a_page_of_hostile_names(tmp_path: Path) -> None:
    """Titles and facts are text, pictures come from the folder alone."""
    (tmp_path / "x.json").write_text(
        json.dumps({"title": "<script>x</script>", "text": "a & b", "figures": []})
    )
    page = write_probe_report(
        tmp_path, "</title><script>", {"prompt": '"><img src=x onerror=alert(1)>'}
    ).read_text()
    assert "<script" not in page and "<img" not in page and "a &amp; b" in page
    (tmp_path / "x.json").write_text(
        json.dumps({"title": "", "text": "", "figures": ["../../etc/passwd"]})
    )
    with pytest.raises(UserError, match="which leaves"):
        write_probe_report(tmp_path, "", {})
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        write_probe_report(tmp_path, "", {})


def test_every_probe_has_its_section() -> None:
    assert set(PROBES) <= set(vars(ProbeConfig("a", "b")))
