"""A real, learnable stand-in for TECO-Minecraft: walks through ViZDoom's mazes with an action per
frame.

    python data_prep/make_doom_actions.py data/doom_actions --train 160 --test 32

writes TECO's own layout, ``{train,test}/<scenario>/NNNNN.mp4`` and ``.npz`` with int64 ``actions``
(F,), and ``manifest.json``. ``actions[f]`` is the action between frames f-1 and f: 0 turn left, 1
turn right, 2 move forward (``actions[0]`` is the last action before the clip). A clip depends on
seed, scenario, split and number alone. An interrupted run goes on where it stopped; a clip is done
when its .npz, written last, exists.

The world: ViZDoom's own maps without monsters, rendered at 320x240 without HUD and weapon, the
middle square filtered to --size; 2 tics of the game (35 a second) per frame. A turn is 10 degrees
per frame. The walker accelerates, and slides on for some frames when it turns. Walks are straight
spans with short turns between them. Walls are read from the map, not from the picture: near a wall
the walker turns to a side where the way is free. A walk that ends early, is stuck or never leaves
its room is drawn again.

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

from scd_sf.config import paragraphs
from scd_sf.data.clips import write_video
from scd_sf.files import hash_json, locked, new_file, sha256_file, write_json
from scd_sf.tools.data.render import begin, run_chunks, sources
from scd_sf.types import UserError, exit_on_user_error, say

# names of the maps
SCENARIOS = ("my_way_home", "health_gathering_supreme", "deathmatch")
SPLITS, ACTIONS = ("train", "test"), ("turn_left", "turn_right", "move_forward")
LEFT, RIGHT, FORWARD = range(3)
FPS, TICS, TURN_DEGREES = 20, 2, 10.0  # frames per second; tics and degrees of a turn per frame
CRF, CHUNK, MAX_TRIES = 12, 4, 50  # quality of the mp4; clips per unit of work; tries per clip
WIDTH, HEIGHT = 320, 240
# tics of waiting, as a new player cannot turn for 7; frames of walking before the clip starts
SPAWN_TICS, WARM_UP = 12, 8
STRAIGHT, TURN = (5, 20), (1, 5)  # frames of a span, at least and at most
# map units: the walker's radius, the distance of a wall that it turns away from, and the free
# distance that it turns to
RADIUS, NEAR, FREE = 17.0, 64.0, 144.0
# a frame of walking fewer map units is stuck; a clip with a larger share of them is rejected
LEAST_SPEED, MOST_STUCK = 2.0, 0.1
LEAST_EXTENT = (
    200.0  # map units; a clip that stays in a smaller square is rejected (a room has 160)
)


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
    """The options that the dataset depends on."""

    seed: int
    frames: int
    size: int
    scenarios: tuple[str, ...]
    train: int
    test: int

    def chunks(self) -> list[Chunk]:
        """All chunks of clips, scenario by scenario."""
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
    # without this the engine writes and reads _vizdoom.ini in the working directory
    game.set_doom_config_path(os.devnull)
    game.set_window_visible(False)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    for set_render in (
        game.set_render_hud,
        game.set_render_weapon,
        game.set_render_crosshair,
        game.set_render_decals,
    ):
        set_render(False)
    for set_render in (
        game.set_render_particles,
        game.set_render_effects_sprites,
        game.set_render_screen_flashes,
    ):
        set_render(False)
    game.set_available_buttons([vizdoom.Button.TURN_LEFT_RIGHT_DELTA, vizdoom.Button.MOVE_FORWARD])
    variables = vizdoom.GameVariable
    game.set_available_game_variables([variables.POSITION_X, variables.POSITION_Y, variables.ANGLE])
    game.set_sectors_info_enabled(True)
    game.set_doom_skill(1)
    game.set_episode_timeout(0)
    game.add_game_args("-nomonsters +movebob 0")
    game.init()
    return game


def walls(game: vizdoom.DoomGame) -> np.ndarray:
    """The map's walls, (N, 4): x1, y1, x2, y2 in map units."""
    lines = [
        line for sector in game.get_state().sectors for line in sector.lines if line.is_blocking
    ]
    return np.asarray(sorted({(line.x1, line.y1, line.x2, line.y2) for line in lines}))


def distances(
    walls_N4: np.ndarray, x: float, y: float, degrees: np.ndarray, aside: np.ndarray
) -> np.ndarray:
    """(R,) map units that each ray goes before it meets a wall; inf where it meets none. Rays have
    headings ``degrees`` (R,) and start ``aside`` (R,) units to the left of (x, y)."""
    angle = np.radians(degrees)[:, None]
    forth_x, forth_y = np.cos(angle), np.sin(angle)
    start_x, start_y = x - aside[:, None] * forth_y, y + aside[:, None] * forth_x
    x1, y1, x2, y2 = walls_N4.T
    along_x, along_y = x2 - x1, y2 - y1
    to_x, to_y = x1 - start_x, y1 - start_y
    cross = forth_x * along_y - forth_y * along_x
    with np.errstate(divide="ignore", invalid="ignore"):
        along_ray = (to_x * along_y - to_y * along_x) / cross
        along_wall = (to_x * forth_y - to_y * forth_x) / cross
    crossing = (np.abs(cross) > 1e-9) & (along_ray > 0) & (along_wall >= 0) & (along_wall <= 1)
    return np.where(crossing, along_ray, np.inf).min(axis=1)


class Walker:
    """Chooses the next action from its place and heading; ``stuck`` counts the frames of walking
    without progress."""

    def __init__(self, walls_N4: np.ndarray, rng: np.random.Generator) -> None:
        self.walls = walls_N4
        self.rng = rng
        self.action = FORWARD
        self.frames_left = int(rng.integers(*STRAIGHT))  # of this action
        self.stuck = 0

    def free(self, x: float, y: float, headings: np.ndarray) -> np.ndarray:
        """Map units that the walker, with its width, can go along each heading (H,), in degrees,
        anticlockwise."""
        aside = np.tile([-RADIUS, 0.0, RADIUS], len(headings))
        return distances(self.walls, x, y, np.repeat(headings, 3), aside).reshape(-1, 3).min(axis=1)

    def next(self, x: float, y: float, heading: float, distance: float) -> int:
        """The action for the next frame. ``distance``: map units walked in the last frame."""
        forward = self.action == FORWARD
        slow = forward and distance < LEAST_SPEED
        if slow:
            self.stuck += 1
        if slow or (forward and self.free(x, y, np.array([heading]))[0] < NEAR):
            self._turn_away(x, y, heading)
        elif self.frames_left <= 0 and not forward:
            self.action = FORWARD
            self.frames_left = int(self.rng.integers(*STRAIGHT, endpoint=True))
        elif self.frames_left <= 0:
            self._turn_somewhere(x, y, heading)
        self.frames_left -= 1
        return self.action

    def _turn_somewhere(self, x: float, y: float, heading: float) -> None:
        """A random short turn if the way is free after it, else as many frames straight on."""
        steps = int(self.rng.integers(*TURN, endpoint=True))
        side = int(self.rng.choice((LEFT, RIGHT)))
        target = heading + TURN_DEGREES * (steps if side == LEFT else -steps)
        self.action = side if self.free(x, y, np.array([target]))[0] >= FREE else FORWARD
        self.frames_left = steps

    def _turn_away(self, x: float, y: float, heading: float) -> None:
        """Turn to one of the nearest headings with a free way, or to the freest if no way is
        free."""
        steps = np.arange(1, int(180 / TURN_DEGREES) + 1)
        turns = np.concatenate([steps, -steps])  # left is positive
        free = self.free(x, y, heading + TURN_DEGREES * turns)
        free_turns = turns[free >= FREE]
        candidates = (
            free_turns[np.abs(free_turns) <= np.abs(free_turns).min() + TURN[1]]
            if len(free_turns)
            else turns[[free.argmax()]]
        )
        turn = int(self.rng.choice(candidates))
        self.action = LEFT if turn > 0 else RIGHT
        self.frames_left = abs(turn)


def film(
    game: vizdoom.DoomGame, chunk: Chunk, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | str:
    """One try at a clip: frames uint8 (F, size, size, 3) and actions (F,), or the reason why it is
    rejected."""
    game.set_seed(int(rng.integers(2**31)))
    game.new_episode()
    game.send_game_command("god")
    game.advance_action(SPAWN_TICS, False)
    game.make_action([float(rng.uniform(-180, 180)), 0.0])
    walker = Walker(walls(game), rng)
    pictures, actions, spots = [], [], []
    distance = np.inf
    for frame in range(-WARM_UP, chunk.frames):
        x, y, heading = game.get_state().game_variables
        action = walker.next(x, y, heading, distance)
        degrees = {LEFT: -TURN_DEGREES, RIGHT: TURN_DEGREES, FORWARD: 0.0}[action] / TICS
        game.make_action([degrees, float(action == FORWARD)], TICS)
        if game.is_episode_finished():
            return "the episode ended"
        state = game.get_state()
        distance = float(np.hypot(state.game_variables[0] - x, state.game_variables[1] - y))
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
    reasons: Counter[str] = Counter()
    for tries in range(MAX_TRIES):
        result = film(game, chunk, np.random.default_rng([*key, tries]))
        if isinstance(result, str):
            reasons[result] += 1
            continue
        pictures, actions = result
        path = clip_path(root, chunk, number)
        write_video(
            path, torch.from_numpy(pictures).permute(0, 3, 1, 2), FPS, crf=CRF, chroma="yuv444p"
        )
        with new_file(path.with_suffix(".npz")) as part, part.open("wb") as file:
            np.savez(file, actions=actions)
        return
    raise RuntimeError(f"{chunk}: {MAX_TRIES} tries in a row were rejected ({dict(reasons)})")


_games: dict[str, vizdoom.DoomGame] = {}


@atexit.register
def close_games() -> None:
    """Ends the games' own processes, which would otherwise outlive the worker."""
    for game in _games.values():
        game.close()
    _games.clear()


def run_chunk(chunk: Chunk, root: Path) -> None:
    """Make the chunk's clips that are not on disk."""
    if chunk.scenario not in _games:
        close_games()
        _games[chunk.scenario] = make_game(chunk.scenario)
    for number in todo(root, chunk):
        make_clip(_games[chunk.scenario], chunk, number, root)


def finish(root: Path, request: Request) -> str:
    """Write ``manifest.json`` (last). Returns a summary."""
    paths = [
        clip_path(root, chunk, number)
        for chunk in request.chunks()
        for number in range(chunk.first, chunk.end)
    ]
    files = sorted(
        str(file_path.relative_to(root))
        for path in paths
        for file_path in (path, path.with_suffix(".npz"))
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
    seed: Annotated[int, typer.Option(help="Random seed of the clips.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that render.")] = 1,
) -> None:
    """Film walks with actions in TECO's layout. Run again to resume."""
    limits = {"train": (train, 0), "test": (test, 0), "seed": (seed, 0), "workers": (workers, 1)}
    for name, (value, minimum) in (limits | {"frames": (frames, 2), "size": (size, 16)}).items():
        if value < minimum:
            raise UserError(f"--{name}: {value} is too small; use {minimum} or more")
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
        if begin(root, request, [f"{split}/{name}" for split, name in product(SPLITS, scenarios)]):
            say(f"{root}: already complete")
        else:
            make(root, request, workers)


def make(root: Path, request: Request, workers: int) -> None:
    """Make all clips that are not on disk, and the manifest."""
    chunks = [chunk for chunk in request.chunks() if todo(root, chunk)]
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as bar:
        total = len(request.scenarios) * (request.train + request.test)
        task = bar.add_task("clips", total=total)
        bar.advance(task, total - sum(chunk.end - chunk.first for chunk in chunks))
        for chunk in run_chunks(run_chunk, chunks, root, workers):
            bar.advance(task, chunk.end - chunk.first)
    say(finish(root, request))


def cli(arguments: list[str] | None = None) -> None:
    """The command line: exits with 0, or 2 and one line for bad input."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=paragraphs(__doc__))(main)
    exit_on_user_error(lambda: app(arguments))


if __name__ == "__main__":
    cli()
