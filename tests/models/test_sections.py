"""Which weights of a file with several are read: as asked, else the generator's average, else an
error with names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from scd_sf.models.sections import choose_section
from scd_sf.models.wan.names import ROOTS, diffusers_to_original, to_diffusers
from scd_sf.models.wan.weights import load_wan, read_wan_config
from scd_sf.tensor_files import open_tensors
from scd_sf.types import UserError

NAME = "blocks.0.ffn.0.weight"


def nested(flat: Mapping[str, Tensor]) -> dict[str, object]:
    """The same as tables in tables, cut after the first part of each name."""
    tables: dict[str, object] = {}
    for name, tensor in flat.items():
        first, _, rest = name.partition(".")
        table = tables.setdefault(first, {})
        assert isinstance(table, dict)
        table[rest] = tensor
    return tables


def read(file: Path, section: str = "") -> float:
    """The number that the chosen section is filled with."""
    chosen = choose_section(open_tensors(file), ROOTS, section, str(file), "say which")
    return float(chosen[NAME].read()[0])


def write(tmp_path: Path, sections: Mapping[str, float]) -> list[Path]:
    """Files in which each section holds one tensor: flat safetensors, a flat pickle, tables in a
    pickle."""
    flat = {
        f"{section}.{NAME}" if section else NAME: torch.full((2,), value)
        for section, value in sections.items()
    }
    save_file(flat, tmp_path / "flat.safetensors")
    torch.save(flat, tmp_path / "flat.pt")
    files = [tmp_path / "flat.safetensors", tmp_path / "flat.pt"]
    if "" not in sections:
        torch.save(
            {
                **nested(flat),
                "step": 600,
                "optimizer": {"state": {0: {"exp_avg": torch.ones(1), "step": 3}}},
            },
            tmp_path / "nested.pt",
        )
        files.append(tmp_path / "nested.pt")
    return files


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"generator.model": 1, "generator_ema.model": 2}, 2),
        ({"generator_ema.model": 2, "generator.model": 1}, 2),
        (
            {
                "generator.model._fsdp_wrapped_module": 1,
                "generator_ema.model.module": 2,
                "critic.model": 3,
            },
            2,
        ),
        ({"generator": 1, "critic": 3}, 1),
        ({"generator": 1, "critic_ema": 3}, 1),
        ({"model": 1, "ema": 2}, 2),
        ({"model": 1, "ema_model": 2, "teacher": 3}, 2),
        ({"state_dict": 1}, 1),
        ({"student_ema.net": 2}, 2),
        ({"student": 1, "student_ema": 2}, 2),
        ({"model.diffusion_model": 1}, 1),
        ({"": 1, "ema": 2}, 2),
        ({"": 1, "critic": 2}, 1),
        ({"model": 1, "model_optimizer": 2}, 1),
    ],
)
def test_the_average_of_the_generator(
    tmp_path: Path, sections: dict[str, float], expected: float
) -> None:
    for file in write(tmp_path, sections):
        assert read(file) == expected, file.name


def test_section_decides(tmp_path: Path) -> None:
    for file in write(
        tmp_path, {"generator.model": 1, "generator_ema.model": 2, "critic.model": 3}
    ):
        chosen = {
            name: read(file, name)
            for name in ("generator", "generator_ema", "critic", "generator.model")
        }
        assert list(chosen.values()) == [1, 2, 3, 1], file.name
        with pytest.raises(
            UserError,
            match=r"no weights 'student' in it \(it has critic, generator, generator_ema\)",
        ):
            read(file, "student")
    for file in write(tmp_path, {"": 1, "generator": 2}):
        assert [read(file, "plain"), read(file, "generator")] == [1, 2], file.name


def test_what_was_taken_of_several_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in write(tmp_path, {"generator": 1, "generator_ema": 2, "critic": 3}):
        caplog.clear()
        read(file, "generator")
        assert not caplog.messages
        read(file)
        assert (
            f"{file}: holds several sets of weights (critic, generator, generator_ema); took "
            "generator_ema; if that is not the one, say which" in caplog.text
        )
    # two averages of different models
    for file in write(tmp_path, {"ema": 1, "teacher_ema": 2}):
        caplog.clear()
        assert read(file) == 1
        assert "(ema, teacher_ema); took ema; if that is not the one, say which" in caplog.text


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({"student": 1, "teacher": 2}, "student, teacher"),
        ({"fake_score": 1, "real_score_ema": 2}, "fake_score, real_score_ema"),
        ({"generator_ema": 1, "generator.ema": 2}, "generator.ema, generator_ema"),
        ({"ema_1": 1, "ema_2": 2, "model": 3}, "ema_1, ema_2"),
        ({"model": 1, "state_dict": 2}, "model, state_dict"),
        ({"": 1, "model": 2}, "plain, model"),
        ({"": 1, "generator": 2}, "plain, generator"),
        ({"": 1, "generator_ema.model": 2, "critic": 3}, "plain, generator_ema"),
        ({"model": 1, "generator.model": 2}, "generator, model"),
    ],
)
def test_several_and_no_way_to_decide(
    tmp_path: Path, sections: dict[str, float], names: str
) -> None:
    for file in write(tmp_path, sections):
        with pytest.raises(
            UserError, match=rf"{file.name}: holds several sets of weights \({names}\); say which"
        ):
            read(file)


def test_a_reader_without_a_section_does_not_propose_one(tmp_path: Path) -> None:
    """As a teacher's or a critic's: the remedy is one that its user has."""
    file = write(tmp_path, {"student": 1, "teacher": 2})[0]
    with pytest.raises(UserError, match=r"teacher\); say which with section$"):
        load_wan(file, section="")
    for read_file in (load_wan, read_wan_config):
        with pytest.raises(UserError, match=r"\); take one out with scd convert --section NAME$"):
            read_file(file)


def test_what_deepspeed_writes(tmp_path: Path) -> None:
    """The model is in 'module', which wraps its names; the optimizer's tensors beside it are no
    weights."""
    file = tmp_path / "mp_rank_00_model_states.pt"
    optimizer = {"state": {0: {"exp_avg": torch.ones(1)}}}
    torch.save({"module": {NAME: torch.ones(2)}, "optimizer": optimizer, "lr": 0.1}, file)
    assert list(choose_section(open_tensors(file), ROOTS, "", str(file))) == [NAME]


def test_two_wrappings_of_one_name(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({f"model.{NAME}": torch.ones(2), f"model._orig_mod.{NAME}": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=r"a\.safetensors: holds tensor 'blocks.*' twice"):
        read(file)


def test_whole_models(tmp_path: Path) -> None:
    """A flat file of two whole Wans: each is the one that was asked for."""
    first, second = tiny.wan(1, torch.float32), tiny.wan(2, torch.float32)
    flat = {}
    for section, model in (("generator_ema", second), ("generator", first)):
        for name, tensor in model.state_dict().items():
            flat[f"{section}.model.{diffusers_to_original(to_diffusers(name))}"] = tensor
    file = tmp_path / "two.safetensors"
    save_file(flat, file)
    for section, model in (("generator", first), ("generator_ema", second), ("", second)):
        read_back = load_wan(file, section=section, heads=2)
        assert all(
            torch.equal(p, model.get_parameter(name)) for name, p in read_back.named_parameters()
        )
    with pytest.raises(
        UserError, match=r"two\.safetensors: no weights 'critic' in it \(it has generator"
    ):
        load_wan(file, section="critic", heads=2)
