"""The quick score against its formulas, and CLIP with random weights of a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from scd_sf.data.clip_statistics import (
    ClipScorer,
    flicker,
    motion,
    saturation,
    statistics,
    temporal_flickering,
)
from scd_sf.data.clips import read_video
from scd_sf.diffusion.samplers import FewStepSampler
from scd_sf.generation.preview import Preview, PreviewConfig
from scd_sf.types import Conditioning, UserError, VideoShape

VBENCH = Path(__file__).resolve().parents[1] / "evaluation" / "vbench"
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


def videos(count: int = 3, frames: int = 5) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, frames, 3, 12, 18), generator=rng, dtype=torch.uint8)


def test_temporal_flickering_is_vbenchs() -> None:
    """The value that VBench's own function gives for the same file (make_golden.py), and the
    formula."""
    golden = json.loads((VBENCH / "golden.json").read_text())["flickering"]
    assert (
        abs(float(temporal_flickering(read_video(VBENCH / "flickering.mp4")[None])[0]) - golden)
        < 1e-6
    )
    x = videos().double().numpy()
    formula = (255 - np.abs(np.diff(x, axis=1)).mean(axis=(2, 3, 4)).mean(axis=1)) / 255
    np.testing.assert_allclose(temporal_flickering(videos()).numpy(), formula, atol=1e-6)
    np.testing.assert_allclose(motion(videos()).numpy(), 1 - formula, atol=1e-6)


def test_what_the_figures_tell() -> None:
    still = videos()[:, :1].expand(-1, 5, -1, -1, -1)
    assert float(motion(still).max()) == 0 and float(flicker(still).max()) < 1e-12
    levels = torch.tensor([0, 20, 40, 60, 80], dtype=torch.uint8).view(1, 5, 1, 1, 1)
    fade, jump = levels.expand(1, 5, 3, 8, 8), levels[:, [0, 4, 0, 4, 0]].expand(1, 5, 3, 8, 8)
    assert float(flicker(fade)) < 1e-12 and abs(float(flicker(jump)) - 160 / 255) < 1e-9
    colours = torch.zeros(3, 2, 3, 4, 4, dtype=torch.uint8)
    colours[0] = 77  # grey
    colours[1, :, 0] = 200  # red
    colours[2, :, 0], colours[2, :, 1:] = 200, 100
    assert saturation(colours).tolist() == [0.0, 1.0, 0.5]
    assert set(statistics(videos(1, 1))) == {"quick/saturation"}
    assert set(statistics(videos())) == {"quick/saturation", "quick/motion", "quick/flicker"}
    for bad, words in (
        (videos()[0], "not uint8"),
        (videos().float(), "not uint8"),
        (videos(1, 1), "at least 2"),
    ):
        with pytest.raises(UserError, match=words):
            temporal_flickering(bad)


def test_clip_with_random_weights(tmp_path: Path) -> None:
    """Equal to open_clip's own calls on the same pictures; weights from a file alone."""
    (tmp_path / "scd-tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "scd-tiny-clip.json")
    torch.manual_seed(0)
    model = open_clip.create_model("scd-tiny-clip")
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    clip, shown = ClipScorer("scd-tiny-clip", tmp_path / "tiny.pt"), videos(2, 3)
    found = clip.similarity(shown, ["a red car", "a dog in the snow"])
    tokens = open_clip.get_tokenizer("scd-tiny-clip")(["a red car", "a dog in the snow"])
    model.eval()
    with torch.no_grad():
        text = model.encode_text(tokens, normalize=True)
        seen = [model.encode_image(clip.pixels(video), normalize=True) for video in shown]
    expected = torch.stack([(s @ t).mean() for s, t in zip(seen, text, strict=True)])
    assert torch.allclose(found.float(), expected, atol=1e-5) and found[0] != found[1]
    assert clip.pixels(shown[0]).shape == (3, 3, 32, 32)
    preview = Preview(
        "",
        Conditioning(torch.zeros(2, 1, 4)),
        VideoShape(1, 4, 2, 2),
        FewStepSampler(),
        tmp_path,
        texts=["a red car", "a dog in the snow"],
        cfg=PreviewConfig("scd-tiny-clip", str(tmp_path / "tiny.pt")),
    )
    logs = preview.measure(shown, torch.ones(2))
    assert logs["quick/clip"] == pytest.approx(float(found.mean())) and logs[
        "quick/motion"
    ] == float(motion(shown).mean())
    with pytest.raises(UserError, match="no such file; give a checkpoint"):
        PreviewConfig(clip_weights=str(tmp_path / "none.pt"))
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pt")
    for name, file, words in (
        ("scd-tiny-clip", "none.pt", "no such file"),
        ("scd-tiny-clip", "other.pt", "not those of scd-tiny-clip"),
        ("no-such-model", "tiny.pt", "unknown to open_clip"),
        ("ViT-B-16-SigLIP", "tiny.pt", "needs files from a hub"),
    ):
        with pytest.raises(UserError, match=words):
            ClipScorer(name, tmp_path / file)
    with pytest.raises(UserError, match="2 videos but 1 prompts"):
        clip.similarity(shown, ["a"])
