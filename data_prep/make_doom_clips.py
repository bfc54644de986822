"""Make the demo's world: captioned 64x64 clips of one camera motion each, rendered without a screen
by ViZDoom.

    python data_prep/make_doom_clips.py data/doom --train 200 --val 16

writes ``clips/<split>/<id>.mp4``, ``clips.jsonl`` and ``manifest.json`` (read them with
``scd_sf.data.clips.ClipSet``). --train and --val count clips per motion and place. A clip depends
on seed, split, place, motion and number alone, except that on a busy machine single frames can
differ by a few grey levels. An interrupted run goes on where it stopped.

The world: three of ViZDoom's own scenario maps without monsters, rendered 160x120 at 35 Hz and
box-filtered to 64x64, no HUD, weapon, crosshair, decals, particles or view bob. Each try starts at
a random spot and heading among columns and trees at random spots around the camera (never straight
ahead, whatever the motion, so that the first frame does not give the motion away). Turns are 3-4
degrees per frame, constant within a clip; the motion has been going on for 12 tics when the clip
starts. A try is kept unless it breaks the rule ``REJECT``; a rejected one is drawn again.

Licences, as stated in the vizdoom 1.3.2 wheel (nothing of it is part of this repository): ViZDoom's
own code is MIT (METADATA); it contains ZDoom, whose code comes under several licences (METADATA:
http://zdoom.org/wiki/license); the textures and sprites come from freedoom2.wad: "freely
redistributable under the terms of the modified BSD license".
"""

from __future__ import annotations

import atexit
import json
import math
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
from scd_sf.data.clips import AGAIN, Clip, write_clips, write_video
from scd_sf.files import locked, parse_json, read_text, sha256_file, typed, write_text
from scd_sf.tools.data.render import begin, run_chunks, sources
from scd_sf.types import UserError, exit_on_user_error, say

SIZE, FPS = 64, 35  # pixels along a side; frames per second
CRF, CHUNK, MAX_TRIES = 6, 16, 500  # quality of the mp4; clips per unit of work; tries per clip
# tics: a new player cannot turn for 7; landmarks fall to the floor; the motion before the clip
SPAWN_TICS, SETTLE_TICS, WARM_UP_TICS = 10, 25, 12
DRAWS = 40  # random spots for landmarks, the first half of them in the first frame's view
IN_VIEW, LANDMARKS = 4, 14  # most landmarks, in that view and in all
SPLITS, MOTIONS = ("train", "val"), ("forward", "turn_left", "turn_right", "still")
PLAYER_RADIUS = 16.0
# name and radius in map units
ACTORS = (
    ("TallRedColumn", 16.0),
    ("TallRedColumn", 16.0),
    ("TallGreenColumn", 16.0),
    ("BigTree", 32.0),
)
NAMES = {  # how captions call a place; the last is held out
    "meadow": "a green meadow with a mossy stone wall|a dark green meadow under a night sky|"
    "green grass and old stones at night",
    "hall": "a hall with red lamps on the ceiling|a grey stone hall under red lamps|"
    "a large room with round red lights above",
    "arena": "a round arena with tan walls|a grey arena with a tall brown wall|an open grey court ringed by a tan wall",
}
# place: name of its map
PLACES = {"meadow": "health_gathering", "hall": "predict_position", "arena": "defend_the_center"}
# where player and landmarks may stand: x0, x1, y0, y1 in map units
FLOORS = {
    "meadow": (64, 1152, 64, 1152),
    "hall": (-512, 192, -576, 576),
    "arena": (-500, 500, -500, 500),
}
TURNS = (
    "SIDE turn: the camera turns SIDE in {}",
    "SIDE pan, the view swings SIDE across {}",
    "SIDE, the camera rotates to the SIDE in {}",
    "SIDE rotation, looking further SIDE in {}",
    "SIDE: the camera keeps turning SIDE around {}",
)
# the last is held out; each turn names its side twice: left differs from right by that word only
PHRASES = {
    "forward": (
        "forward walk: the camera moves forward through {}",
        "forward, walking straight ahead into {}",
        "forward motion, going forward across {}",
        "forward, the camera advances forward in {}",
        "forward: moving on and on through {}",
    ),
    "turn_left": tuple(phrase.replace("SIDE", "left") for phrase in TURNS),
    "turn_right": tuple(phrase.replace("SIDE", "right") for phrase in TURNS),
    "still": (
        "still: the camera stands still in {}",
        "still picture, nothing moves in {}",
        "still, a motionless view of {}",
        "still shot, the camera rests in {}",
        "still: the camera does not move at all in {}",
    ),
}
REJECT = {
    # of every frame: mean of the 8-bit depth buffer; below it a near wall or column fills the view
    "depth_mean": 9.0,
    # of the first frame: median depth in the middle of the picture; below it the way is blocked
    "depth_ahead": 20.0,
    "frame_std": 18.0,  # of every frame: std of the 64x64x3 picture; below it the picture is dull
    # of every frame: most height of the camera; above it the player stands on something
    "units_above_floor": 1.0,
    # of forward clips: distance from first to last frame; below it the player met an obstacle
    "units_per_frame": 5.3,
}


@dataclass(frozen=True)
class Chunk:
    """Clips ``first`` .. ``end``-1 of one split, place and motion: the unit of work and of
    resuming."""

    seed: int
    frames: int
    split: str
    place: str
    motion: str
    first: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.place}-{self.motion}-{self.first:05d}"


@dataclass(frozen=True)
class Request:
    """The options that the dataset depends on."""

    seed: int
    frames: int
    train: int
    val: int

    def chunks(self) -> list[Chunk]:
        """All work in the order of ``clips.jsonl``."""
        return [
            Chunk(self.seed, self.frames, split, place, motion, first, min(first + CHUNK, count))
            for (split, count), place, motion in product(
                (("train", self.train), ("val", self.val)), PLACES, MOTIONS
            )
            for first in range(0, count, CHUNK)
        ]


def make_game(place: str) -> vizdoom.DoomGame:
    """A headless game on the place's map; buttons: turn by degrees (positive right), move
    forward."""
    game = vizdoom.DoomGame()
    game.set_doom_scenario_path(os.path.join(vizdoom.scenarios_path, PLACES[place] + ".wad"))
    # without this the engine writes and reads _vizdoom.ini in the working directory
    game.set_doom_config_path(os.devnull)
    game.set_window_visible(False)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
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
    game.set_available_game_variables(
        [variables.POSITION_X, variables.POSITION_Y, variables.POSITION_Z]
    )
    game.set_doom_skill(1)
    game.add_game_args("-nomonsters +movebob 0")
    game.init()
    return game


def furnish(game: vizdoom.DoomGame, place: str, rng: np.random.Generator) -> None:
    """Start an episode at a random spot and heading (degrees, anticlockwise from +x) among random
    landmarks."""
    x0, x1, y0, y1 = FLOORS[place]
    game.set_seed(int(rng.integers(2**31)))
    game.new_episode()
    game.send_game_command("god")
    game.advance_action(SPAWN_TICS, False)
    x, y, heading = rng.uniform(x0, x1), rng.uniform(y0, y1), rng.uniform(-180, 180)
    game.make_action([-heading, 0.0])
    forth_x, forth_y = math.cos(math.radians(heading)), math.sin(math.radians(heading))
    count = 0
    for draw in range(DRAWS):
        limit = 40 if draw < DRAWS // 2 else 180
        bearing, distance = math.radians(rng.uniform(-limit, limit)), rng.uniform(110, 480)
        actor, radius = ACTORS[rng.integers(len(ACTORS))]
        ahead, aside = distance * math.cos(bearing), distance * math.sin(bearing)
        if count >= (IN_VIEW if draw < DRAWS // 2 else LANDMARKS):
            continue
        spot_x, spot_y = (
            x + ahead * forth_x - aside * forth_y,
            y + ahead * forth_y + aside * forth_x,
        )
        if (ahead > 0 and abs(aside) < PLAYER_RADIUS + radius + 16) or not (
            x0 <= spot_x <= x1 and y0 <= spot_y <= y1
        ):
            continue
        reach = PLAYER_RADIUS + 2 * radius  # the game summons this far in front of the player
        game.send_game_command(
            f"warp {spot_x - reach * forth_x:.1f} {spot_y - reach * forth_y:.1f}"
        )
        game.advance_action(1, False)
        game.send_game_command(f"summon {actor}")
        game.advance_action(1, False)
        count += 1
    game.send_game_command(f"warp {x:.1f} {y:.1f}")
    game.advance_action(SETTLE_TICS, False)


def film(game: vizdoom.DoomGame, motion: str, degrees: float, frames: int) -> np.ndarray | str:
    """One try at a clip: uint8 (F, H, W, 3), or the name of the rule (``REJECT``) that it
    breaks."""
    action = [degrees, float(motion == "forward")]
    for _ in range(WARM_UP_TICS):
        game.set_action(action)
        game.advance_action(1, False)
    pictures, spots = [], []
    for number in range(frames):
        game.make_action(action)
        state = game.get_state()
        depth = state.depth_buffer
        if state.game_variables[2] > REJECT["units_above_floor"]:
            return "units_above_floor"
        if number == 0 and np.median(depth[45:75, 60:100]) < REJECT["depth_ahead"]:
            return "depth_ahead"
        if depth.mean() < REJECT["depth_mean"]:
            return "depth_mean"
        picture = np.asarray(
            Image.fromarray(state.screen_buffer).resize((SIZE, SIZE), Image.Resampling.BOX)
        )
        if picture.std() < REJECT["frame_std"]:
            return "frame_std"
        pictures.append(picture)
        spots.append(np.asarray(state.game_variables))
    if motion == "forward" and np.linalg.norm(spots[-1] - spots[0]) < REJECT["units_per_frame"] * (
        frames - 1
    ):
        return "units_per_frame"
    return np.stack(pictures)


def captions(place: str, motion: str, rng: np.random.Generator) -> tuple[str, str]:
    """A random training caption and the held-out caption; both begin with the motion word."""
    *phrases, held_out_phrase = PHRASES[motion]
    *names, held_out_name = NAMES[place].split("|")
    return str(rng.choice(phrases)).format(rng.choice(names)), held_out_phrase.format(held_out_name)


def make_clip(
    game: vizdoom.DoomGame, chunk: Chunk, number: int, root: Path
) -> tuple[Clip, dict[str, int]]:
    """Try until one clip is kept, and write its file. Returns the clip, and the number of tries that
    each rule rejected."""
    key = [
        chunk.seed,
        SPLITS.index(chunk.split),
        list(PLACES).index(chunk.place),
        MOTIONS.index(chunk.motion),
        number,
    ]
    rejections = dict.fromkeys(REJECT, 0)
    for tries in range(1, MAX_TRIES + 1):
        rng = np.random.default_rng([*key, tries])
        furnish(game, chunk.place, rng)
        sign = {"turn_left": -1.0, "turn_right": 1.0}.get(chunk.motion, 0.0)
        degrees = round(sign * rng.uniform(3.0, 4.0), 3)
        pictures = film(game, chunk.motion, degrees, chunk.frames)
        if not isinstance(pictures, str):
            break
        rejections[pictures] += 1
    else:
        raise RuntimeError(f"{chunk.name}: {MAX_TRIES} tries in a row were rejected ({rejections})")
    caption, held_out = captions(chunk.place, chunk.motion, np.random.default_rng(key))
    name = f"{chunk.split}-{chunk.place}-{chunk.motion}-{number:05d}"
    path = root / "clips" / chunk.split / f"{name}.mp4"
    write_video(
        path, torch.from_numpy(pictures).permute(0, 3, 1, 2), FPS, crf=CRF, chroma="yuv444p"
    )
    clip = Clip(
        id=name,
        split=chunk.split,
        place=chunk.place,
        motion=chunk.motion,
        actions=(chunk.motion,) * chunk.frames,
        degrees_per_frame=degrees,
        caption=caption,
        held_out_caption=held_out,
        seed=chunk.seed,
        tries=tries,
        path=path.relative_to(root).as_posix(),
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
    )
    return clip, rejections


_games: dict[str, vizdoom.DoomGame] = {}


@atexit.register
def close_games() -> None:
    """Ends the games' own processes, which would otherwise outlive the worker."""
    for game in _games.values():
        game.close()
    _games.clear()


def run_chunk(chunk: Chunk, root: Path) -> str:
    """Make a chunk's clips and, when all are written, its part file ``work/<name>.json``."""
    if chunk.place not in _games:
        close_games()
        _games[chunk.place] = make_game(chunk.place)
    results = [
        make_clip(_games[chunk.place], chunk, number, root)
        for number in range(chunk.first, chunk.end)
    ]
    totals = {rule: sum(rejections[rule] for _, rejections in results) for rule in REJECT}
    write_text(
        root / "work" / f"{chunk.name}.json",
        json.dumps([[clip.to_json() for clip, _ in results], totals]),
    )
    return chunk.name


def prepare(root: Path, request: Request) -> bool:
    """Make or resume the directory; True if it is complete. UserError: it holds another dataset."""
    return begin(root, request, [f"clips/{split}" for split in SPLITS])


def chunk_done(root: Path, chunk: Chunk) -> bool:
    """Whether the chunk's part file exists and all its clips are on disk in full size."""
    part = root / "work" / f"{chunk.name}.json"
    if not part.is_file():
        return False
    clips, _ = read_part(part)
    return all(
        (root / clip.path).is_file() and (root / clip.path).stat().st_size == clip.bytes
        for clip in clips
    )


def read_part(part: Path) -> tuple[list[Clip], dict[str, int]]:
    """A chunk's clips, and the number of tries that each rule rejected."""
    rows = parse_json(read_text(part, AGAIN), part, AGAIN)
    lines, totals = typed(rows, tuple[list[str], dict[str, int]], part, AGAIN)
    return [Clip.from_json(line, str(part)) for line in lines], totals


def finish(root: Path, request: Request) -> str:
    """Join the part files into ``clips.jsonl``, then write ``manifest.json`` last. Returns a
    summary."""
    clips: list[Clip] = []
    rejections = {place: Counter(dict.fromkeys(REJECT, 0)) for place in PLACES}
    for chunk in request.chunks():
        part = root / "work" / f"{chunk.name}.json"
        chunk_clips, totals = read_part(part)
        clips += chunk_clips
        rejections[chunk.place].update(totals)
    counts = Counter(clip.place for clip in clips)
    facts = {
        "counts": Counter(clip.split for clip in clips),
        "places": PLACES,
        "motions": MOTIONS,
        "request": asdict(request),
        "reject": REJECT,
        "kept": counts,
        "rejected": rejections,
        "video": {
            "codec": "h264",
            "crf": CRF,
            "pixels": "yuv444p",
            "rendered": "160x120, box filter to 64x64",
        },
        "sources": sources(),
    }
    write_clips(
        root, clips, {"frames": request.frames, "height": SIZE, "width": SIZE, "fps": FPS}, facts
    )
    shutil.rmtree(root / "work")
    ratios = ", ".join(
        f"{place} {number}/{number + rejections[place].total()}" for place, number in counts.items()
    )
    return f"{root}: {len(clips)} clips; kept/tried {ratios}"


def main(
    out: Annotated[Path, typer.Argument(help="Directory for the clips (made if missing).")],
    train: Annotated[int, typer.Option(help="Training clips per motion and place.")] = 200,
    val: Annotated[int, typer.Option(help="Validation clips per motion and place.")] = 16,
    frames: Annotated[int, typer.Option(help="Frames per clip: 1 + 4*k.")] = 33,
    seed: Annotated[int, typer.Option(help="Random seed of the clips.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that render.")] = os.cpu_count() or 1,
) -> None:
    """Render captioned one-motion clips of three Doom places. Run again to resume."""
    if frames < 5 or (frames - 1) % 4:
        raise UserError(
            f"--frames: {frames} is not 1 + 4*k (k >= 1); use {1 + 4 * max(1, round((frames - 1) / 4))}"
        )
    for name, value, minimum in (
        ("train", train, 0),
        ("val", val, 0),
        ("seed", seed, 0),
        ("workers", workers, 1),
    ):
        if value < minimum:
            raise UserError(f"--{name}: {value} is too small; use {minimum} or more")
    if train + val == 0:
        raise UserError("--train/--val: both are 0; ask for at least one clip")
    root, request = out.resolve(), Request(seed, frames, train, val)
    with locked(root, "make_doom_clips"):
        if prepare(root, request):
            say(f"{root}: already complete")
        else:
            make(root, request, workers)


def make(root: Path, request: Request, workers: int) -> None:
    """Make all chunks that are not on disk, and the index."""
    todo = [chunk for chunk in request.chunks() if not chunk_done(root, chunk)]
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as bar:
        total = sum(chunk.end - chunk.first for chunk in request.chunks())
        clips_to_make = sum(chunk.end - chunk.first for chunk in todo)
        task = bar.add_task("clips", total=total, completed=total - clips_to_make)
        for chunk in run_chunks(run_chunk, todo, root, workers):
            bar.advance(task, chunk.end - chunk.first)
    say(finish(root, request))


def cli(arguments: list[str] | None = None) -> None:
    """The command line: exits with 0, or 2 and one line for bad input."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=paragraphs(__doc__))(main)
    exit_on_user_error(lambda: app(arguments))


if __name__ == "__main__":
    cli()
