"""Wan's original text encoder file, ``models_t5_umt5-xxl-enc-bf16.pth``, as transformers'
``UMT5EncoderModel``.

The two agree tensor by tensor; the geometry follows from the shapes. The tokenizer lies beside it
in its own folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from scd_sf.models.skeleton import check_fit, skeleton
from scd_sf.tensor_files import AGAIN, Lazy, open_tensors, read_all
from scd_sf.types import UserError

FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl"


_EMBEDDING, _EMBEDDING_AGAIN = "shared.weight", "encoder.embed_tokens.weight"
_OUTSIDE = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_BLOCK = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{name}": f"layer.0.SelfAttention.{name}" for name in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def to_transformers(name: str) -> str | None:
    """The original's tensor name -> transformers'; None if Wan's umT5 has no such tensor."""
    module, _, leaf = name.rpartition(".")
    if leaf != "weight":
        return None
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.weight"
    block, _, part = module.removeprefix("blocks.").partition(".")
    if not (block.isascii() and block.isdecimal()) or len(block) > 3 or part not in _BLOCK:
        return None
    return f"encoder.block.{block}.{_BLOCK[part]}.weight"


def open_umt5(file: Path) -> tuple[transformers.UMT5Config, dict[str, Lazy]]:
    """The geometry and the tensors by transformers' names, none read yet.

    UserError: unreadable, a foreign tensor, or missing ones.
    """
    tensors: dict[str, Lazy] = {}
    for name, tensor in open_tensors(file).items():
        new_name = to_transformers(name)
        if new_name is None:
            raise UserError(f"{file}: tensor '{name}' is not one of Wan's umT5; use {FILE}")
        tensors[new_name] = tensor
    block = "encoder.block.0.layer"
    required_names = (
        _EMBEDDING,
        f"{block}.0.SelfAttention.q.weight",
        f"{block}.0.SelfAttention.relative_attention_bias.weight",
        f"{block}.1.DenseReluDense.wi_0.weight",
    )
    for name in required_names:
        if name not in tensors or len(tensors[name].shape) != 2 or not all(tensors[name].shape):
            raise UserError(f"{file}: tensor for '{name}' is missing or not a matrix; {AGAIN}")
    (words, width), (inner, _), (buckets, heads), (hidden, _) = (
        tensors[name].shape for name in required_names
    )
    config = transformers.UMT5Config(
        vocab_size=words,
        d_model=width,
        d_kv=inner // heads,
        d_ff=hidden,
        num_layers=1
        + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.block.")),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )
    return config, tensors


def load_umt5(file: Path, dtype: torch.dtype) -> transformers.UMT5EncoderModel:
    """The encoder of Wan's original file in ``dtype``. UserError as :func:`open_umt5`, or shapes
    that do not fit."""
    config, tensors = open_umt5(file)
    model = skeleton(lambda: transformers.UMT5EncoderModel(config), tensors, file, AGAIN)
    twin = tensors[_EMBEDDING]
    check_fit(model, {**tensors, _EMBEDDING_AGAIN: twin}, file, "Wan's umT5", AGAIN)
    state = {name: tensor.to(dtype) for name, tensor in read_all(tensors).items()}
    model.load_state_dict({**state, _EMBEDDING_AGAIN: state[_EMBEDDING]}, assign=True)
    model.tie_weights()
    return model
