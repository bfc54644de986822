"""Encode a list of prompts into a directory that stage 3 reads, without clips; stage 3 takes the
plain list as well.

    python data_prep/encode_prompts.py prompts=data/prompts \\
        model=models/Wan2.1-T2V-1.3B-Diffusers out=data/encoded
    torchrun --nproc_per_node 8 data_prep/encode_prompts.py prompts=mine.jsonl model=... \\
        out=data/encoded

``prompts`` is a list (txt, csv, jsonl) or the output folder of filter_vidprom.py or
extend_prompts.py. Each prompt takes about 1 MB with umT5-xxl (8 kB a token): a million of them need
a terabyte, which stage 3 saves by encoding the list itself. The states are the same to the last
bit. The same command, on any number of ranks, goes on where a run stopped; a finished directory is
left alone. Fields: scd_sf/tools/data/encode_list.py.
"""

from __future__ import annotations

from scd_sf.config import from_command_line
from scd_sf.distributed import init_distributed
from scd_sf.tools.data.encode_list import EncodeListConfig, encode_list
from scd_sf.types import exit_on_user_error

WAIT_MINUTES = 24 * 60.0  # of the ranks that are done, for the slowest


def main() -> None:
    cfg = from_command_line(EncodeListConfig, __doc__ or "")
    encode_list(cfg, init_distributed(timeout_minutes=WAIT_MINUTES))


if __name__ == "__main__":
    exit_on_user_error(main)
