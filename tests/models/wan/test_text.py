"""Text encoders: the same code for umT5 and BERT, Wan's cleaning and zeros, references, and what
bad input says."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from scd_sf.models.wan.text import (
    REFERENCE,
    TextEncoderConfig,
    TransformersTextEncoder,
    clean_prompt,
    encoder_width,
    load_text_encoder,
    text_config,
    write_reference,
)
from scd_sf.types import UserError

WORDS = ["<pad>", "<unk>", "</s>", "the", "camera", "turns", "left", "right", "meadow", "&"]
POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 2838276208\n"
)
PROMPTS = ["the camera turns left", "right", ""]


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)


def umt5(root: Path) -> UMT5EncoderModel:
    """A tiny Wan text encoder in diffusers layout."""
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=len(WORDS),
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
    )
    model = UMT5EncoderModel(config).eval()
    model.save_pretrained(root / "text_encoder")
    save_tokenizer(root / "tokenizer")
    return model


def bert(folder: Path) -> BertModel:
    """A tiny sentence encoder: weights and tokenizer in one folder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    model = BertModel(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def test_prompts_are_cleaned_as_wan_does() -> None:
    assert clean_prompt("  a &amp;amp; b\n\t c â€œdâ€\x9d ") == 'a & b c "d"'


def test_umt5_equals_the_fully_padded_encoder_and_is_zero_after_the_true_length(
    tmp_path: Path,
) -> None:
    model = umt5(tmp_path)
    encoder = load_text_encoder(tmp_path)
    assert (encoder.width, encoder.max_length) == (16, 512)
    text = encoder.encode(PROMPTS).text_BLE
    tokens = encoder.tokenizer(PROMPTS, padding="max_length", max_length=512, return_tensors="pt")
    with torch.no_grad():
        full = model(
            **{name: tokens[name] for name in ("input_ids", "attention_mask")}
        ).last_hidden_state
    assert text.shape == (3, 512, 16) and text.dtype == torch.float32
    torch.testing.assert_close(text, full * tokens.attention_mask[..., None], rtol=1e-5, atol=1e-6)
    assert [int(row.abs().sum(1).ne(0).sum()) for row in text] == [5, 2, 1]
    assert text[0, 5:].eq(0).all()


def test_bert_layer_and_scale_are_configuration(tmp_path: Path) -> None:
    model = bert(tmp_path)
    with torch.no_grad():
        hidden = model(torch.tensor([[3, 4, 5, 6, 2]]), output_hidden_states=True).hidden_states
    for layer, wanted in ((-1, hidden[2]), (0, hidden[0]), (1, hidden[1])):
        config = TextEncoderConfig(path=str(tmp_path), max_length=8, hidden_layer=layer, scale=2.0)
        states = load_text_encoder(config).states(PROMPTS[:1])
        torch.testing.assert_close(states[0], 2.0 * wanted[0], rtol=1e-5, atol=1e-6)


def test_batching_does_not_change_the_states(tmp_path: Path) -> None:
    bert(tmp_path)
    encoder = load_text_encoder(TextEncoderConfig(path=str(tmp_path), max_length=8))
    single = TransformersTextEncoder(encoder.model, encoder.tokenizer, encoder.config, batch=1)
    torch.testing.assert_close(
        encoder.encode(PROMPTS).text_BLE, single.encode(PROMPTS).text_BLE, rtol=1e-5, atol=1e-6
    )
    assert encoder.states([]) == []


def test_long_prompts_are_cut_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bert(tmp_path)
    encoder = load_text_encoder(TextEncoderConfig(path=str(tmp_path), max_length=3))
    assert encoder.encode(PROMPTS).text_BLE.shape == (3, 3, 16)
    assert "prompt of 5 tokens cut to 3" in caplog.text


def test_threads_may_load_at_once(tmp_path: Path) -> None:
    tiny_run.write_text_encoder(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        encoders = list(pool.map(lambda _: load_text_encoder(tmp_path), range(8)))
    states = [encoder.encode(["left"]).text_BLE for encoder in encoders]
    assert all(torch.equal(one, states[0]) for one in states)


def test_reference_by_package_name_never_imports_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "tiny_words"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    bert(package / "model")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    model = tmp_path / "teacher"
    model.mkdir()
    config = TextEncoderConfig(package="tiny-words", max_length=8, hidden_layer=0, scale=2.0)
    write_reference(model, config)
    assert text_config(model) == config
    assert load_text_encoder(model).encode(PROMPTS).text_BLE.shape == (3, 8, 16)


def test_own_encoder_comes_before_the_reference_and_relative_paths_resolve(tmp_path: Path) -> None:
    bert(tmp_path / "words")
    write_reference(tmp_path, TextEncoderConfig(path="words", max_length=8))
    assert load_text_encoder(tmp_path).max_length == 8
    umt5(tmp_path)
    assert load_text_encoder(tmp_path).max_length == 512


def test_directory_without_encoder_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"no text encoder; it needs .*{REFERENCE}"):
        load_text_encoder(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(UserError, match="only one of text_encoder/ and tokenizer/"):
        load_text_encoder(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"pakage": "x"}, "unknown field 'pakage'"),
        (
            {"package": "no_such_package_here"},
            "package 'no_such_package_here' is not installed; pip install",
        ),
        ({"package": "../evil"}, "is not installed"),
        ({"package": "torch", "folder": "../.."}, "'folder' is '../..', which leaves"),
        ({"path": "../other"}, "'path' is '../other', which leaves"),
        ({"path": "a", "package": "b"}, "keep one"),
        ({"max_length": "8"}, "Expected `int`, got `str` - at `$.max_length`"),
        ({"max_length": 0}, "max_length is 0"),
        ({}, "neither 'path' nor 'package' is set"),
        ({"path": "/" + "[" * 5000}, "no such file; point"),
    ],
)
def test_bad_reference(tmp_path: Path, row: dict[str, object], message: str) -> None:
    (tmp_path / REFERENCE).write_text(json.dumps(row))
    with pytest.raises(UserError) as caught:
        load_text_encoder(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_encoders_are_named(tmp_path: Path) -> None:
    bert(tmp_path)
    config = TextEncoderConfig(path=str(tmp_path), max_length=8)
    for bad, message in (
        (9, "hidden_layer is 9; this encoder has 0 to 2"),
        (-4, "hidden_layer is -4"),
    ):
        with pytest.raises(UserError, match=message):
            load_text_encoder(TextEncoderConfig(path=str(tmp_path), max_length=8, hidden_layer=bad))
    with pytest.raises(UserError, match="at most 20"):
        load_text_encoder(TextEncoderConfig(path=str(tmp_path), max_length=21))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: unreadable"):
        load_text_encoder(config)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        load_text_encoder(config)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_text_encoder(config)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    bert(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"1 weights are missing \(encoder\.layer\.1\.output\.dense\.weight"
    ):
        load_text_encoder(TextEncoderConfig(path=str(tmp_path), max_length=8))


def test_a_config_chooses_no_code(tmp_path: Path) -> None:
    """Attention kernels of the hub and code of a repository are not asked for; quantised weights
    are refused."""
    bert(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    chosen = {
        "attn_implementation": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "auto_map": {"a": "b.C"},
    }
    file.write_text(json.dumps(config | chosen | {"_experts_implementation": "someone/kernel"}))
    source = TextEncoderConfig(path=str(tmp_path), max_length=8)
    encoder = load_text_encoder(source)
    assert encoder.model.config._attn_implementation == "sdpa" and encoder_width(source) == 16
    assert not vars(encoder.model.config).get("auto_map")
    for inside in (False, True):
        settings: dict[str, object] = {"quantization_config": {"quant_method": "fp8"}}
        file.write_text(json.dumps(config | ({"text_config": settings} if inside else settings)))
        for read in (load_text_encoder, encoder_width):
            with pytest.raises(
                UserError,
                match=r"config\.json: 'quantization_config' is set; quantised weights are not",
            ):
                read(source)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 100_000},
        {"num_hidden_layers": 10**12},
        {"intermediate_size": 10**12},
        {"intermediate_size": 10**19},
        {"hidden_size": -1},
        {"hidden_size": "16"},
        {"hidden_size": [16]},
        {"hidden_size": 10**12},
        {"num_attention_heads": 0},
        {"hidden_act": "no such"},
        {"model_type": "gpt2"},
        {"model_type": ["bert"]},
        {"model_type": "\ud800"},
        {"vocab_size": 3},
        {"layer_norm_eps": "x"},
        {"num_hidden_layers": None},
    ],
)
def test_configs_of_others(tmp_path: Path, fields: dict[str, object]) -> None:
    """One line that names the folder, before anything large is made."""
    bert(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(UserError, match=re.escape(str(tmp_path))) as caught:
        load_text_encoder(TextEncoderConfig(path=str(tmp_path), max_length=8))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_weights_that_are_nan_or_not_there(tmp_path: Path) -> None:
    bert(tmp_path)
    source, file = (
        TextEncoderConfig(path=str(tmp_path), max_length=8),
        tmp_path / "model.safetensors",
    )
    tensors = load_file(file)
    tensors["encoder.layer.1.output.dense.weight"][3, 4] = float("nan")
    save_file(tensors, file)
    with pytest.raises(
        UserError, match=r"tensor 'encoder\.layer\.1\.output\.dense\.weight' holds NaN"
    ):
        load_text_encoder(source)
    file.write_bytes(whole_bert(tmp_path / "other"))
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text(POINTER)
        with pytest.raises(UserError, match=rf"{name}: a Git LFS pointer.*run `git lfs pull`"):
            load_text_encoder(source)
        (tmp_path / name).write_bytes(whole)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    wrong = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "X", "type_id": 0}}]}
    for changes in ({"model": 3}, {"post_processor": {**wrong, "pair": [], "special_tokens": {}}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(stored | changes))
        with pytest.raises(
            UserError,
            match=r"cannot be read as a text encoder|text encoder: its tokenizer: no entry",
        ):
            load_text_encoder(source).encode(["x"])
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(stored | {"added_tokens": [*stored["added_tokens"], token(999)]})
    )
    with pytest.raises(UserError, match="the tokenizer gives more than the encoder's 10 words"):
        load_text_encoder(source).encode(["x extra"])


def token(number: int) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": "extra", **flags}


def whole_bert(folder: Path) -> bytes:
    bert(folder)
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("text", [f"a &#{'9' * 5000}; b", f"a &amp;#{'1' * 6000} b", "a \ud800 b"])
def test_cleaning_never_ends_a_job(text: str) -> None:
    assert clean_prompt(text) == "a \N{REPLACEMENT CHARACTER} b"
