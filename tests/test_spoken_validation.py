"""What is heard of a model in training: it depends on the weights alone, training goes on untouched, bad turns show."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from conftest import full_model, tiny_model, turn_record, voice
from spoken_clips import SENTENCES, speech

from audio import FRAME_RATE, FRAME_SAMPLES, SAMPLE_RATE, resample
from audio_tokenizer import AudioTokenizer, CodeShape
from command_line import MissingRequirement
from conversations import split_of
from frames import N_PROSODY, Clock, Turn
from generation import Reply, Sampling
from speech_metrics import NotMeasurable
from spoken_validation import SpokenValidation, choose_prompted, mean_cosine, spoken_values
from text_tokenizer import ByteTokenizer
from turn_shards import Collection, TurnRecord

HELD_OUT = next(name for name in (f"talk{i}" for i in range(100)) if split_of(name) == "val")


@pytest.fixture(scope="module")
def validation(shared_data, tokenizer):
    return SpokenValidation(shared_data, "val", tokenizer, ByteTokenizer(), n_texts=2)


def timeless(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != "spoken/seconds_per_second"}


@pytest.mark.parametrize("make", [tiny_model, full_model], ids=["plain", "full"])
def test_the_same_weights_say_the_same_and_training_goes_on_as_if_nothing_was_said(validation, make):
    model = make().train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    spoken, again = validation.measure(model), validation.measure(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and all(module.training for module in model.modules())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    ids = [ByteTokenizer.bos, 65, ByteTokenizer.eos]
    heard = Turn(ids, torch.zeros(3, 4, dtype=torch.int64), 1, "speak", 0.0, torch.zeros(N_PROSODY))
    model.hidden(model.config.layout.turn_rows(heard, Clock()).batch()).sum().backward()  # nothing is left of inference
    assert model.text_embedding.weight.grad.abs().sum() > 0

    assert timeless(spoken.values) == timeless(again.values) and spoken.lines == again.lines
    assert [text for text, _ in spoken.clips] == [text for text, _ in again.clips]
    for (_, one), (_, other) in zip(spoken.clips, again.clips, strict=True):
        assert np.array_equal(one, other)
    different = validation.measure(make(seed=1))
    assert [len(samples) for _, samples in different.clips] != [len(samples) for _, samples in spoken.clips]
    with torch.no_grad():
        validation.measure(model.eval())
        assert not torch.is_grad_enabled() and not model.training


def test_with_fewer_codebooks_the_first_ones_are_drawn_and_heard(shared_data, tokenizer, validation):
    fewer = SpokenValidation(shared_data, "val", tokenizer, ByteTokenizer(), n_texts=2, sampling=Sampling(codebooks=1))
    (one, *_), (all_of_them, *_) = (each.measure(tiny_model()).clips for each in (fewer, validation))
    assert one[0] == all_of_them[0] and not np.array_equal(one[1], all_of_them[1])


def test_choosing_and_loading_leave_the_random_state_alone(shared_data, tokenizer, validation):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    same = SpokenValidation(shared_data, "val", tokenizer, ByteTokenizer(), n_texts=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert same.chosen == validation.chosen and same.wer_recorded == validation.wer_recorded


def test_turns_are_cut_at_2_s_and_twice_the_recorded_turn_and_counted_as_run_away(validation):
    model = tiny_model()
    end = model.config.layout.end_of_turn
    with torch.no_grad():  # the end of turn has a logit of 0, some code a large one
        model.codebook0_head.weight[:end] *= 1000
        model.codebook0_head.weight[end] = 0
    spoken = validation.measure(model)
    assert spoken.values["spoken/run_away"] == 1 and spoken.values["spoken/empty"] == 0
    for (text, samples), (record, _) in zip(spoken.clips, validation.chosen, strict=True):
        assert text == record.text
        assert len(samples) == int((2 + 2 * record.duration_s) * FRAME_RATE) * FRAME_SAMPLES


def reply(seconds: float, ended: bool = True, wall: float = 1.0) -> Reply:
    samples = np.zeros(int(seconds * SAMPLE_RATE), np.float32)
    return Reply(samples, torch.zeros(0, 4, dtype=torch.int64), "", ended, wall / 2 if seconds else math.nan, wall)


def test_shares_rates_and_speed_are_those_of_the_replies():
    texts = ["one of the boats", "the other boat sinks", "a third boat", "no boat at all"]
    heard = ["One of the boats.", "", "a third goat and a fourth", "no boat at all"]
    replies = [reply(1.0), reply(0.05), reply(4.0, ended=False), reply(1.0, wall=3.0)]
    values = spoken_values(texts, heard, replies)
    assert values["spoken/wer"] == pytest.approx((0 + 4 + 4 + 0) / 15)  # a missing turn is all deletions
    assert values["spoken/cer"] < values["spoken/cer_by_chance"]
    assert values["spoken/wer_low"] <= values["spoken/wer"] <= values["spoken/wer_high"] <= 4 / 3
    assert values["spoken/run_away"] == 0.25 and values["spoken/empty"] == 0.25
    assert values["spoken/seconds_per_second"] == pytest.approx(6 / 6.05, rel=1e-3)
    assert "spoken/similarity" not in values


def test_silence_has_an_error_rate_but_no_speed_and_babble_exceeds_1():
    silent = spoken_values(["one two three"] * 2, ["", ""], [reply(0), reply(0)])
    assert silent["spoken/wer"] == silent["spoken/empty"] == 1 and "spoken/seconds_per_second" not in silent
    assert silent["spoken/cer"] == silent["spoken/cer_by_chance"] == 1
    assert spoken_values(["one two three"], ["you know it " * 5], [reply(4, ended=False)])["spoken/wer"] > 1


def test_similarity_is_the_mean_over_the_voices_there_are():
    one, other = np.eye(256, dtype=np.float32)[:2]
    pairs = [(one, one), (one, other), (NotMeasurable("short"), one)]
    values = spoken_values(["one two"] * 3, ["one two"] * 3, [reply(1)] * 3, pairs)
    assert values["spoken/similarity"] == 0.5
    values = spoken_values(["one two"], ["one two"], [reply(1)], pairs[2:])
    assert "spoken/similarity" not in values and all(map(math.isfinite, values.values()))


def test_a_missing_voice_gives_its_reason():
    one = np.eye(256, dtype=np.float32)[0]
    assert mean_cosine(one, [one, NotMeasurable("short")]) == 1
    with pytest.raises(NotMeasurable, match="short"):
        mean_cosine(NotMeasurable("short"), [one])
    with pytest.raises(NotMeasurable, match="compare"):
        mean_cosine(one, [])


def turn(conversation: str, index: int, speaker: str, seconds: float, text: str = "", **changes) -> TurnRecord:
    text = text or f"turn {index} of {conversation} here"
    return turn_record(conversation, index, speaker, text, voice(seconds, 120), **{"split_group": HELD_OUT, **changes})


def test_the_prompt_is_an_earlier_turn_of_the_speaker_if_there_is_one():
    turns = [turn("x", i, "ab"[i % 2], (0.5, 0.6, 0.9, 0.7, 0.5)[i]) for i in range(5)]
    turns += [turn("y", 0, "a", 0.8), turn("y", 1, "alone", 0.8)]
    turns += [turn("z", 0, "a", 2.0), turn("z", 1, "a", 0.5, "Hm, yes."), turn("z", 2, "a", 0.5, lang="de")]
    chosen = choose_prompted(turns, 20, seed=0, max_seconds=1.0)
    prompts = {t.utt_id.removeprefix("test:"): prompt.utt_id.removeprefix("test:") for t, prompt in chosen}
    # nobody is chosen who speaks once, too long, in another language or in two words
    assert prompts == {"x-0": "x-2", "x-1": "x-3", "x-2": "x-0", "x-3": "x-1", "x-4": "x-2", "y-0": "x-2"}
    assert choose_prompted(turns, 3, seed=0, max_seconds=1.0) == chosen[:3]
    assert len({t.speaker_id for t, _ in chosen[:2]}) == 2
    assert any(choose_prompted(turns, 3, seed, max_seconds=1.0) != chosen[:3] for seed in range(1, 9))


def test_a_text_is_spoken_once():
    turns = [turn("x", i, "a", 0.5, "I do not know.") for i in range(4)]
    assert len(choose_prompted(turns, 4, seed=0, max_seconds=1.0)) == 1


class MuLaw(AudioTokenizer):
    """Every sample is a code of 8 bits: speech stays intelligible without a training."""

    delay_samples = 0
    device = torch.device("cpu")
    config = CodeShape(n_codebooks=FRAME_SAMPLES, n_semantic=1, codebook_size=256)

    def encoder_state(self, batch_size):
        return None

    decoder_state = encoder_state

    def encode_frames(self, wave, state):
        level = wave.sign() * torch.log1p(255 * wave.abs().clamp(max=1)) / math.log(256)
        return ((level + 1) * 127.5).round().long().view(len(wave), -1, FRAME_SAMPLES), state

    def decode_frames(self, codes, state):
        level = codes.flatten(1) / 127.5 - 1
        return level.sign() * torch.expm1(level.abs() * math.log(256)) / 255, state

    def decode_end(self, state):
        return torch.zeros(1, 0)


def test_the_reference_is_the_error_rate_of_the_recorded_turns(tmp_path):
    rates = []
    for name in ("speech", "noise"):
        turns = []
        for i in range(3):
            wave = resample(speech(i), SAMPLE_RATE, 16_000)
            if name == "noise":
                wave = 0.05 * np.random.default_rng(i).standard_normal(len(wave)).astype(np.float32)
            turns.append(turn_record(HELD_OUT, i, "ab"[i % 2], SENTENCES[i], wave))
        (tmp_path / name).mkdir()
        Collection(tmp_path / name).commit("test", "1", [HELD_OUT], turns, [])
        validation = SpokenValidation(tmp_path / name, "val", MuLaw(), ByteTokenizer())
        assert sorted(validation.texts) == sorted([SENTENCES[0], SENTENCES[2]])  # the other speaks once
        rates.append(validation.wer_recorded)
        if name == "speech":
            assert validation.prompt_voices[0] @ validation.prompt_voices[1] > 0.7
    assert rates[0] <= 0.2 and rates[1] >= 0.8


def test_a_missing_recogniser_says_what_to_install_and_a_missing_speaker_encoder_leaves_its_value_out(
    shared_data, tokenizer, monkeypatch
):
    monkeypatch.setitem(sys.modules, "resemblyzer", None)  # makes importing it fail
    values = SpokenValidation(shared_data, "val", tokenizer, ByteTokenizer(), n_texts=2).measure(tiny_model()).values
    names = (
        "wer",
        "wer_low",
        "wer_high",
        "cer",
        "cer_by_chance",
        "run_away",
        "empty",
        "seconds_per_second",
        "wer_recorded",
    )
    assert set(values) == {f"spoken/{name}" for name in names}
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(MissingRequirement, match=r"jiwer not installed: python setup_environment\.py"):
        SpokenValidation(shared_data, "val", tokenizer, ByteTokenizer())


def test_nothing_to_speak_is_one_line(shared_data, tokenizer):
    with pytest.raises(ValueError, match=r"no English turn in split 'val' .* up to 0.1 s") as caught:
        SpokenValidation(shared_data, "val", tokenizer, ByteTokenizer(), max_seconds=0.1)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="n_texts=0"):
        SpokenValidation(shared_data, "val", tokenizer, ByteTokenizer(), n_texts=0)
    with pytest.raises(ValueError, match="codebooks=5 must be at most the tokenizer's 4"):
        SpokenValidation(shared_data, "val", tokenizer, ByteTokenizer(), sampling=Sampling(codebooks=5))
