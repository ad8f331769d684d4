"""A conversation as a file, to go on with another day: its turns, their times, the memory, the random draws.

A safetensors file: codes and sound of the turns and states of the memory are tensors, the rest is JSON in its metadata.
Keys and values are not in it, the turns are read anew.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from architecture import CSM
from audio_tokenizer import AudioTokenizer
from checkpointing import FORMAT, save_tensors
from conversational_memory import MemoryState
from frames import Clock, Turn
from generation import Conversation, KeptTurn, Sampling
from inference_model import InferenceModel
from text_tokenizer import TextTokenizer

KIND = "conversation"


def save_conversation(talk: Conversation, path: Path, notes: dict | None = None) -> None:
    """Write all that `load_conversation` needs, whole or not at all. OSError when it cannot be written.

    `notes` are the caller's own, of JSON's kinds, for `load_notes`.
    """
    clock, memory = talk.standing()
    tensors = {"draws": talk.speaker.generator.get_state(), **memory_tensors("memory", memory)}
    turns = []
    for number, (turn, before, remembered, voice_of) in enumerate(talk.kept):
        tensors |= {f"turn.{number}.codes": turn.codes.to(torch.int16), f"turn.{number}.prosody": turn.prosody}
        tensors |= memory_tensors(f"turn.{number}.memory", remembered)
        facts = {"text_ids": turn.text_ids, "n_prompt": turn.n_prompt, "order": turn.order, "gap": turn.gap}
        turns.append(facts | {"clock": dataclasses.asdict(before), "voice_of": voice_of})
    content = {"format": FORMAT, "kind": KIND, "of": identity(talk), "sampling": dataclasses.asdict(talk.sampling)}
    content |= {"clock": dataclasses.asdict(clock), "turns": turns, "notes": notes or {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, {KIND: json.dumps(content)})


def load_conversation(
    path: Path,
    model: CSM | InferenceModel,
    tokenizer: AudioTokenizer,
    text_tokenizer: TextTokenizer,
    *,
    sampling: Sampling | None = None,
    acoustic_batch: int | None = None,
) -> Conversation:
    """The conversation of a file, with its sampling unless another is given.

    ValueError: the file is damaged, no conversation, or one of another tokenizer or kind of model. The weights may be
    others, a memory is then of little use to them.
    """
    content, tensors = read(path)
    try:
        sampling = sampling or Sampling(**content["sampling"])
        talk = Conversation(model, tokenizer, text_tokenizer, sampling=sampling, acoustic_batch=acoustic_batch)
        for name, own in identity(talk).items():
            if content["of"][name] != own:
                raise ValueError(f"it is a conversation with {name}={content['of'][name]}, the model's is {own}")
        _, empty = talk.standing()
        kept = [kept_turn(talk, number, facts, tensors, empty) for number, facts in enumerate(content["turns"])]
        talk.restore(kept, Clock(**content["clock"]), memory_of("memory", tensors, empty))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        talk.speaker.generator.set_state(tensors["draws"])
    except (KeyError, RuntimeError, TypeError):
        warnings.warn(f"{path} was saved on another kind of device, its random draws begin anew", stacklevel=2)
    return talk


def load_notes(path: Path) -> dict:
    """The notes saved with a conversation; empty for a file of before there were any. ValueError: it is damaged."""
    notes = read(path)[0].get("notes", {})
    if not isinstance(notes, dict):
        raise ValueError(f"{path} is damaged (its notes are {notes!r})")
    return notes


def identity(talk: Conversation) -> dict:
    """What a model must share with the one that a conversation was held with."""
    c = talk.model.config
    return {
        "audio_tokenizer": talk.tokenizer.fingerprint(),
        "text_tokenizer": talk.text_tokenizer.name,
        "codebooks": c.n_codebooks,
        "memory": c.has_memory,
    }


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """JSON and tensors of a file. ValueError: it is damaged or no conversation."""
    if not path.is_file():
        raise FileNotFoundError(f"no conversation at {path}")
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {})[KIND])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        found = (content["format"], content["kind"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no conversation, or is damaged ({type(error).__name__})") from error
    if found != (FORMAT, KIND):
        raise ValueError(f"{path} holds {found[1]!r} of format {found[0]}; expected {KIND!r} of format {FORMAT}")
    return content, tensors


def kept_turn(
    talk: Conversation, number: int, facts: dict, tensors: dict[str, Tensor], empty: MemoryState | None
) -> KeptTurn:
    """Turn `number` of a file. ValueError for text ids that cannot be; codes are checked where they are read."""
    ids, vocabulary, voice_of = facts["text_ids"], talk.model.config.text_vocab_size, facts.get("voice_of")
    if not ids or not all(isinstance(i, int) and 0 <= i < vocabulary for i in ids):
        raise ValueError(f"turn {number} holds text ids outside [0, {vocabulary})")
    if not isinstance(voice_of, int | None):
        raise ValueError(f"turn {number} is of the voice of {voice_of!r}, which is no speaker")
    codes = tensors[f"turn.{number}.codes"].long()
    prosody = tensors[f"turn.{number}.prosody"]
    turn = Turn(ids, codes, facts["n_prompt"], facts["order"], facts["gap"], prosody)
    return KeptTurn(turn, Clock(**facts["clock"]), memory_of(f"turn.{number}.memory", tensors, empty), voice_of)


def memory_tensors(prefix: str, memory: MemoryState | None) -> dict[str, Tensor]:
    """Named tensors of a state; none without a memory."""
    return {} if memory is None else {f"{prefix}.{name}": tensor for name, tensor in memory.to_tensors().items()}


def memory_of(prefix: str, tensors: dict[str, Tensor], like: MemoryState | None) -> MemoryState | None:
    """Inverse of `memory_tensors`, on the device of `like`."""
    if like is None:
        return None
    own = {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
    return MemoryState.from_tensors({name: tensor.to(like.seconds.device) for name, tensor in own.items()}, like)
