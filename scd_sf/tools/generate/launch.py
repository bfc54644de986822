"""``data_prep/generate_clips.py`` under a launcher: static shares by id, no rank waits for
another's clip."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext

from scd_sf.distributed import Ranks, rank_zero_first
from scd_sf.tools.data.progress import progress_of
from scd_sf.tools.generate.maker import Maker, check_problems, finish, missing, prepare
from scd_sf.tools.generate.plan import GenerateConfig, Unit, units_of, wanted_clips
from scd_sf.types import say


def run_on_ranks(cfg: GenerateConfig, ranks: Ranks) -> None:
    """Make the units ``[rank::world]`` of the list in id order on every rank. Rank 0 holds the
    folder."""
    with ExitStack() as locks:
        rank_zero_first(ranks, lambda: prepare(cfg, locks))
        _make(cfg, ranks)


def _make(cfg: GenerateConfig, ranks: Ranks) -> None:
    maker = Maker(cfg, ranks)
    specs = wanted_clips(cfg, maker.common)
    units = units_of(specs, cfg.batch)
    own_units = [
        unit for unit in units[ranks.rank :: ranks.world] if missing(maker.root, maker.common, unit)
    ]
    if ranks.local_rank == 0:
        maker.tidy()
    if ranks.is_main:
        maker.fixed_prompts()
        say(
            f"{cfg.out}: {len(specs)} clips; rank 0 of {ranks.world} has "
            f"{len(own_units)} batches of at most {cfg.batch} to make"
        )
    ranks.barrier()
    maker.encode(list(dict.fromkeys(spec.prompt for unit in own_units for spec in unit)))
    problems = _make_all(maker, own_units, units, ranks)
    for line in problems:
        say(f"rank {ranks.rank}: {line}")
    count = ranks.max(len(problems))
    ranks.barrier()
    if ranks.is_main:
        hint = []
        if count:
            hint = [f"up to {count} clips of a rank could not be made, see the ranks' output"]
        say(finish(cfg, specs, problems or hint))


def _make_all(
    maker: Maker, own_units: Sequence[Unit], units: Sequence[Unit], ranks: Ranks
) -> list[str]:
    """Make this rank's units and return one line for each problem. All ranks call a ZeRO-3 teacher
    equally often, so a rank with fewer units computes one without writing it."""
    is_partitioned = maker.cfg.engine.backend == "deepspeed"
    rounds = ranks.max(len(own_units)) if is_partitioned else len(own_units)
    problems: list[str] = []
    with (
        progress_of("batches of rank 0", rounds, 0)
        if ranks.is_main
        else nullcontext(lambda count: None) as progress
    ):
        for number in range(rounds):
            if number < len(own_units):
                problems += maker.make(own_units[number])
            else:
                maker.make(units[0], write=False)
            check_problems(problems)
            progress(number + 1)
    return problems
