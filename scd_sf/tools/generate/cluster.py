"""``data_prep/generate_clips.py launcher=ray``: one actor per GPU, work re-assigned when an actor
or its node dies.

The actors run the same :class:`Maker` as a launcher's ranks, each with a whole teacher. Ray knows
which workers live, and the task of a dead one is given to another. That is safe because a clip's
file is named by its content and appears whole. All nodes need this package and must see ``model``,
``out`` and ``text_cache``. Ray runs any code that is sent to its ports, so keep a cluster in a
closed network.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from scd_sf.data.clip_index import read_folder_job
from scd_sf.distributed import init_distributed
from scd_sf.tools.data.progress import progress_of
from scd_sf.tools.generate.maker import (
    PROMPTS_AT_ONCE,
    Maker,
    check_problems,
    finish,
    missing,
    prepare,
)
from scd_sf.tools.generate.plan import GenerateConfig, Spec, units_of
from scd_sf.types import UserError, say

POLL_SECONDS = 2.0  # how often new nodes are looked for


class Worker:
    """The code of an actor. Every method returns one line for each problem."""

    def __init__(self, cfg: GenerateConfig) -> None:
        self.maker = Maker(cfg, init_distributed(cfg.timeout_minutes))
        self.maker.tidy()

    def ready(self) -> list[str]:
        """Return when the actor has started."""
        return []

    def encode(self, *prompts: str) -> list[str]:
        """Encode prompts into the cache. With "" among them, write the folder's fixed prompts,
        too."""
        if "" in prompts:
            self.maker.fixed_prompts()
        self.maker.encode(prompts)
        return []

    def make(self, *unit: Spec) -> list[str]:
        """Make a unit, unless all its clips exist."""
        return self.maker.make(unit) if missing(self.maker.root, self.maker.common, unit) else []


def run_on_cluster(cfg: GenerateConfig) -> None:
    """Make all clips on the workers of a Ray cluster. UserError without Ray, or without a cluster
    at the address."""
    try:
        import ray
    except ImportError as error:
        raise UserError("launcher=ray needs Ray; pip install 'scd-sf[cluster]'") from error
    with ExitStack() as locks:
        specs = prepare(cfg, locks)
        common = read_folder_job(cfg.roots[0])
        units = [
            unit for unit in units_of(specs, cfg.batch) if missing(Path(cfg.out), common, unit)
        ]
        prompts = ["", *dict.fromkeys(spec.prompt for unit in units for spec in unit)]
        chunks = [prompts[n : n + PROMPTS_AT_ONCE] for n in range(0, len(prompts), PROMPTS_AT_ONCE)]
        try:
            ray.init(
                address=cfg.cluster.address or None, log_to_driver=False, include_dashboard=False
            )
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"cluster.address={cfg.cluster.address}: no Ray cluster ({error}); 'ray start' one"
            ) from error
        try:
            pool = Pool(cfg, ray)
            say(
                f"{cfg.out}: {len(specs)} clips, {len(units)} batches of at most {cfg.batch} to make"
            )
            pool.run("encode", chunks, "prompt batches")
            problems = pool.run("make", units, "units")
        finally:
            ray.shutdown()
        for line in problems:
            say(line)
        say(finish(cfg, specs, problems))


class Pool:
    """Actors of :class:`Worker`, as many as the cluster has room for, and their current tasks."""

    def __init__(self, cfg: GenerateConfig, ray: Any) -> None:
        self.cfg, self.ray = cfg, ray
        self.idle: list[Any] = []
        # reference -> (actor, number of its task; -1: coming up)
        self.running: dict[Any, tuple[Any, int]] = {}
        self._gpus = cfg.cluster.gpus if ray.cluster_resources().get("GPU", 0) else 0.0
        options = {
            "num_cpus": cfg.cluster.cpus,
            "num_gpus": self._gpus,
            "max_restarts": 0,
            "max_concurrency": 1,
        }
        self._actor = ray.remote(Worker).options(**options)

    def run(self, method: str, tasks: Sequence[Sequence[Any]], label: str) -> list[str]:
        """Call ``method`` of a :class:`Worker` with each task's arguments. Returns one line for
        each problem.

        UserError when a task's workers died more than ``cluster.retries`` times, or too much could
        not be done.
        """
        queue = deque(range(len(tasks)))
        losses = Counter[int]()
        problems: list[str] = []
        count = 0
        with progress_of(label, len(tasks), 0) as progress:
            while count < len(tasks):
                self._grow(len(queue))
                while queue and self.idle:
                    actor, number = self.idle.pop(), queue.popleft()
                    self.running[getattr(actor, method).remote(*tasks[number])] = (actor, number)
                for actor, number, answer in self._answers():
                    if isinstance(answer, str):
                        losses[number] += 1
                        self._check_losses(number, losses, answer)
                        if number >= 0:
                            queue.append(number)
                        continue
                    self.idle.append(actor)
                    if number >= 0:
                        count += 1
                        problems += answer
                        progress(count)
                check_problems(problems)
        return problems

    def _grow(self, queue_length: int) -> None:
        """Start actors where the cluster has room: at the beginning, for a dead one, on a new
        node."""
        worker_count = len(self.idle) + len(self.running)
        limit = self.cfg.cluster.workers or self._room()
        for _ in range(min(limit - worker_count, queue_length - len(self.idle))):
            actor = self._actor.remote(self.cfg)
            self.running[actor.ready.remote()] = (actor, -1)

    def _room(self) -> int:
        """How many workers the cluster's GPUs and CPUs allow."""
        resources = self.ray.cluster_resources()
        rooms = []
        if self._gpus:
            rooms.append(resources.get("GPU", 0) // self._gpus)
        if self.cfg.cluster.cpus:
            rooms.append(resources.get("CPU", 0) // self.cfg.cluster.cpus)
        return int(min(rooms))

    def _answers(self) -> list[tuple[Any, int, list[str] | str]]:
        """(actor, task, answer) of each call that ended meanwhile. For a dead actor the answer is
        Ray's error text."""
        if not self.running:
            time.sleep(POLL_SECONDS)
            return []
        ready_references, _ = self.ray.wait(list(self.running), num_returns=1, timeout=POLL_SECONDS)
        answers = []
        for reference in ready_references:
            actor, number = self.running.pop(reference)
            try:
                answers.append((actor, number, self.ray.get(reference)))
            except self.ray.exceptions.RayTaskError as error:  # the worker lives, its code raised
                if isinstance(error.cause, UserError):
                    raise UserError(str(error.cause)) from error
                raise
            except self.ray.exceptions.RayError as error:
                self.ray.kill(actor)
                answers.append((actor, number, str(error).strip()))
        return answers

    def _check_losses(self, number: int, losses: Counter[int], reason: str) -> None:
        limit = self.cfg.cluster.retries * (1 if number >= 0 else 1 + self._room())
        say(
            f"a worker died {'at its task' if number >= 0 else 'while it came up'}; its work is given to another"
        )
        if losses[number] > limit:
            occasion = f"at the same task ({number})" if number >= 0 else "while they came up"
            raise UserError(
                f"cluster: workers died {losses[number]} times {occasion} (out of memory?); see 'ray logs', or raise "
                f"cluster.retries. Ray says: {reason}"
            )
