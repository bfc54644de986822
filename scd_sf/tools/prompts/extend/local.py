"""A causal language model read by transformers (Qwen2.5 and its like): left-padded batches, one
random stream per row.

Letters: B prompts of the batch, L tokens, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from scd_sf.files import foreign
from scd_sf.models.wan.text_files import AGAIN, LANGUAGE, read_model, read_tokenizer
from scd_sf.tensor_files import dtype_of
from scd_sf.tools.prompts.extend.rules import Answer, messages
from scd_sf.types import UserError

GENERATION = "generation_config.json"
# What is read of a repository on the hub: neither pickles nor code, nothing in its folders.
READ = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors"]


class SeededChoice:
    """Adds Gumbel noise to log-probabilities, so that greedy decoding draws a sample.

    Every row has a generator of its own, so a prompt's answer does not depend on the others in the
    batch.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.narrow = LogitsProcessorList(
            [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
        )

    def __call__(self, tokens_BL: Tensor, scores_BV: Tensor) -> Tensor:
        logits_BV: Tensor = self.narrow(tokens_BL, scores_BV.float())
        width = scores_BV.shape[-1]
        noise_BV = torch.stack(
            [torch.empty(width).exponential_(generator=stream) for stream in self.streams]
        )
        return logits_BV - noise_BV.clamp_min(1e-30).log().to(scores_BV.device)


@dataclass(frozen=True)
class LocalModel:
    """Answers of a model in this process."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    temperature: float
    top_p: float
    max_tokens: int

    @classmethod
    def open(
        cls,
        name: str,
        *,
        hub: bool,
        device: torch.device,
        dtype: str,
        temperature: float,
        top_p: float,
        max_tokens: int,
    ) -> LocalModel:
        """Reads a directory, or with ``hub`` a repository of the Hugging Face hub. Tensors only, no
        code of its own.

        UserError: not there, not a causal language model, weights that are missing or not finite,
        no chat template.
        """
        if not hub and not Path(name).is_dir():
            raise UserError(
                f"model: {name} is no directory; correct the path, or set hub=true for a name on the hub"
            )
        folder = _download(name) if hub else Path(name)
        tokenizer = read_tokenizer(folder, LANGUAGE, padding_side="left")
        if not tokenizer.chat_template:
            raise UserError(f"model: {name} has no chat template; give an instruction-tuned model")
        model: Any = read_model(folder, dtype_of(dtype), LANGUAGE)
        if (folder / GENERATION).is_file():
            with foreign(folder / GENERATION, AGAIN):
                model.generation_config = GenerationConfig.from_pretrained(
                    str(folder), local_files_only=True
                )
        if model.generation_config.eos_token_id is None:
            raise UserError(
                f"model: {name} has no eos_token_id, so no answer ends; correct generation_config.json"
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.requires_grad_(False)
        return cls(model.to(device), tokenizer, temperature, top_p, max_tokens)

    @torch.inference_mode()
    def write(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Answer]:
        """One answer per prompt."""
        if not prompts:
            return []
        with foreign(
            "model: its chat template", "give a model whose template takes a system message"
        ):
            chats = [
                self.tokenizer.apply_chat_template(
                    messages(prompt), tokenize=False, add_generation_prompt=True
                )
                for prompt in prompts
            ]
        inputs = self.tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {
            name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")
        }
        tokens_BL = self.model.generate(
            **inputs,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=self.max_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList(
                [SeededChoice(seeds, self.temperature, self.top_p)]
            ),
        )
        answers_BL = tokens_BL[:, inputs["input_ids"].shape[1] :]
        ends = torch.tensor(
            self.model.generation_config.eos_token_id, device=answers_BL.device
        ).flatten()
        end_flags = torch.isin(answers_BL, ends).any(dim=1).tolist()
        texts = self.tokenizer.batch_decode(answers_BL, skip_special_tokens=True)
        return [Answer(text, cut=not end) for text, end in zip(texts, end_flags, strict=True)]


def _download(name: str) -> Path:
    """Download a repository's readable files and return their folder in the hub's cache."""
    with foreign(
        f"model: {name} cannot be read from the hub", "correct the name, or give a directory"
    ):
        return Path(snapshot_download(name, allow_patterns=READ, ignore_patterns=["*/*"]))
