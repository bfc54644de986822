"""Wan's original layout and the files of distilled generators: read, written, converted bit for
bit, or refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from scd_sf.models.wan.names import diffusers_to_original, to_diffusers, to_ours
from scd_sf.models.wan.transformer import Wan, WanConfig
from scd_sf.models.wan.wan_json import config_from_shapes
from scd_sf.models.wan.weights import (
    INDEX,
    WEIGHTS,
    load_wan,
    open_wan,
    read_wan_config,
    save_wan,
    write_wan,
)
from scd_sf.types import UserError

BF16 = torch.bfloat16
# One head of Wan's own size, so that a file alone tells its geometry.
ONE_HEAD = WanConfig(
    num_attention_heads=1,
    attention_head_dim=128,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
)


def original_state(model: Wan) -> dict[str, Tensor]:
    state = {}
    for name, tensor in model.state_dict().items():
        original = diffusers_to_original(to_diffusers(name))
        assert original is not None
        state[original] = tensor
    return state


def same(first: Wan, second: Wan) -> bool:
    theirs = dict(second.named_parameters())
    return first.cfg == second.cfg and all(
        torch.equal(p, theirs[name]) for name, p in first.named_parameters()
    )


@pytest.fixture(scope="module")
def model() -> Wan:
    return tiny.wan(3, BF16, ONE_HEAD)


def test_both_layouts_round_trip_bit_for_bit(model: Wan, tmp_path: Path) -> None:
    """diffusers -> original -> diffusers, in shards, in bf16: the files' tensors are the first
    ones."""
    save_wan(model.state_dict(), ONE_HEAD, tmp_path / "a", BF16)
    first = open_wan(tmp_path / "a")
    write_wan(first.tensors, first.config, tmp_path / "b", "original", max_shard=100_000)
    second = open_wan(tmp_path / "b")
    assert (first.layout, second.layout) == ("diffusers", "original")
    assert second.config == first.config == ONE_HEAD
    shards = list((tmp_path / "b").glob("*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "b" / INDEX).is_file()
    assert {p.dtype for shard in shards for p in load_file(shard).values()} == {BF16}
    write_wan(second.tensors, second.config, tmp_path / "c", "diffusers")
    assert load_file(tmp_path / "c" / WEIGHTS).keys() == load_file(tmp_path / "a" / WEIGHTS).keys()
    for name, tensor in load_file(tmp_path / "c" / WEIGHTS).items():
        assert torch.equal(tensor, load_file(tmp_path / "a" / WEIGHTS)[name])
    for folder in "abc":
        assert same(load_wan(tmp_path / folder, BF16), model)


def test_the_original_layout_is_what_diffusers_converts(model: Wan, tmp_path: Path) -> None:
    save_wan(model.state_dict(), ONE_HEAD, tmp_path, BF16, layout="original")
    theirs = convert_wan_transformer_to_diffusers(load_file(tmp_path / WEIGHTS))
    state = model.state_dict()
    assert {to_ours(name) for name in theirs} == set(state)
    assert all(torch.equal(tensor, state[to_ours(name)]) for name, tensor in theirs.items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["_class_name"], config["model_type"], config["dim"]) == ("WanModel", "t2v", 128)


def test_the_published_config_json_leaves_fields_out(tmp_path: Path) -> None:
    published = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": 1536,
        "eps": 1e-06,
        "ffn_dim": 8960,
    }
    published |= {
        "freq_dim": 256,
        "in_dim": 16,
        "model_type": "t2v",
        "num_heads": 12,
        "num_layers": 30,
    }
    published |= {"out_dim": 16, "text_len": 512}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(published))
    assert read_wan_config(tmp_path) == WanConfig()
    for field, value, words in (
        ("model_type", "i2v", "model_type is 'i2v'; only 't2v'"),
        ("qk_norm", False, "qk_norm is False"),
        ("num_heads", 7, "dim 1536 is not divisible by num_heads 7"),
        ("patch_size", [2, 2, 2], "patch_size"),
        ("_class_name", "VaceWanModel", "_class_name is 'VaceWanModel'"),
    ):
        file.write_text(json.dumps({**published, field: value}))
        with pytest.raises(UserError, match=rf"config\.json: .*{words}"):
            read_wan_config(tmp_path)


def plain(state: dict[str, Tensor]) -> object:
    return state


def released(state: dict[str, Tensor]) -> object:
    return {"generator_ema": {f"model.{name}": tensor for name, tensor in state.items()}}


def training(state: dict[str, Tensor]) -> object:
    """What a trainer saves: FSDP's and checkpointing's wrappers, another model beside it, a step
    count."""
    wrapped = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts.insert(2, "_fsdp_wrapped_module")
        wrapped["model._fsdp_wrapped_module." + ".".join(parts)] = tensor
    noise = {name: torch.zeros_like(tensor) for name, tensor in wrapped.items()}
    return {"generator": noise, "generator_ema": wrapped, "critic": noise, "step": 600}


def nested(state: dict[str, Tensor]) -> object:
    return {
        "model": {"generator": {f"module.model.{name}": tensor for name, tensor in state.items()}}
    }


@pytest.mark.parametrize("wrap", [plain, released, training, nested])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickles_of_tensors(
    model: Wan, wrap: Callable[[dict[str, Tensor]], object], legacy: bool, tmp_path: Path
) -> None:
    file = tmp_path / "self_forcing_dmd.pt"
    torch.save(wrap(original_state(model)), file, _use_new_zipfile_serialization=not legacy)
    files = open_wan(file, heads=1)
    assert (files.layout, files.config) == ("original", ONE_HEAD)
    assert same(load_wan(file, BF16, heads=1), model)


def test_a_section_can_be_chosen(model: Wan, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    torch.save(training(original_state(model)), file)
    chosen = load_wan(file, section="generator", heads=1)
    assert not any(bool(p.any()) for p in chosen.parameters())
    with pytest.raises(
        UserError, match=r"no weights 'student' in it \(it has critic, generator, generator_ema\)"
    ):
        load_wan(file, section="student")


def test_a_directory_with_a_pickle_and_a_file_in_diffusers_names(
    model: Wan, tmp_path: Path
) -> None:
    save_wan(model.state_dict(), ONE_HEAD, tmp_path / "a", BF16, layout="original")
    torch.save(original_state(model), tmp_path / "a" / "diffusion_pytorch_model.pth")
    (tmp_path / "a" / WEIGHTS).unlink()
    assert same(load_wan(tmp_path / "a", BF16), model)
    save_file(
        {to_diffusers(name): tensor for name, tensor in model.state_dict().items()},
        tmp_path / "b.safetensors",
    )
    assert same(load_wan(tmp_path / "b.safetensors", BF16, heads=1), model)


def test_heads_of_a_file_alone(tmp_path: Path) -> None:
    save_file(original_state(tiny.wan(dtype=torch.float32)), tmp_path / "tiny.safetensors")
    file = tmp_path / "tiny.safetensors"
    fault = r"tiny\.safetensors: a file of width 24 does not say how many attention heads it has; "
    for read in (load_wan, read_wan_config):  # a teacher's: it has no field for the heads
        with pytest.raises(UserError, match=f"{fault}make a .* scd convert --heads N, or"):
            read(file)
    with pytest.raises(UserError, match=f"{fault}say it with heads"):
        load_wan(file, section="")
    with pytest.raises(UserError, match="width 24 is not divisible into 5 heads"):
        load_wan(file, heads=5)
    assert load_wan(file, heads=2).cfg == load_wan(file, like=tiny.CFG).cfg == tiny.CFG
    assert open_wan(file, any_heads=True).heads == "unknown"
    state = {f"{to_diffusers(name)}": tuple(t.shape) for name, t in wan_on_meta().items()}
    config, known = config_from_shapes(state, 0, file)
    assert (config, known) == (WanConfig(num_layers=1), "assumed")


def wan_on_meta() -> dict[str, Tensor]:
    """One layer of the released width."""
    with torch.device("meta"):
        return dict(Wan(WanConfig(num_layers=1)).named_parameters())


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


def test_pickles_that_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.pt"
    torch.save({"generator": {"a": torch.zeros(1)}, "callback": Evil()}, file)
    with pytest.raises(UserError, match=r"evil\.pt: holds more than tensors, which is refused"):
        load_wan(file)
    file.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(UserError, match=r"evil\.pt"):
        load_wan(file)
    assert not (tmp_path / "executed").exists()


def test_other_contents_are_refused(model: Wan, tmp_path: Path) -> None:
    state = original_state(model)
    file = tmp_path / "file.pt"
    for content, words in (
        ({"epoch": 3}, r"neither .*\(no tensors\)"),
        ([1, 2], "holds a list, not a table of tensors"),
        ({**state, "epoch": 3}, "entry 'epoch' is not a tensor"),
        ({**state, "img_emb.proj.0.weight": torch.zeros(1)}, "image-to-video"),
        (
            {name: t for name, t in state.items() if "blocks.1.ffn" not in name},
            r"tensors missing, first 'blocks\.1",
        ),
        ({**state, "blocks.1.ffn.0.weight": torch.zeros(3, 3)}, "these files do not match"),
        ({**state, "extra.weight": torch.zeros(1)}, "'extra.weight' is not one of Wan 2.1"),
        (
            {name: t for name, t in state.items() if name != "patch_embedding.weight"},
            "'patch_embedding.weight' is mis",
        ),
    ):
        torch.save(content, file)
        with pytest.raises(UserError, match=words):
            load_wan(file, heads=1)
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"file\.pt: unreadable"):
        load_wan(file)


def test_float8_and_other_types_are_refused(model: Wan, tmp_path: Path) -> None:
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in original_state(model).items()}
    save_file(state, tmp_path / "fp8.safetensors")
    with pytest.raises(
        UserError, match=r"fp8\.safetensors: tensor '.*' is F8_E4M3; only F64, F32, F16, BF16"
    ):
        load_wan(tmp_path / "fp8.safetensors")
