"""The prompt filter at VidProM's size: wall seconds and peak memory of the whole process, its
workers included.

    python benchmarks/vidprom.py --work /scratch/vidprom --out docs/results/data.json

writes ``<work>/prompts.csv`` (once) and runs ``data_prep/filter_vidprom.py`` on it as a user would.
**The rows are modelled, not VidProM's.** Columns, quoting, time format and size (1.67 M rows, about
450 MB) are VidProM's; the prompts are random English words. ``SHARES`` and ``scores`` state the
assumptions: prompts of 4 to 120 words (median 19), a third with Pika flags, some in other
languages, some that equal or nearly equal an earlier one, Detoxify scores mostly below 0.01. So the
seconds are an estimate for VidProM; the number of kept rows is not.

CPU seconds do not depend on other work on the machine, wall seconds do. Memory is the sum over the
processes of their proportional set sizes (shared pages are counted once), read every 0.2 s; the sum
of resident sizes, which counts shared pages once per process, is printed beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import shutil
import sys
import time
import uuid
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import psutil

from scd_sf.config import HelpFormatter
from scd_sf.files import new_file, read_json, write_json
from scd_sf.types import exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = [
    "uuid",
    "prompt",
    "time",
    "toxicity",
    "obscene",
    "identity_attack",
    "insult",
    "threat",
    "sexual_explicit",
]
SHARES = {
    "foreign": 0.05,
    "repeated": 0.06,
    "nearly repeated": 0.12,
    "no letters": 0.01,
    "short": 0.03,
    "flags": 0.33,
}
SHARES |= {"line break": 0.03, "quotes": 0.05, "url": 0.01, "accents": 0.02}
VOCABULARY = """a an the of in on with under over near behind through across around between beside above city forest cat
dog robot dragon running flying cinematic slow motion camera zoom light sunset realistic detailed woman man walking
street rain neon cyberpunk ocean waves mountain snow river castle space ship planet epic beautiful anime style old young
girl boy child king queen knight warrior horse bird eagle fish shark whale lion tiger wolf bear elephant monkey rabbit
fox butterfly flower garden tree grass field desert island beach cliff valley lake waterfall storm lightning thunder
cloud sky moon star galaxy nebula astronaut rocket alien spaceship futuristic dystopian ruins temple church bridge tower
village market train car motorcycle bicycle bus boat airplane helicopter road highway tunnel window door room kitchen
bedroom library school hospital office factory stage concert dancing singing playing eating drinking cooking reading
writing painting drawing sleeping dreaming laughing crying smiling looking watching standing sitting jumping swimming
climbing fighting driving riding falling rising floating glowing burning melting exploding spinning turning opening
closing shining dark bright golden silver red blue green yellow purple orange white black colorful vibrant pastel
monochrome vintage retro modern ancient medieval baroque gothic surreal abstract minimal photorealistic render animation
cartoon pixar ghibli watercolor oil sketch portrait landscape close wide shot angle aerial drone view tracking panning
depth focus blur bokeh fog mist smoke dust fire water ice glass metal wood stone crystal diamond silk leather fur
feathers hair eyes face hands dress suit hat crown sword shield gun magic wizard witch ghost vampire zombie skeleton
angel demon god goddess hero villain detective scientist doctor teacher soldier pirate ninja samurai cowboy chef farmer
fisherman musician guitar piano violin drums party wedding festival christmas halloween birthday winter spring summer
autumn morning evening night midnight dawn dusk high quality resolution ultra sharp smooth dramatic lighting shadows
reflection texture pattern timelapse hyperlapse loop seamless background foreground atmosphere mood mysterious peaceful
calm happy sad angry scary funny cute tiny giant huge small big long short tall fast slowly gently quickly while and
then as his her their its from into toward away"""
ENGLISH = VOCABULARY.split()
FOREIGN = [
    "una mujer caminando por la calle bajo la lluvia con luces de la ciudad al fondo y un perro pequeño",
    "un homme qui marche dans la forêt avec son chien pendant que le soleil se couche sur les montagnes",
    "ein alter Mann geht langsam durch den Wald während der Schnee auf die Bäume fällt und es dunkel wird",
    "uma menina correndo na praia com o cachorro enquanto o sol se põe no horizonte e as ondas quebram",
    "красивая девушка идет по улице ночного города под дождем и смотрит на яркие огни витрин",
    "一个女孩在雨中的街道上行走 电影质感 夕阳下的城市 一只猫在窗边看着下雨的街道 慢镜头",
]
FLAGS = [
    "-gs 16",
    "-motion 2",
    "-camera zoom in",
    "-ar 16:9",
    "-fps 24",
    "-seed 123456",
    "-neg blurry, low quality",
]
FIRST_DAY = datetime(2023, 7, 1)


def english(rng: random.Random) -> str:
    """4 to 120 random words with commas."""
    words = rng.choices(ENGLISH, k=min(120, max(4, int(rng.lognormvariate(2.95, 0.65)))))
    for place in range(rng.randint(4, 12), len(words), rng.randint(6, 14)):
        words[place] += ","
    return " ".join(words)


def near_duplicate(text: str, rng: random.Random) -> str:
    """The same prompt with a word more, a word less or a word changed."""
    words = text.split(" ")
    place = rng.randrange(len(words))
    change = ("insert", "replace", "remove")[rng.randrange(3)]
    if change == "insert":
        words.insert(place, rng.choice(ENGLISH))
    elif change == "replace":
        words[place] = rng.choice(ENGLISH)
    else:
        del words[place]
    return " ".join(words)


def prompt(rng: random.Random, earlier: list[str]) -> str:
    """One prompt. ``earlier``: up to 200,000 of the English prompts before it; it is updated."""
    share = rng.random()
    for kind in ("foreign", "repeated", "nearly repeated", "no letters", "short"):
        share -= SHARES[kind]
        if share < 0:
            break
    else:
        kind = "plain"
    if kind == "foreign":
        text = " ".join(rng.choices(rng.choice(FOREIGN).split(), k=rng.randint(6, 24)))
    elif kind in ("repeated", "nearly repeated") and earlier:
        text = rng.choice(earlier)
        text = text.title() if kind == "repeated" else near_duplicate(text, rng)
    elif kind == "no letters":
        text = " ".join(str(rng.randrange(10**6)) for _ in range(5))
    else:
        text = (
            " ".join(rng.choices(ENGLISH, k=rng.randint(1, 2))) if kind == "short" else english(rng)
        )
        if len(earlier) < 200_000:
            earlier.append(text)
        else:
            earlier[rng.randrange(len(earlier))] = text
    return text


def decorate(text: str, rng: random.Random) -> str:
    """The prompt with flags, line breaks, quotes, addresses and accents, each in its share of the
    prompts."""
    if rng.random() < SHARES["line break"]:
        text = text.replace(" ", "\n", 2)
    if rng.random() < SHARES["quotes"]:
        text = f'"{text}" she said'
    if rng.random() < SHARES["accents"]:
        text = text.replace("e", "é", 1) + " – “wow”…"
    if rng.random() < SHARES["url"]:
        text = f"https://example.org/{rng.randrange(10**9)}.png {text}"
    if rng.random() < SHARES["flags"]:
        text = " ".join([text, *rng.sample(FLAGS, rng.randint(1, 3))])
    return text


def scores(rng: random.Random) -> list[str]:
    """Six Detoxify scores: 4 % of rows have one above 0.05, 1.3 % above 0.2, 0.5 % above 0.5; the
    others are tiny."""
    values = [10 ** rng.uniform(-4.5, -2.2) for _ in range(6)]
    dice = rng.random()
    if dice < 0.04:
        if dice < 0.005:
            low, high = 0.5, 1.0
        elif dice < 0.013:
            low, high = 0.2, 0.5
        else:
            low, high = 0.05, 0.2
        values[rng.randrange(6)] = rng.uniform(low, high)
    return [f"{value:.8f}" for value in values]


def write_rows(path: Path, rows: int, seed: int) -> None:
    """Write ``rows`` rows as VidProM's csv file; it appears under its name when it is complete."""
    rng = random.Random(seed)  # noqa: S311
    earlier: list[str] = []
    with new_file(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for number in range(rows):
            name = uuid.UUID(int=rng.getrandbits(128), version=5)
            date = (FIRST_DAY + timedelta(seconds=7 * number)).ctime()
            writer.writerow([name, decorate(prompt(rng, earlier), rng), date, *scores(rng)])


def measure(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds, peak proportional and resident GiB of a command and its children.
    SystemExit with the command's code where that is not 0."""
    start = time.monotonic()
    cpu_seconds: dict[psutil.Process, float] = {}
    peak = resident = 0.0
    process = psutil.Popen(command, cwd=ROOT)
    while process.poll() is None:
        proportional_bytes = 0
        resident_bytes = 0
        for member in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # an ended process
                memory, times = member.memory_full_info(), member.cpu_times()
                proportional_bytes += memory.pss
                resident_bytes += memory.rss
                cpu_seconds[member] = times.user + times.system
        peak = max(peak, proportional_bytes / 2**30)
        resident = max(resident, resident_bytes / 2**30)
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(process.returncode)
    wall = time.monotonic() - start
    return {
        "wall": wall,
        "cpu": sum(cpu_seconds.values()),
        "proportional": peak,
        "resident": resident,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="folder for the rows (450 MB) and the result (400 MB)",
    )
    parser.add_argument("--out", type=Path, help="JSON file whose vidprom figures are replaced")
    parser.add_argument("--rows", type=int, default=1_672_243, help="number of prompts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows, result = args.work / f"prompts-{args.rows}-{args.seed}.csv", args.work / "filtered"
    if not rows.is_file():
        write_rows(rows, args.rows, args.seed)
    shutil.rmtree(result, ignore_errors=True)
    load = os.getloadavg()[0]
    script = str(ROOT / "data_prep" / "filter_vidprom.py")
    cost = measure(
        [sys.executable, script, f"inputs=[{rows.resolve()}]", f"out={result.resolve()}"]
    )
    report = read_json(result / "report.json", "run again")
    figures = {
        "vidprom_seconds": round(cost["wall"], 1),
        "vidprom_peak_gib": round(cost["proportional"], 2),
        "vidprom": {
            "rows": args.rows,
            "kept": report["kept"],
            "cpu_seconds": round(cost["cpu"], 1),
            "resident_gib": round(cost["resident"], 2),
            "seconds": report["seconds"],
            "load_before": round(load, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        },
    }
    print(json.dumps(figures, indent=1))
    if args.out is not None:
        document = read_json(args.out, "delete it") if args.out.is_file() else {}
        write_json(args.out, document | figures)


if __name__ == "__main__":
    exit_on_user_error(main)
