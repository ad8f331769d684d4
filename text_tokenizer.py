"""Text and speaker tag to ids and back: bytes by default (no download), any Hugging Face tokenizer by path or name.

A turn's text is coded as csm-1b does it: BOS "[speaker]text" EOS, the tag being literal text without a space after it.
Knows nothing of audio or models.
"""

from __future__ import annotations

import unicodedata
from typing import Protocol

from command_line import NEEDS_DEV, MissingRequirement


class TextTokenizer(Protocol):
    """What training and generation need of a tokenizer."""

    name: str  # what `load_text_tokenizer` takes
    vocab_size: int
    bos: int
    eos: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes 0..255, then BOS and EOS. About 15 ids per second of English speech."""

    name = "bytes"
    bos = 256
    eos = 257
    vocab_size = 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """Any tokenizer of `transformers.AutoTokenizer`, by local path or hub name (Llama's for csm-1b)."""

    def __init__(self, name: str):
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise MissingRequirement(f"text tokenizer {name!r} needs transformers: {NEEDS_DEV}") from error
        try:
            self.inner = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"no tokenizer at {name!r}: give a local folder, a hub name or 'bytes'") from error
        if self.inner.bos_token_id is None or self.inner.eos_token_id is None:
            raise ValueError(f"tokenizer {name!r} has no BOS or EOS id; turns cannot be delimited with it")
        self.name, self.bos, self.eos = name, self.inner.bos_token_id, self.inner.eos_token_id
        self.vocab_size = len(self.inner)

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)


def load_text_tokenizer(name: str = "bytes") -> TextTokenizer:
    """'bytes', or a Hugging Face tokenizer by path or name."""
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)


def clean_text(text: str) -> str:
    """NFC, one space between words, no control characters. ValueError if nothing that can be spoken is left."""
    normal = unicodedata.normalize("NFC", text)
    printable = "".join(" " if character.isspace() else character for character in normal)
    cleaned = " ".join("".join(c for c in printable if unicodedata.category(c) not in ("Cc", "Cf")).split())
    if not any(character.isalnum() for character in cleaned):
        raise ValueError(f"text {text!r} holds no letter or digit to speak")
    return cleaned


def encode_turn(tokenizer: TextTokenizer, speaker: int, text: str) -> list[int]:
    """BOS "[speaker]text" EOS, as in csm-1b's prompt format."""
    return [tokenizer.bos, *tokenizer.encode(f"[{speaker}]{text}"), tokenizer.eos]


def turn_prompt(tokenizer: TextTokenizer, speaker: int) -> list[int]:
    """The ids that open every turn of a speaker and are given to a model that writes the text itself.

    Some tokenizers join the closing bracket with what follows; it is then left to the model.
    """
    return shared_prefix([tokenizer.bos, *tokenizer.encode(f"[{speaker}]")], encode_turn(tokenizer, speaker, "Hello"))


def prompt_length(tokenizer: TextTokenizer, speaker: int, text_ids: list[int]) -> int:
    """How many ids of a turn are its prompt."""
    return len(shared_prefix(turn_prompt(tokenizer, speaker), text_ids))


def shared_prefix(one: list[int], other: list[int]) -> list[int]:
    """The ids that both begin with."""
    length = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    return one[: min(len(one), len(other)) if length is None else length]


def turn_text(tokenizer: TextTokenizer, speaker: int, text_ids: list[int]) -> str:
    """Inverse of `encode_turn`, also for ids that a model wrote."""
    ids = [i for i in text_ids if i not in (tokenizer.bos, tokenizer.eos)]
    return tokenizer.decode(ids).removeprefix(f"[{speaker}]").strip()
