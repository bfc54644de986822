"""One thread, no network and no accounts for every test, set before torch is imported."""

from __future__ import annotations

import os

# Tests use tiny tensors: more threads are slower, and the order of sums must not depend on the machine.
for name, value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "offline",
}.items():
    os.environ.setdefault(name, value)
