"""Encode videos with captions into training data: VAE latents and text states. Also ``scd data
encode``.

    python data_prep/encode_latents.py --clips videos --model models/Wan2.1-T2V-1.3B-Diffusers \\
        --out data/mine
    torchrun --nproc_per_node 8 data_prep/encode_latents.py --clips videos --model ... --out ...

``--clips`` is a folder of videos as people have them (``--help`` says more), or a clip directory of
make_doom_clips.py (``scd_sf.data.clips.ClipSet``), whose splits become ``<out>/<split>`` in shards.
Stage 2 reads the output as ``data=<out>/train val=<out>/val``. An interrupted run goes on where it
stopped; a finished one does nothing; other videos or settings than the directory was begun with are
an error.
"""

from __future__ import annotations

import typer

from scd_sf.config import paragraphs
from scd_sf.tools.data.encode import encode as main
from scd_sf.types import exit_on_user_error

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=paragraphs(main.__doc__))(main)
    exit_on_user_error(app)
