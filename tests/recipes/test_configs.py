"""Every shipped configuration, and every command of the chains, fits the schema of the script that takes it."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import recipe_runner

from scd_sf.config import load_config
from scd_sf.steps import Step

CONFIGS = recipe_runner.ROOT / "recipes" / "configs"
# Which script and schema a configuration is for, by what its name holds.
SCHEMAS = {
    "evaluate": ("evaluate", "EvaluateConfig"),
    "stage1": ("stage1_transplant", "TransplantConfig"),
    "stage2": ("stage2_flow_matching", "Stage2Config"),
    "stage3": ("stage3_self_forcing", "Stage3Config"),
    "teacher": ("pretrain", "PretrainConfig"),
    "vae": ("pretrain_vae", "PretrainVae"),
}


def schema_of(config: Path) -> type[object]:
    found = [entry for word, entry in SCHEMAS.items() if word in config.stem]
    assert len(found) == 1, f"{config}: say in SCHEMAS which script it is for"
    script, name = found[0]
    schema: type[object] = vars(recipe_runner.load_script(f"recipes/{script}.py"))[name]
    return schema


def mandatory(schema: type[object], prefix: str = "") -> Iterator[str]:
    """A value for every field that has no default."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            if dataclasses.is_dataclass(hints[field.name]):
                yield from mandatory(hints[field.name], f"{prefix}{field.name}.")
            else:
                yield f"{prefix}{field.name}=x"


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_fits_its_schema(config: Path) -> None:
    schema = schema_of(config)
    load_config(schema, config, list(mandatory(schema)))


def chain_steps() -> list[Step]:
    """Every step of the demo and of the teacher's chain."""
    run, teacher = Path("runs/x"), Path("assets/wan_doom")
    demo, make = (recipe_runner.load_script(f"recipes/{name}.py") for name in ("demo", "make_teacher"))
    groups = [*demo.data_steps(run, teacher, 60), *demo.student_steps(run, teacher, 1)]
    groups += [
        demo.distil_step(run, teacher, 1),
        demo.evaluate_step(run, teacher),
        *make.data_steps(run, {}),
        *make.train_steps(run, make.REHEARSAL),
    ]
    return [step for group in groups for step in group]


def test_commands_of_the_chains_fit_their_scripts() -> None:
    """Scripts and configuration files exist, and every override names a field."""
    steps = [step for step in chain_steps() if "--config" in step.command]
    assert len(steps) >= 7
    for step in steps:
        at = list(step.command).index("--config")
        script, config, overrides = step.command[at - 1], step.command[at + 1], step.command[at + 2 :]
        assert (recipe_runner.ROOT / script).is_file()
        load_config(schema_of(recipe_runner.ROOT / config), recipe_runner.ROOT / config, list(overrides))
