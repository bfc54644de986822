"""``data_prep/generate_clips.py`` under a launcher: static shares by id, no rank waits for another's clip."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack

from scd_sf.distributed import Ranks, init_distributed, rank_zero_first
from scd_sf.tools.generate.maker import Maker, finish, missing, prepare
from scd_sf.tools.generate.plan import GenerateConfig, Unit, units_of, wanted_clips
from scd_sf.types import UserError, say

MAX_PROBLEMS = 10  # of one rank; more is no accident
SECONDS_PER_LINE = 20.0


def run_generate(cfg: GenerateConfig) -> None:
    """Make all clips that are missing, by the launcher that ``cfg`` names."""
    if cfg.launcher == "ray":
        from scd_sf.tools.generate.cluster import run_on_cluster

        run_on_cluster(cfg)
    else:
        run_on_ranks(cfg, init_distributed(cfg.timeout_minutes))


def run_on_ranks(cfg: GenerateConfig, ranks: Ranks) -> None:
    """Every rank makes the units ``[rank::world]`` of the list in id order; rank 0 holds the folder."""
    with ExitStack() as held:
        rank_zero_first(ranks, lambda: prepare(cfg, held))
        _make(cfg, ranks)


def _make(cfg: GenerateConfig, ranks: Ranks) -> None:
    maker = Maker(cfg, ranks)
    specs = wanted_clips(cfg, maker.common)
    units = units_of(specs, cfg.batch)
    mine = [unit for unit in units[ranks.rank :: ranks.world] if missing(maker.root, maker.common, unit)]
    if ranks.local_rank == 0:
        maker.tidy()
    if ranks.is_main:
        maker.fixed_prompts()
        say(f"{cfg.out}: {len(specs)} clips, rank 0 has {len(mine)} units of {cfg.batch} to make")
    ranks.barrier()
    maker.encode(list(dict.fromkeys(spec.prompt for unit in mine for spec in unit)))
    problems = _make_all(maker, mine, units, ranks)
    for line in problems:
        say(f"rank {ranks.rank}: {line}")
    count = ranks.max(len(problems))
    ranks.barrier()
    if ranks.is_main:
        hint = [f"up to {count} clips of a rank could not be made, see the ranks' output"] if count else []
        say(finish(cfg, specs, problems or hint))


def _make_all(maker: Maker, mine: Sequence[Unit], units: Sequence[Unit], ranks: Ranks) -> list[str]:
    """This rank's units. All call a ZeRO-3 teacher equally often: who has fewer units computes one for nothing."""
    together = maker.cfg.engine.kind == "deepspeed"
    rounds = ranks.max(len(mine)) if together else len(mine)
    problems: list[str] = []
    started = last = time.monotonic()
    for number in range(rounds):
        if number < len(mine):
            problems += maker.make(mine[number])
        else:
            maker.make(units[0], write=False)
        if len(problems) > MAX_PROBLEMS:
            raise UserError(f"rank {ranks.rank}: {len(problems)} clips could not be made; the last: {problems[-1]}")
        now = time.monotonic()
        if ranks.is_main and (now - last > SECONDS_PER_LINE or number + 1 == rounds):
            seconds, last = (now - started) / (number + 1), now
            left = round(seconds * (rounds - number - 1))
            say(f"{number + 1}/{rounds} units  {seconds:.3g} s/unit  left {left // 60}:{left % 60:02d}")
    return problems
