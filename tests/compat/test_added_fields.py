"""A field that was added since is no reason to refuse a folder or to forget a hash: what an earlier
version stored without it was made with its default. Another value is refused as ever."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import recipe_runner
import torch

from scd_sf.data.frames import FrameSetInfo, FrameWriter
from scd_sf.data.prompts import Prompt
from scd_sf.data.sources.pixel_sources import PixelsConfig
from scd_sf.distributed import Ranks
from scd_sf.files import hash_json, identity
from scd_sf.generation.folder import open_sample_folder
from scd_sf.generation.guided import SampleGuidance
from scd_sf.models.wan.text import TextEncoderConfig
from scd_sf.tools.data.render import begin
from scd_sf.tools.prompts.extend.rules import Gates
from scd_sf.tools.prompts.extend.run import ExtendConfig
from scd_sf.tools.prompts.result import result_folder
from scd_sf.types import UserError


@dataclass(frozen=True)
class Request:
    """As the scripts that render clips have it."""

    seed: int = 0
    places: tuple[str, ...] = ("hall", "meadow")
    later: int = 3


def frames(root: Path, value: float) -> None:
    info = FrameSetInfo(4, 2, 2, 8, fps=value)
    writer = FrameWriter(root, {"source": "x"}, info, frames_per_shard=2)
    if not writer.done:
        writer.append("c0", torch.zeros(2, 4, 2, 2))


def samples(root: Path, value: float) -> None:
    root.mkdir(exist_ok=True)
    guidance = asdict(SampleGuidance(corruption=1.5, context_noise=value))
    open_sample_folder(root, {"fps": 16, "guidance": guidance | {"negative_prompt": ""}})


def prompts(root: Path, value: int) -> None:
    settings = {"seed": 1, "gates": asdict(Gates(min_words=value))}
    with result_folder(root, settings, ExtendConfig, "extend_prompts"):
        if not (root / "settings.json").is_file():
            (root / "settings.json").write_text(json.dumps(settings))


def rendering(root: Path, value: int) -> None:
    begin(root, Request(later=value), ["clips"])


def predictions(root: Path, value: int) -> None:
    recipe: Any = recipe_runner.load_script("recipes/evaluate_prediction.py")
    (root.parent / "tokenizer").mkdir(exist_ok=True)
    (root.parent / "tokenizer" / "config.json").touch()
    cfg = recipe.EvaluatePredictionConfig(
        "run", str(root.parent / "tokenizer"), str(root), PixelsConfig("teco")
    )
    cfg.custom.context = value
    recipe.claim(cfg, Ranks(0, 1, 0, torch.device("cpu")), None)


# name: how a folder is opened, default of a field, another value, its file, the section in the file
PLACES: dict[str, tuple[Callable[..., None], float, float, str, list[str], str]] = {
    "frames": (frames, 20.0, 10.0, "building.json", ["inputs", "info"], "fps"),
    "samples": (samples, 0.05, 0.1, "manifest.json", ["settings", "guidance"], "context_noise"),
    "prompts": (prompts, 40, 50, "settings.json", ["gates"], "min_words"),
    "rendering": (rendering, 3, 4, "work/request.json", [], "later"),
    "predictions": (predictions, 8, 4, "generation.json", ["custom"], "context"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_folder_without_the_field_goes_on(tmp_path: Path, name: str) -> None:
    opened, default, other, file, sections, added = PLACES[name]
    root = tmp_path / "folder"
    opened(root, default)
    document = json.loads((root / file).read_text())
    section = document
    for part in sections:
        section = section[part]
    assert section.pop(added) == default
    (root / file).write_text(json.dumps(document))
    opened(root, default)
    (root / file).write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"other|another|differ"):
        opened(root, other)


@dataclass(frozen=True)
class LaterPrompt:
    id: str
    prompt: str
    held_out: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    weight: float = 1.0
    words: list[str] = field(default_factory=list)


def test_a_hash_stays_while_an_added_field_is_at_its_default() -> None:
    first = ("id", "prompt", "held_out", "tags")
    before = hash_json(asdict(Prompt("p0", "a hall")))
    assert hash_json(identity(Prompt("p0", "a hall"), first)) == before
    assert hash_json(identity(LaterPrompt("p0", "a hall"), first)) == before
    for changed in (
        LaterPrompt("p0", "a hall", weight=2.0),
        LaterPrompt("p0", "a hall", words=["a"]),
    ):
        assert hash_json(identity(changed, first)) != before
    settings = {"max_length": 512, "hidden_layer": -1, "scale": 1.0, "clean": True}
    assert settings.items() <= TextEncoderConfig(path="x").settings.items()
    assert "package" not in TextEncoderConfig(path="x").settings
    assert SimpleNamespace(**TextEncoderConfig(scale=2.0, path="x").settings).scale == 2.0
