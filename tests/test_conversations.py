"""From turns to conversations: splits, loudness, pseudo-dialogues."""

from collections import Counter

import numpy as np
import pytest
from conftest import turn_record, voice

from audio import loudness_lufs, read_audio
from conversations import (
    SPLITS,
    build_conversations,
    choose_clip,
    load_clips,
    loudness_gains,
    speakers_in_several_splits,
    split_of,
)
from turn_shards import read_turns


def test_splits_are_about_80_10_10_and_never_move():
    names = [f"group {i}" for i in range(4000)]
    counts = Counter(split_of(name) for name in names)
    assert counts["train"] == pytest.approx(3200, abs=100)
    assert counts["val"] == pytest.approx(400, abs=70)
    assert [split_of("group 0"), split_of("group 1"), split_of("group 6")] == ["train", "val", "train"]


def test_no_turn_is_in_two_splits(shared_data):
    groups = {split: {turn.split_group for turn, _ in load_clips(shared_data, split)} for split in SPLITS}
    assert all(groups.values())
    assert sum(len(names) for names in groups.values()) == len(set.union(*groups.values())) == 30


def test_a_conversation_in_two_splits_is_refused():
    other = next(f"g{i}" for i in range(100) if split_of(f"g{i}") != split_of("talk"))
    samples = voice(0.5, 100)
    turns = [turn_record("talk", 0, "a", "yes", samples), turn_record("talk", 1, "b", "no", samples, split_group=other)]
    with pytest.raises(ValueError, match="give it one split_group"):
        build_conversations(turns)


def test_loudness_is_evened_per_speaker_of_a_conversation_but_not_per_turn():
    loud, soft = voice(1.0, 120, level=0.2), voice(1.0, 120, level=0.05)
    records = [turn_record("c", 0, "a", "aa", loud), turn_record("c", 1, "a", "bb", soft)]
    gains = loudness_gains(records)
    assert gains["test:c-0"] == gains["test:c-1"]
    joined = np.concatenate([loud, soft]) * gains["test:c-0"]
    assert loudness_lufs(joined, 16_000) == pytest.approx(-23, abs=0.7)


def test_a_gain_never_clips():
    spiky = voice(1.0, 120, level=0.001)
    spiky[100] = 0.9
    (gain,) = loudness_gains([turn_record("c", 0, "a", "aa", spiky)]).values()
    assert 0.9 * gain == pytest.approx(10 ** (-1 / 20), rel=1e-3)


def test_clips_of_a_split_are_reproducible_and_resampled_once(shared_data):
    clips = load_clips(shared_data, "train", limit=5, seed=3)
    again = load_clips(shared_data, "train", limit=5, seed=3)
    assert [turn.utt_id for turn, _ in clips] == [turn.utt_id for turn, _ in again]
    assert len(clips) == 5
    assert [turn.utt_id for turn, _ in clips] != [
        turn.utt_id for turn, _ in load_clips(shared_data, "train", 5, seed=4)
    ]
    for turn, samples in clips:
        assert turn.audio is None
        assert len(samples) == pytest.approx(turn.duration_s * 24_000, abs=2)


def test_stored_audio_is_what_was_collected(shared_data):
    turn = next(read_turns(shared_data, with_audio=True))
    samples, rate = read_audio(turn.audio, None)
    assert rate == turn.sample_rate
    assert len(samples) == turn.num_samples


def voice_sets(n: int) -> list:
    """Sets of two sentences of n speakers of either sex."""
    samples, sexes = voice(0.5, 120), ("male", None)
    facts = {"source": "common_voice"}
    return [
        turn_record(f"set{s}", i, f"s{s}", f"sentence {i} of {s}", samples, **facts, speaker_sex=sexes[s % 2])
        for s in range(n)
        for i in range(2)
    ]


def test_a_fifth_of_the_training_voice_sets_becomes_marked_pseudo_dialogues():
    turns = voice_sets(400)
    conversations = build_conversations(turns)
    pseudo = [c for c in conversations if c.structure == "pseudo"]
    sets = sum(split_of(f"set{s}") == "train" for s in range(400))
    assert 2 * len(pseudo) / sets == pytest.approx(0.2, abs=0.05)
    assert {c.split for c in pseudo} == {"train"}
    for c in pseudo:
        assert c.speakers == (0, 1, 0, 1) and len({turn.speaker_sex for turn in c.turns}) == 1
        assert [turn.turn_index for turn in c.turns] == [0, 0, 1, 1] and len({t.speaker_id for t in c.turns}) == 2
    heard = Counter(turn.utt_id for c in conversations for turn in c.turns)
    assert set(heard.values()) == {1} and len(heard) == len(turns)
    assert build_conversations(reversed(turns)) == conversations


def test_dialogues_and_monologues_are_never_joined():
    turns = [turn_record(f"m{i}", 0, f"s{i}", "alone", voice(0.5, 100)) for i in range(100)]
    assert {c.structure for c in build_conversations(turns)} == {"monologue"}


def test_voices_that_are_in_several_splits_are_found():
    names = {split: next(f"g{i}" for i in range(100) if split_of(f"g{i}") == split) for split in SPLITS}
    samples = voice(0.5, 100)
    speakers = {"train": "known", "val": "new"}
    turns = [turn_record(names[split], 0, speaker, "yes", samples) for split, speaker in speakers.items()]
    assert speakers_in_several_splits(build_conversations(turns)) == {}
    turns.append(turn_record(names["test"], 0, "known", "no", samples))
    assert speakers_in_several_splits(build_conversations(turns)) == {"test": {"test:known"}}


def test_the_clip_of_a_voice_is_neutral_unless_a_style_is_asked_for():
    lengths = {"sad": 5.0, "neutral": 2.0, None: 1.0}
    turns = [turn_record("t", i, "a", "aa", voice(n, 120), style=style) for i, (style, n) in enumerate(lengths.items())]
    for style in lengths:
        assert choose_clip(turns, "a", style).style == style
    assert choose_clip([turn for turn in turns if turn.style], "a").style == "neutral"
    assert choose_clip(turns[:1], "test:a").style == "sad"
    with pytest.raises(ValueError, match="test:a has no clip in the style 'calm', but in: neutral, no style, sad"):
        choose_clip(turns, "a", "calm")
