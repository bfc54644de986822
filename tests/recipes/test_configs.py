"""Every shipped configuration, and every command of the chains, fits the schema of the script that
takes it."""

from __future__ import annotations

import dataclasses
import importlib
import re
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import recipe_runner
import torch
import yaml

from scd_sf.config import commented_yaml, differences, from_yaml, load_config, to_yaml
from scd_sf.diffusion.flow import shift_time
from scd_sf.losses.flow_matching import FlowMatchingConfig
from scd_sf.models.build import ModelConfig
from scd_sf.models.scd.config import ScdConfig
from scd_sf.models.scd.decoder import DecoderConfig
from scd_sf.models.scd.transplant import TransplantConfig
from scd_sf.tools.demo_steps import clips_and_latents
from scd_sf.tools.stage_configs import Stage2Config
from scd_sf.tools.steps import Step
from scd_sf.train.base import TRAINING, EngineConfig, accumulation
from scd_sf.types import UserError

CONFIGS = recipe_runner.ROOT / "recipes" / "configs"
# Which script (or module, for what only ``scd`` runs) and schema a configuration is for, by what
# its name holds.
SCHEMAS = {
    "bench": ("scd_sf.evaluation.bench", "BenchConfig"),
    "evaluate": ("evaluate", "EvaluateConfig"),
    "pretrain": ("pretrain", "PretrainConfig"),
    "stage1": ("stage1_transplant", "TransplantConfig"),
    "stage2": ("stage2_flow_matching", "Stage2Config"),
    "stage3": ("stage3_self_forcing", "Stage3Config"),
    "teacher": ("pretrain_teacher", "PretrainConfig"),
    "tiny_vae": ("pretrain_tiny_vae", "PretrainTinyVaeConfig"),
    "tokenizer": ("pretrain_tokenizer", "PretrainTokenizerConfig"),
    "vae_doom": ("pretrain_vae", "PretrainVae"),
}


def schema_of(config: Path) -> type[object]:
    found = [entry for word, entry in SCHEMAS.items() if config.stem.startswith(word)] or [
        entry for word, entry in SCHEMAS.items() if word in config.stem
    ]
    assert len(found) == 1, f"{config}: say in SCHEMAS which script it is for"
    script, name = found[0]
    module = (
        importlib.import_module(script)
        if "." in script
        else recipe_runner.load_script(f"recipes/{script}.py")
    )
    schema: type[object] = vars(module)[name]
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


COMMANDS: dict[tuple[str, str], list[str]] = {
    **{entry: [] for name, entry in SCHEMAS.items() if name != "bench"},
    ("scd_sf.evaluation.bench", "BenchConfig"): ["checkpoints=[x]"],
    ("scd_sf.generation.sampling", "SampleConfig"): [],
    ("scd_sf.probes.run", "ProbeConfig"): [],
    ("scd_sf.tools.generate.plan", "GenerateConfig"): ["prompts=[a]"],
    ("scd_sf.tools.data.encode_list", "EncodeListConfig"): [],
    ("scd_sf.evaluation.vbench.suite", "SuiteConfig"): [],
    ("scd_sf.evaluation.vbench.score", "ScoreConfig"): [],
    ("evaluate_prediction", "EvaluatePredictionConfig"): [],
}
MAY_BE_NEGATIVE = ("pca.frame",)  # counted from the end


def numbers(schema: Any, prefix: str = "") -> Iterator[str]:
    """Every field that is a number, dotted."""
    for name, hint in typing.get_type_hints(schema).items():
        kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if isinstance(kind, type)]
        if typing.get_origin(hint) in (list, tuple, dict):
            continue
        for kind in kinds:
            if dataclasses.is_dataclass(kind):
                yield from numbers(kind, f"{prefix}{name}.")
        if int in kinds or float in kinds:
            yield prefix + name


@pytest.mark.parametrize("command", COMMANDS, ids=".".join)
def test_no_number_means_nothing(command: tuple[str, str]) -> None:
    """A number that nothing can be is refused where the configuration is read, in a line that names
    the field."""
    script, name = command
    module = (
        importlib.import_module(script)
        if "." in script
        else recipe_runner.load_script(f"recipes/{script}.py")
    )
    schema: Any = vars(module)[name]
    given = [*mandatory(schema), *COMMANDS[command]]
    load_config(schema, None, given)
    fields = list(numbers(schema))
    assert fields
    for field in fields:
        for value in ("-1000000000", "nan", "inf", "[1, 2]", "''", "yes"):
            if value.startswith("-") and field in MAY_BE_NEGATIVE:
                continue
            with pytest.raises(UserError, match=field.rsplit(".", 1)[-1]):
                load_config(schema, None, [*given, f"{field}={value}"])
                pytest.fail(f"{field}={value} is taken")


@pytest.mark.parametrize(
    ("command", "given", "words"),
    [
        (
            ("scd_sf.models.scd.transplant", "TransplantConfig"),
            ["heads=2"],
            "section and heads are of the file weights=",
        ),
        (
            ("scd_sf.models.scd.transplant", "TransplantConfig"),
            ["section=ema"],
            "section and heads are of the file",
        ),
        (
            ("scd_sf.models.scd.transplant", "TransplantConfig"),
            ["scd.decoder={fusion: delta, prefix_rope: temporal}"],
            "scd.decoder.prefix_rope is temporal, but fusion delta has no prefix",
        ),
        (
            ("scd_sf.models.scd.transplant", "TransplantConfig"),
            ["family=causal", "scd.encoder_layers=[0]"],
            "set family=scd",
        ),
        (("scd_sf.models.scd.transplant", "TransplantConfig"), ["sampler.times=[1,2]"], "sampler"),
        (
            ("scd_sf.tools.stage_configs", "Stage2Config"),
            ["engine={backend: torch, offload: true}"],
            "offload is for backend=deepspeed",
        ),
        (
            ("scd_sf.tools.stage_configs", "Stage2Config"),
            ["loss.action_dropout=0.5"],
            "loss.action_dropout is set, but clips",
        ),
        (
            ("scd_sf.tools.stage_configs", "Stage3Config"),
            ["teacher_engine.lr=1"],
            "teacher_engine.lr is set, but the teacher",
        ),
        (
            ("scd_sf.tools.stage_configs", "Stage3Config"),
            ["critic_data=student", "reuse=2"],
            "reuse is 2, but critic_data=student",
        ),
        (
            ("scd_sf.generation.sampling", "SampleConfig"),
            ["negative_prompt=ugly"],
            "negative_prompt is what guidance.text leads",
        ),
        (
            ("scd_sf.generation.sampling", "SampleConfig"),
            ["force=true"],
            "force is for another sampler",
        ),
        (
            ("scd_sf.generation.sampling", "SampleConfig"),
            ["guidance.text.scale=-1"],
            "guidance.scale is -1.0; it must be between 0",
        ),
        (
            ("scd_sf.tools.generate.plan", "GenerateConfig"),
            ["prompts=[a]", "cluster.workers=3"],
            "cluster is for launcher=ray",
        ),
        (
            ("scd_sf.tools.generate.plan", "GenerateConfig"),
            ["prompts=[a]", "engine.lr=1"],
            "engine.lr is set, but the teacher",
        ),
        (
            ("evaluate_prediction", "EvaluatePredictionConfig"),
            ["protocol=minecraft-fvd", "custom.clips=3"],
            "custom is for protocol=custom",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(
    command: tuple[str, str], given: list[str], words: str
) -> None:
    script, name = command
    module = (
        importlib.import_module(script)
        if "." in script
        else recipe_runner.load_script(f"recipes/{script}.py")
    )
    schema: Any = vars(module)[name]
    with pytest.raises(UserError, match=re.escape(words)):
        load_config(schema, None, [*mandatory(schema), *given])


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_fits_its_schema(config: Path) -> None:
    """It is complete, in block style, and ``--print-config`` of it is the same configuration."""
    schema, text = schema_of(config), config.read_text()
    cfg = load_config(schema, config, list(mandatory(schema)))
    assert from_yaml(schema, commented_yaml(cfg)) == cfg
    for printed in (text, commented_yaml(cfg), to_yaml(cfg)):
        require_block_style(printed)
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 100
    if config.stem != "bench_wan_1.3b" and "evaluate" not in config.stem:
        assert not missing_fields(cfg, yaml.safe_load(text), ""), (
            f"{config}: write out every field of its sections"
        )


def require_block_style(text: str) -> None:
    """One field a line; on one line only lists of scalars and what is empty."""
    events = list(yaml.parse(text))
    for event, below in pairwise(events):
        if isinstance(event, yaml.MappingStartEvent):
            assert not event.flow_style or isinstance(below, yaml.MappingEndEvent), event.start_mark
        if isinstance(event, yaml.SequenceStartEvent) and event.flow_style:
            assert isinstance(below, yaml.ScalarEvent | yaml.SequenceEndEvent), event.start_mark


# What a file may leave out: where a run lies and what it reads, what is kept of it, how it is
# watched.
ELSEWHERE = {
    "init",
    "teacher",
    "critic",
    "prompts",
    "data",
    "val",
    "base",
    "out",
    "weights",
    "section",
    "heads",
}
ELSEWHERE |= {
    "run",
    "text",
    "preview",
    "keep",
    "keep_every",
    "max_rollbacks",
    "async_save",
    "prefetch",
}
ELSEWHERE |= {"bucket", "max_skips"}


def unread_fields(cfg: Any, tree: dict[str, Any], key: str) -> set[str]:
    """Fields of a section that mean nothing beside the others."""
    match cfg:
        case ModelConfig():
            return {
                "blocks",
                "dit" if cfg.backbone == "wan" else "wan",
                "chunk" if cfg.family == "scd" else "scd",
            }
        case EngineConfig():
            local = {"zero_stage", "offload"} if cfg.backend == "torch" else set()
            return local | (set(TRAINING) if key == "teacher_engine." else set())
        case DecoderConfig(fusion="delta"):
            return {"prefix", "prefix_rope", "prefix_time"}
        case FlowMatchingConfig():
            text, signals = (
                {"text_dropout", "query_from", "query_pure"},
                {"action_dropout", "label_dropout"},
            )
            return signals if text & tree.keys() else text
        case TransplantConfig(family="causal"):
            return {"scd"}
        case ScdConfig() if key == "scd.":
            return {"chunk"}  # stage 1 has it outside
        case Stage2Config(blocks=None):
            return {"blocks"}
    if key == "" and "gan_engine" in vars(cfg) and not cfg.gan.weight:
        return {"discriminator", "gan_engine"}
    return set()


def missing_fields(cfg: Any, tree: dict[str, Any], key: str) -> list[str]:
    """Fields that a file does not name and that mean something beside the others."""
    fields = {
        field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg) if field.init
    }
    unread = ELSEWHERE | unread_fields(cfg, tree, key)
    missing = [f"{key}{name}" for name in fields if name not in unread and name not in tree]
    for name, value in fields.items():
        if dataclasses.is_dataclass(value) and name in tree and name != "run":
            missing += missing_fields(value, tree[name], f"{key}{name}.")
    return missing


def chain_steps() -> list[Step]:
    """Every step of the demo and of the teacher's chain."""
    run, teacher = Path("runs/x"), Path("assets/wan_doom")
    demo, make = (
        recipe_runner.load_script(f"recipes/{name}.py") for name in ("demo", "make_teacher")
    )
    groups = [
        *clips_and_latents(run, teacher, run / "latents", 60),
        *demo.training_steps(run, teacher, 1),
    ]
    groups += [
        [Step("evaluate", demo.scoring(run, teacher), 1)],
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
        script, config, overrides = (
            step.command[at - 1],
            step.command[at + 1],
            step.command[at + 2 :],
        )
        assert (recipe_runner.ROOT / script).is_file()
        load_config(
            schema_of(recipe_runner.ROOT / config), recipe_runner.ROOT / config, list(overrides)
        )


def test_commands_of_the_experiments_fit_their_scripts() -> None:
    """Every training and scoring of every table."""
    script = recipe_runner.load_script("recipes/scratch_experiments.py")
    plan = script.Plan(Path("runs/x"), 1600, (0, 1), 24, 8)
    groups = [group for name in script.EXPERIMENTS for group in script.train_and_score(plan, name)]
    groups += [group for name in script.EXPERIMENTS for group in script.extra(plan, name)]
    steps = [step for group in groups for step in group]
    assert {trial for names in script.TABLES.values() for trial in names} == set(script.TRIALS)
    schemas = {
        f"recipes/{name}.py": vars(recipe_runner.load_script(f"recipes/{name}.py"))[schema]
        for name, schema in (
            ("pretrain", "PretrainConfig"),
            ("evaluate_prediction", "EvaluatePredictionConfig"),
        )
    }
    for step in steps:
        given = list(step.command)[2:]
        config = recipe_runner.ROOT / given[1] if given[0] == "--config" else None
        load_config(schemas[step.command[1]], config, given[2:] if config else given)
    assert len(steps) >= 60


def test_training_from_scratch_has_the_published_numbers() -> None:
    """Supplement Table 2 and the released configuration; the rest is marked in the files."""
    for data, frames, actions in (
        ("minecraft", 300, 3),
        ("ucf101", 16, 0),
        ("realestate10k", 64, 0),
    ):
        cfg: Any = configured("pretrain", f"pretrain_{data}")
        assert (cfg.frames, cfg.model.dit.num_actions, cfg.sampler.steps) == (frames, actions, 50)
        assert (cfg.engine.lr, cfg.engine.lr_scale, cfg.engine.weight_decay) == (
            1e-4,
            {"decoder": 2.0},
            0.0,
        )
        assert (
            cfg.train.ema.decay == 0.9999
            and cfg.engine.grad_clip == 1.0
            and cfg.loss.context_noise == 0.05
        )
        assert cfg.train.steps == (200_000 if data == "ucf101" else 400_000)
        assert (cfg.model.dit.width, len(cfg.model.scd.encoder_layers)) == (768, 8)
    cfg = configured("pretrain", "pretrain_minecraft")
    assert (
        cfg.train.global_batch == 16 and cfg.loss.noise_samples == 2 and cfg.engine.warmup == 10_000
    )


# Supplement Table 2: encoder layers, decoder layers, width, heads.
TABLE_2 = {
    "causal_b": (0, 12, 768, 12),
    "scd_b": (8, 4, 768, 12),
    "scd_b_e": (12, 4, 768, 12),
    "scd_b_d": (8, 12, 768, 12),
    "causal_m": (0, 12, 1024, 16),
    "scd_m": (8, 4, 1024, 16),
    "scd_m_e": (12, 4, 1024, 16),
    "scd_m_d": (8, 12, 1024, 16),
}


def test_table_2() -> None:
    """The files of one data set have the sizes of Table 2 and differ in nothing else."""
    dit = {f"model.dit.{name}" for name in ("num_attention_heads", "ffn_dim", "num_layers")}
    scd = {"model.scd.encoder_layers", "model.scd.decoder.layers"}
    causal = scd | {
        f"model.scd.decoder.{name}" for name in ("fusion", "prefix_rope", "prefix_time")
    }
    causal |= {"model.family", "engine.lr_scale", "engine.lr_scale.decoder"}
    first: dict[str, Any] = {
        data: configured("pretrain", f"pretrain_{data}") for data in ("ucf101", "realestate10k")
    }
    first["minecraft"] = configured("pretrain", "pretrain_scd_b")
    assert differences(first["minecraft"], configured("pretrain", "pretrain_minecraft")) == {}
    found = 0
    for file in CONFIGS.glob("pretrain_*.yaml"):
        size = next(
            (size for size in sorted(TABLE_2, key=len, reverse=True) if file.stem.endswith(size)),
            None,
        )
        if size is None:
            continue
        found += 1
        encoder, decoder, width, heads = TABLE_2[size]
        data = next((data for data in first if data in file.stem), "minecraft")
        cfg: Any = configured("pretrain", file.stem)
        assert set(differences(first[data], cfg)) <= dit | (scd if encoder else causal), file
        model = cfg.model
        assert (model.dit.width, model.dit.num_attention_heads, model.dit.ffn_dim) == (
            width,
            heads,
            4 * width,
        )
        assert model.dit.num_layers == encoder + decoder
        assert (model.family, cfg.engine.lr_scale) == (
            ("scd", {"decoder": 2.0}) if encoder else ("causal", {})
        )
        if encoder:
            assert model.scd.encoder_layers == tuple(range(encoder))
            assert model.scd.decoder.layers == tuple(range(encoder, encoder + decoder))
            decoder_config = model.scd.decoder
            assert (decoder_config.fusion, decoder_config.prefix_rope) == ("paper", "temporal")
    assert found == 12


@pytest.mark.parametrize(
    ("below", "file"),
    [
        ("stage2_wan_1.3b", "stage2_1gpu"),
        ("stage2_wan_1.3b", "stage2_skip_layer"),
        ("stage3_wan_1.3b", "stage3_1gpu"),
        ("demo_stage2_causal", "demo_stage2_skip_layer"),
        ("pretrain_minecraft", "pretrain_scd_m_d"),
        ("pretrain_minecraft", "pretrain_causal_m"),
        ("pretrain_doom", "pretrain_doom_scd"),
        ("tokenizer_doom", "tokenizer_doom_12"),
    ],
)
def test_a_complete_file_over_another_is_itself(below: str, file: str) -> None:
    """Commands of before, which needed two files, run the same."""
    assert differences(configured("", below, file), configured("", file)) == {}


def configured(stage: str, *files: str) -> object:
    """A stage's configuration as these files and a run's own arguments make it."""
    paths = [CONFIGS / f"{name}.yaml" for name in files]
    schema = schema_of(paths[0])
    assert stage in paths[0].stem
    return load_config(schema, paths, list(mandatory(schema)))


def test_table_6() -> None:
    """Every figure of the supplement's fine-tuning table (resolution and clip length are the
    data's)."""
    cfg: Any = configured("stage2", "stage2_wan_1.3b")
    assert cfg.train.global_batch == 64 and cfg.train.ema.decay == 0.99
    assert (cfg.engine.lr, cfg.engine.weight_decay, tuple(cfg.engine.betas)) == (
        2e-5,
        0.01,
        (0.9, 0.99),
    )
    t = shift_time(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), cfg.loss.shift)
    assert torch.allclose(
        t, torch.tensor([5 * u / (1 + 4 * u) for u in (0.1, 0.5, 0.9)], dtype=torch.float64)
    )


def test_table_7() -> None:
    """Every figure of the supplement's rollout table; the critic's and teacher's sizes are what the
    README passes."""
    cfg: Any = configured("stage3", "stage3_wan_1.3b")
    assert (cfg.video.width, cfg.video.height, cfg.video.frames) == (832, 480, 81)
    assert (cfg.loss.guidance.scale, cfg.loss.guidance.form, cfg.loss.guidance.w) == (
        3.0,
        "additive",
        4.0,
    )
    assert cfg.loss.guidance.logs() == {"guidance/standard_w": 4.0, "guidance/additive_s": 3.0}
    assert cfg.train.global_batch == 64 and cfg.train.ema.decay == 0.99
    assert cfg.ratio == 5 and cfg.loss.shift == 5.0 and cfg.critic_data == "own" and cfg.reuse == 1
    for engine, lr in ((cfg.student_engine, 2e-6), (cfg.critic_engine, 4e-7)):
        assert (engine.lr, engine.weight_decay, tuple(engine.betas)) == (lr, 0.01, (0.0, 0.99))
    assert (
        cfg.student_engine.zero_stage,
        cfg.critic_engine.zero_stage,
        cfg.teacher_engine.zero_stage,
    ) == (2, 2, 3)


def test_layers_and_fusions_of_stage_1() -> None:
    """The paper's cut in all; the fusion is written out in each file, ours (the default) and the
    paper's."""
    ours, theirs = ("delta", "identical", "full"), ("paper", "temporal", "full")
    for name, chunk, fusion in (
        ("stage1_wan_1.3b", 1, ours),
        ("stage1_wan_1.3b_chunk3", 3, ours),
        ("stage1_wan_1.3b_paper", 1, theirs),
    ):
        cfg: Any = configured("stage1", name)
        assert (
            cfg.scd.encoder_layers == tuple(range(25))
            and cfg.chunk == chunk
            and cfg.family == "scd"
        )
        decoder = cfg.scd.decoder
        assert decoder.layers == (*range(5), *range(25, 30))
        assert (decoder.fusion, decoder.prefix_rope, decoder.prefix) == fusion
    cfg = configured("stage1", "stage1_causal_chunk3")
    assert (cfg.family, cfg.chunk) == ("causal", 3)
    for file in [
        *CONFIGS.glob("*stage1*.yaml"),
        *CONFIGS.glob("pretrain_*scd*.yaml"),
        CONFIGS / "bench_wan_1.3b.yaml",
    ]:
        text = re.sub(r"#.*", "", file.read_text())
        assert text.count("family: scd") == text.count("fusion: "), (
            f"{file}: name the fusion of every SCD"
        )


def test_self_forcings_own_settings() -> None:
    cfg: Any = configured("stage3", "stage3_self_forcing")
    assert (
        cfg.train.steps * cfg.ratio == 600
        and cfg.train.global_batch == 64
        and cfg.train.ema.decay == 0.99
    )
    for engine, lr in ((cfg.student_engine, 2e-6), (cfg.critic_engine, 4e-7)):
        assert (engine.lr, tuple(engine.betas), engine.grad_clip, engine.weight_decay) == (
            lr,
            (0.0, 0.999),
            10.0,
            0.01,
        )
    assert (cfg.loss.guidance.scale, cfg.loss.shift, cfg.ratio) == (3.0, 5.0, 5)


@pytest.mark.parametrize("world", [1, 8, 64])
def test_the_global_batch_is_64_on_any_number_of_gpus(world: int) -> None:
    """One GPU: optimizer states and teacher are offloaded; 8 and 64 need no file of their own."""
    for stage in ("stage2", "stage3"):
        cfg: Any = configured(stage, f"{stage}_1gpu" if world == 1 else f"{stage}_wan_1.3b")
        batches = accumulation(cfg.train.global_batch, cfg.train.micro_batch, world)
        assert batches * cfg.train.micro_batch * world == 64
        engines = (
            [cfg.engine]
            if stage == "stage2"
            else [cfg.student_engine, cfg.critic_engine, cfg.teacher_engine]
        )
        assert all(engine.offload == (world == 1) for engine in engines)
