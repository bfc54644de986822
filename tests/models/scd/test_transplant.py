"""Stage 1: every destination tensor has one line in the report, copies are bit-equal and share
nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch

from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import FUSIONS, DecoderConfig
from scd_sf.models.scd.transplant import (
    TransplantConfig,
    report_lines,
    transplant_causal,
    transplant_scd,
    verify_transplant,
)
from scd_sf.models.scd.wan import ScdWan
from scd_sf.models.wan.transformer import Wan
from scd_sf.types import UserError

LISTS = [
    (tiny.ENCODER, tiny.DECODER),
    ((0, 2, 3), (1, 1, 5)),
    ((5,), (0,)),
    (tuple(range(6)), (5, 4, 3)),
]
QUERIES = "blocks.1.attn1.to_q.weight"


def wan() -> Wan:
    return tiny.wan(dtype=torch.float32)


@pytest.mark.parametrize(("encoder", "decoder"), LISTS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_destination_once_and_bit_equal(
    encoder: tuple[int, ...], decoder: tuple[int, ...], fusion: str
) -> None:
    source = wan()
    # split 0 where junction would have no block left that could read the context
    split = 0 if all(layer in encoder for layer in decoder) else None
    model, report = transplant_scd(
        source, ScdConfig(encoder, DecoderConfig(decoder, fusion, split=split))
    )
    verify_transplant(model, source, report)
    assert Counter(line.destination for line in report) == Counter(
        dict(model.named_parameters()).keys()
    )
    given = dict(source.named_parameters())
    for line in report:
        parameter = model.get_parameter(line.destination)
        assert line.shape == tuple(parameter.shape)
        if line.source is None:
            assert line.destination.startswith("decoder.adapter") and fusion in ("paper", "channel")
        else:
            assert torch.equal(parameter, given[line.source])
    came_from = {line.destination: line.source for line in report}
    for side, layers in (("encoder", encoder), ("decoder.trunk", decoder)):
        for index, layer in enumerate(layers):
            name = "attn1.to_q.weight"
            assert came_from[f"{side}.blocks.{index}.{name}"] == f"trunk.blocks.{layer}.{name}"
    assert came_from["decoder.trunk.head.proj_out.weight"] == "trunk.head.proj_out.weight"
    assert (
        came_from["encoder.patch_embedding.weight"]
        == came_from["decoder.trunk.patch_embedding.weight"]
    )


def test_copies_share_no_storage_with_the_source_or_each_other() -> None:
    source = wan()
    model, report = transplant_scd(source, ScdConfig((0, 1), DecoderConfig((1, 1), split=1)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)
        model.get_parameter("decoder.trunk.blocks.0.attn1.to_q.weight").zero_()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["decoder.trunk.blocks.0.attn1.to_q.weight"]
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(report)


def test_verification_can_fail() -> None:
    source = wan()
    model, report = transplant_scd(source, ScdConfig(tiny.ENCODER, DecoderConfig(tiny.DECODER)))
    weight = model.get_parameter("encoder.blocks.1.ffn.net.2.weight")
    with torch.no_grad():
        kept = weight[0, 0].clone()
        weight[0, 0] += 1e-7
    with pytest.raises(
        AssertionError,
        match=r"encoder.blocks.1.ffn.net.2.weight != trunk.blocks.1.ffn.net.2.weight",
    ):
        verify_transplant(model, source, report)
    with torch.no_grad():
        weight[0, 0] = kept
    verify_transplant(model, source, report)


@pytest.mark.parametrize("with_source", [True, False])
def test_shared_storage_is_caught_though_values_are_equal(with_source: bool) -> None:
    source = wan()
    model, report = transplant_scd(source, ScdConfig(tiny.ENCODER, DecoderConfig(tiny.DECODER)))
    other = source.trunk if with_source else model.decoder.trunk
    model.encoder.get_parameter(QUERIES).data = other.get_parameter(QUERIES).data
    with pytest.raises(AssertionError, match="two tensors share storage"):
        verify_transplant(model, source, report)


def test_a_tied_parameter_is_caught() -> None:
    source = wan()
    model, report = transplant_scd(source, ScdConfig(tiny.ENCODER, DecoderConfig(tiny.DECODER)))
    tied = model.decoder.trunk.get_parameter(QUERIES)
    model.encoder.get_submodule(QUERIES.removesuffix(".weight")).weight = tied
    with pytest.raises(AssertionError, match="two tensors share storage"):
        verify_transplant(model, source, report)


def test_layers_out_of_range_are_refused_before_anything_is_built() -> None:
    for config in (ScdConfig((0, 6), DecoderConfig((0,))), ScdConfig((0,), DecoderConfig((0, 25)))):
        with pytest.raises(UserError, match=r"the base model has layers 0\.\.5; remove \[(6|25)\]"):
            transplant_scd(wan(), config)


def test_causal_baseline_is_all_of_wan() -> None:
    source = wan()
    model, report = transplant_causal(source, chunk=3)
    verify_transplant(model, source, report)
    assert model.chunk == 3
    assert (
        [line.destination for line in report]
        == [line.source for line in report]
        == list(dict(source.named_parameters()))
    )


def test_report_for_people() -> None:
    _, report = transplant_scd(wan(), ScdConfig((3,), DecoderConfig((5,), "paper")))
    lines = report_lines(report)
    assert len(lines) == len(report)
    assert (
        "encoder.blocks.0.attn1.to_q.weight <- trunk.blocks.3.attn1.to_q.weight [24, 24]" in lines
    )
    assert "decoder.adapter.weight <- (new) [24, 24]" in lines


@torch.no_grad()
def test_transplanted_contexts_are_wans_hidden_states() -> None:
    """Before any training, frame 0's context is Wan's own output of the last encoder layer on one
    pure-noise frame."""
    source, data = tiny.wan(), tiny.clip(1, chunks=1, samples=1)
    with tiny.double():
        model, _ = transplant_scd(source, tiny.scd_config(tiny.Variant("scd", 1, "junction")))
    assert isinstance(model, ScdWan)
    caught: list[torch.Tensor] = []
    last = source.trunk.blocks[len(tiny.ENCODER) - 1]
    last.register_forward_hook(lambda _module, _inputs, out: caught.append(out))
    source(data.query.x, data.query.t, data.cond)
    c = model.encode(
        data.x, data.query.x, data.query.t, model.encoder.text(data.cond.text_BLE), [0]
    )
    assert torch.allclose(c, caught[0], rtol=0, atol=1e-12)


def test_two_chunks_that_contradict_are_refused() -> None:
    """``chunk`` is what the student has; ``scd.chunk`` beside it was overwritten without a word."""
    scd = ScdConfig(chunk=3)
    assert TransplantConfig("", "", scd=scd, chunk=3).chunk == 3
    with pytest.raises(UserError, match=r"scd\.chunk is 3 and chunk 1; set chunk= alone"):
        TransplantConfig("", "", scd=scd)
