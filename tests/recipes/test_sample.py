"""Sampling by the real script: files, seeds, resuming, the checkpoint's own sampler and size, and
refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recipe_runner
import torch
from PIL import Image
from recipe_runner import At
from tiny_run import Chain

from scd_sf import cli
from scd_sf.config import load_config
from scd_sf.data.clips import read_video, write_video
from scd_sf.data.prompt_files import PromptRow
from scd_sf.data.start import read_start
from scd_sf.files import LOCK, locked, sha256_file
from scd_sf.generation.folder import batches, open_sample_folder
from scd_sf.generation.generate import as_uint8, generate
from scd_sf.generation.inputs import ChunkInput
from scd_sf.generation.prompt_change import PromptChange
from scd_sf.generation.sampling import SampleConfig, open_generator, start_sha256, wanted_videos
from scd_sf.models.export import export_weights
from scd_sf.models.wan import text_cache
from scd_sf.models.wan.text import WAN_NEGATIVE_PROMPT
from scd_sf.models.wan.tiny_vae import TinyDecoder, TinyVaeConfig, latents_of, save_decoder
from scd_sf.models.wan.vae import load_vae
from scd_sf.types import Conditioning, UserError

SCRIPT = "recipes/sample.py"
PROMPTS = ["left in meadow", "still in hall"]


def arguments(chain: Chain, out: Path, stage: str = "stage3") -> list[str]:
    """Lossless files: a lossy encoder turns the last bit of a sum (batch, threads) into grey
    levels."""
    return [
        f"checkpoint={chain.root}/{stage}",
        f"out={out}",
        f"prompts={json.dumps(PROMPTS)}",
        "samples=2",
        "batch=3",
        "crf=0",
    ]


def manifest(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return content


@pytest.fixture(scope="module")
def made(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "samples"
    result = recipe_runner.succeed(SCRIPT, *arguments(chain, out))
    assert "3/4 videos" in result.out and "left 0:00" in result.out
    return out


def test_files_and_manifest(made: Path) -> None:
    names = ["0000-00.mp4", "0000-01.mp4", "0001-00.mp4", "0001-01.mp4"]
    assert sorted(file.name for file in made.iterdir()) == [
        ".done",
        ".lock",
        *names,
        "manifest.json",
    ]
    content = manifest(made)
    assert list(content["videos"]) == names
    for name, entry in content["videos"].items():
        assert read_video(made / name).shape == (9, 3, 32, 32)
        assert entry["sha256"] == sha256_file(made / name)
        assert entry["prompt"] == PROMPTS[int(name[:4])]
    assert [entry["seed"] for entry in content["videos"].values()] == [0, 1, 0, 1]
    assert len({entry["sha256"] for entry in content["videos"].values()}) == 4
    sampler = content["settings"]["sampler"]
    times = pytest.approx([1.0, 0.9375, 0.8333333, 0.625])
    assert (sampler["name"], sampler["steps"], sampler["shift"], sampler["times"]) == (
        "renoise",
        4,
        5.0,
        times,
    )


def test_a_second_run_makes_only_what_is_missing(chain: Chain, made: Path) -> None:
    """The remade one has another batch around it: its pixels agree, its bytes need not."""
    before, lost = manifest(made), read_video(made / "0001-00.mp4").float()
    times = {file.name: file.stat().st_mtime_ns for file in made.glob("*.mp4")}
    (made / "0001-00.mp4").write_bytes(b"damaged")
    result = recipe_runner.succeed(SCRIPT, *arguments(chain, made))
    assert "3 finished before" in result.out
    after = manifest(made)
    assert (read_video(made / "0001-00.mp4").float() - lost).abs().mean() < 0.5
    assert after["videos"]["0001-00.mp4"].pop("batch") == ["0001-00.mp4"]
    assert before["videos"]["0001-00.mp4"].pop("batch") == [*list(after["videos"])[:3]]
    for content in (before, after):
        content["videos"]["0001-00.mp4"].pop("sha256")
    assert after == before
    changed = [name for name, time in times.items() if (made / name).stat().st_mtime_ns != time]
    assert changed == ["0001-00.mp4"]


def test_seeds_do_not_depend_on_batch_or_on_the_other_videos(
    chain: Chain, made: Path, tmp_path: Path
) -> None:
    """A run for one sample per prompt, killed before its second video and resumed, makes the same
    files."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    few = [
        f"checkpoint={chain.root}/stage3",
        f"out={tmp_path}/out",
        f"prompt_file={tmp_path}/prompts.txt",
    ]
    few += ["batch=1", "crf=0"]
    killed = recipe_runner.run(SCRIPT, *few, at=At("scd_sf.generation.folder:make", 2))
    assert killed.code == -9 and len(list((tmp_path / "out" / ".done").iterdir())) == 1
    recipe_runner.succeed(SCRIPT, *few)
    ours, theirs = manifest(tmp_path / "out")["videos"], manifest(made)["videos"]
    assert list(ours) == ["0000-00.mp4", "0001-00.mp4"]
    for name, entry in ours.items():
        assert entry["seed"] == theirs[name]["seed"]
        left, right = read_video(tmp_path / "out" / name).float(), read_video(made / name).float()
        assert (left - right).abs().mean() < 0.5  # batches round differently


def refused(*options: object) -> str:
    result = recipe_runner.run(SCRIPT, *options)
    assert result.code == 2, result.err
    line = result.err.splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in result.err
    return line


def test_other_sampler_of_a_distilled_checkpoint(chain: Chain, tmp_path: Path) -> None:
    other = [*arguments(chain, tmp_path / "out"), "sampler={name: euler, steps: 3}"]
    assert "distilled for sampler" in refused(*other) and not (tmp_path / "out").exists()
    recipe_runner.succeed(SCRIPT, *other, "force=true", "samples=1")
    assert manifest(tmp_path / "out")["settings"]["sampler"]["name"] == "euler"


def test_other_sampler_and_size_of_a_checkpoint_that_is_not_distilled(
    chain: Chain, tmp_path: Path
) -> None:
    options = [
        *arguments(chain, tmp_path / "out", "stage2"),
        "sampler={name: renoise, steps: 2}",
        "frames=5",
    ]
    assert "dtype 'fp8' is unknown" in refused(*options, "dtype=fp8")
    assert "compile.cuda_graphs: the device is cpu" in refused(
        *options, "compile={enabled: true, cuda_graphs: true}"
    )
    recipe_runner.succeed(SCRIPT, *options, "samples=1", "dtype=bf16")
    assert read_video(tmp_path / "out" / "0000-00.mp4").shape == (5, 3, 32, 32)
    assert manifest(tmp_path / "out")["settings"]["dtype"] == "bf16"


def test_a_folder_is_one_command_s_and_goes_on_after_any_kill(chain: Chain, tmp_path: Path) -> None:
    """A second command is refused while a first one is at work; what a killed one left is no
    obstacle, and is gone."""
    options = [
        f"checkpoint={chain.root}/stage3",
        f"out={tmp_path}/out",
        f"prompts={json.dumps(PROMPTS[:1])}",
        "frames=5",
    ]
    with locked(tmp_path / "out", "samples"):
        assert f"process {os.getpid()}" in refused(*options)
    for target in (
        "scd_sf.generation.folder:write_json",
        "scd_sf.generation.sampling:VideoGenerator.frames",
        "os:replace",
    ):
        assert recipe_runner.run(SCRIPT, *options, at=At(target, 1)).code == -9
    recipe_runner.succeed(SCRIPT, *options)
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [".done", ".lock", "0000-00.mp4", "manifest.json"]
    record = manifest(tmp_path / "out")["videos"]["0000-00.mp4"]
    assert record["sha256"] == sha256_file(tmp_path / "out" / "0000-00.mp4")


def scd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str]:
    """Exit code and output of ``scd ARGUMENTS``, in this process."""
    monkeypatch.setattr(sys, "argv", ["scd", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out + err


def test_a_video_is_made_again_from_its_manifest(
    chain: Chain,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """To the last bit, in its batch of then, though the file is gone: with a start, a later prompt,
    guidance and a window too. Other weights, starts and records are refused."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    rows = [
        {"prompt": PROMPTS[0], "seed": 5, "then": [[9, PROMPTS[1]]], "start": "red.png"},
        {"prompt": PROMPTS[1], "start": "red.png"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"checkpoint={chain.root}/stage3", f"out={tmp_path}/rich", "frames=17", "crf=0"]
    options += [
        f"prompt_file={tmp_path}/p.jsonl",
        "guidance.text.scale=2",
        "guidance.scope=decoder",
    ]
    options += ["negative_prompt=left", "window=2", "sink=1", "dtype=bf16", "text_cache=off"]
    options += ["history=recache"]
    code, said = scd(monkeypatch, capsys, "sample", *options)
    assert code == 0, said
    shutil.copytree(made, tmp_path / "samples")
    for folder, name, more in (
        ("samples", "0000-01.mp4", []),
        ("rich", "0000-00.mp4", ["--text-cache", "off"]),
    ):
        before = (tmp_path / folder / name).read_bytes()
        (tmp_path / folder / name).unlink()
        out = tmp_path / f"{folder}-again"
        code, said = scd(
            monkeypatch, capsys, "again", tmp_path / folder / name, "--out", out, *more
        )
        assert code == 0 and "the same bytes as recorded" in said
        assert (out / name).read_bytes() == before
        assert sorted(file.name for file in out.glob("*.mp4")) == [name]
        old, new = manifest(tmp_path / folder), manifest(out)
        assert new["settings"] == old["settings"] and new["videos"] == {name: old["videos"][name]}
    again = ["again", tmp_path / "rich" / "0000-00.mp4"]

    def refusal(*more: object) -> str:
        code, said = scd(monkeypatch, capsys, *more)
        assert code == 2
        return said

    assert "was made already" in refusal(*again, "--out", tmp_path / "rich-again")
    assert "is 'fp32' there but 'bf16' now" in refusal(*again, "--out", tmp_path / "samples-again")
    other = refusal(*again, "--out", tmp_path / "x", "--checkpoint", chain.root / "stage2")
    assert "its weights have sha256" in other
    assert "no finished video" in refusal("again", made / "0009-00.mp4", "--out", tmp_path / "x")
    assert "no manifest.json" in refusal("again", tmp_path / "a.mp4", "--out", tmp_path / "x")
    record = tmp_path / "rich" / ".done" / "0000-00.mp4.json"
    content = record.read_text()
    for batch, words in (
        (["0000-00.mp4"] * 2, "does not name every video once"),
        (["0001-00.mp4"], "does not name every video once"),
        (["0000-00.mp4", "../../x"], "which leaves"),
    ):
        record.write_text(json.dumps(json.loads(content) | {"batch": batch}))
        assert words in refusal(*again, "--out", tmp_path / "x")
    record.write_text(content)
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "red.png")
    start_sha256.cache_clear()
    assert "red.png, which was changed since" in refusal(*again, "--out", tmp_path / "x")
    record = tmp_path / "samples" / ".done" / "0000-01.mp4.json"  # as before batches were recorded
    content = json.loads(record.read_text())
    del content["batch"]
    record.write_text(json.dumps(content | {"sha256": "0"}))
    code, said = scd(
        monkeypatch, capsys, "again", tmp_path / "samples" / "0000-01.mp4", "--out", tmp_path / "y"
    )
    assert code == 1 and "it was made alone" in said and "other bytes than recorded" in said


def test_a_tiny_decoder_is_recorded(
    chain: Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same latents in other pixels; named in the manifest, taken again by ``scd again``, and
    another one in its place is refused."""
    vae, tiny = load_vae(chain.wan), tmp_path / "tiny"
    torch.manual_seed(0)
    patch = vae.geometry.spatial // 8
    model = TinyDecoder(TinyVaeConfig(vae.geometry.channels, (4, 4, 4, 4), patch=patch))
    file = save_decoder(model, tiny, latents_of(vae))
    options = [*arguments(chain, tmp_path / "out")[:-3], "samples=1", "crf=0", f"decoder={tiny}"]
    code, said = scd(monkeypatch, capsys, "sample", *options)
    assert code == 0, said
    settings = manifest(tmp_path / "out")["settings"]
    assert settings["decoder"] == str(tiny) and settings["decoder_sha256"] == sha256_file(file)
    video = tmp_path / "out" / "0000-00.mp4"
    assert read_video(video).shape == (9, 3, 32, 32)
    cfg = load_config(SampleConfig, None, options)
    generator, _ = open_generator(cfg, torch.device("cpu"))
    assert generator.decoder is not None and generator.decoder.latents == latents_of(vae)
    again = ["again", video, "--out"]
    code, said = scd(monkeypatch, capsys, *again, tmp_path / "same")
    assert code == 0 and "the same bytes as recorded" in said
    code, said = scd(monkeypatch, capsys, "sample", *options[:-1])
    assert code == 2 and f"decoder is '{tiny}' there but '' now" in said
    model.get_parameter("decoder.22.bias").data += 1.0
    save_decoder(model, tiny, latents_of(vae))
    code, said = scd(monkeypatch, capsys, *again, tmp_path / "other")
    assert code == 2 and "is another file than" in said and not (tmp_path / "other").exists()
    save_decoder(model, tiny, "another VAE's")
    code, said = scd(monkeypatch, capsys, "sample", *options)
    assert code == 2 and "is for another VAE" in said


def test_a_seed_is_its_prompt_s_wherever_it_stands(tmp_path: Path) -> None:
    """In any list and order a prompt's n-th video has seed + n; rows may bring a seed of their
    own."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "b", "seed": 30}\n{"prompt": "a"}\n')
    seeds = []
    for options in (
        'prompts=["a", "b"]',
        'prompts=["b", "c", "a"]',
        f"prompt_file={tmp_path}/p.jsonl",
    ):
        cfg = load_config(
            SampleConfig, None, ["checkpoint=x", "out=x", options, "samples=2", "seed=7"]
        )
        seeds.append([video.seed for video in wanted_videos(cfg) if video.row.prompt == "a"])
    assert seeds == [[7, 8]] * 3
    assert [video.seed for video in wanted_videos(cfg)] == [30, 31, 7, 8]


def test_nothing_is_overwritten(chain: Chain, made: Path, tmp_path: Path) -> None:
    before = {
        file: file.read_bytes() for file in made.rglob("*") if file.is_file() and file.name != LOCK
    }
    assert "seed is 0 there but 1 now" in refused(*arguments(chain, made), "seed=1")
    settings = manifest(made)["settings"]
    settings["sampler"]["steps"] += 1
    with pytest.raises(UserError, match=r"manifest\.json: sampler\.steps is \d there but \d now"):
        open_sample_folder(made, settings)
    other = shutil.copytree(chain.wan, tmp_path / "other")
    assert f"base is '{chain.wan}' there but '{other}' now" in refused(
        *arguments(chain, made), f"base={other}"
    )
    rest = [argument for argument in arguments(chain, made) if not argument.startswith("prompts=")]
    assert "made for prompt 'left in meadow'" in refused(*rest, 'prompts=["right in hall"]')
    (tmp_path / "mine.txt").write_text("mine")
    assert "no manifest.json" in refused(*arguments(chain, tmp_path))
    assert {
        file: file.read_bytes() for file in made.rglob("*") if file.is_file() and file.name != LOCK
    } == before


def test_prompts_from_csv_and_jsonl_and_an_exported_file(
    chain: Chain, made: Path, tmp_path: Path
) -> None:
    """The same prompts by other files give the same seeds; a single file samples like its run."""
    (tmp_path / "p.csv").write_text("id,caption\n1,left in meadow\n2,still in hall\n")
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"caption": prompt}) + "\n\n" for prompt in PROMPTS)
    )
    export_weights(chain.root / "stage3", tmp_path / "student.safetensors", "single", dtype="fp32")
    for name in ("p.csv", "p.jsonl"):
        out, single = tmp_path / f"from-{name}", tmp_path / "student.safetensors"
        options = [
            f"checkpoint={single}",
            f"out={out}",
            f"prompt_file={tmp_path}/{name}",
            "prompt_column=caption",
            "crf=0",
        ]
        recipe_runner.succeed(SCRIPT, *options)
        for video, entry in manifest(out)["videos"].items():
            assert entry["seed"] == manifest(made)["videos"][video]["seed"]
            left, right = read_video(out / video).float(), read_video(made / video).float()
            assert (left - right).abs().mean() < 0.5


def test_an_image_or_a_video_is_continued(chain: Chain, made: Path, tmp_path: Path) -> None:
    """The first frames are the start's as the VAE gives them back; what follows depends on it."""
    picture = read_video(made / "0000-00.mp4")[0]
    Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((64, 48)).save(tmp_path / "image.png")
    base = [f"checkpoint={chain.root}/stage3", f"prompts={json.dumps(PROMPTS[:1])}"]
    for number, start in enumerate((tmp_path / "image.png", made / "0001-00.mp4")):
        out = tmp_path / f"out{number}"
        recipe_runner.succeed(SCRIPT, *base, f"out={out}", f"start={start}", "frames=17")
        video = read_video(out / "0000-00.mp4")
        assert video.shape == (17, 3, 32, 32)
        assert manifest(out)["videos"]["0000-00.mp4"]["start_sha256"] == sha256_file(start)
        vae = load_vae(chain.wan)
        pixels = read_start(start, (32, 32), 4, 16)
        back = as_uint8((vae.decode(vae.encode(pixels[None] * 2 - 1)) + 1) / 2)[0]
        cfg = load_config(SampleConfig, None, [*base, "out=x", f"start={start}", "frames=17"])
        video_generator, _ = open_generator(cfg, torch.device("cpu"))
        parts = list(video_generator.frames(wanted_videos(cfg)))
        assert torch.equal(parts[0][0], back) and sum(part.shape[1] for part in parts) == 17
    assert "fills all 9 frames" in refused(*base, f"out={tmp_path}/x", f"start={made}/0001-00.mp4")
    assert "no such file" in refused(*base, f"out={tmp_path}/x", f"start={tmp_path}/none.png")
    (tmp_path / "broken.png").write_bytes(b"png")
    assert "neither a video nor a readable image" in refused(
        *base, f"out={tmp_path}/x", f"start={tmp_path}/broken.png"
    )
    assert not (tmp_path / "x").exists(), "a start that cannot be used is found before work begins"


def test_a_video_is_made_anew(
    chain: Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As long as the file, or as asked; resampled and cropped; from the run's video or a row's own;
    again to the last byte; and what cannot be is refused before anything is made."""
    random = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 255, (36, 3, 6, 8), dtype=torch.uint8, generator=random)
    frames = frames.repeat_interleave(8, 2).repeat_interleave(8, 3)
    write_video(tmp_path / "fast.mp4", frames, 32, crf=0)  # 18 frames at 16 per second
    write_video(tmp_path / "short.mp4", frames[:9], 16)
    rows: list[dict[str, object]] = [
        {"prompt": PROMPTS[0], "video": "fast.mp4", "seed": 5, "then": [[13, PROMPTS[1]]]},
        {"prompt": PROMPTS[1], "video": "short.mp4"},
        {"prompt": PROMPTS[1]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"checkpoint={chain.root}/stage3", f"prompt_file={tmp_path}/p.jsonl", "samples=2"]
    options += [f"out={tmp_path}/out", "crf=0", "strength=0.9", "text_cache=off"]
    code, said = scd(monkeypatch, capsys, "sample", *options)
    assert code == 0, said
    assert "strength 0.9: begins with noise 0.8333, 2 of 4 steps; no student is trained" in said
    content = manifest(tmp_path / "out")
    lengths = [len(read_video(tmp_path / "out" / name)) for name in content["videos"]]
    assert lengths == [17, 17, 9, 9, 9, 9]  # the last two as trained
    entry = content["videos"]["0000-01.mp4"]
    assert entry["video_sha256"] == sha256_file(tmp_path / "fast.mp4")
    assert entry["batch"] == ["0000-00.mp4", "0000-01.mp4"] and entry["seed"] == 6
    assert content["settings"]["from_video"] == {
        "strength": 0.9,
        "noise": pytest.approx(5 / 6),
        "steps": 2,
        "frames": 0,
    }

    name = "0000-01.mp4"
    again = ["again", tmp_path / "out" / name, "--text-cache", "off", "--out"]
    code, said = scd(monkeypatch, capsys, *again, tmp_path / "again")
    assert code == 0 and "the same bytes as recorded" in said
    assert manifest(tmp_path / "again")["settings"] == content["settings"]
    code, said = scd(monkeypatch, capsys, "sample", *options)
    assert code == 0 and "6 finished before" in said

    # the frames are those of generate() with the file's latents, encoded as a whole
    cfg = load_config(SampleConfig, None, [*options, "batch=2"])
    maker, _ = open_generator(cfg, torch.device("cpu"))
    videos = wanted_videos(cfg)
    pixels = read_start(tmp_path / "fast.mp4", (32, 32), 1, 16)[None, :17]
    latents = maker.vae.encode(pixels * 2 - 1)
    expected = generate(
        maker.student,
        maker.vae,
        maker.text.encode([PROMPTS[0]] * 2),
        [5, 6],
        maker.shape_of(videos[0]),
        maker.sampler,
        changes={13: PromptChange(maker.text.encode([PROMPTS[1]] * 2))},
        inputs=[ChunkInput(part, 0.9) for part in latents.split(1, dim=1)],
    )
    own = torch.cat(list(maker.frames(videos[:2])), 1)
    assert (own.float() - as_uint8(torch.cat(list(expected), 1)).float()).abs().max() <= 1
    assert (own[0].float() - own[1].float()).abs().mean() > 0.1  # another seed

    def refusal(*more: str) -> str:
        code, said = scd(monkeypatch, capsys, "sample", *options, *more)
        assert code == 2
        return said

    one = [f"prompts={json.dumps(PROMPTS[:1])}", "prompt_file=", f"out={tmp_path}/x"]
    fast, short = f"video={tmp_path}/fast.mp4", f"video={tmp_path}/short.mp4"
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "fast.mp4").read_bytes()[:-4000])
    for more, words in (
        ([*one], "strength is 0.9, but there is no video"),
        ([*one, fast, f"start={tmp_path}/red.png"], "start and video are both set"),
        ([*one, f"video={tmp_path}/none.mp4"], "none.mp4: no such file"),
        ([*one, f"video={tmp_path}/red.png"], "red.png: is no video by its name"),
        ([*one, f"video={tmp_path}/cut.mp4"], "cut.mp4: cannot be decoded"),
        ([*one, fast, "frames=21"], "gives 18 frames, of which 17 can be made anew, not 21"),
        ([*one, fast, "strength=0.5"], "below all noise levels of the sampler"),
        ([*one, fast, "strength=0"], "must be above 0 and at most 1"),
        ([fast, "prompts=[a]", "prompt_file=", "samples=1"], "made for prompt"),
        (["strength=0.7"], "from_video.strength is 0.9 there but 0.7 now"),
        ([*one[:2], short, "samples=1"], "0000-00.mp4: made for"),
    ):
        assert words in refusal(*more), more
    assert not (tmp_path / "x").exists()
    (tmp_path / "p.jsonl").write_text('{"prompt": "left in meadow", "seed": 5}\n')
    assert "0000-00.mp4: made for then" in refusal("samples=1", fast)
    write_video(tmp_path / "fast.mp4", frames[:20], 32)
    start_sha256.cache_clear()
    code, said = scd(monkeypatch, capsys, *again, tmp_path / "x")
    assert code == 2 and "fast.mp4, which was changed since" in said
    cfg = load_config(
        SampleConfig,
        None,
        [f"checkpoint={chain.root}/stage3", "out=x", 'prompts=["a"]', short, "strength=1"],
    )
    maker, _ = open_generator(cfg, torch.device("cpu"))
    from_noise = replace(wanted_videos(cfg)[0], row=PromptRow("a"))
    parts = [
        torch.cat(list(maker.frames([video])), 1) for video in (wanted_videos(cfg)[0], from_noise)
    ]
    assert torch.equal(*parts)  # strength 1: nothing is left of the video


def test_a_folder_of_an_earlier_version_gains_a_video_that_is_made_anew(
    chain: Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its manifest knows neither histories nor input videos. It goes on; what is asked for without
    the video later on forgets nothing of it; another strength and another past are refused."""
    random = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 255, (9, 3, 32, 32), dtype=torch.uint8, generator=random)
    write_video(tmp_path / "a.mp4", frames, 16)
    rows = [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[1], "video": "a.mp4"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    options = [f"checkpoint={chain.root}/stage3", f"out={out}", "crf=0", "text_cache=off"]
    plain = [*options, f"prompts={json.dumps(PROMPTS[:1])}"]
    anew = [*options, f"prompt_file={tmp_path}/p.jsonl", "strength=0.9"]

    def sample(*arguments: str) -> tuple[int, str]:
        return scd(monkeypatch, capsys, "sample", *arguments)

    assert sample(*plain)[0] == 0
    content = json.loads((out / "manifest.json").read_text())
    assert content["settings"].pop("history") == "keep"
    (out / "manifest.json").write_text(json.dumps(content))
    code, said = sample(*anew)
    assert code == 0 and "1 finished before" in said, said
    assert sample(*plain)[0] == 0
    assert manifest(out)["settings"]["from_video"]["strength"] == 0.9
    for arguments, words in (
        ([*anew[:-1], "strength=0.7"], "from_video.strength is 0.9 there but 0.7 now"),
        ([*anew[:-1]], "from_video.strength is 0.9 there but 0.8 now"),
    ):
        code, said = sample(*arguments)
        assert code == 2 and words in said
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": PROMPTS[0], "then": [[5, "a"]]}))
    assert "0000-00.mp4: made for then None" in sample(*anew[:-1])[1]
    code, said = sample(*anew[:-1], "history=flush")
    assert code == 2 and "history is 'keep' there but 'flush' now" in said
    for name in ("0001-00.mp4", "0000-00.mp4"):
        again = ["again", out / name, "--text-cache", "off", "--out", tmp_path / "again"]
        code, said = scd(monkeypatch, capsys, *again)
        assert code == 0 and "the same bytes as recorded" in said, said
    content = manifest(out)
    del content["settings"]["from_video"]
    (out / "manifest.json").write_text(json.dumps(content))
    code, said = scd(monkeypatch, capsys, *again[:1], out / "0001-00.mp4", "--out", tmp_path / "x")
    assert code == 2 and "has no from_video" in said
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said = sample(*anew[:-1], "strength=0.7")  # which would be recorded as that of all
    assert code == 2 and "with what strength its videos were made anew is not known" in said


def test_guidance_other_prompts_and_videos_longer_than_training(
    chain: Chain, made: Path, tmp_path: Path
) -> None:
    base = [f"checkpoint={chain.root}/stage2", "sampler={name: unipc, steps: 2}"]
    rows = [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[0], "then": [[10, PROMPTS[1]]]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "plain": [],
        "text": ["guidance.text.scale=3"],
        "decoder": [
            "guidance.text.scale=3",
            "guidance.scope=decoder",
            "negative_prompt=still in hall",
        ],
        "corruption": ["guidance.corruption=1.5"],
    }
    first: dict[str, torch.Tensor] = {}
    for name, more in settings.items():
        long = ["frames=25", "window=3", "sink=1"]
        out = tmp_path / name
        recipe_runner.succeed(
            SCRIPT, *base, f"out={out}", f"prompt_file={tmp_path}/p.jsonl", *long, *more, "batch=1"
        )
        first[name] = read_video(out / "0000-00.mp4")
        assert first[name].shape == (25, 3, 32, 32)
        assert manifest(out)["videos"]["0001-00.mp4"]["then"] == [[10, PROMPTS[1]]]
    assert len({sha256_file(tmp_path / name / "0000-00.mp4") for name in settings}) == len(settings)


def test_a_student_of_three_frames_at_a_time(
    chain: Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What does not fit its chunks is refused before a folder is begun; a window that they do not
    divide, the past encoded again, an input video that fills no chunk at its end; once more to the
    last byte. Two steps: the least noise that they know is the default strength."""
    student = tmp_path / "student"
    layers = ["scd.encoder_layers=[0, 1]", "scd.decoder.layers=[0, 5]", "chunk=3"]
    recipe_runner.succeed(
        "recipes/stage1_transplant.py", f"base={chain.wan}", f"out={student}", *layers
    )
    random = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 255, (40, 3, 40, 24), dtype=torch.uint8, generator=random)
    write_video(tmp_path / "a.mp4", frames, 16)
    rows = [
        {"prompt": PROMPTS[0], "video": "a.mp4", "then": [[9, PROMPTS[1]], [17, PROMPTS[0]]]},
        {"prompt": PROMPTS[1], "then": [[21, PROMPTS[0]]]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"checkpoint={student}", f"prompt_file={tmp_path}/p.jsonl", "height=32", "width=32"]
    options += [
        f"out={tmp_path}/out",
        "sampler={name: renoise, steps: 2}",
        "text_cache=off",
        "crf=0",
    ]
    options += ["history=recache", "sink=2"]

    def refusal(*more: str) -> str:
        code, said = scd(monkeypatch, capsys, "sample", *options, *more)
        assert code == 2 and not (tmp_path / "out").exists()
        return said

    one = [f"prompts={json.dumps(PROMPTS[:1])}", "prompt_file=", "window=4"]
    for more, words in (
        (["window=2", "frames=33"], "window is 2, but the model makes 3 latent frames at a time"),
        (["window=4", "frames=21"], "no other prompt can begin after frame 9"),
        (["window=4", "frames=33", "strength=0.8"], "below all noise levels"),
        ([*one, "frames=33"], "history is 'recache', what becomes of the past"),
        ([*one, "frames=33", "history=keep", f"start={tmp_path}/a.mp4"], "gives 10 latent frames"),
    ):
        assert words in refusal(*more), more
    options += ["window=4", "frames=33"]
    code, said = scd(monkeypatch, capsys, "sample", *options)
    assert code == 0 and "strength 0.8333: begins with noise 0.8333, 1 of 2 steps" in said, said
    content = manifest(tmp_path / "out")
    assert [len(read_video(tmp_path / "out" / name)) for name in content["videos"]] == [33, 33]
    for name in content["videos"]:
        again = ["again", tmp_path / "out" / name, "--text-cache", "off"]
        code, said = scd(monkeypatch, capsys, *again, "--out", tmp_path / "again")
        assert code == 0 and "the same bytes as recorded" in said, said


def test_known_prompts_need_no_text_encoder(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches with Wan's negative prompt: each text is encoded once, and not at all by the next
    run."""
    options = [
        argument
        for argument in arguments(chain, tmp_path / "out", "stage2")
        if "batch" not in argument
    ]
    more = [
        "guidance.text.scale=3",
        "negative_prompt=wan",
        f"text_cache={tmp_path}/cache",
        "sampler.name=euler",
    ]
    cfg = load_config(SampleConfig, None, [*options, *more, "sampler.steps=2"])
    assert cfg.negative_prompt == WAN_NEGATIVE_PROMPT
    seen: list[str] = []

    def made() -> torch.Tensor:
        video_generator, settings = open_generator(cfg, torch.device("cpu"))
        assert settings["guidance"]["negative_prompt"] == WAN_NEGATIVE_PROMPT  # type: ignore[index]
        encode = video_generator.text.encode

        def noted(prompts: Sequence[str]) -> Conditioning:
            seen.extend(prompts)
            return encode(prompts)

        monkeypatch.setattr(video_generator.text, "encode", noted)
        return torch.cat(
            [
                torch.cat(list(video_generator.frames(part)), 1)
                for part in batches(wanted_videos(cfg), 2)
            ]
        )

    first = made()
    assert (
        seen.count(WAN_NEGATIVE_PROMPT) == 1
        and len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3
    )
    monkeypatch.setattr(text_cache, "load_text_encoder", None)
    assert torch.equal(made(), first)


@pytest.mark.slow
def test_ranks_share_the_videos(chain: Chain, made: Path, tmp_path: Path) -> None:
    options = arguments(chain, tmp_path / "out")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        SCRIPT,
        *options,
    ]
    done = subprocess.run(
        command, cwd=recipe_runner.ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = manifest(tmp_path / "out")["videos"], manifest(made)["videos"]
    assert {n: e["seed"] for n, e in ours.items()} == {n: e["seed"] for n, e in theirs.items()}
    for name in ours:
        left, right = read_video(tmp_path / "out" / name).float(), read_video(made / name).float()
        assert (left - right).abs().mean() < 0.5


def test_bad_prompt_files(chain: Chain, tmp_path: Path) -> None:
    options = [f"checkpoint={chain.root}/stage3", f"out={tmp_path}/out"]
    for name, text, words in (
        ("a.csv", "text\nhello\n", "no column 'prompt' (it has text); set prompt_column"),
        ("b.csv", 'prompt\n"left in\n', "line"),
        ("c.jsonl", '{"prompt": "a"}\nnot json\n', "line 2: not JSON"),
        ("d.jsonl", "[1]\n", "line 1 is not an object"),
        ("e.jsonl", '{"prompt": ""}\n', "line 1: 'prompt' is ''"),
        ("f.jsonl", '{"prompt": "a", "then": [["x", "b"]]}\n', "'then' has ['x', 'b']"),
        (
            "i.jsonl",
            '{"prompt": "a", "then": [[5, "c"], [5, "b"]]}\n',
            "two prompts from frame 5 on",
        ),
        (
            "j.jsonl",
            '{"prompt": "a", "then": [[6, "b"]]}\n',
            "no other prompt can begin after frame 5",
        ),
        (
            "k.jsonl",
            '{"prompt": "a", "then": [[2, "b"], [5, "c"]]}\n',
            "would both begin with frame 5",
        ),
        ("g.txt", "\n\n", "no prompt in it"),
        ("h.jsonl", '{"prompt": "a", "start": "none.png"}\n', "none.png: no such file"),
    ):
        (tmp_path / name).write_text(text)
        assert words in refused(*options, f"prompt_file={tmp_path}/{name}"), name
    for more, words in ((["sink=1"], "a sink needs a window"), (["crf=99"], "crf is 99")):
        assert words in refused(*options, f"prompts={json.dumps(PROMPTS)}", *more)
    assert not (tmp_path / "out").exists()


def test_bad_input(chain: Chain, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stage1 = arguments(chain, out, "stage1")
    assert "set frames=, height=, width=" in refused(*stage1)
    assert "use 9" in refused(*arguments(chain, out), "frames=10")
    assert "neither config.json nor vae/config.json" in refused(
        *arguments(chain, out), f"base={tmp_path}"
    )
    assert "either prompts or prompt_file" in refused(*arguments(chain, out), "prompt_file=x")
    assert not out.exists()
