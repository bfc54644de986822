"""Descriptions of models by others, each with any field changed: the model is read, or one line
says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
import torch
from diffusers import AutoencoderDC
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from scd_sf.files import Json
from scd_sf.models.build import CheckpointConfig, describe_checkpoint, write_single
from scd_sf.models.tokenizers.tokenizer import Normalisation, load_tokenizer, save_tokenizer
from scd_sf.models.wan.text import load_text_encoder
from scd_sf.models.wan.transformer import Wan
from scd_sf.models.wan.vae import load_vae
from scd_sf.types import UserError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.sampled_from([10**5, 10**12, -(10**18), 1e308, 0.5, "", "\0", "\ud800", "x" * 300])
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
Target = tuple[Path, Callable[[], object]]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    """Name -> a JSON file that describes a tiny model, and what reads it."""
    root = tmp_path_factory.mktemp("descriptions")
    wan = tiny_run.write_wan(root / "wan")
    torch.manual_seed(0)
    kinds = ("ResBlock", "ResBlock")
    tokenizer = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )
    save_tokenizer(tokenizer, Normalisation((0.0,) * 4, (1.0,) * 4), root / "tokenizer")
    return {
        "vae": (wan / "vae" / "config.json", lambda: load_vae(wan)),
        "text": (
            wan / "text_encoder" / "config.json",
            lambda: load_text_encoder(wan).encode(["in"]),
        ),
        "words": (
            wan / "tokenizer" / "tokenizer_config.json",
            lambda: load_text_encoder(wan).encode(["in"]),
        ),
        "tokenizer": (
            root / "tokenizer" / "config.json",
            lambda: load_tokenizer(root / "tokenizer"),
        ),
    }


def check(read: Callable[[], object]) -> None:
    try:
        read()
    except UserError as error:
        assert str(error).strip() and len(str(error)) < 2000


@pytest.mark.parametrize("name", ["vae", "text", "words", "tokenizer"])
def test_any_field_changed(targets: dict[str, Target], name: str) -> None:
    file, read = targets[name]
    whole = file.read_text(encoding="utf-8")

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(data=st.data(), value=VALUES)
    def changed(data: st.DataObject, value: object) -> None:
        content: Json = json.loads(whole)
        content[data.draw(st.sampled_from(sorted(content)))] = value
        file.write_text(json.dumps(content), encoding="utf-8")
        check(read)

    try:
        changed()
    finally:
        file.write_text(whole, encoding="utf-8")
    read()


def test_any_metadata_of_an_exported_file(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    write_single(
        good,
        Wan(tiny_run.WAN),
        CheckpointConfig(),
        {"stage": "x", "video": {"frames": 9}},
        torch.float32,
    )
    tensors = {name: tensor[:0] for name, tensor in load_file(good).items()}
    described = describe_checkpoint(good)[1]

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(key=st.sampled_from(sorted(described)), value=VALUES, cut=st.integers(0, 40))
    def changed(key: str, value: object, cut: int) -> None:
        text = json.dumps({**described, key: value})
        metadata = {"format": "scd_sf.model.1", "config": "", "provenance": text[: len(text) - cut]}
        save_file(dict(list(tensors.items())[:1]), tmp_path / "bad.safetensors", metadata)
        check(lambda: describe_checkpoint(tmp_path / "bad.safetensors"))

    changed()
