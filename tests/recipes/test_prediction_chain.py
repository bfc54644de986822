"""From TECO's layout to a score: encode, train SCD from scratch, predict, measure; and what is
refused on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import recipe_runner
import torch
from diffusers import AutoencoderDC

from scd_sf.checkpoint import find
from scd_sf.config import load_config
from scd_sf.data.clips import read_video
from scd_sf.data.frames import FrameClips
from scd_sf.evaluation.prediction_protocols import named_protocol
from scd_sf.evaluation.prediction_result import PredictionResult
from scd_sf.files import sha256_file
from scd_sf.models.tokenizers.tokenizer import Normalisation, save_tokenizer
from scd_sf.types import UserError

EVALUATE = "recipes/evaluate_prediction.py"
SCD = "{encoder_layers: [0, 1], decoder: {layers: [2], fusion: paper, prefix_rope: temporal, prefix_time: step}}"
DIT = (
    "{num_attention_heads: 2, attention_head_dim: 16, in_channels: 4, out_channels: 4, freq_dim: 16, ffn_dim: 32, "
    "num_layers: 3, num_actions: 3}"
)


def write_tokenizer(folder: Path) -> Path:
    """A random DC-AE of 64 pixels to 4x4x4."""
    torch.manual_seed(0)
    blocks = ("ResBlock",) * 5
    model = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8,) * 5,
        decoder_block_out_channels=(8,) * 5,
        encoder_layers_per_block=(0, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 1),
        encoder_qkv_multiscales=((),) * 5,
        decoder_qkv_multiscales=((),) * 5,
        scaling_factor=1.0,
    )
    save_tokenizer(model, Normalisation((0.0,) * 4, (1.0,) * 4), folder)
    return folder


@pytest.fixture(scope="module")
def chain(doom_actions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tokenizer``, ``train`` and ``test`` encoded, and ``run``: a model of a few updates."""
    root = tmp_path_factory.mktemp("prediction")
    write_tokenizer(root / "tokenizer")
    for split in ("train", "test"):
        recipe_runner.succeed(
            "data_prep/teco_minecraft.py",
            "--root",
            doom_actions,
            "--split",
            split,
            "--tokenizer",
            root / "tokenizer",
            "--out",
            root / split,
        )
    recipe_runner.succeed(
        "recipes/pretrain.py",
        f"data={root / 'train'}",
        f"val={root / 'test'}",
        f"run.dir={root / 'run'}",
        "frames=12",
        f"model={{dit: {DIT}, scd: {SCD}}}",
        "engine={backend: torch}",
        "validation_clips=1",
        f"preview={{tokenizer: {root / 'tokenizer'}, clips: 1, context: 2, frames: 3}}",
        "sampler.steps=2",
        "train={steps: 2, global_batch: 2, micro_batch: 1, save_every: 2, validate_every: 2}",
    )
    return root


def evaluation(chain: Path, data: Path, out: Path, *more: str) -> list[str]:
    custom = "custom={context: 4, generated: 6, clips: 3, resolution: 64, seeds: [0, 1]}"
    given = [
        f"checkpoint={chain / 'run'}",
        f"tokenizer={chain / 'tokenizer'}",
        f"out={out}",
        f"pixels.root={data}",
    ]
    return [
        *given,
        custom,
        "networks=false",
        "batch=2",
        "sampler.steps=2",
        "videos=1",
        "timed=3",
        *more,
    ]


def test_the_whole_chain(chain: Path, doom_actions: Path, tmp_path: Path) -> None:
    assert FrameClips(chain / "train").info.num_actions == 3
    shown = read_video(chain / "run" / "videos" / "00000002.mp4")
    assert shown.shape == (5, 3, 128, 64)  # truth above prediction
    assert sorted(path.name for path in (chain / "run" / "videos").iterdir()) == [
        "00000000.mp4",
        "00000002.mp4",
    ]
    for out, more in ((tmp_path / "a", "batch=2"), (tmp_path / "b", "batch=3")):
        recipe_runner.succeed(EVALUATE, *evaluation(chain, doom_actions, out, more))
    result, other = (PredictionResult.read(tmp_path / name / "result.json") for name in "ab")
    assert (
        result.clips == 3
        and "custom" in result.title
        and set(result.figures) == {"psnr", "ssim", "mse"}
    )
    # a clip's noise is its own
    assert result.curves["psnr"] == pytest.approx(other.curves["psnr"], abs=1e-3)
    assert result.figures["psnr"].value > 3.0 and len(result.curves["ssim"]) == 6
    cost = json.loads((tmp_path / "a" / "cost.json").read_text())
    # encoder once, decoder twice
    assert cost["block_passes_per_frame"] == 2 + 2 * 1 and cost["seconds_per_frame"] > 0
    assert all(len(row) == 3 and min(row) > 0 for row in cost["by_frame"].values())
    assert len(list((tmp_path / "a" / "videos").glob("*.mp4"))) == 1

    removed = tmp_path / "a" / "clips" / "clip-00001.safetensors"
    before = removed.read_bytes()
    removed.unlink()
    recipe_runner.succeed(EVALUATE, *evaluation(chain, doom_actions, tmp_path / "a"))
    assert len(removed.read_bytes()) == len(before)
    again = PredictionResult.read(tmp_path / "a" / "result.json")
    assert again.figures["psnr"].value == pytest.approx(result.figures["psnr"].value, abs=1e-4)

    scores = {}
    for name in ("reconstruction", "repeat"):
        recipe_runner.succeed(
            EVALUATE, *evaluation(chain, doom_actions, tmp_path / name, f"checkpoint={name}")
        )
        scores[name] = PredictionResult.read(tmp_path / name / "result.json").figures["psnr"].value
    assert scores["repeat"] > scores["reconstruction"]  # a random tokenizer reconstructs nothing


def test_a_model_is_played_by_actions(chain: Path, doom_actions: Path, tmp_path: Path) -> None:
    """The same start and noise, other actions from some frame on: equal until there."""
    (tmp_path / "walks.txt").write_text("1 1 1,2 2\n1*3 0 0\n")
    given = [
        f"checkpoint={chain / 'run'}",
        f"tokenizer={chain / 'tokenizer'}",
        f"pixels.root={doom_actions}",
        "clip=1",
    ]
    out = tmp_path / "out"
    said = recipe_runner.succeed(
        "recipes/play.py", *given, f"out={out}", f"actions_file={tmp_path}/walks.txt"
    ).out
    assert "4 frames of" in said and "then 5 by actions" in said
    videos = [read_video(out / f"000{number}.mp4") for number in range(2)]
    assert [tuple(video.shape) for video in videos] == [(9, 3, 64, 64)] * 2
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["videos"][1] == {"file": "0001.mp4", "actions": [1, 1, 1, 0, 0]}
    script = recipe_runner.load_script("recipes/play.py")
    cfg = load_config(script.PlayConfig, None, [*given, "out=x", "actions=[1, 1, 1, 2, 2]"])
    model, description, sampler, tokenizer = script.open_model(cfg, find(chain / "run"))
    start, _ = script.read_start(cfg, description.model.dit.num_actions)
    first, second = (
        script.play(cfg, model, sampler, tokenizer, start, actions, torch.device("cpu"))
        for actions in ([1, 1, 1, 2, 2], [1, 1, 1, 0, 0])
    )
    assert torch.equal(first[:7], second[:7]) and not torch.equal(first[7:], second[7:])
    for more, message in (
        ("actions=[0, 3]", "list 1 has 3; the model knows 0 .. 2"),
        ("actions=[]", "set either actions or actions_file"),
        (f"actions_file={chain / 'run' / 'config.yaml'}", "is no action"),
        ("clip=99", "clip is 99;"),
        ("context=999", "context is 999, but"),
        (f"out={out}", "made with other settings or actions"),
    ):
        more_given = [] if "actions" in more else ["actions=[1, 1]"]
        place = [] if more.startswith("out") else [f"out={tmp_path / 'new'}"]
        refused = recipe_runner.run("recipes/play.py", *given, *more_given, *place, more)
        assert refused.code == 2 and message in refused.err, (more, refused.err[-600:])
        assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_ssim_and_fvd_s_network_can_be_chosen(tmp_path: Path) -> None:
    """Named protocols too; a TorchScript file runs only when its hash is named; nothing is chosen
    in vain."""
    script = recipe_runner.load_script(EVALUATE)
    given = ["checkpoint=repeat", "tokenizer=x", "out=x", "pixels.root=x"]

    def configured(*more: str) -> Any:
        return load_config(script.EvaluatePredictionConfig, None, [*given, *more])

    assert configured("protocol=minecraft-scd").rules() == named_protocol("minecraft-scd")
    assert configured("protocol=minecraft-scd", "ssim=padded").rules().ssim == "padded"
    assert (
        configured("ssim=padded").rules().ssim == "padded" and configured().rules().ssim == "valid"
    )
    with pytest.raises(UserError, match="ssim"):
        configured("ssim=same")
    with pytest.raises(UserError, match="i3d_torchscript is for FVD"):
        configured("i3d_torchscript=x", "fvd=false")
    file, device = tmp_path / "i3d_torchscript.pt", torch.device("cpu")
    torch.jit.script(torch.nn.Flatten()).save(str(file))
    own = sha256_file(file)
    with pytest.raises(UserError, match=f"sha256 is {own}, not bec6519"):
        configured(f"i3d_torchscript={file}").metric_networks(device)
    # accepted; the weights of the other network are not there
    with pytest.raises(UserError, match="lpips_alex"):
        configured(
            f"i3d_torchscript={file}", f"i3d_sha256={own}", f"metrics={tmp_path}"
        ).metric_networks(device)


def test_what_does_not_fit_is_refused(chain: Path, doom_actions: Path, tmp_path: Path) -> None:
    recipe_runner.succeed(EVALUATE, *evaluation(chain, doom_actions, tmp_path / "out"))
    shutil.copytree(chain / "tokenizer", tmp_path / "wrong")
    config = json.loads((tmp_path / "wrong" / "config.json").read_text())
    (tmp_path / "wrong" / "config.json").write_text(json.dumps({**config, "scaling_factor": 2.0}))
    for more, message in (
        ("sampler.steps=3", "begun with another sampler"),
        (f"tokenizer={tmp_path / 'wrong'}", "begun with another tokenizer_sha256"),
        ("custom.clips=9", "4 clips, the protocol has 9"),
        ("custom.resolution=32", "the protocol needs 10 frames of 32x32"),
        ("custom.generated=90", "the protocol needs 94 frames"),
        ("pixels.num_actions=2", "2 actions, the model knows 3"),
        ("protocol=minecraft", "protocol 'minecraft' is unknown"),
        (f"checkpoint={tmp_path}", str(tmp_path)),
        ("rollout.guidance={corruption: 1.5, actions: 2.0}", "not both"),
    ):
        out = [] if "begun" in message else [f"out={tmp_path / 'new'}"]
        given = evaluation(chain, doom_actions, tmp_path / "out")
        result = recipe_runner.run(EVALUATE, *given, *out, more)
        assert result.code == 2 and message in result.err, (more, result.code, result.err[-600:])
