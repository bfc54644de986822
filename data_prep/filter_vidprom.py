"""Filter users' prompts (VidProM, or any list) into clean, safe, English, different ones.

    python data_prep/filter_vidprom.py inputs='[VidProM_semantic_unique.csv]' out=data/prompts
    python data_prep/filter_vidprom.py inputs='[mine.txt, more.jsonl]' out=data/mine \\
        licence='my own' sample=16000

writes ``out/prompts.jsonl`` (uuid, prompt, original where cleaning changed it, time, scores),
``out/prompts.txt`` (one a line) and ``out/report.json``, ``out/report.md``: what each step dropped,
with examples. The steps, in this order: parse (bad rows are left out and counted, up to
``bad_rows`` of all), clean (Pika's flags, addresses, control characters), NSFW (the six Detoxify
scores, where the list has them), length, letters, language, exact duplicates, near-duplicates,
seeded sample. The result depends on the inputs and the settings alone, and rows added at the end
change nothing about those before.

VidProM is CC BY-NC 4.0: keep its prompts out of repositories. Needs ``pip install scd-sf[data]``.
Every setting is a field of ``FilterConfig`` (scd_sf/tools/prompts/filter/chain.py).
"""

from __future__ import annotations

from scd_sf.config import from_command_line
from scd_sf.tools.prompts.filter.chain import FilterConfig
from scd_sf.tools.prompts.filter.report import run_filter
from scd_sf.types import exit_on_user_error, say


def main() -> None:
    report = run_filter(from_command_line(FilterConfig, __doc__ or ""))
    say(f"report: {report.with_suffix('.md')}")


if __name__ == "__main__":
    exit_on_user_error(main)
