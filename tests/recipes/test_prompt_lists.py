"""A plain list of prompts in stage 3, and what the filter makes of one: encoded while it trains, as
if it had been encoded before, killed and resumed."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import recipe_runner
import tiny_run
from recipe_runner import At
from tiny_run import BACKWARD, MOTIONS, PLACES, SCRIPTS, Chain

from scd_sf.checkpoint import find
from scd_sf.data.prompts import PromptSet
from scd_sf.files import read_json
from scd_sf.tensor_files import read_tensors
from scd_sf.tools.prompts.filter.chain import FilterConfig
from scd_sf.tools.prompts.filter.report import run_filter

PROMPTS = [f"{motion} in {place}" for place in PLACES for motion in MOTIONS]
STAGE3, ENCODE = SCRIPTS["stage3"], "data_prep/encode_prompts.py"


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("list") / "prompts.jsonl"
    file.write_text(
        "".join(
            json.dumps({"prompt": prompt, "uuid": f"u{n}"}) + "\n"
            for n, prompt in enumerate(PROMPTS)
        )
    )
    return file


def arguments(chain: Chain, run: Path, prompts: Path, *more: str) -> list[str]:
    return [*chain.stage3(run), f"prompts={prompts}", *more]


@pytest.fixture(scope="module")
def whole(chain: Chain, listed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 3 over the list, never interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = recipe_runner.succeed(STAGE3, *arguments(chain, run, listed))
    assert (
        "6 prompts, encoded as they are used in bf16" in done.out
        and "guided away from '色调艳丽" in done.out
    )
    return run


def same(one: Path, two: Path) -> None:
    """But for the best step, from when on a run has one is a matter of ``train.steps``."""
    rows = [
        [row | {"monitor/best_step": 0.0} for row in tiny_run.metrics(run)] for run in (one, two)
    ]
    assert rows[0] == rows[1]
    for name in ("model", "ema"):
        left, right = (read_tensors(find(run) / f"{name}.safetensors") for run in (one, two))
        assert all(left[key].equal(right[key]) for key in left)


def test_killed_and_resumed(chain: Chain, listed: Path, whole: Path, tmp_path: Path) -> None:
    """From the filter's folder this time, whose rows are those of the list but for what it dropped,
    and with a cache: neither changes the training; and the list's own identity is in the
    provenance."""
    run, cache, kept = tmp_path / "run", tmp_path / "cache", tmp_path / "kept"
    raw = tmp_path / "raw.jsonl"
    raw.write_text(
        listed.read_text()
        + '{"prompt": "left", "uuid": "u6"}\n{"prompt": "LEFT in  meadow", "uuid": "u7"}\n'
    )
    report = run_filter(FilterConfig((str(raw),), str(kept), language_score=1.0, workers=1))
    assert read_json(report, "")["kept"] == 6
    given = arguments(chain, run, kept, f"text.cache={cache}")
    assert recipe_runner.run(STAGE3, *given, at=At(BACKWARD, 15)).code == -signal.SIGKILL
    recipe_runner.succeed(STAGE3, *given)
    same(run, whole)
    origin = read_json(find(run) / "provenance.json", "")
    assert origin["data_hash"] != read_json(find(whole) / "provenance.json", "")["data_hash"]
    assert (
        str(origin["negative_prompt"]).startswith("色调艳丽")
        and len(list(cache.rglob("*.safetensors"))) == 7
    )


def test_as_if_the_prompts_had_been_encoded_before(
    chain: Chain, listed: Path, whole: Path, tmp_path: Path
) -> None:
    """encode_prompts.py, killed between two of its files and run again; then the same losses and
    weights."""
    out, run = tmp_path / "encoded", tmp_path / "run"
    given = [f"prompts={listed}", f"model={chain.wan}", f"out={out}", "per_shard=2"]
    killed = recipe_runner.run(ENCODE, *given, at=At("scd_sf.tools.data.encode_list:write_json", 2))
    assert killed.code == -signal.SIGKILL and not (out / "manifest.json").exists()
    refused = recipe_runner.run(STAGE3, *arguments(chain, run, out))
    assert refused.code == 2 and "encoding was not finished" in refused.err
    recipe_runner.succeed(ENCODE, *given)
    assert "already complete" in recipe_runner.succeed(ENCODE, *given).out
    assert sorted(file.name for file in out.iterdir() if file.name != ".lock") == [
        "manifest.json",
        "negative.safetensors",
        "null.safetensors",
        "prompts.jsonl",
        *(f"text-0000{n}.safetensors" for n in range(3)),
    ]
    recipe_runner.succeed(STAGE3, *arguments(chain, run, out))
    same(run, whole)
    for more, words in (
        (["negative_prompt=ugly"], "was encoded with '色调艳丽"),
        (["text.dtype=fp32"], "is encoded already"),
    ):
        result = recipe_runner.run(STAGE3, *arguments(chain, tmp_path / "other", out, *more))
        assert result.code == 2 and words in result.err, result.err


def test_what_is_refused_before_anything_is_written(
    chain: Chain, listed: Path, whole: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{prompt}\n" for prompt in reversed(PROMPTS)))
    (tmp_path / "seeds.jsonl").write_text('{"prompt": "a", "seed": 3}\n')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.txt").write_text("mine")
    tiny_run.write_wan(tmp_path / "wan", width=6)
    run = tmp_path / "run"
    for given, words in (
        (arguments(chain, run, tmp_path / "none.txt"), "none.txt"),
        (arguments(chain, run, tmp_path / "seeds.jsonl"), "prompt 1 has 'seed'"),
        (arguments(chain, run, tmp_path), "a folder without report.json"),
        (arguments(chain, run, other, f"text.path={tmp_path}"), "no text encoder"),
        (arguments(chain, run, other, f"text.path={tmp_path}/wan"), "6 wide, the model takes 8"),
        (
            arguments(chain, run, other, "train.global_batch=8"),
            "6 samples, fewer than train.global_batch=8; use train.global_batch=6, or more samples",
        ),
    ):
        result = recipe_runner.run(STAGE3, *given)
        assert result.code == 2 and words in result.err.splitlines()[-1] and not run.exists(), (
            result.err
        )
    shutil.copytree(whole, run)
    moved = [f"run.dir={run}", f"prompts={listed}", "train.steps=6"]
    listed_now = listed.read_bytes()
    listed.write_bytes(listed_now.replace(b"left", b"still"))
    result = recipe_runner.run(STAGE3, *chain.stage3(run), *moved)
    listed.write_bytes(listed_now)
    assert result.code == 2 and "was trained on other data" in result.err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_stopped_and_resumed(
    chain: Chain, listed: Path, whole: Path, tmp_path: Path
) -> None:
    """Bit for bit the run of two ranks that never stopped; the run of one rank but for the order of
    sums. Two ranks also share the work of encode_prompts.py."""
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "encoded"
    for run, steps in ((one, 4), (two, 2), (two, 4)):
        given = arguments(
            chain, run, listed, f"train.steps={steps}", f"text.cache={tmp_path}/cache"
        )
        results = recipe_runner.run_ranks(STAGE3, *given, world=2)
        assert [result.code for result in results] == [0, 0], results[0].err + results[1].err
    same(one, two)
    for left, right in zip(tiny_run.metrics(one), tiny_run.metrics(whole), strict=True):
        assert left["dmd/fake_real"] == pytest.approx(right["dmd/fake_real"], rel=1e-4)
    given = [f"prompts={listed}", f"model={chain.wan}", f"out={out}", "per_shard=2"]
    assert [result.code for result in recipe_runner.run_ranks(ENCODE, *given, world=2)] == [0, 0]
    assert len(PromptSet(out)) == 6 and not (out / "records").exists()
    recipe_runner.succeed(ENCODE, *given[:2], f"out={tmp_path}/alone", "per_shard=2")
    for file in out.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "alone" / file.name).read_bytes()
    held = [f"prompts={tmp_path}/none.txt", *given[1:]]
    for result in recipe_runner.run_ranks(ENCODE, *held, world=2):
        assert result.code == 2 and result.err.splitlines()[-1].startswith("error: "), result.err
