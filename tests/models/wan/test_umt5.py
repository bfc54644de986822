"""Wan's original umT5 file: the same states as transformers' own files, all names and shapes of
umT5-xxl, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu
from transformers import UMT5Config, UMT5EncoderModel

from scd_sf.models.wan.text import TextEncoderConfig, encoder_width, load_text_encoder, text_config
from scd_sf.models.wan.umt5 import FILE, TOKENIZER, to_transformers
from scd_sf.types import UserError

PROMPTS = ["left in meadow", "still", ""]
BLOCK = (
    "norm1",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.o",
    "pos_embedding.embedding",
    "norm2",
    "ffn.gate.0",
    "ffn.fc1",
    "ffn.fc2",
)


def original_names(layers: int) -> list[str]:
    blocks = [f"blocks.{number}.{module}" for number in range(layers) for module in BLOCK]
    return [f"{module}.weight" for module in ("token_embedding", *blocks, "norm")]


def convert(folder: Path, out: Path, layers: int = 1) -> dict[str, Tensor]:
    """diffusers' layout at ``folder`` as Wan's original one at ``out``."""
    theirs = load_file(folder / "text_encoder" / "model.safetensors")
    state = {name: theirs[str(to_transformers(name))] for name in original_names(layers)}
    (out / TOKENIZER).parent.mkdir(parents=True)
    (folder / "tokenizer").rename(out / TOKENIZER)
    torch.save(state, out / FILE)
    return state


def test_every_tensor_of_umt5_xxl_has_its_place() -> None:
    """24 blocks, each with its own position bias: 242 tensors, and transformers names the embedding
    twice."""
    config = UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64
    )
    with torch.device("meta"):
        wanted = set(UMT5EncoderModel(config).state_dict())
    names = original_names(24)
    assert len(names) == 242
    assert {to_transformers(name) for name in names} | {"encoder.embed_tokens.weight"} == wanted
    for foreign in (
        "blocks.0.attn.q.bias",
        "blocks.x.norm1.weight",
        "blocks.0.cross.q.weight",
        "head.weight",
        "norm1",
    ):
        assert to_transformers(foreign) is None


def test_the_original_layout_gives_the_same_states(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny_run.write_text_encoder(tmp_path / "a")
    wanted = load_text_encoder(tmp_path / "a").encode(PROMPTS).text_BLE
    state = convert(tmp_path / "a", tmp_path / "b")
    assert text_config(tmp_path / "b") == TextEncoderConfig(path=str(tmp_path / "b"))
    assert encoder_width(text_config(tmp_path / "b")) == tiny_run.WAN.text_dim
    encoder = load_text_encoder(tmp_path / "b")
    assert torch.equal(encoder.encode(PROMPTS).text_BLE, wanted)
    ids = torch.tensor(encoder.tokenizer(PROMPTS[0])["input_ids"])
    torch.testing.assert_close(
        wanted[0, : len(ids)], reference(state, ids, heads=2), atol=1e-5, rtol=1e-5
    )
    half = load_text_encoder(tmp_path / "b", dtype=torch.bfloat16).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.shared.weight is half.encoder.embed_tokens.weight


def reference(w: dict[str, Tensor], ids: Tensor, heads: int) -> Tensor:
    """What Wan's own code computes for one short prompt (L tokens, all closer than the first shared
    bucket)."""

    def norm(name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    x = w["token_embedding.weight"][ids]
    away = torch.arange(len(ids))[None, :] - torch.arange(len(ids))[:, None]
    buckets = away.abs() + (away > 0) * 16
    for name in sorted(
        {name.removesuffix(".norm1.weight") for name in w if name.endswith(".norm1.weight")}
    ):
        hidden = norm(f"{name}.norm1", x)
        q, k, v = (
            (hidden @ w[f"{name}.attn.{part}.weight"].T).unflatten(1, (heads, -1)) for part in "qkv"
        )
        scores = torch.einsum("ihc,jhc->hij", q, k) + w[f"{name}.pos_embedding.embedding.weight"][
            buckets
        ].permute(2, 0, 1)
        x = (
            x
            + torch.einsum("hij,jhc->ihc", scores.softmax(-1), v).flatten(1)
            @ w[f"{name}.attn.o.weight"].T
        )
        hidden = norm(f"{name}.norm2", x)
        gate = gelu(hidden @ w[f"{name}.ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (hidden @ w[f"{name}.ffn.fc1.weight"].T * gate) @ w[f"{name}.ffn.fc2.weight"].T
    return norm("norm", x)


def test_bad_files_are_named(tmp_path: Path) -> None:
    tiny_run.write_text_encoder(tmp_path / "a")
    root = tmp_path / "b"
    state = convert(tmp_path / "a", root)

    def refused(content: dict[str, Tensor], words: str) -> None:
        torch.save(content, root / FILE)
        with pytest.raises(UserError, match=rf"{FILE}: {words}"):
            load_text_encoder(root)

    refused(
        state | {"decoder.norm.weight": torch.ones(2)},
        "tensor 'decoder.norm.weight' is not one of Wan's umT5",
    )
    refused(
        {name: t for name, t in state.items() if "gate" not in name},
        "tensor for .*wi_0.weight' is missing",
    )
    refused(
        {name: t for name, t in state.items() if "fc2" not in name}, "1 tensors missing, first .*wo"
    )
    refused(
        state | {"norm.weight": torch.ones(2)},
        ".*final_layer_norm.* has shape .*2.*, Wan's umT5 implies",
    )
    (root / TOKENIZER).rename(tmp_path / "aside")
    with pytest.raises(UserError, match=f"{TOKENIZER}: no such folder"):
        load_text_encoder(root)
