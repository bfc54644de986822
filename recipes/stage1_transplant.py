"""Stage 1: a pretrained Wan 2.1 becomes a student: SCD, or the causal baseline.

    python recipes/stage1_transplant.py base=/models/Wan2.1-T2V-1.3B-Diffusers out=runs/stage1
    python recipes/stage1_transplant.py base=/models/Wan2.1-T2V-1.3B-Diffusers out=runs/self-forcing \\
        family=causal chunk=3 weights=self_forcing_dmd.pt 'sampler={name: renoise, steps: 4, shift: 5.0}'

``base`` is a folder or a name on the Hugging Face hub (Wan-AI/Wan2.1-T2V-1.3B-Diffusers, others as
OWNER/NAME@REVISION), of which the transformer is downloaded here, VAE and text encoder when they
are needed.

No training: tensors are copied, checked bit for bit, and every source -> destination pair is
written to report.txt. The second line takes a distilled generator's file. The same as ``scd
transplant``.
"""

from __future__ import annotations

import os

from scd_sf.config import from_command_line
from scd_sf.models.scd.transplant import TransplantConfig, run_transplant
from scd_sf.types import exit_on_user_error, say


def main() -> None:
    cfg = from_command_line(TransplantConfig, __doc__ or "")
    # of the processes of a launcher only one does the work
    if os.environ.get("RANK", "0") == "0":
        say(run_transplant(cfg))


if __name__ == "__main__":
    exit_on_user_error(main)
