"""Tiny real models and data that several test files share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy threads on two cores can be slower than one

import dataclasses
import datetime
import hashlib

import numpy as np
import pytest
import torch

from architecture import CSM
from audio import encode_pcm16, loudness_lufs, to_pcm16
from model_sizes import CSMConfig
from rvq_tokenizer import PRESETS, RVQTokenizer, save_tokenizer
from transformer import TransformerConfig
from turn_shards import Collection, TurnRecord

torch.set_num_threads(1)


def tiny_config(**changes) -> CSMConfig:
    """Two layers of width 32; 4 codebooks of 16 codes."""
    stack = TransformerConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48)
    values = {"n_codebooks": 4, "codebook_size": 16, "max_positions": 256, "backbone": stack, "depth": stack}
    return CSMConfig(**{**values, **changes})


def tiny_model(seed: int = 0, **changes) -> CSM:
    """A `tiny_config` model with weights large enough for its outputs to differ."""
    torch.manual_seed(seed)
    model = CSM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


ADDITIONS = {
    "n_semantic": 2,
    "acoustic_delay": 3,
    "cross_attention_every": 1,
    "semantic_heads": 2,
    "prosodic_heads": 2,
    "memory_key": 8,
    "memory_value": 8,
    "text_head": True,
    "text_per_chunk": 3,
    "frames_per_chunk": 4,
}


def full_config(**changes) -> CSMConfig:
    """A `tiny_config` with every addition to the published model."""
    return tiny_config(**{**ADDITIONS, **changes})


def full_model(seed: int = 0, **changes) -> CSM:
    """A `full_config` model with large weights and open gates, so that every addition changes its outputs."""
    model = tiny_model(seed, **{**ADDITIONS, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.7)
    return model


def tiny_tokenizer(seed: int = 0) -> RVQTokenizer:
    """An untrained codec with 4 codebooks of 16 codes, 2 of them semantic."""
    torch.manual_seed(seed)
    tokenizer = RVQTokenizer(dataclasses.replace(PRESETS["debug"], n_codebooks=4, n_semantic=2))
    for stack in (tokenizer.semantic, tokenizer.acoustic):
        stack.fit(torch.randn(128, 8), 16, torch.Generator().manual_seed(seed))
    return tokenizer.eval()


def voiced_tokenizer(seed: int = 0) -> RVQTokenizer:
    """`tiny_tokenizer` with a decoder that is told who speaks, and listens to it."""
    tokenizer = tiny_tokenizer(seed)
    voiced = RVQTokenizer(tokenizer.config, voiced=True)
    voiced.load_state_dict(tokenizer.state_dict(), strict=False)
    torch.nn.init.normal_(voiced.voice.out.weight)
    return voiced.eval()


def voice(seconds: float, pitch: float, rate: int = 16_000, level: float = 0.1) -> np.ndarray:
    """A buzz with harmonics and a syllable rhythm: audible, voiced, never silent for long."""
    t = np.arange(int(seconds * rate)) / rate
    buzz = sum(np.sin(2 * np.pi * pitch * h * t) / h for h in range(1, 8))
    return (level * buzz * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))).astype(np.float32)


def turn_record(conversation: str, index: int, speaker: str, text: str, samples: np.ndarray, **changes) -> TurnRecord:
    """A turn of `samples` at 16 kHz."""
    pcm = to_pcm16(samples)
    peak = np.abs(samples).max()
    values = {
        "utt_id": f"test:{conversation}-{index}",
        "source": "test",
        "split_group": conversation,
        "conv_key": conversation,
        "turn_index": index,
        "speaker_id": f"test:{speaker}",
        "text": text,
        "text_raw": text,
        "audio": encode_pcm16(samples, 16_000),
        "sample_rate": 16_000,
        "num_samples": len(samples),
        "duration_s": len(samples) / 16_000,
        "pcm_sha256": hashlib.sha256(pcm.tobytes()).hexdigest(),
        "lufs": loudness_lufs(samples, 16_000),
        "peak_dbfs": float(20 * np.log10(peak)),
        "clip_frac": 0.0,
        "chars_per_s": len(text) / (len(samples) / 16_000),
        "license": "CC0-1.0",
        "retrieved_at": datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
    }
    return TurnRecord(**{**values, **changes})


LETTERS = str.maketrans("0123456789", "abcdefghij")  # what digits say is not in them


def write_tiny_data(folder, n_conversations: int = 30):
    """Two-speaker conversations of three turns of 0.4 to 0.9 s, in two shards; every split has some."""
    folder.mkdir(parents=True, exist_ok=True)
    collection = Collection(folder)
    turns = []
    for c in range(n_conversations):
        for i in range(3):
            samples = voice(
                0.4 + 0.1 * ((c + 2 * i) % 6), pitch=110 + 7 * c + 60 * (i % 2), level=0.05 + 0.05 * (i % 2)
            )
            turns.append(
                turn_record(f"talk{c:02d}", i, "ab"[i % 2], f"turn {i} of talk {c}".translate(LETTERS), samples)
            )
    half = n_conversations // 2
    for part in (range(half), range(half, n_conversations)):
        units = [f"talk{c:02d}" for c in part]
        collection.commit("test", "1", units, [turn for turn in turns if turn.conv_key in units], [])
    return folder


@pytest.fixture
def model() -> CSM:
    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer() -> RVQTokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory):
    """Collected turns that tests may read (and tokenise) but not change."""
    return write_tiny_data(tmp_path_factory.mktemp("shared") / "data")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, folder)
    return folder
