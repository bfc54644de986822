"""extend_prompts.py end to end: a tiny random language model, an endpoint on loopback, kills,
numbers of ranks."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recipe_runner
import torch
from chat_server import completion, serving
from recipe_runner import At
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from scd_sf.data.prompt_files import read_prompt_file
from scd_sf.distributed import Ranks
from scd_sf.files import LFS_POINTER, locked, read_json, read_jsonl
from scd_sf.tools.prompts.extend import local as local_model
from scd_sf.tools.prompts.extend.endpoint import EndpointConfig
from scd_sf.tools.prompts.extend.local import LocalModel
from scd_sf.tools.prompts.extend.rules import messages
from scd_sf.tools.prompts.extend.run import ExtendConfig, run_extend
from scd_sf.types import UserError

SCRIPT = "data_prep/extend_prompts.py"
LINE = "a the old cat dog runs over green hills while camera follows slowly and light falls through trees"
WORDS = LINE.split()
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
POINTER = LFS_POINTER + b".github.com/spec/v1\noid sha256:0\nsize 9\n"
ALONE = Ranks(0, 1, 0, torch.device("cpu"))
LONG = " ".join(f"{word} the old green hill" for word in WORDS[:12])  # 60 words


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    words = [
        "<pad>",
        "<unk>",
        "<end>",
        *(f"Ġ{word}" for word in ("system", "user", "assistant", *WORDS)),
    ]
    tokens = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    # as Qwen2's
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(root)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=2,
        bos_token_id=None,
        pad_token_id=0,
    )
    network = Qwen2ForCausalLM(config)
    network.save_pretrained(root)
    return root


def prompts(root: Path, count: int) -> Path:
    rows = [
        {"uuid": f"id-{n}", "prompt": f"a cat {WORDS[n % len(WORDS)]} number {n}"}
        for n in range(count)
    ]
    path = root / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def result(out: Path) -> bytes:
    return (
        (out / "prompts.jsonl").read_bytes()
        + (out / "prompts.txt").read_bytes()
        + (out / "report.json").read_bytes()
    )


def local(path: Path, model: Path, out: Path, batch: int = 4) -> list[str]:
    more = [
        "dtype=float32",
        "temperature=1.0",
        "top_p=1.0",
        "max_tokens=160",
        "attempts=2",
        "gates={min_words: 10}",
    ]
    return [f"prompts={path}", f"model={model}", f"out={out}", f"batch={batch}", *more]


@pytest.mark.slow
def test_ranks_kills_and_resuming_give_the_same_files(model: Path, tmp_path: Path) -> None:
    path = prompts(tmp_path, 14)
    recipe_runner.succeed(SCRIPT, *local(path, model, tmp_path / "one"))
    report: Any = read_json(tmp_path / "one" / "report.json", "")
    assert report["prompts"] == 14 and 0 < report["extended"] < 14
    assert sum(report["kept original because"].values()) == report["kept original"]
    assert report["settings"]["gates"]["min_words"] == 10

    other = tmp_path / "other"
    sync = "scd_sf.tools.prompts.extend.run:append"
    killed = recipe_runner.run_ranks(
        SCRIPT, *local(path, model, other, 2), world=1, at={0: At(sync, 3)}
    )
    assert killed[0].code < 0 and not (other / "report.json").exists()
    part = other / "parts" / "rank-0000.jsonl"
    whole = part.read_bytes()
    part.write_bytes(whole + b'{"uuid": "id-9", "prom')  # what a kill inside the write leaves
    before = whole.count(b"\n")
    assert 0 < before < 14
    two = recipe_runner.run_ranks(SCRIPT, *local(path, model, other, 3), world=2)
    assert [rank.code for rank in two] == [0, 0], two[0].err + two[1].err
    assert f"14 prompts, {before} finished before" in two[0].out
    assert (
        part.read_bytes().startswith(whole)
        and (other / "parts" / "rank-0001.jsonl").stat().st_size > 0
    )
    assert result(other) == result(tmp_path / "one")
    merged = recipe_runner.run(
        SCRIPT,
        *local(path, model, other, 3),
        at=At("scd_sf.tools.prompts.extend.run:write_json", 1),
    )
    assert merged.code < 0 and not (other / "report.json").exists()
    again = recipe_runner.succeed(SCRIPT, *local(path, model, other))
    assert "14 prompts, 14 finished before" in again.out and result(other) == result(
        tmp_path / "one"
    )


def test_an_answer_does_not_depend_on_the_batch(model: Path) -> None:
    more: dict[str, Any] = {
        "hub": False,
        "device": torch.device("cpu"),
        "dtype": "float32",
        "max_tokens": 40,
    }
    writer = LocalModel.open(str(model), temperature=1.0, top_p=0.9, **more)
    asked = ["a cat", "the old dog runs over green hills", "light"]
    together = writer.write(asked, [1, 2, 3])
    assert together == [
        writer.write([prompt], [seed])[0] for prompt, seed in zip(asked, (1, 2, 3), strict=True)
    ]
    assert writer.write(asked, [4, 5, 6]) != together and writer.write([], []) == []
    assert all(
        answer.cut == (len(answer.text.split()) >= 40)
        for answer in together
        if "<unk>" not in answer.text
    )


def test_the_draw_follows_the_models_distribution(model: Path) -> None:
    more: dict[str, Any] = {
        "hub": False,
        "device": torch.device("cpu"),
        "dtype": "float32",
        "max_tokens": 1,
    }
    writer = LocalModel.open(str(model), temperature=0.5, top_p=1.0, **more)
    count = 3000
    drawn = Counter[str]()
    for first in range(0, count, 500):
        drawn.update(
            answer.text for answer in writer.write(["a cat"] * 500, range(first, first + 500))
        )
    text = writer.tokenizer.apply_chat_template(
        messages("a cat"), tokenize=False, add_generation_prompt=True
    )
    logits = writer.model(
        **writer.tokenizer([text], return_tensors="pt", return_token_type_ids=False)
    ).logits[0, -1]
    chance = torch.softmax(logits / 0.5, 0)
    for index in chance.topk(5).indices.tolist():
        word = writer.tokenizer.decode([index], skip_special_tokens=True)
        if word:
            assert (
                abs(drawn[word] / count - chance[index].item())
                < 4 * (chance[index].item() / count) ** 0.5
            )


def test_an_endpoint_with_every_kind_of_answer(tmp_path: Path) -> None:
    lines = ["good", "second", "chatty", "foreign", "cut", "good"]
    path = tmp_path / "in.txt"
    path.write_text("\n".join(lines))
    seeds: dict[str, list[int]] = {}

    def reply(number: int, body: dict[str, Any]) -> Any:
        word = body["messages"][1]["content"]
        seeds.setdefault(word, []).append(body["seed"])
        if word == "second" and len(seeds[word]) == 1:
            return completion(f"{LONG}\n{LONG}")
        answers = {
            "chatty": f"Sure, {LONG}",
            "foreign": "una mujer por la calle bajo la lluvia " * 8,
        }
        return completion(
            answers.get(word, f"{word} {LONG}"), "length" if word == "cut" else "stop"
        )

    with serving(reply) as server:
        cfg = ExtendConfig(
            str(path), str(tmp_path / "out"), "qwen", endpoint=EndpointConfig(server.url), batch=2
        )
        run_extend(cfg, ALONE)
        first = len(server.requests)
        run_extend(replace(cfg, batch=5), ALONE)
        assert len(server.requests) == first == 1 + 2 + 3 * 3
    assert len(set(seeds["chatty"])) == 3 and len(seeds["good"]) == 1
    report: Any = read_json(tmp_path / "out" / "report.json", "")
    assert (report["prompts"], report["extended"], report["kept original"]) == (6, 3, 3)
    assert report["kept original because"] == {"chatter": 1, "cut": 1, "language": 1}
    assert report["answers refused because"] == {"chatter": 3, "cut": 3, "language": 3, "lines": 1}
    wanted = [f"good {LONG}", f"second {LONG}", "chatty", "foreign", "cut", f"good {LONG}"]
    for name in ("prompts.txt", "prompts.jsonl"):
        assert [row.prompt for row in read_prompt_file(tmp_path / "out" / name)] == wanted
    rows = read_jsonl(tmp_path / "out" / "prompts.jsonl", "")
    assert (
        [row["original"] for row in rows] == lines
        and rows[1]["refused"] == ["lines"]
        and rows[2]["extended"] is False
    )


def test_a_longer_list_goes_on_and_another_setting_is_refused(tmp_path: Path) -> None:
    path = prompts(tmp_path, 3)
    with serving(lambda number, body: completion(LONG)) as server:
        cfg = ExtendConfig(
            str(path), str(tmp_path / "out"), "qwen", endpoint=EndpointConfig(server.url)
        )
        run_extend(cfg, ALONE)
        prompts(tmp_path, 5)
        run_extend(cfg, ALONE)
        assert (
            len(server.requests) == 5
            and len(read_jsonl(tmp_path / "out" / "prompts.jsonl", "")) == 5
        )
        with pytest.raises(UserError, match=r"begun with other seed; nothing is overwritten"):
            run_extend(replace(cfg, seed=1), ALONE)
        with pytest.raises(UserError, match=r"begun with other model"):
            run_extend(replace(cfg, model="gwen"), ALONE)
        path.write_text(path.read_text().replace("number 1", "number 7"))
        with pytest.raises(UserError, match=r"uuid id-1 was another prompt then"):
            run_extend(cfg, ALONE)
        part = tmp_path / "out" / "parts" / "rank-0000.jsonl"
        part.write_text(part.read_text().replace('{"uuid"', '{"uid"', 1))
        with pytest.raises(UserError, match=r"rank-0000\.jsonl: line 1 is damaged"):
            run_extend(cfg, ALONE)
        (tmp_path / "in.jsonl").write_text(
            '{"uuid": "x", "prompt": "a"}\n{"uuid": "x", "prompt": "b"}\n'
        )
        with pytest.raises(UserError, match=r"uuid x names two prompts"):
            run_extend(cfg, ALONE)
        (tmp_path / "in.jsonl").write_text('{"prompt": "a", "start": "x.png"}\n')
        with pytest.raises(UserError, match=r"prompt 1 has 'start' or 'then', which would be lost"):
            run_extend(cfg, ALONE)
        (tmp_path / "in.csv").write_text("uuid,prompt,time\nu,a,t\nv,b,t,more\n")
        with pytest.raises(UserError, match=r"in\.csv: line 3 has 4 columns instead of 3"):
            run_extend(replace(cfg, prompts=str(tmp_path / "in.csv")), ALONE)
        assert len(server.requests) == 5


def test_bad_models(model: Path, tmp_path: Path) -> None:
    path = prompts(tmp_path, 2)
    cfg = ExtendConfig(str(path), str(tmp_path / "out"), str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"none is no directory; correct the path, or set hub=true"):
        run_extend(cfg, ALONE)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none: cannot be read as a causal language model"):
        run_extend(cfg, ALONE)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"bare has no chat template"):
        run_extend(replace(cfg, model=str(bare)), ALONE)
    assert not (tmp_path / "out").exists()
    for change in ({"attempts": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"batch": 0}):
        with pytest.raises(ValueError, match="must be"):
            replace(cfg, **change)


def opened(folder: Path, *, hub: bool = False) -> Any:
    return LocalModel.open(
        str(folder),
        hub=hub,
        device=torch.device("cpu"),
        dtype="float32",
        temperature=1.0,
        top_p=1.0,
        max_tokens=9,
    ).model


def test_weights_that_are_broken_missing_or_stale(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of every other model: NaN, pointers of Git LFS, a tensor that is not there; the index
    names the shard."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    whole = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    broken = {**whole, name: whole[name] * float("nan")}
    save_file(broken, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"model\.safetensors: tensor '{name}' holds NaN"):
        opened(folder)
    save_file(
        {key: value for key, value in whole.items() if key != name}, folder / "model.safetensors"
    )
    with pytest.raises(UserError, match=rf"1 weights are missing \({name}"):
        opened(folder)
    save_file(whole, folder / "model.safetensors")
    # not read, so its contents need not be there
    (folder / "pytorch_model.bin").write_bytes(POINTER)
    for file in (
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    ):
        before = (folder / file).read_bytes()
        (folder / file).write_bytes(POINTER)
        with pytest.raises(UserError, match=rf"{file}: a Git LFS pointer.*run `git lfs pull`"):
            opened(folder)
        (folder / file).write_bytes(before)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(raw | {"quantization_config": {"quant_method": "awq"}})
    )
    with pytest.raises(
        UserError, match=r"'quantization_config' is set; quantised weights are not read"
    ):
        opened(folder)
    # words as both ends, as the small Qwen2.5 have them; the file leaves out the second
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    kept = sorted(key for key in whole if key != "lm_head.weight")
    places = {key: names[key > name] for key in kept}
    (folder / "model.safetensors").unlink()
    for shard in names:
        save_file({key: whole[key] for key in kept if places[key] == shard}, folder / shard)
    stale = load_file(folder / names[1]) | {name: torch.zeros_like(whole[name])}
    save_file(stale, folder / names[1])
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    asked = dict[str, object]()
    monkeypatch.setattr(
        local_model, "snapshot_download", lambda name, **more: asked.update(more) or str(folder)
    )
    for read in (opened(folder), opened(tmp_path / "on the hub", hub=True)):
        assert torch.equal(read.get_parameter(name), whole[name])
        assert torch.equal(read.lm_head.weight, whole["model.embed_tokens.weight"])
        assert read.generation_config.eos_token_id == 2
    assert "*.bin" not in str(asked) and asked["ignore_patterns"] == ["*/*"]


def test_nothing_of_others_is_overwritten(tmp_path: Path) -> None:
    """Somebody at work in the folder, prompts inside it, files that were there or were changed
    since."""
    path, out = prompts(tmp_path, 2), tmp_path / "out"
    with serving(lambda number, body: completion(LONG)) as server:
        cfg = ExtendConfig(str(path), str(out), "qwen", endpoint=EndpointConfig(server.url))
        with locked(out, "extend_prompts"), pytest.raises(UserError, match="is at work in it"):
            run_extend(cfg, ALONE)
        with pytest.raises(UserError, match=r"holds in\.jsonl, the prompts"):
            run_extend(replace(cfg, out=str(tmp_path)), ALONE)
        for name in ("prompts.txt", "report.json", "settings.json"):
            (tmp_path / name.replace(".", "-")).mkdir()
            mine = tmp_path / name.replace(".", "-") / name
            mine.write_text('{"mine": 1}')
            with pytest.raises(UserError, match=r"nothing of others is touched|begun with other"):
                run_extend(replace(cfg, out=str(mine.parent)), ALONE)
            assert mine.read_text() == '{"mine": 1}' and len(list(mine.parent.iterdir())) <= 2
        assert not server.requests
        run_extend(cfg, ALONE)
        (out / "prompts.txt").write_text("my own words")
        with pytest.raises(
            UserError, match=r"prompts\.txt: was changed since report\.json was written"
        ):
            run_extend(cfg, ALONE)
        assert (out / "prompts.txt").read_text() == "my own words"
        begun = recipe_runner.run(
            SCRIPT,
            f"prompts={path}",
            f"out={tmp_path}/begun",
            "model=qwen",
            f"endpoint.url={server.url}",
            at=At("scd_sf.tools.prompts.extend.run:write_json", 1),
        )
        assert begun.code < 0
        # killed before its first file: still ours
        run_extend(replace(cfg, out=str(tmp_path / "begun")), ALONE)
        # a result is a list
        run_extend(replace(cfg, prompts=str(out), out=str(tmp_path / "again")), ALONE)
