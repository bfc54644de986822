"""Play a world model: start from frames of a clip, then give an action for each frame and see what
it makes of them.

    python recipes/play.py checkpoint=runs/scd tokenizer=assets/tokenizer_doom pixels.root=data/doom \\
        pixels.split=test clip=3 actions='[0, 0, 1, 1, 1, 2]' out=runs/played
    python recipes/play.py ... actions_file=walks.txt

For models of ``recipes/pretrain.py`` with actions. ``clip`` is the number of a clip of the data
set; its first ``context`` frames, with their true actions, are what the model sees. Each action
makes one more frame: ``actions`` is one list, a file has one on each line (numbers with spaces or
commas; ``2*16`` is the action 2 sixteen times). All lists start from the same frames and noise, so
the videos differ by the actions alone. ``out`` gets 0000.mp4 .. and manifest.json.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from scd_sf.config import from_command_line
from scd_sf.data.clips import write_video
from scd_sf.data.sources.pixel_sources import PixelsConfig, open_pixels
from scd_sf.data.sources.pixels import PixelClip
from scd_sf.diffusion.samplers import MOST_STEPS, Sampler
from scd_sf.distributed import init_distributed
from scd_sf.evaluation.prediction import PredictionConfig, load_predictor, predict
from scd_sf.files import (
    Json,
    lines_of,
    locked,
    read_json,
    read_text,
    require_own_folder,
    write_json,
)
from scd_sf.generation.generate import as_uint8
from scd_sf.generation.request import choose_sampler
from scd_sf.models.build import CheckpointConfig, Student
from scd_sf.models.tokenizers.tokenizer import load_tokenizer
from scd_sf.types import (
    Conditioning,
    Tokenizer,
    UserError,
    check_within,
    device_of,
    exit_on_user_error,
    say,
)

MANIFEST = "manifest.json"
LONGEST = 100_000  # actions of a list
ACTION = re.compile(r"(\d{1,6})(?:\*(\d{1,6}))?")


@dataclass
class PlayConfig:
    """A start, and the actions after it."""

    checkpoint: str
    """A run directory of recipes/pretrain.py, or one step_N of it."""
    tokenizer: str
    """Directory of the tokenizer that encoded the training data."""
    out: str
    """Folder for the videos and their manifest."""
    pixels: PixelsConfig
    """The clips to start from."""
    actions: list[int] = field(default_factory=list)
    """The actions, one per generated frame; or give ``actions_file``."""
    actions_file: str = ""
    """A text file with one list of actions on each line; each makes a video."""
    clip: int = 0
    """Number of the clip that the videos start from."""
    context: int = 4
    """Frames of the clip that the model sees."""
    seed: int = 0
    """Seed of the noise, the same for all lists."""
    weights: str = "ema"
    """Which weights of the checkpoint: ema, model or best."""
    steps: int = 0
    """Denoising steps per frame; 0: the checkpoint's."""
    rollout: PredictionConfig = field(default_factory=PredictionConfig)
    """History and guidance."""
    device: str = ""
    """cpu or cuda; empty: a GPU if there is one."""

    def __post_init__(self) -> None:
        check_within(self, {"steps": (0, MOST_STEPS), "context": (1, 10**6), "clip": (0, 10**9)})
        check_within(self, {"seed": (0, 2**63 - 1)})
        if bool(self.actions) == bool(self.actions_file):
            raise UserError("set either actions or actions_file")


def action_lists(cfg: PlayConfig) -> list[list[int]]:
    """The lists of actions. UserError names the line of a file that is no list."""
    if cfg.actions:
        return [cfg.actions]
    path = Path(cfg.actions_file)
    remedy = "write whole numbers with spaces between them, one list on a line"
    lists: list[list[int]] = []
    for number, line in enumerate(lines_of(read_text(path, remedy)), 1):
        actions: list[int] = []
        for word in line.replace(",", " ").split():
            match = ACTION.fullmatch(word)
            if match is None:
                raise UserError(f"{path}:{number}: '{word[:40]}' is no action; {remedy}")
            actions += [int(match[1])] * min(int(match[2] or 1), LONGEST + 1)
            if len(actions) > LONGEST:
                raise UserError(f"{path}:{number}: more than {LONGEST} actions; use fewer")
        if actions:
            lists.append(actions)
    if not lists:
        raise UserError(f"{path}: holds no actions; {remedy}")
    return lists


def open_model(cfg: PlayConfig, path: Path) -> tuple[Student, CheckpointConfig, Sampler, Tokenizer]:
    """Model, description, sampler and tokenizer. UserError: a model without actions, or that does
    not fit the tokenizer."""
    model, description = load_predictor(path, cfg.weights)
    dit = description.model.dit
    if not dit.num_actions:
        raise UserError(
            f"{cfg.checkpoint}: was trained without actions; use recipes/evaluate_prediction.py"
        )
    tokenizer = load_tokenizer(Path(cfg.tokenizer))
    if tokenizer.channels != dit.in_channels:
        raise UserError(
            f"{cfg.tokenizer}: {tokenizer.channels} channels, the model takes {dit.in_channels}; use its own"
        )
    wanted = dataclasses.replace(
        description.sampler, steps=cfg.steps or description.sampler.steps, times=()
    )
    sampler = choose_sampler(description.sampler, wanted, cfg.checkpoint).build()
    return model, description, sampler, tokenizer


def read_start(cfg: PlayConfig, num_actions: int) -> tuple[PixelClip, float]:
    """The first frames of the clip with their actions, and frames per second. UserError: there is
    no such clip, or it is too short."""
    clips = open_pixels(dataclasses.replace(cfg.pixels, num_actions=num_actions))
    if cfg.clip >= len(clips):
        raise UserError(f"clip is {cfg.clip}; {cfg.pixels.root} has clips 0 .. {len(clips) - 1}")
    clip = clips.read(cfg.clip)
    if clip.actions_F is None:
        raise UserError(f"{clip.id}: has no actions; use clips of the kind that was trained on")
    if clip.frames < cfg.context:
        raise UserError(f"context is {cfg.context}, but {clip.id} has {clip.frames} frames")
    return (
        PixelClip(
            clip.id, clip.frames_F3HW[: cfg.context], clip.actions_F[: cfg.context], clip.label
        ),
        clips.fps,
    )


def play(
    cfg: PlayConfig,
    model: Student,
    sampler: Sampler,
    tokenizer: Tokenizer,
    start: PixelClip,
    actions: Sequence[int],
    device: torch.device,
) -> Tensor:
    """uint8 (F, 3, H, W): the start as it is, then one frame per action."""
    pixels = start.frames_F3HW[None].float() / 127.5 - 1
    assert start.actions_F is not None
    all_actions = torch.cat([start.actions_F, torch.tensor(actions)])[None]
    label = None if start.label is None else torch.tensor([start.label])
    cond = Conditioning.of_frames(1, all_actions, label).to(device)
    context = tokenizer.encode(pixels).to(device)
    parts = predict(model, context, cond, len(actions), sampler, [cfg.seed], cfg.rollout)
    latents = torch.cat(list(parts), 1).float().cpu()
    frames = as_uint8((tokenizer.decode(latents).clamp(-1, 1) + 1) / 2)[0]
    return torch.cat([start.frames_F3HW, frames])


def main() -> None:
    cfg = from_command_line(PlayConfig, __doc__ or "")
    ranks = init_distributed()
    if ranks.world > 1:
        raise UserError("recipes/play.py is for one process; start it with python")
    device, out = device_of(cfg.device), Path(cfg.out)
    lists = action_lists(cfg)
    model, description, sampler, tokenizer = open_model(
        cfg, ranks.checkpoint(cfg.checkpoint, cfg.weights)
    )
    num_actions = description.model.dit.num_actions
    for number, actions in enumerate(lists, 1):
        if not all(0 <= action < num_actions for action in actions):
            wrong = next(action for action in actions if not 0 <= action < num_actions)
            raise UserError(
                f"actions: list {number} has {wrong}; the model knows 0 .. {num_actions - 1}"
            )
    start, fps = read_start(cfg, num_actions)
    require_own_folder(out, [MANIFEST])
    request = json.loads(json.dumps({"config": dataclasses.asdict(cfg), "actions": lists}))
    with locked(out, "recipes/play.py"):
        path = out / MANIFEST
        old = read_json(path, "use another out=") if path.is_file() else request
        if any(old.get(name) != request[name] for name in request):
            raise UserError(f"{path}: made with other settings or actions; use another out=")
        videos: list[Json] = []
        write_json(path, {**request, "start": start.id, "fps": fps, "videos": videos})
        for number, actions in enumerate(lists):
            frames = play(cfg, model.to(device), sampler, tokenizer, start, actions, device)
            name = f"{number:04d}.mp4"
            write_video(out / name, frames, fps)
            videos.append({"file": name, "actions": actions})
            write_json(path, {**request, "start": start.id, "fps": fps, "videos": videos})
            say(f"{out / name}: {cfg.context} frames of {start.id}, then {len(actions)} by actions")


if __name__ == "__main__":
    exit_on_user_error(main)
