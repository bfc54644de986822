"""Prompt directories: ragged on disk, zero-padded when read, held-out ones apart, damage named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scd_sf.data.prompts import Prompt, PromptSet, PromptTable, encode_prompts, finish_prompts
from scd_sf.data.shards import ShardWriter
from scd_sf.files import read_json, read_jsonl, safe_path, sha256_folder, write_json, write_tensors
from scd_sf.types import UserError

LENGTH, WIDTH = 6, 4
TEXTS = ("left", "a b c", "right now", "still", "forward on")


def fake(texts: Sequence[str]) -> list[Tensor]:
    """One state per word and one more at the end; values tell the words apart."""
    return [
        torch.stack([torch.full((WIDTH,), float(len(word) + 1)) for word in f"{text} .".split()])
        for text in texts
    ]


def prompts() -> list[Prompt]:
    return [
        Prompt(f"p{i}", text, held_out=i >= 3, tags={"motion": text[0]})
        for i, text in enumerate(TEXTS)
    ]


def build(root: Path, per_shard: int = 2, negative: str = "") -> Path:
    writer = ShardWriter(root, {"source": "test"})
    text = encode_prompts(
        writer, prompts(), fake, max_length=LENGTH, per_shard=per_shard, negative=negative
    )
    finish_prompts(writer, text)
    return root


def test_round_trip_is_padded_with_zeros(tmp_path: Path) -> None:
    table = PromptTable(build(tmp_path))
    text = table.conditioning([1, 4, 0]).text_BLE
    assert text.shape == (3, LENGTH, WIDTH) and text.dtype == torch.float32
    for row, index in zip(text, (1, 4, 0), strict=True):
        states = fake([TEXTS[index]])[0]
        assert torch.equal(row[: len(states)], states) and row[len(states) :].eq(0).all()
    assert table.null.text_BLE.shape == (1, LENGTH, WIDTH)
    assert table.null.text_BLE[0, 1:].eq(0).all() and table.null.text_BLE[0, 0].ne(0).all()
    shards = list(tmp_path.glob("text-*.safetensors"))
    assert len(shards) == 3 and sum(file.stat().st_size for file in shards) < 3 * 400


def test_the_negative_prompt_is_the_empty_one_unless_encoded(tmp_path: Path) -> None:
    plain, table = (
        PromptSet(build(tmp_path / "a")),
        PromptSet(build(tmp_path / "b", negative="ugly and grey")),
    )
    assert plain.negative is plain.null and torch.equal(table.null.text_BLE, plain.null.text_BLE)
    wanted = fake(["ugly and grey"])[0]
    assert (
        torch.equal(table.negative.text_BLE[0, :4], wanted)
        and table.negative.text_BLE[0, 4:].eq(0).all()
    )
    assert table.hash != plain.hash
    (tmp_path / "b" / "negative.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"negative\.safetensors: missing or changed"):
        PromptSet(tmp_path / "b")


def test_training_and_held_out_prompts_are_apart(tmp_path: Path) -> None:
    build(tmp_path)
    train, held = PromptSet(tmp_path), PromptSet(tmp_path, held_out=True)
    assert [row.prompt for row in train.rows] == list(TEXTS[:3]) and len(train) == 3
    assert [row.prompt for row in held.rows] == list(TEXTS[3:]) and held.rows[0].tags == {
        "motion": "s"
    }
    assert torch.equal(held.conditioning([1]).text_BLE, held.table.conditioning([4]).text_BLE)
    assert train.hash != held.hash


def test_hash_depends_on_contents_only(tmp_path: Path) -> None:
    one, two, three = (
        PromptSet(build(tmp_path / name, shard)).hash
        for name, shard in (("a", 2), ("b", 2), ("c", 5))
    )
    assert one == two and one != three


def test_interrupted_encoding_goes_on_after_the_last_shard(tmp_path: Path) -> None:
    calls: list[int] = []

    def breaks(texts: Sequence[str]) -> list[Tensor]:
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fake(texts)

    writer = ShardWriter(tmp_path, {"source": "test"})
    with pytest.raises(KeyboardInterrupt):
        encode_prompts(writer, prompts(), breaks, max_length=LENGTH, per_shard=2)
    with pytest.raises(
        UserError, match=r"encoding was not finished; run the same encoding command again"
    ):
        PromptSet(tmp_path)
    assert ShardWriter(tmp_path, {"source": "test"}).count("text") == 2
    build(tmp_path)
    assert PromptSet(tmp_path).hash == PromptSet(build(tmp_path.with_name("whole"))).hash
    assert ShardWriter(tmp_path, {"source": "test"}).finished


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(
        UserError, match=r"made from other inputs \(source differ\); choose another"
    ):
        ShardWriter(tmp_path, {"source": "else"})


def test_a_folder_in_which_nothing_is_made_yet_takes_other_inputs(tmp_path: Path) -> None:
    """The first try met broken weights; with the right ones the same command goes on."""
    ShardWriter(tmp_path, {"source": "broken"})
    writer = ShardWriter(tmp_path, {"source": "whole"})
    encode_prompts(writer, prompts(), fake, max_length=LENGTH, per_shard=2)
    with pytest.raises(UserError, match=r"made from other inputs \(source differ\)"):
        ShardWriter(tmp_path, {"source": "broken"})
    assert ShardWriter(tmp_path, {"source": "whole"}).count("text") == len(prompts())


@pytest.mark.parametrize(
    "file", ["text-00001.safetensors", "null.safetensors", "prompts.jsonl", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_and_cut_files_are_named(tmp_path: Path, file: str, damage: str) -> None:
    path = build(tmp_path) / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError) as caught:
        PromptSet(tmp_path)
    assert file in str(caught.value) and ";" in str(caught.value) and "\n" not in str(caught.value)


def test_lengths_that_do_not_fit_are_named(tmp_path: Path) -> None:
    build(tmp_path)
    manifest = read_json(tmp_path / "manifest.json", "")
    manifest["text"]["max_length"] = 2  # type: ignore[index]
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"text-00000\.safetensors: tokens and lengths do not fit"):
        PromptSet(tmp_path).conditioning([1])


@pytest.mark.parametrize(
    "change",
    [
        {"width": 10**15},
        {"width": "4"},
        {"max_length": 0},
        {"max_length": True},
        {"negative": 3},
        {"negative": {"sha256": 5}},
        {"null_sha256": None},
        {"prompts_sha256": []},
        {"shards": {}},
        {"clips": None},
    ],
)
def test_a_manifest_of_others_is_one_line(tmp_path: Path, change: dict[str, object]) -> None:
    build(tmp_path)
    manifest = read_json(tmp_path / "manifest.json", "")
    manifest["text"] |= change  # type: ignore[operator]
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(UserError) as caught:
        PromptSet(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lengths", [torch.tensor(2), torch.ones(2, 1), torch.tensor([2.0, 4.0]), torch.tensor([-2, 4])]
)
def test_lengths_of_others_are_one_line(tmp_path: Path, lengths: Tensor) -> None:
    build(tmp_path)
    file = tmp_path / "text-00000.safetensors"
    write_tensors(file, load_file(file) | {"lengths": lengths})
    manifest = read_json(tmp_path / "manifest.json", "")
    manifest["text"]["shards"][0] |= {"bytes": file.stat().st_size}  # type: ignore[index]
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"text-00000\.safetensors"):
        PromptSet(tmp_path).conditioning([0])


@pytest.mark.parametrize("file", ["../text.safetensors", "/etc/passwd", "a\\..\\b"])
def test_a_manifest_cannot_point_outside(tmp_path: Path, file: str) -> None:
    build(tmp_path)
    manifest = read_json(tmp_path / "manifest.json", "")
    manifest["text"]["shards"][0]["file"] = file  # type: ignore[index]
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(UserError, match="which leaves"):
        PromptSet(tmp_path)


def test_links_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="field is 'link/x'"):
        safe_path(tmp_path / "root", "link/x", "field")


def test_non_finite_states_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {})
    with pytest.raises(UserError, match=r"not finite in torch\.float16; store as bfloat16"):
        encode_prompts(
            writer, prompts(), lambda texts: [s * 1e6 for s in fake(texts)], max_length=LENGTH
        )


def test_json_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\n\n[1]\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:3: not a JSON object; fix it"):
        read_jsonl(path, "fix it")
    path.write_text("{")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: not JSON"):
        read_jsonl(path, "fix it")
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        read_json(tmp_path / "none.json", "fix it")
    with pytest.raises(UserError, match=r"no file \*\.bin"):
        sha256_folder(tmp_path, "*.bin")
