"""Files of a text encoder or language model that others wrote, read as data: config.json, weights,
the tokenizer's.

Of config.json the geometry is taken. What would choose code is not: attention kernels (transformers
fetches them from the hub), code of the repository's own; quantised weights are refused.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import transformers  # its classes take seconds to import: only where they are used

from scd_sf.files import JSON_BYTES, foreign, read_json, refuse_lfs_pointer
from scd_sf.models.skeleton import skeleton
from scd_sf.tensor_files import PICKLES, open_tensor_folder, read_all
from scd_sf.types import UserError

AGAIN = "download it again"
STEM = "model"
LARGEST = 2**20  # width of a token state
# a tokenizer reads none of them
WEIGHTS = {".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx"}
# while transformers builds a model, its settings are those of the whole process
BUILDING = threading.Lock()
QUANTISED = {"quantization_config", "compression_config"}
CHOOSES_CODE = {
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "kernel_config",
    "custom_pipelines",
    "base_model_tp_plan",
}


@dataclass(frozen=True)
class Kind:
    """``mapping`` is the name of transformers' table from configurations to models; ``noun`` and
    ``examples`` are for errors."""

    mapping: str
    noun: str
    examples: str

    @property
    def models(
        self,
    ) -> Mapping[type[transformers.PretrainedConfig], type[transformers.PreTrainedModel]]:
        """Models by their configurations' classes."""
        models: Mapping[type[transformers.PretrainedConfig], type[transformers.PreTrainedModel]]
        models = getattr(transformers, self.mapping)
        return models


ENCODER = Kind("MODEL_FOR_TEXT_ENCODING_MAPPING", "text encoder", "umT5, T5 or a BERT")
LANGUAGE = Kind("MODEL_FOR_CAUSAL_LM_MAPPING", "causal language model", "Qwen2.5 or its like")


def plain_config(value: object, where: Path) -> object:
    """A JSON value without the fields that choose code, at any depth. UserError for one of
    quantised weights."""
    if isinstance(value, list):
        return [plain_config(item, where) for item in value]
    if not isinstance(value, dict):
        return value
    for field in QUANTISED:
        if value.get(field) is not None:
            raise UserError(
                f"{where}: '{field}' is set; quantised weights are not read, use the original ones"
            )
    return {
        name: plain_config(item, where) for name, item in value.items() if name not in CHOOSES_CODE
    }


def read_encoder_config(folder: Path, kind: Kind = ENCODER) -> transformers.PretrainedConfig:
    """``folder/config.json`` as transformers' configuration of a model of this kind. UserError for
    other models."""
    file = folder / "config.json"
    raw = plain_config(read_json(file, AGAIN), file)
    assert isinstance(raw, dict)
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"{file}: model_type is {repr(name)[:80]}, which transformers does not know; {AGAIN}"
        )
    with foreign(_unreadable(folder, kind), AGAIN):
        config = cast(
            "transformers.PretrainedConfig", transformers.CONFIG_MAPPING[name].from_dict(raw)
        )
        width = config.hidden_size if kind is ENCODER else 1
    if type(config) not in kind.models:
        raise UserError(f"{file}: model_type is '{name[:80]}', no {kind.noun}; use {kind.examples}")
    if type(width) is not int or not 1 <= width <= LARGEST:
        raise UserError(
            f"{file}: the width is {repr(width)[:80]}; it must be a number from 1 to {LARGEST}"
        )
    return config


def read_model(
    folder: Path, dtype: torch.dtype, kind: Kind = ENCODER
) -> transformers.PreTrainedModel:
    """The model of ``folder``: config.json beside ``model.safetensors`` or its shards, in
    ``dtype``.

    UserError: unreadable, NaN, weights that are missing or do not fit, a config of more than the
    weights hold.
    """
    config, where = read_encoder_config(folder, kind), _unreadable(folder, kind)
    network = kind.models[type(config)]
    lazy = open_tensor_folder(folder, STEM)
    with BUILDING:
        skeleton(lambda: network(config), lazy, where, AGAIN)
    tensors = read_all(lazy)
    # Without a setting in its config a model attends by SDPA, or eagerly if it has none.
    with BUILDING, foreign(where, AGAIN):
        model, report = network.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    missing_names = sorted(
        key for key in report["missing_keys"] if kind is LANGUAGE or not key.startswith("pooler.")
    )
    if missing_names:
        raise UserError(
            f"{folder}: {len(missing_names)} weights are missing ({missing_names[0]}, ...); {AGAIN}"
        )
    return cast("transformers.PreTrainedModel", model)


def read_tokenizer(
    folder: Path, kind: Kind = ENCODER, *, padding_side: str | None = None
) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a folder. ``padding_side``: left or right; None: its own.

    UserError: a pointer of Git LFS, a file that is too large, unreadable.
    """
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix not in WEIGHTS:
            refuse_lfs_pointer(file)
            if file.stat().st_size > JSON_BYTES:
                raise UserError(
                    f"{file}: {file.stat().st_size:,} bytes, more than a tokenizer's file has; {AGAIN}"
                )
    side = {} if padding_side is None else {"padding_side": padding_side}
    with foreign(_unreadable(folder, kind), AGAIN):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **side
        )
    return cast("transformers.PreTrainedTokenizerBase", tokenizer)


def _unreadable(folder: Path, kind: Kind) -> str:
    return f"{folder}: cannot be read as a {kind.noun}"
