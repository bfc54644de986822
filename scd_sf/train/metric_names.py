"""The meaning of every metric that a recipe logs: the one table behind ``scd runs show`` and the page
``docs/reference/metrics.md``."""

from __future__ import annotations

import re

# Name (``*`` stands for a part that varies) -> meaning.
MEANINGS: dict[str, str] = {
    "loss": "what the optimiser minimises, mean over the global batch",
    "loss/t*": "the loss at noise levels in this range (1 is pure noise)",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate",
    "val/loss": "loss of the averaged weights on held-out clips at fixed noise; the least is the best",
    "val/right": "held-out loss with each clip's own prompt",
    "val/wrong_motion": "held-out loss with the prompt of another motion; above val/right: prompts matter",
    "val/null": "held-out loss without a prompt",
    "val/psnr": "likeness of decoded to true held-out pictures in dB; more is better",
    "val/psnr_first_frame": "the same of each clip's first frame",
    "val/ssim": "structural likeness of decoded to true held-out pictures, to 1; more is better",
    "val/sharpness": "fine detail of decoded against true held-out pictures; 1 is equal",
    "quick/saturation": "colour of the preview videos, 0 grey to 1",
    "quick/motion": "mean change from frame to frame in the preview videos; 0 is a still picture",
    "quick/flicker": "jumps of the preview videos' brightness; a steady fade gives 0",
    "quick/clip": "likeness of the preview videos to their prompts (CLIP); more is better",
    "quick/not_finite": "preview videos with values that are not finite",
    "dmd/fake_real": "distance between critic's and teacher's prediction; a rise to a multiple is a collapse",
    "dmd/normaliser": "distance between rollout and teacher's prediction, by which the gradient is divided",
    "dmd/gradient": "mean size of the gradient that the student's videos get",
    "rollout/std": "standard deviation of the student's latents",
    "critic/loss": "how well the critic denoises the student's videos; near-constant when it keeps up",
    "critic/grad_norm": "norm of the critic's gradient before clipping",
    "monitor/fake_real": "dmd/fake_real, smoothed over about ten steps",
    "monitor/std_ratio": "rollout/std over data_std; 1 is the data's",
    "monitor/std_mean": "monitor/std_ratio, smoothed over about ten steps",
    "monitor/best_step": "newest step that was healthy; its average is the checkpoint's best",
    "l1": "mean absolute error of the pixels",
    "mse": "mean squared error of the pixels",
    "gradient": "error of the pixels' differences: edges",
    "perceptual": "LPIPS distance of the pictures",
    "anchor": "distance of the latents from the principal components",
    "gan": "the decoder's adversarial loss; lower: the discriminator takes more for real",
    "gan_balance": "factor that makes both losses' gradients equally large",
    "discriminator": "the discriminator's loss; 0: it tells all apart, 1: nothing",
    "alarm/*": "1: this alarm was raised at the step, 0: it was over",
    "perf/seconds": "duration of the step",
    "perf/tokens_per_second": "latent tokens of all ranks per second",
    "perf/mfu": "share of the devices' peak that the model's arithmetic uses",
    "perf/peak_gib": "largest memory of rank 0 so far",
}


def meaning(name: str) -> str:
    """The meaning of a metric; empty for an unknown one."""
    for pattern, text in MEANINGS.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", ".+"), name):
            return text
    return ""


def metrics_table() -> str:
    """All metrics as a Markdown table."""
    rows = [f"| `{name}` | {text} |" for name, text in MEANINGS.items()]
    return "\n".join(["| metric | meaning |", "|---|---|", *rows])
