"""A plain list of prompts -> a directory of encoded ones, shared by any number of ranks.

Shard n holds the prompts n*per_shard and on, and is the work of rank n mod N. It is recorded under
``records/`` when it is whole; when all are, rank 0 writes the manifest. So the same command goes on
after any kill, on any number of ranks.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from scd_sf.data.manifest import AGAIN, BUILDING, MANIFEST
from scd_sf.data.prompt_list import read_prompt_list
from scd_sf.data.prompts import Prompt, encode_prompts, finish_prompts, finite
from scd_sf.data.shards import ShardFile, ShardWriter
from scd_sf.distributed import Ranks, rank_zero_first
from scd_sf.files import (
    hash_json,
    identity,
    locked,
    read_typed,
    require_own_folder,
    sha256_file,
    sha256_folder,
    write_json,
    write_tensors,
)
from scd_sf.models.wan.live_prompts import states_alone
from scd_sf.models.wan.text import (
    TextEncoder,
    TextEncoderConfig,
    encoder_parts,
    encoder_width,
    load_text_encoder,
    text_config,
    wan_negative,
)
from scd_sf.tensor_files import dtype_of
from scd_sf.tools.data.progress import progress_of
from scd_sf.types import UserError, say

RECORDS = "records"


@dataclass
class EncodeListConfig:
    """Which prompts are encoded, by what, in which type."""

    prompts: str
    """A list (txt, csv, jsonl), or the folder of a filter or extender."""
    model: str
    """Directory with the text encoder."""
    out: str
    """Folder of the encoded prompts."""
    column: str = "prompt"
    """Column or key of the prompts in a csv or jsonl file."""
    negative_prompt: str = "wan"
    """What stage 3's teacher is guided away from; wan: Wan 2.1's own; empty: the empty prompt."""
    dtype: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Type that the encoder computes in."""
    store: Literal["", "bf16", "fp32", "fp16"] = ""
    """Type on the disk; empty: the same, as in stage 3 that encodes by itself."""
    per_shard: int = 256
    """Prompts in a file."""

    def __post_init__(self) -> None:
        if self.per_shard < 1:
            raise UserError(f"per_shard is {self.per_shard}; it must be at least 1")
        self.negative_prompt = wan_negative(self.negative_prompt)


def encode_list(cfg: EncodeListConfig, ranks: Ranks) -> None:
    """Encode the prompts that are not encoded yet. UserError for a folder of other files or of
    other inputs."""
    config, out = text_config(cfg.model), Path(cfg.out)
    width = encoder_width(config)
    prompts = read_prompt_list(Path(cfg.prompts), cfg.column)
    with ExitStack() as locks:
        writers: list[ShardWriter] = []
        rank_zero_first(ranks, lambda: writers.append(_begin(cfg, config, prompts, locks)))
        if ranks.any(bool(writers) and writers[0].finished):
            if ranks.is_main:
                say(f"{out}: already complete")
            return
        encoder = load_text_encoder(config, device=ranks.device, dtype=dtype_of(cfg.dtype))
        _encode_share(cfg, encoder, prompts, ranks)
        ranks.barrier()
        if ranks.is_main:
            _finish(cfg, encoder, prompts, writers[0])
            say(f"{out}: {len(prompts)} prompts, states of width {width}")
        ranks.barrier()


def _begin(
    cfg: EncodeListConfig, config: TextEncoderConfig, prompts: Sequence[Prompt], locks: ExitStack
) -> ShardWriter:
    """Begin or resume the folder and lock it until ``locks`` is closed. Returns its writer."""
    out = Path(cfg.out)
    weights, tokens = encoder_parts(config)
    inputs = {
        "prompts_sha256": hash_json(
            [identity(prompt, ("id", "prompt", "held_out", "tags")) for prompt in prompts]
        ),
        "text_weights_sha256": sha256_file(weights)
        if weights.is_file()
        else sha256_folder(weights, "*.safetensors"),
        "text_tokenizer_sha256": sha256_folder(tokens, "token*.json"),
        "text_config": config.settings,
        "negative_prompt": cfg.negative_prompt,
        "text_dtype": cfg.dtype,
        "store_text": cfg.store or cfg.dtype,
        "per_shard": cfg.per_shard,
    }
    require_own_folder(out, (MANIFEST, BUILDING))
    locks.enter_context(locked(out, "encode_prompts"))
    writer = ShardWriter(out, inputs)
    if not writer.finished:
        (out / RECORDS).mkdir(exist_ok=True)
    return writer


def _encode_share(
    cfg: EncodeListConfig, encoder: TextEncoder, prompts: Sequence[Prompt], ranks: Ranks
) -> None:
    """Write the shards of this rank that are not complete, each with its record."""
    out, dtype = Path(cfg.out), dtype_of(cfg.store or cfg.dtype)
    starts = range(0, len(prompts), cfg.per_shard)[ranks.rank :: ranks.world]
    with progress_of("shards of rank 0", len(starts), 0) as report:
        for number, start in enumerate(starts, 1):
            name = f"text-{start // cfg.per_shard:05d}"
            file, record = out / f"{name}.safetensors", out / RECORDS / f"{name}.json"
            if not (
                file.is_file()
                and record.is_file()
                and read_typed(record, ShardFile, AGAIN).bytes == file.stat().st_size
            ):
                rows = prompts[start : start + cfg.per_shard]
                states = states_alone(encoder, [row.prompt for row in rows])
                tokens = finite(
                    torch.cat(states).to(dtype), f"text states of prompts {start} and on"
                )
                write_tensors(
                    file,
                    {"tokens": tokens, "lengths": torch.tensor([len(state) for state in states])},
                )
                write_json(
                    record,
                    asdict(ShardFile(file.name, len(rows), file.stat().st_size, sha256_file(file))),
                )
            if ranks.is_main:
                report(number)


def _finish(
    cfg: EncodeListConfig, encoder: TextEncoder, prompts: Sequence[Prompt], writer: ShardWriter
) -> None:
    names = [f"text-{number:05d}.json" for number in range(math.ceil(len(prompts) / cfg.per_shard))]
    writer.shards["text"] = [
        read_typed(writer.root / RECORDS / name, ShardFile, AGAIN) for name in names
    ]
    text = encode_prompts(
        writer,
        prompts,
        lambda texts: states_alone(encoder, texts),
        max_length=encoder.max_length,
        dtype=dtype_of(cfg.store or cfg.dtype),
        negative=cfg.negative_prompt,
    )
    finish_prompts(writer, text)
    shutil.rmtree(writer.root / RECORDS, ignore_errors=True)
