"""One tiny chain per session, made by the real scripts: stage 1, and finished runs of stage 2 and 3
to compare with."""

from __future__ import annotations

from pathlib import Path

import pytest
import recipe_runner
import tiny_run
from shared import built_once


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tiny_run.Chain:
    """Inputs, stage 1, and uninterrupted runs ``stage2`` and ``stage3``, made by the real scripts.
    Only to be read."""
    return tiny_run.Chain(built_once(tmp_path_factory, "chain", _run))


def _run(root: Path) -> None:
    chain = tiny_run.Chain(root)
    tiny_run.write_wan(chain.wan)
    tiny_run.write_latents(chain.train, 16)
    tiny_run.write_latents(chain.root / "val", 6, 1)
    layers = ["scd.encoder_layers=[0, 1, 2]", "scd.decoder.layers=[0, 5]"]
    recipe_runner.succeed(
        "recipes/stage1_transplant.py", f"base={chain.wan}", f"out={chain.stage1}", *layers
    )
    recipe_runner.succeed("recipes/stage2_flow_matching.py", *chain.stage2(chain.root / "stage2"))
    recipe_runner.succeed("recipes/stage3_self_forcing.py", *chain.stage3(chain.root / "stage3"))
