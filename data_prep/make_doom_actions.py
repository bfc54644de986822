"""A real, learnable stand-in for TECO-Minecraft: walks through ViZDoom's mazes with an action per
frame.

    python data_prep/make_doom_actions.py data/doom_actions --train 160 --test 32

writes TECO's own layout, ``{train,test}/<scenario>/NNNNN.mp4`` and ``.npz`` with int64 ``actions``
(F,), and ``manifest.json``. ``actions[f]`` is what led from frame f-1 to frame f: 0 turn left, 1
turn right, 2 move forward (``actions[0]`` is the last of some actions before the clip). A clip is a
function of (seed, scenario, split, number). An interrupted run goes on where it stopped; a clip is
done when its .npz, written last, is there.

The world: maps of ViZDoom's own without monsters, rendered 320x240 without HUD and weapon, the
middle square filtered to --size; 2 tics of the game (35 a second) per frame. A turn is 10 degrees
per frame; who walks gathers speed and slides on for some frames when he turns. Walks are straight
spans with short turns between. Walls are known from the map (never from the picture): near one the
walker turns to a side where the way is free. A walk that ends early, is stuck or never leaves its
room is drawn again.

Licences: as in ``make_doom_clips.py`` (nothing of the game is part of this repository); the
manifest names them.
"""

from __future__ import annotations

import atexit
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
import vizdoom
from PIL import Image
from rich.progress import MofNCompleteColumn, Progress

from scd_sf.data.clips import write_video
from scd_sf.files import hash_json, locked, new_file, sha256_file, write_json
from scd_sf.tools.data.render import begin, run_chunks, sources
from scd_sf.types import UserError, exit_on_user_error, say

# places to walk in, by their maps' names
SCENARIOS = ("my_way_home", "health_gathering_supreme", "deathmatch")
SPLITS, ACTIONS = ("train", "test"), ("turn_left", "turn_right", "move_forward")
LEFT, RIGHT, FORWARD = range(3)
FPS, TICS, TURN_DEGREES, CRF, CHUNK, MAX_TRIES = 20, 2, 10.0, 12, 4, 50
WIDTH, HEIGHT = 320, 240
# tics: a new player cannot turn for 7; frames: the walk is under way when the clip starts
SPAWN_TICS, WARM_UP = 12, 8
STRAIGHT, TURN = (5, 20), (1, 5)  # frames of a span, at least and at most
# map units: the walker's, turn away from walls this near, until this free
RADIUS, NEAR, FREE = 17.0, 64.0, 144.0
# a frame of walking slower than this (units) is stuck; reject clips with more
LEAST_SPEED, MOST_STUCK = 2.0, 0.1
LEAST_EXTENT = 200.0  # reject clips that stay inside a square of so many units: a room has 160


@dataclass(frozen=True)
class Chunk:
    """Clips ``first`` .. ``end``-1 of one scenario and split: the unit of work."""

    seed: int
    frames: int
    size: int
    scenario: str
    split: str
    first: int
    end: int


@dataclass(frozen=True)
class Request:
    """What decides the dataset (the number of workers does not)."""

    seed: int
    frames: int
    size: int
    scenarios: tuple[str, ...]
    train: int
    test: int

    def chunks(self) -> list[Chunk]:
        """All work."""
        return [
            Chunk(
                self.seed, self.frames, self.size, scenario, split, first, min(first + CHUNK, count)
            )
            for scenario, (split, count) in product(
                self.scenarios, (("train", self.train), ("test", self.test))
            )
            for first in range(0, count, CHUNK)
        ]


def clip_path(root: Path, chunk: Chunk, number: int) -> Path:
    """The clip's mp4; its actions lie beside it as .npz."""
    return root / chunk.split / chunk.scenario / f"{number:05d}.mp4"


def todo(root: Path, chunk: Chunk) -> list[int]:
    """The numbers of the chunk's clips that are not on disk yet."""
    paths = {number: clip_path(root, chunk, number) for number in range(chunk.first, chunk.end)}
    return [
        number
        for number, path in paths.items()
        if not (path.is_file() and path.with_suffix(".npz").is_file())
    ]


def make_game(scenario: str) -> vizdoom.DoomGame:
    """A headless game on the scenario's map; buttons: turn by degrees (positive right), move
    forward."""
    game = vizdoom.DoomGame()
    game.set_doom_scenario_path(os.path.join(vizdoom.scenarios_path, scenario + ".wad"))
    # else the engine leaves _vizdoom.ini in the working directory, and reads it
    game.set_doom_config_path(os.devnull)
    game.set_window_visible(False)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    for show in (
        game.set_render_hud,
        game.set_render_weapon,
        game.set_render_crosshair,
        game.set_render_decals,
    ):
        show(False)
    for show in (
        game.set_render_particles,
        game.set_render_effects_sprites,
        game.set_render_screen_flashes,
    ):
        show(False)
    game.set_available_buttons([vizdoom.Button.TURN_LEFT_RIGHT_DELTA, vizdoom.Button.MOVE_FORWARD])
    known = vizdoom.GameVariable
    game.set_available_game_variables([known.POSITION_X, known.POSITION_Y, known.ANGLE])
    game.set_sectors_info_enabled(True)
    game.set_doom_skill(1)
    game.set_episode_timeout(0)
    game.add_game_args("-nomonsters +movebob 0")
    game.init()
    return game


def walls(game: vizdoom.DoomGame) -> np.ndarray:
    """(N, 4) x1 y1 x2 y2 of the map's lines that nobody can cross."""
    lines = [
        line for sector in game.get_state().sectors for line in sector.lines if line.is_blocking
    ]
    return np.asarray(sorted({(line.x1, line.y1, line.x2, line.y2) for line in lines}))


def distances(
    walls_N4: np.ndarray, x: float, y: float, degrees: np.ndarray, aside: np.ndarray
) -> np.ndarray:
    """How far rays go before a wall, in map units. Rays start ``aside`` units to the left of (x,
    y), all (R,)."""
    angle = np.radians(degrees)[:, None]
    forth_x, forth_y = np.cos(angle), np.sin(angle)
    start_x, start_y = x - aside[:, None] * forth_y, y + aside[:, None] * forth_x
    x1, y1, x2, y2 = walls_N4.T
    along_x, along_y, to_x, to_y = x2 - x1, y2 - y1, x1 - start_x, y1 - start_y
    cross = forth_x * along_y - forth_y * along_x
    with np.errstate(divide="ignore", invalid="ignore"):
        far = (to_x * along_y - to_y * along_x) / cross
        where = (to_x * forth_y - to_y * forth_x) / cross
    hit = (np.abs(cross) > 1e-9) & (far > 0) & (where >= 0) & (where <= 1)
    return np.where(hit, far, np.inf).min(axis=1)


class Walker:
    """Chooses the next action from where it stands; ``stuck`` counts frames of walking that led
    nowhere."""

    def __init__(self, walls_N4: np.ndarray, rng: np.random.Generator) -> None:
        self.walls, self.rng = walls_N4, rng
        # held for so many frames more
        self.action, self.left = FORWARD, int(rng.integers(*STRAIGHT))
        self.stuck = 0

    def free(self, x: float, y: float, headings: np.ndarray) -> np.ndarray:
        """How far the walker, as wide as it is, could go along each heading (degrees,
        anticlockwise)."""
        aside = np.tile([-RADIUS, 0.0, RADIUS], len(headings))
        return distances(self.walls, x, y, np.repeat(headings, 3), aside).reshape(-1, 3).min(axis=1)

    def next(self, x: float, y: float, heading: float, moved: float) -> int:
        """The action for the next frame; ``moved``: units in the last frame."""
        blocked = self.action == FORWARD and (
            moved < LEAST_SPEED or self.free(x, y, np.array([heading]))[0] < NEAR
        )
        self.stuck += self.action == FORWARD and moved < LEAST_SPEED
        if blocked:
            self._turn_away(x, y, heading)
        elif self.left <= 0 and self.action != FORWARD:
            self.action, self.left = FORWARD, int(self.rng.integers(*STRAIGHT, endpoint=True))
        elif self.left <= 0:
            self._turn_somewhere(x, y, heading)
        self.left -= 1
        return self.action

    def _turn_somewhere(self, x: float, y: float, heading: float) -> None:
        """A random short turn to where the way is free; straight on for as long where it is not."""
        steps = int(self.rng.integers(*TURN, endpoint=True))
        side = int(self.rng.choice((LEFT, RIGHT)))
        there = heading + TURN_DEGREES * (steps if side == LEFT else -steps)
        self.action = side if self.free(x, y, np.array([there]))[0] >= FREE else FORWARD
        self.left = steps

    def _turn_away(self, x: float, y: float, heading: float) -> None:
        """Turn to one of the nearer headings where the way is free; to the freest where it is
        nowhere."""
        turns = np.arange(1, int(180 / TURN_DEGREES) + 1)
        both = np.concatenate([turns, -turns])  # left is positive
        free = self.free(x, y, heading + TURN_DEGREES * both)
        wide = both[free >= FREE]
        near = (
            wide[np.abs(wide) <= np.abs(wide).min() + TURN[1]]
            if len(wide)
            else both[[free.argmax()]]
        )
        chosen = int(self.rng.choice(near))
        self.action, self.left = LEFT if chosen > 0 else RIGHT, abs(chosen)


def film(
    game: vizdoom.DoomGame, chunk: Chunk, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | str:
    """One try at a clip: uint8 (F, size, size, 3) and its actions (F,), or why it was rejected."""
    game.set_seed(int(rng.integers(2**31)))
    game.new_episode()
    game.send_game_command("god")
    game.advance_action(SPAWN_TICS, False)
    game.make_action([float(rng.uniform(-180, 180)), 0.0])
    walker = Walker(walls(game), rng)
    pictures, actions, spots = [], [], []
    moved = np.inf
    for frame in range(-WARM_UP, chunk.frames):
        x, y, heading = game.get_state().game_variables
        action = walker.next(x, y, heading, moved)
        degrees = {LEFT: -TURN_DEGREES, RIGHT: TURN_DEGREES, FORWARD: 0.0}[action] / TICS
        game.make_action([degrees, float(action == FORWARD)], TICS)
        if game.is_episode_finished():
            return "the episode ended"
        state = game.get_state()
        moved = float(np.hypot(state.game_variables[0] - x, state.game_variables[1] - y))
        spots.append(state.game_variables[:2])
        if frame >= 0:
            square = ((WIDTH - HEIGHT) // 2, 0, (WIDTH + HEIGHT) // 2, HEIGHT)
            picture = Image.fromarray(state.screen_buffer)
            pictures.append(
                np.asarray(
                    picture.resize((chunk.size, chunk.size), Image.Resampling.BOX, box=square)
                )
            )
            actions.append(action)
    if walker.stuck > MOST_STUCK * chunk.frames:
        return "stuck"
    if np.ptp(spots, axis=0).max() < min(LEAST_EXTENT, LEAST_SPEED * chunk.frames):
        return "stays in one place"
    return np.stack(pictures), np.asarray(actions, dtype=np.int64)


def make_clip(game: vizdoom.DoomGame, chunk: Chunk, number: int, root: Path) -> None:
    """Try until one clip is kept; write its mp4, then its .npz."""
    key = [chunk.seed, SCENARIOS.index(chunk.scenario), SPLITS.index(chunk.split), number]
    why: Counter[str] = Counter()
    for tries in range(MAX_TRIES):
        made = film(game, chunk, np.random.default_rng([*key, tries]))
        if isinstance(made, str):
            why[made] += 1
            continue
        pictures, actions = made
        path = clip_path(root, chunk, number)
        write_video(
            path, torch.from_numpy(pictures).permute(0, 3, 1, 2), FPS, crf=CRF, chroma="yuv444p"
        )
        with new_file(path.with_suffix(".npz")) as part, part.open("wb") as file:
            np.savez(file, actions=actions)
        return
    raise RuntimeError(f"{chunk}: {MAX_TRIES} tries in a row were rejected ({dict(why)})")


_games: dict[str, vizdoom.DoomGame] = {}


@atexit.register
def close_games() -> None:
    """Ends the games' own processes, which would otherwise outlive the worker."""
    for game in _games.values():
        game.close()
    _games.clear()


def run_chunk(chunk: Chunk, root: Path) -> None:
    """Make those of a chunk's clips that are missing."""
    if chunk.scenario not in _games:
        close_games()
        _games[chunk.scenario] = make_game(chunk.scenario)
    for number in todo(root, chunk):
        make_clip(_games[chunk.scenario], chunk, number, root)


def finish(root: Path, request: Request) -> str:
    """Write ``manifest.json`` (last). Returns a summary."""
    paths = [
        clip_path(root, c, number) for c in request.chunks() for number in range(c.first, c.end)
    ]
    files = sorted(
        str(p.relative_to(root)) for path in paths for p in (path, path.with_suffix(".npz"))
    )
    size = sum((root / file).stat().st_size for file in files)
    manifest = {
        "request": asdict(request),
        "actions": ACTIONS,
        "fps": FPS,
        "tics_per_frame": TICS,
        "degrees_per_turn": TURN_DEGREES,
        "video": {
            "codec": "h264",
            "crf": CRF,
            "pixels": "yuv444p",
            "rendered": f"{WIDTH}x{HEIGHT}, middle square",
        },
        "bytes": size,
        "hash": hash_json({file: sha256_file(root / file) for file in files}),
        "sources": sources(),
    }
    write_json(root / "manifest.json", manifest)
    shutil.rmtree(root / "work")
    return f"{root}: {len(paths)} clips of {request.frames} frames, {size / 1e6:.1f} MB"


def main(
    out: Annotated[Path, typer.Argument(help="Directory for the clips (made if missing).")],
    train: Annotated[int, typer.Option(help="Training clips per scenario.")] = 1000,
    test: Annotated[int, typer.Option(help="Test clips per scenario.")] = 256,
    frames: Annotated[int, typer.Option(help="Frames per clip.")] = 300,
    size: Annotated[int, typer.Option(help="Pixels along a side, even.")] = 128,
    scenario: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable: {', '.join(SCENARIOS)}.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides everything but the number of workers.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
) -> None:
    """Film walks with actions in TECO's layout. Run again to resume."""
    least = {"train": (train, 0), "test": (test, 0), "seed": (seed, 0), "workers": (workers, 1)}
    for name, (value, low) in (least | {"frames": (frames, 2), "size": (size, 16)}).items():
        if value < low:
            raise UserError(f"--{name}: {value} is too small; use {low} or more")
    if train + test == 0:
        raise UserError("--train/--test: both are 0; ask for at least one clip")
    if size % 2 or size > HEIGHT:
        raise UserError(
            f"--size: {size} is odd or more than {HEIGHT}; use an even size up to {HEIGHT}"
        )
    scenarios = tuple(dict.fromkeys(scenario or SCENARIOS[:1]))
    if unknown := [name for name in scenarios if name not in SCENARIOS]:
        raise UserError(f"--scenario: '{unknown[0]}' is unknown; use one of {', '.join(SCENARIOS)}")
    root, request = out.resolve(), Request(seed, frames, size, scenarios, train, test)
    with locked(root, "make_doom_actions"):
        if begin(
            root, asdict(request), [f"{split}/{name}" for split, name in product(SPLITS, scenarios)]
        ):
            say(f"{root}: already complete")
        else:
            make(root, request, workers)


def make(root: Path, request: Request, workers: int) -> None:
    """All clips that are not there, and the manifest."""
    left = [chunk for chunk in request.chunks() if todo(root, chunk)]
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as bar:
        total = len(request.scenarios) * (request.train + request.test)
        task = bar.add_task("clips", total=total)
        bar.advance(task, total - sum(chunk.end - chunk.first for chunk in left))
        for chunk in run_chunks(run_chunk, left, root, workers):
            bar.advance(task, chunk.end - chunk.first)
    say(finish(root, request))


def cli(arguments: list[str] | None = None) -> None:
    """The command line: exits with 0, or 2 and one line for bad input."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    exit_on_user_error(lambda: app(arguments))


if __name__ == "__main__":
    cli()
