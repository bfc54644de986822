"""The request to the language model, and the gates for its answers.

Wan 2.1 was trained on long captions; its authors have prompts rewritten by an LLM under seven
rules. The text here says the same in our own words (source of the rules: Wan2.1,
``wan/utils/prompt_extend.py``).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from scd_sf.files import place_digest
from scd_sf.tools.prompts.filter.language import is_foreign

SYSTEM = """You turn short ideas for a video into full descriptions of it. Follow these rules:
1. Where the idea is bare, add plausible detail that makes the picture complete and appealing; keep what it means.
2. Say what the main subjects look like, what they do and feel, in which visual style, where they are in the picture \
and how the shot is framed.
3. Write in English, whatever language the idea is in. Text in quotes and the titles of works stay exactly as they are.
4. Choose the style that fits the idea, or the one it names, and say its name. Where nothing hints at one, choose a \
realistic film look. Traditional Chinese subjects get a Chinese style.
5. Bring out movement: everything that moves, and how the camera moves.
6. Let movement be natural and simple: give the subjects actions that suit them, in plain verbs.
7. Use 80 to 100 words, in one paragraph.
Answer with the description alone: no introduction, no comment, no quotation marks around it, no list."""

_CHATTER = re.compile(
    r"(?i)^\W*(?:sure|here(?:'s| is| are)\b|certainly|of course|okay|ok\b|absolutely|i'm sorry|i am sorry|sorry|"
    r"i can(?:'t|not)|as an ai|(?:revised|rewritten|extended|expanded|enhanced)?\s*(?:prompt|description|video)\s*:|"
    r"<\|)"
)


@dataclass(frozen=True)
class Gates:
    """Limits of an answer, which must also be one line without chatter."""

    min_words: int = 40
    """Least number of words."""
    max_words: int = 160
    """Largest number of words."""
    language: str = "en"
    """Its language."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.max_words:
            raise ValueError("min_words must be from 1 to max_words")


@dataclass(frozen=True)
class Answer:
    """A model's text. ``cut``: it did not end within the allowed tokens."""

    text: str
    cut: bool = False


def messages(prompt: str) -> list[dict[str, str]]:
    """The conversation that asks for one description."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]


def refusal(answer: Answer, gates: Gates) -> str:
    """The first gate that the answer does not pass, '' for none: empty, cut, lines, characters,
    chatter, short, long, language."""
    text = answer.text.strip()
    count = len(text.split())
    if not text:
        return "empty"
    if answer.cut:
        return "cut"
    if len(text.splitlines()) > 1:
        return "lines"
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in text):
        return "characters"
    if _CHATTER.match(text):
        return "chatter"
    if count < gates.min_words:
        return "short"
    if count > gates.max_words:
        return "long"
    return "language" if is_foreign(text, gates.language) else ""


def seed_of(seed: int, name: str, attempt: int) -> int:
    """The seed of one attempt at one prompt, which depends on the prompt's id and not on its place.
    It has 31 bits, which every server takes."""
    return int.from_bytes(place_digest(seed, name, attempt), "big") >> 33
