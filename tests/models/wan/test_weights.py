"""Wan weights on disk: round trips, shards, and errors that name the file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from scd_sf.models.wan.names import to_diffusers, to_ours
from scd_sf.models.wan.wan_json import config_json
from scd_sf.models.wan.weights import (
    INDEX,
    WEIGHTS,
    load_wan,
    open_wan,
    read_wan_config,
    save_wan,
    transformer_dir,
)
from scd_sf.tensor_files import read_tensors
from scd_sf.types import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Wan in diffusers layout."""
    path = tmp_path / "transformer"
    save_wan(tiny.wan(dtype=torch.float32).state_dict(), tiny.CFG, path, torch.float32)
    return path


def edit(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def shard(folder: Path, pieces: int = 3) -> list[str]:
    """Split the weights over ``pieces`` files with an index; the names of the files."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [
        f"diffusion_pytorch_model-{i + 1:05d}-of-{pieces:05d}.safetensors" for i in range(pieces)
    ]
    keys = sorted(tensors)
    for i, name in enumerate(names):
        save_file({key: tensors[key] for key in keys[i::pieces]}, folder / name)
    weight_map = {key: names[i % pieces] for i, key in enumerate(keys)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def assert_is_the_tiny_wan(path: Path) -> None:
    expected = dict(tiny.wan(dtype=torch.float32).named_parameters())
    model = load_wan(path)
    assert model.cfg == tiny.CFG
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]) and parameter.requires_grad


def test_round_trip_and_where_the_transformer_may_lie(folder: Path) -> None:
    assert_is_the_tiny_wan(folder)
    assert_is_the_tiny_wan(folder.parent)
    assert transformer_dir(folder.parent) == transformer_dir(folder) == folder
    with pytest.raises(
        UserError, match=r"nothing: no such file or folder; give a Wan 2.1 directory"
    ):
        load_wan(folder / "nothing")
    (folder / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"no transformer/config.json there; give a Wan 2.1 directory"
    ):
        load_wan(folder / "empty")


def test_shards_with_an_index(folder: Path) -> None:
    shard(folder)
    assert_is_the_tiny_wan(folder)


def test_dtype_and_names(folder: Path) -> None:
    assert {p.dtype for p in load_wan(folder, torch.bfloat16).parameters()} == {torch.bfloat16}
    ours = [name for name, _ in tiny.wan().named_parameters()]
    assert [to_ours(to_diffusers(name)) for name in ours] == ours
    assert to_diffusers("trunk.head.scale_shift_table") == "scale_shift_table"
    assert to_diffusers("trunk.blocks.0.scale_shift_table") == "blocks.0.scale_shift_table"


def test_truncated_file_is_named(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        UserError, match=rf"{WEIGHTS}: unreadable safetensors.*truncated or damaged"
    ):
        load_wan(folder)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=WEIGHTS):
        read_tensors(file)
    file.unlink()
    with pytest.raises(UserError, match=rf"{WEIGHTS}: missing"):
        load_wan(folder)


def test_missing_shard_and_missing_tensors_are_named(folder: Path) -> None:
    names = shard(folder)
    (folder / names[1]).rename(folder.parent / "aside")
    with pytest.raises(UserError, match=rf"{names[1]}: missing"):
        load_wan(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != names[1]}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"tensors missing, first '.*'; these files do not match"):
        load_wan(folder)


def test_shards_that_are_links(folder: Path) -> None:
    """As in a Hugging Face cache, whose snapshots link to blobs, and on a machine whose weights lie
    elsewhere."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, name in enumerate(shard(folder)):
        (folder / name).rename(blobs / str(number))
        (folder / name).symlink_to(blobs / str(number))
    assert_is_the_tiny_wan(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_the_index_cannot_leave_the_directory(folder: Path, name: str) -> None:
    save_file({"a": torch.zeros(1)}, folder.parent / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(
        UserError, match=rf"{INDEX}: shard name '.*' leaves the directory; it is not read"
    ):
        load_wan(folder)


def test_tensors_that_do_not_fit_the_config(folder: Path) -> None:
    edit(folder, ffn_dim=tiny.CFG.ffn_dim * 2)
    with pytest.raises(
        UserError, match=rf"{WEIGHTS}: tensor 'blocks.*ffn.*' has shape .*these files do not match"
    ):
        load_wan(folder)
    edit(folder, ffn_dim=tiny.CFG.ffn_dim, num_layers=5)
    with pytest.raises(UserError, match=r"tensor 'blocks\.5.*no such tensor"):
        load_wan(folder)
    edit(folder, num_layers=7)
    with pytest.raises(UserError, match=r"tensors missing, first 'blocks\.6"):
        load_wan(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"_class_name": "LTXVideoTransformer3DModel"},
            "_class_name is 'LTXVideoTransformer3DModel'",
        ),
        ({"image_dim": 1280}, "image_dim is 1280; only None .Wan 2.1 text-to-video"),
        ({"added_kv_proj_dim": 5120}, "added_kv_proj_dim is 5120"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ({"patch_size": [2, 2, 2]}, r"`\$\.patch_size"),
        ({"patch_size": [2, 2]}, "patch_size"),
        ({"patch_size": None}, "patch_size"),
        ({"num_attention_heads": "x"}, r"`int`.*`\$\.num_attention_heads`"),
        ({"ffn_dim": None}, r"`int`.*`\$\.ffn_dim`"),
    ],
)
def test_other_architectures_are_refused(
    folder: Path, fields: dict[str, object], words: str
) -> None:
    edit(folder, **fields)
    with pytest.raises(UserError, match=rf"config\.json: .*{words}|config\.json: {words}"):
        load_wan(folder)


def test_broken_config_files_are_named(folder: Path) -> None:
    file = folder / "config.json"
    for content, words in (
        (b"{", "not JSON"),
        (b"\xff\xfe", ".*utf-8"),
        (b"[]", "not a JSON object"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"config\.json: {words}"):
            read_wan_config(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_layers": 100_000},
        {"num_layers": 900},
        {"ffn_dim": 10**12},
        {"ffn_dim": 10**6},
        {"num_attention_heads": -2},
        {"attention_head_dim": 7},
        {"text_dim": 0},
        {"freq_dim": True},
        {"patch_size": [1, 10**12, 2]},
        {"patch_size": [1, "2", 2]},
        {"eps": 1},
        {"eps": -1e-6},
        {"cross_attn_norm": 1},
        {"_class_name": ["WanTransformer3DModel"]},
        {"qk_norm": {"a": 1}},
        {"in_channels": 10**19},
    ],
)
def test_configs_of_others(folder: Path, fields: dict[str, object]) -> None:
    """One line that names a file of the folder, before anything large is made."""
    edit(folder, **fields)
    with pytest.raises(UserError, match=re.escape(str(folder))) as caught:
        load_wan(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_broken_weights_are_refused_as_they_are_read(folder: Path) -> None:
    """By the model's reader, and by that of a partitioned teacher, which reads one tensor at a
    time."""
    tensors = load_file(folder / WEIGHTS)
    name = "blocks.0.ffn.net.2.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    reads = {part: tensor.read for part, tensor in open_wan(folder).tensors.items()}
    for attempt in (lambda: load_wan(folder), reads[f"trunk.{name}"]):
        with pytest.raises(
            UserError, match=rf"{WEIGHTS}: tensor '{re.escape(name)}' holds NaN or infinity"
        ):
            attempt()
    save_file({**tensors, name: tensors[name].nan_to_num().to(torch.int8)}, folder / WEIGHTS)
    with pytest.raises(UserError, match="is I8; only F64"):
        load_wan(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 3}}'])
def test_broken_index_is_named(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    with pytest.raises(UserError, match=INDEX):
        load_wan(folder)


def test_config_json_round_trip_and_defaults(folder: Path) -> None:
    assert read_wan_config(folder) == tiny.CFG
    minimal = {
        key: value
        for key, value in config_json(tiny.CFG, "diffusers").items()
        if key
        in ("_class_name", "num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers")
    }
    (folder / "config.json").write_text(json.dumps(minimal))
    cfg = read_wan_config(folder)
    assert (cfg.in_channels, cfg.out_channels, cfg.text_dim, cfg.freq_dim) == (16, 16, 4096, 256)
    assert (cfg.patch_height, cfg.patch_width, cfg.cross_attn_norm, cfg.eps) == (2, 2, True, 1e-6)
