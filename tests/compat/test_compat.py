"""What scd-sf 0.1.0 left on disk is read: checkpoints give the numbers that they gave, folders are
whole, runs go on.

``scd-sf-0.1.0.tar.xz`` was made by revision 352ad44 on random weights: ``wan`` (diffusers layout),
``train`` and ``val`` (latents), ``clips`` (generate_clips), ``prompts`` (encode_prompts),
``frames``, the checkpoints ``stage1``, ``causal``, ``stage2`` (with its training state),
``stage3``, ``skip`` (skip-layer schedule and a frame-diagonal block) and ``scratch``, the export
``single.safetensors``, the sample folder ``samples``. ``expected.safetensors`` holds what the
models of that revision computed from :func:`noise`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import recipe_runner
import torch
from torch import Tensor

from scd_sf.checkpoint import find, read_provenance
from scd_sf.data.frames import FrameClips
from scd_sf.data.latents import LatentClips
from scd_sf.data.prompts import PromptSet
from scd_sf.evaluation.prediction import load_predictor
from scd_sf.generation.generate import decode, generate_latents
from scd_sf.generation.pipeline import SCDWanPipeline
from scd_sf.models.build import load_student
from scd_sf.models.interface import FrameGenerator, Query
from scd_sf.models.wan.text import load_text_encoder
from scd_sf.models.wan.vae import load_vae
from scd_sf.tensor_files import read_tensors
from scd_sf.types import Conditioning

ARCHIVE = Path(__file__).with_name("scd-sf-0.1.0.tar.xz")
STUDENTS = ("stage1", "stage2", "stage3", "causal", "skip")
STAGE2 = [
    "init=stage1",
    "data=train",
    "val=./val",
    "run.dir=stage2",
    "run.log_every=1",
    "engine={kind: local, lr: 1e-2}",
    "sampler={name: euler, steps: 2}",
]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked archive."""
    root = tmp_path_factory.mktemp("compat")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    return root / "scd-sf-0.1.0"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def teacher_forced(model: FrameGenerator, cond: Conditioning) -> Tensor:
    x_t, x_clean = noise(2, 1, 3, 4, 4, 4), noise(1, 3, 4, 4, 4, seed=1)
    t = torch.tensor([[[0.2, 0.5, 0.9]], [[0.7, 0.1, 0.4]]])
    query = Query(noise(1, 3, 4, 4, 4, seed=2), torch.ones(1, 3)) if model.needs_query else None
    return model.teacher_forced(x_t, t, x_clean, cond, query=query)


@torch.no_grad()
def streamed(model: FrameGenerator, cond: Conditioning) -> Tensor:
    stream, velocity, chunks = model.start(cond, (4, 4)), None, []
    for index in range(3):
        stream = model.advance(stream, velocity, noise(1, 1, 4, 4, 4, seed=10 + index))
        velocity = model.denoise(stream, noise(1, 1, 4, 4, 4, seed=20 + index), torch.tensor([0.6]))
        chunks.append(velocity)
    return torch.cat(chunks, 1)


def test_checkpoints_give_the_numbers_that_they_gave(before: Path) -> None:
    expected = read_tensors(before / "expected.safetensors")
    prompt = Conditioning(noise(1, 5, 8, seed=9))
    for name in STUDENTS:
        model, _ = load_student(before / name)
        for way in (teacher_forced, streamed):
            torch.testing.assert_close(
                way(model, prompt), expected[f"{name}.{way.__name__}"], atol=1e-5, rtol=1e-4
            )
    exported, _ = load_student(before / "single.safetensors")
    torch.testing.assert_close(
        streamed(exported, prompt), expected["stage3.streamed"], atol=1e-5, rtol=1e-4
    )
    model, config = load_predictor(before / "scratch")
    actions = Conditioning(torch.zeros(1, 0, 0), actions_BF=torch.tensor([[0, 1, 2]]))
    found = teacher_forced(model, actions)
    torch.testing.assert_close(found, expected["scratch.teacher_forced"], atol=1e-5, rtol=1e-4)
    assert config.model.backbone == "dit"
    assert read_provenance(find(before / "stage3"))["stage"] == "stage3_self_forcing"


def test_folders_are_whole(before: Path) -> None:
    assert len(LatentClips(before / "train")) == 6 and len(LatentClips(before / "val")) == 4
    clips = LatentClips(before / "clips")
    assert len(clips) == 2 and clips.batch([0]).latents_BFCHW.shape == (1, 3, 4, 4, 4)
    assert FrameClips(before / "frames" / "train").info.num_actions == 3
    assert {row.prompt for row in PromptSet(before / "prompts").rows} == {
        "left in meadow",
        "still in hall",
    }


def test_a_pipeline_directory_is_read(before: Path) -> None:
    """As 0.1.0 exported one: its name of the class in model_index.json, and the exported file as the
    student. Its callers passed ``frames``, ``height``, ``width`` and ``seed``."""
    folder = before / "pipeline"
    (folder / "transformer").mkdir(parents=True)
    shutil.copy(before / "single.safetensors", folder / "transformer" / "model.safetensors")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(before / "wan" / part, folder / part)
    index = {
        "_class_name": "SCDWanPipeline",
        "_diffusers_version": "0.42.1",
        "transformer": ["scd_sf", "ScdWan"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "AutoModelForTextEncoding"],
        "tokenizer": ["transformers", "AutoTokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    pipe = SCDWanPipeline.from_pretrained(folder, device="cpu", dtype=torch.float32)
    size: dict[str, Any] = {"frames": 5, "height": 32, "width": 32}
    clip = pipe("left in meadow", seed=[3], output_type="pt", **size).frames
    parts = list(pipe.stream("left in meadow", seed=3, **size))
    assert clip.shape == (1, 5, 3, 32, 32) and torch.equal(torch.cat(parts, 1), clip)
    student, config = load_student(before / "single.safetensors")
    text = load_text_encoder(before / "wan").encode(["left in meadow"])
    latents = generate_latents(student, text, [3], (2, 4, 4, 4), config.sampler.build())
    expected = decode(load_vae(before / "wan"), torch.cat(list(latents), 1))
    torch.testing.assert_close(clip, expected, atol=1e-5, rtol=0)


def test_runs_and_folders_go_on(before: Path) -> None:
    """Stage 2 resumes at its step 4; a finished folder of samples has nothing left to make."""
    train = "train={steps: 5, global_batch: 4, micro_batch: 2, save_every: 2, validate_every: 3, keep: 1}"
    run(before, "recipes/stage2_flow_matching.py", *STAGE2, train)
    steps = [
        json.loads(line)["step"]
        for line in (before / "stage2" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps[-2:] == [4, 5] and find(before / "stage2").name == "step_00000005"
    manifest = before / "samples" / "manifest.json"  # the folder was made at another place
    manifest.write_text(manifest.read_text().replace("/tmp/scd-sf-0.1.0", str(before)))
    video = before / "samples" / "0000-00.mp4"
    written = video.stat().st_mtime_ns
    sample = [
        "checkpoint=stage3",
        "out=samples",
        'prompts=["left in meadow"]',
        "crf=0",
        "base=wan",
        "text_cache=off",
    ]
    run(before, "recipes/sample.py", *sample)
    assert video.stat().st_mtime_ns == written


def run(folder: Path, script: str, *arguments: str) -> None:
    """In ``folder``: the paths that a run keeps are relative to it."""
    command = [sys.executable, str(recipe_runner.ROOT / script), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
