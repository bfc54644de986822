"""Text encoder, probes, clips of the teacher and validation videos on the rehearsal's device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from probed import subject, write_clips
from rehearsal import world
from rehearsal.budgets import BUDGETS
from rehearsal.fake_cuda import DEVICE, FakeCuda
from transformers import BatchEncoding, UMT5Config, UMT5EncoderModel

from scd_sf.config import load_config
from scd_sf.data.clip_files import clip_paths
from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.generation.preview import Preview
from scd_sf.models.causal import Causal
from scd_sf.models.wan.live_prompts import states_alone
from scd_sf.models.wan.text import TextEncoderConfig, TransformersTextEncoder
from scd_sf.probes.attention_mass import AttentionProbe, attention_mass
from scd_sf.probes.frame_diagonal import DiagonalProbe, frame_diagonal
from scd_sf.probes.leave_one_out import LeaveOneOut, leave_one_out
from scd_sf.probes.pca import PcaProbe, pca
from scd_sf.probes.similarity import SimilarityProbe, similarity
from scd_sf.probes.skip_layer import SkipProbe, skip_layer
from scd_sf.tools.generate.maker import Maker, prepare
from scd_sf.tools.generate.plan import GenerateConfig, units_of


def tokens(texts: Sequence[str], **kwargs: Any) -> BatchEncoding:
    """Words of 1 to 7, padded."""
    lengths = [len(text.split()) for text in texts]
    ids = torch.tensor([[1] * length + [0] * (max(lengths) - length) for length in lengths])
    if kwargs.get("return_tensors") != "pt":
        return BatchEncoding({"input_ids": [[1] * length for length in lengths]})
    return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})


def test_text_encoder(cuda: FakeCuda) -> None:
    """umT5-XXL in bf16: two prompts at once, and one as it is encoded while a training goes on."""
    config = UMT5Config(
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        vocab_size=256384,
        feed_forward_proj="gated-gelu",
    )
    with DEVICE:
        model = UMT5EncoderModel(config)
    tokenizer: Any = tokens
    encoder = TransformersTextEncoder(world.in_bf16(model), tokenizer, TextEncoderConfig(path="x"))
    with cuda.budget(BUDGETS["prompts encoded together"]):
        cond = encoder.encode(["a red fox", "a red fox in the snow"])
    assert cond.text_BLE.shape == (2, 512, 4096) and cond.text_BLE.device == cuda.device
    with cuda.budget(BUDGETS["a prompt encoded while training"]):
        states = states_alone(encoder, ["a red fox"])
    assert states[0].shape == (3, 4096) and states[0].device.type == "cpu"


PROBES = {
    "similarity": (similarity, SimilarityProbe()),
    "pca": (pca, PcaProbe()),
    "attention": (attention_mass, AttentionProbe(first_frame=1)),
    "skip": (skip_layer, SkipProbe()),
    "diagonal": (frame_diagonal, DiagonalProbe()),
    "leave_one_out": (leave_one_out, LeaveOneOut()),
}


@pytest.mark.parametrize("name", PROBES)
def test_probes(cuda: FakeCuda, name: str, tmp_path: Path) -> None:
    """Of a small baseline with clips on disk: what they keep comes to the host."""
    with DEVICE:
        model = world.in_bf16(Causal(tiny.CFG))
    given = replace(subject(model, write_clips(tmp_path), 2), device=DEVICE)
    probe: Any
    probe, settings = PROBES[name]
    with cuda.budget(BUDGETS[f"probe {name}, a small model"]):
        assert probe(given, settings).data


def test_clips_of_the_teacher(cuda: FakeCuda, tmp_path: Path) -> None:
    """generate_clips from a directory of weights to files, with a small teacher, encoder and VAE,
    all as loaded."""
    model = tiny_run.write_wan(tmp_path / "model")
    size = [
        "frames=9",
        "height=32",
        "width=32",
        "sampler.steps=2",
        "samples=2",
        "batch=2",
        "videos=true",
    ]
    kinds = [
        "engine.backend=torch",
        "engine.dtype=bf16",
        "negative_prompt=still",
        f"model={model}",
        f"out={tmp_path / 'clips'}",
    ]
    cfg = load_config(GenerateConfig, None, ["prompts=[left in meadow]", *size, *kinds])
    with ExitStack() as held:
        units = units_of(prepare(cfg, held), cfg.batch)
        maker = Maker(cfg, world.RANKS)
        maker.encode(["left in meadow"])
        assert maker.teacher is not None and maker.vae is not None and maker.negative is not None
        with cuda.budget(BUDGETS["two small clips generated and written"]):
            assert maker.make(units[0]) == []
    assert len(clip_paths(tmp_path / "clips")) == 2


def test_validation_videos(cuda: FakeCuda, tmp_path: Path) -> None:
    """The VAE goes to the device and back."""
    model = tiny_run.write_wan(tmp_path / "model")
    with DEVICE:
        student = Causal(tiny_run.WAN)
    preview = Preview(
        str(model),
        world.prompts(2, tiny_run.WAN.text_dim, 5),
        tiny_run.SHAPE,
        FewStepSampler(),
        tmp_path,
    )
    with cuda.budget(BUDGETS["two small validation videos"]):
        videos, _ = preview.sample(student, [0, 1], DEVICE)
    assert videos.device.type == "cpu" and videos.dtype == torch.uint8
