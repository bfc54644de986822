"""generate_clips.py: every clip once, byte for byte the same, whoever dies when and on however many
processes."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recipe_runner
import tiny_run
from recipe_runner import At

from scd_sf.data.clip_files import clip_path, clip_paths, files_of, read_header
from scd_sf.data.clip_index import Common
from scd_sf.data.latents import LatentClips
from scd_sf.data.prompts import PromptSet
from scd_sf.files import is_part, locked, sha256_file
from scd_sf.tools.generate.plan import GenerateConfig, clip_id, units_of, wanted_clips
from scd_sf.types import UserError

SCRIPT = "data_prep/generate_clips.py"
PROMPTS = ["left in meadow", "right in hall", "still in hall", "still in meadow"]
CLIPS = 3 * len(PROMPTS)
MAKER = "scd_sf.tools.generate.maker"
PLACES_TO_DIE = f"os:replace|os:fsync|{MAKER}:write_video|{MAKER}:sample_bidirectional"


def arguments(model: Path, out: Path) -> list[str]:
    size = ["frames=9", "height=32", "width=32", "sampler.steps=2", "samples=3", "batch=2"]
    kinds = [
        "engine.backend=torch",
        "engine.dtype=fp32",
        "text_dtype=fp32",
        "negative_prompt=still",
    ]
    return [f"model={model}", f"out={out}", f"prompts={json.dumps(PROMPTS)}", *size, *kinds]


def contents(root: Path) -> dict[str, bytes]:
    """All that a run leaves, but its cache."""
    files = [
        *files_of(root),
        *(root / name for name in ("manifest.json", "clips.jsonl", "job.json", "wanted.jsonl")),
    ]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_wan(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "clips"
    recipe_runner.succeed(SCRIPT, *arguments(model, out))
    return out


def common(settings: dict[str, object] | None = None) -> Common:
    names = (
        "negative_prompt",
        "model_sha",
        "text_sha",
        "sampler",
        "steps",
        "shift",
        "cfg",
        "dtype",
    )
    return Common(tiny_run.SHAPE, "bfloat16", 8, 512, dict.fromkeys(names, "x") | (settings or {}))


def test_ids_depend_on_all_that_decides_a_clip() -> None:
    one = clip_id("a cat", 0, common())
    assert one == clip_id("a cat", 0, common({"vae_sha": "y", "batch": 4})) and len(one) == 32
    others = [clip_id("a cat ", 0, common()), clip_id("a cat", 1, common())]
    others += [clip_id("a cat", 0, common({name: "y"})) for name in common().settings]
    others += [clip_id("a cat", 0, Common(tiny_run.SHAPE, "float16", 8, 512, common().settings))]
    assert len({one, *others}) == 1 + len(others)


def test_every_clip_is_wanted_once_and_groups_do_not_depend_on_ranks(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a", "uuid": "u1"}\n{"prompt": "b"}\n{"prompt": "a", "uuid": "u3"}\n'
    )
    specs = wanted_clips(
        GenerateConfig("m", "o", prompt_file=str(file), samples=2, seed=5), common()
    )
    assert sorted((spec.prompt, spec.uuid, spec.seed) for spec in specs) == [
        ("a", "u1", 5),
        ("a", "u1", 6),
        ("b", "", 5),
        ("b", "", 6),
    ]
    assert [spec.id for spec in specs] == sorted(spec.id for spec in specs)
    assert [len(unit) for unit in units_of(specs, 3)] == [3, 1]
    file.write_text('{"prompt": "a", "seed": 3}\n{"prompt": "a"}\n')
    specs = wanted_clips(
        GenerateConfig("m", "o", prompt_file=str(file), samples=2, seed=5), common()
    )
    # a row's own seed comes before the command's
    assert sorted(spec.seed for spec in specs) == [3, 4, 5, 6]
    (tmp_path / "report.json").write_text(
        json.dumps({"sha256": {"prompts.jsonl": sha256_file(file)}})
    )
    assert (
        wanted_clips(
            GenerateConfig("m", "o", prompt_file=str(tmp_path), samples=2, seed=5), common()
        )
        == specs
    )
    file.write_text('{"prompt": "a", "then": [[9, "b"]]}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl: row 1 \('a'\) has then; .* correct it"):
        wanted_clips(GenerateConfig("m", "o", prompt_file=str(file)), common())
    with pytest.raises(UserError, match=r"prompts: number 2 \(''\) has no prompt"):
        wanted_clips(GenerateConfig("m", "o", prompts=["a", " "]), common())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": []}, "set either prompts or prompt_file"),
        ({"store": "int8"}, "store 'int8' is unknown"),
        ({"batch": 0}, "batch is 0; it must be between 1 and"),
        ({"crf": 99}, "crf is 99"),
    ],
)
def test_bad_settings_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerateConfig(**({"model": "m", "out": "o", "prompts": ["a"]} | fields))  # type: ignore[arg-type]


def test_ctrl_c_and_two_at_once(model: Path, tmp_path: Path) -> None:
    """One line and 130, and the same command goes on; a folder is one job's; others' files are no
    place for clips."""
    out = tmp_path / "out"
    given = [
        *arguments(model, out),
        "samples=1",
        f"prompts={json.dumps(PROMPTS[:3])}",
        "videos=false",
    ]
    moment = At("scd_sf.tools.generate.maker:sample_bidirectional", 2, signal.SIGINT)
    stopped = recipe_runner.run(SCRIPT, *given, at=moment)
    assert stopped.code == 130 and stopped.err.splitlines()[-1].startswith(
        "interrupted; the same command goes on"
    )
    assert "Traceback" not in stopped.err
    with locked(out, "generate_clips"):
        second = recipe_runner.run(SCRIPT, *given)
    assert second.code == 2 and "is at work in it" in second.err.splitlines()[-1]
    assert "all 3 clips" in recipe_runner.succeed(SCRIPT, *given).out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "wanted.jsonl").write_text("mine")
    refused = recipe_runner.run(SCRIPT, *given, f"out={tmp_path}/mine")
    assert refused.code == 2 and "nothing of others is touched" in refused.err
    assert [(file.name, file.read_text()) for file in (tmp_path / "mine").iterdir()] == [
        ("wanted.jsonl", "mine")
    ]


def test_train_and_val_by_one_command(model: Path, tmp_path: Path) -> None:
    """Split by the hash of the prompt; a share does not move prompts that were there before."""

    def splits(prompts: list[str], val: float) -> dict[str, str]:
        cfg = GenerateConfig("m", "o", prompts=prompts, val=val, samples=2)
        return {spec.prompt: spec.folder for spec in wanted_clips(cfg, common())}

    many = [f"prompt {number}" for number in range(400)]
    first = splits(many[:200], 0.1)
    assert 5 < list(first.values()).count("val") < 40
    assert {prompt: splits(many, 0.1)[prompt] for prompt in first} == first
    assert list(splits(many, 7).values()).count("val") == 7
    with pytest.raises(UserError, match="val=4 takes 4 of 4 prompts"):
        splits(many[:4], 4)
    out = tmp_path / "out"
    given = [*arguments(model, out), "samples=1", "videos=false"]
    killed = recipe_runner.run(SCRIPT, *given, "val=1", at=At(PLACES_TO_DIE, 14))
    assert killed.code == -signal.SIGKILL
    said = recipe_runner.succeed(SCRIPT, *given, "val=1").out
    assert f"data={out}/train val={out}/val" in said
    train, val = LatentClips(out / "train"), LatentClips(out / "val")
    assert (len(train), len(val)) == (3, 1) and train.shape == val.shape
    assert sorted([*train.texts(range(3)), *val.texts([0])]) == sorted(PROMPTS)
    for more, message in (
        ("val=2", "made with other settings (val)"),
        ("val=0", "holds other files"),
        ("val=1.5", "val is 1.5"),
    ):
        refused = recipe_runner.run(SCRIPT, *given, more)
        assert refused.code == 2 and message in refused.err.splitlines()[-1]


@pytest.mark.slow
def test_the_folder_is_training_data_with_all_that_is_known(unbroken: Path, model: Path) -> None:
    clips = LatentClips(unbroken)
    assert (
        len(clips) == CLIPS
        and clips.prompts.width == 8
        and sorted(set(clips.texts(range(CLIPS)))) == sorted(PROMPTS)
    )
    clips.verify()
    about = read_header(clip_paths(unbroken)[0]).about
    assert (about.sampler, about.steps, about.shift, about.cfg, about.frames, about.size) == (
        "unipc",
        2,
        5.0,
        5.0,
        9,
        "32x32",
    )
    assert (
        about.video_sha256
        and about.model_sha
        and about.text_sha
        and about.vae_sha
        and about.toolkit
    )
    assert len(PromptSet(unbroken)) == CLIPS and not clips.prompts.negative.text_BLE.equal(
        clips.null.text_BLE
    )
    again = recipe_runner.succeed(SCRIPT, *arguments(model, unbroken))
    assert "has 0 batches of at most 2 to make" in again.out
    other = recipe_runner.run(SCRIPT, *arguments(model, unbroken), "sampler.steps=3")
    assert other.code == 2 and "made with other settings (steps)" in other.err


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_anywhere_on_any_number_of_ranks_every_clip_is_made_once(
    tmp_path: Path, model: Path, unbroken: Path, seed: int
) -> None:
    random_, out = random.Random(seed), tmp_path / "clips"
    for world in (2, 1) if seed else (1, 2):
        at = {rank: At(PLACES_TO_DIE, random_.randint(8, 24)) for rank in range(world)}
        results = recipe_runner.run_ranks(SCRIPT, *arguments(model, out), world=world, at=at)
        assert all(result.code for result in results)
    for path in clip_paths(out)[:1]:
        path.write_bytes(path.read_bytes()[:-1])  # as a file system that lies about fsync leaves it
    last = recipe_runner.run_ranks(SCRIPT, *arguments(model, out), world=3 - seed)
    assert [result.code for result in last] == [0] * (3 - seed), last[0].err[-2000:]
    assert contents(out) == contents(unbroken)
    assert not any(is_part(file) for file in files_of(out))


@pytest.mark.slow
def test_a_zero_3_teacher_is_called_equally_often_by_ranks_with_unequal_shares(
    tmp_path: Path, model: Path, unbroken: Path
) -> None:
    out = tmp_path / "clips"
    recipe_runner.run(
        SCRIPT, *arguments(model, out), at=At("scd_sf.tools.generate.maker:write_clip", 6)
    )  # 5 clips are there
    zero = ["engine={backend: deepspeed, dtype: fp32, bucket: 1000}"]
    results = recipe_runner.run_ranks(SCRIPT, *arguments(model, out), *zero, world=2)
    assert [result.code for result in results] == [0, 0], results[0].err[-2000:]
    assert contents(out) == contents(unbroken)


@pytest.mark.slow
def test_stage_2_trains_on_the_folder(tmp_path: Path, model: Path, unbroken: Path) -> None:
    layers = ["scd.encoder_layers=[0, 1, 2]", "scd.decoder.layers=[0, 5]"]
    recipe_runner.succeed(
        "recipes/stage1_transplant.py", f"base={model}", f"out={tmp_path}/stage1", *layers
    )
    given = [
        f"init={tmp_path}/stage1",
        f"data={unbroken}",
        f"val={unbroken}",
        "engine={backend: torch, lr: 1e-2}",
    ]
    given += [
        "train={steps: 4, global_batch: 4, micro_batch: 2, save_every: 2, validate_every: 4, prefetch: 3}"
    ]
    given += ["sampler={name: euler, steps: 2}", "run.log_every=1", f"run.dir={tmp_path}/run"]
    recipe_runner.succeed(tiny_run.SCRIPTS["stage2"], *given)
    losses = [row["loss"] for row in tiny_run.metrics(tmp_path / "run") if "loss" in row]
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)


@pytest.mark.slow
def test_a_ray_cluster_gives_a_dead_workers_and_a_dead_nodes_work_to_others(
    tmp_path: Path, model: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two raylets of one CPU each; a worker is killed at its work, then a whole raylet."""
    import psutil
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(recipe_runner.ROOT))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    out = tmp_path / "clips"
    command = [
        sys.executable,
        SCRIPT,
        *arguments(model, out),
        "launcher=ray",
        f"cluster.address={cluster.address}",
    ]
    try:
        second = cluster.add_node(**small)
        with (tmp_path / "log").open("w") as log:
            driver = subprocess.Popen(command, cwd=recipe_runner.ROOT, stdout=log, stderr=log)
        ours = [
            p.pid
            for p in psutil.Process(os.getpid()).children(recursive=True)
            if "raylet" in p.name()
        ]

        def until(count: int) -> None:
            while driver.poll() is None and sum(clip_path(out, i).is_file() for i in ids) < count:
                time.sleep(0.02)

        ids = [path.stem for path in clip_paths(unbroken)]
        until(1)
        workers = [
            p
            for pid in ours
            for p in psutil.Process(pid).children(True)
            if "ray::Worker" in " ".join(p.cmdline())
        ]
        workers[0].send_signal(signal.SIGKILL)
        until(4)
        cluster.remove_node(second, allow_graceful=False)
        driver.wait(timeout=400)
    finally:
        cluster.shutdown()
    said = (tmp_path / "log").read_text()
    assert driver.returncode == 0, said[-3000:]
    assert "a worker died at its task" in said
    assert contents(out) == contents(unbroken)
