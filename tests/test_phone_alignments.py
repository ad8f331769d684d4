"""Phones in time: TextGrids read and refused, what pocketsphinx finds in speech, what the heads are given."""

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from conftest import voice

import phone_alignments
from audio import SAMPLE_RATE, to_pcm16
from codec_batches import NO_PHONE, SPREAD, Utterances
from command_line import MissingRequirement
from phone_alignments import Clip, Interval, align_clips, file_name, read_phones, tokens_of, write_phones

SHORT = """File type = "ooTextFile"
Object class = "TextGrid"

0
1.5
<exists>
2
"IntervalTier"
"words"
0
1.5
1
0
1.5
"hay"
"IntervalTier"
"phones"
0
1.5
3
0
0.4
"HH"
0.4
1.2
"EY1"
1.2
1.5
"sp"
"""  # Praat's short format, by hand
POINTS = SHORT.replace('"IntervalTier"\n"phones"\n0\n1.5\n3\n0\n0.4', '"TextTier"\n"phones"\n0\n1.5\n1\n0.4')


def spoken(sentence: int = 0, **changes) -> Clip:
    clips = pytest.importorskip("spoken_clips")
    clip = Clip(f"s:{sentence}", "en", clips.SENTENCES[sentence], to_pcm16(clips.speech(sentence)))
    return clip._replace(**changes)


def test_a_textgrid_of_another_aligner_is_read(tmp_path):
    path = tmp_path / "a.TextGrid"
    path.write_text(SHORT, encoding="utf-8")
    expected = [Interval(0, 0.4, "HH"), Interval(0.4, 1.2, "EY"), Interval(1.2, 1.5, "")]  # no stress; silence
    assert read_phones(path) == expected
    path.write_text(SHORT, encoding="utf-16")
    assert read_phones(path) == expected


def test_what_is_written_is_read_back_and_gaps_are_silence(tmp_path):
    path = tmp_path / file_name("source:a/b c")
    write_phones(path, [Interval(0.1, 0.25, "HH"), Interval(0.25, 0.5, "EY")], 0.75)
    filled = [Interval(0, 0.1, ""), Interval(0.1, 0.25, "HH"), Interval(0.25, 0.5, "EY"), Interval(0.5, 0.75, "")]
    assert read_phones(path) == filled
    assert [each.name for each in tmp_path.iterdir()] == ["source-a-b-c.TextGrid"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no whole TextGrid"),
        (b"\x00\xff\x01", "is no whole TextGrid"),
        (SHORT[: len(SHORT) // 2].encode(), "TextGrid"),
        (SHORT.replace('"phones"', '"sounds"').encode(), 'has no intervals in a tier "phones"'),
        (POINTS.encode(), 'has no intervals in a tier "phones"'),
    ],
)
def test_a_file_that_is_none_is_refused_by_name(content, words, tmp_path):
    path = tmp_path / "a.TextGrid"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as refusal:
        read_phones(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_phones_of_speech_are_found_where_they_sound(tmp_path):
    clip = spoken()
    late = np.concatenate([np.zeros(SAMPLE_RATE // 2, dtype=np.int16), clip.pcm])
    found, moved = align_clips([clip, clip._replace(utt_id="s:late", pcm=late)], tmp_path)
    said = [each.phone for each in found if each.phone]
    assert said[:11] == ["G", "UH", "D", "M", "AO", "R", "N", "IH", "NG", "D", "IH"]
    assert found[-1].end_s <= len(clip.pcm) / SAMPLE_RATE + 0.05
    assert all(one.end_s == pytest.approx(next_.begin_s) for one, next_ in itertools.pairwise(found))
    begins, later = ([each.begin_s for each in each_of if each.phone] for each_of in (found, moved))
    assert len(later) == len(begins) and np.median(np.subtract(later, begins)) == pytest.approx(0.5, abs=0.02)


def test_alignments_are_made_once_and_those_of_others_are_kept(tmp_path, monkeypatch):
    clip = spoken()
    (tmp_path / file_name("theirs")).write_text(SHORT, encoding="utf-8")
    first = align_clips([clip, clip._replace(utt_id="theirs")], tmp_path)
    assert first[1][1].phone == "EY"
    found = importlib.util.find_spec  # who brings all alignments needs no pocketsphinx
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pocketsphinx" else found(name))
    monkeypatch.setattr(phone_alignments, "Aligner", lambda: pytest.fail("aligned again"))
    again = align_clips([clip, clip._replace(utt_id="theirs")], tmp_path)
    assert [each.phone for each in again[0] if each.phone] == [each.phone for each in first[0] if each.phone]
    assert again == first  # silence at the end included: a resumed run learns from the same labels


def test_clips_that_cannot_be_aligned_are_counted_with_the_reason(tmp_path, capsys):
    clip = spoken()
    clips = [
        clip,
        clip._replace(utt_id="a", lang="cs"),
        clip._replace(utt_id="b", text="Room 12 is ready."),
        clip._replace(utt_id="c", text="The zxqvbly is ready."),
        clip._replace(utt_id="d", pcm=clip.pcm[:4000]),
    ]
    found = align_clips(clips, tmp_path)
    assert found[0] and not any(found[1:])
    printed = capsys.readouterr().out
    assert "phones of 1 of 5 clips" in printed and "2 not English in letters" in printed
    assert "1 with a word the dictionary lacks" in printed and "1 whose text is not what is heard" in printed
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match=r"no clip has phones .*put TextGrids into"):
        align_clips(clips[1:], tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(phone_alignments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingRequirement, match="phones need praatio"):
        align_clips([], tmp_path)


def test_a_batch_has_the_phones_of_its_moments_at_any_speed():
    utterances = Utterances([("s", "a b", voice(2.0, 120, SAMPLE_RATE)), ("s", "b", voice(1.2, 120, SAMPLE_RATE))])
    utterances.add_phones([[(0.0, 0.5, "A"), (0.5, 1.5, "B")], []])
    assert utterances.phones == ["A", "B"]
    lengths, n_silent = set(), 0
    for step in range(40):
        batch = utterances.batch(0, step, 2)
        assert batch.phones.shape == (2, SPREAD * batch.wave.size(1) // 1920)
        for wave, phones, frames, characters in zip(
            batch.wave, batch.phones, batch.n_frames, batch.n_characters, strict=True
        ):
            if characters == 1:
                assert (phones == NO_PHONE).all()
                continue
            at = (torch.arange(len(phones)) + 0.5) * 0.02 * 25 / int(frames)  # s in the recording
            silent = (wave.view(-1, 1920) == 0).all(dim=1).repeat_interleave(SPREAD)
            assert (phones[silent | (at > 1.56)] == NO_PHONE).all()  # what cannot be heard is not asked for
            assert (phones[~silent & (at < 0.44)] == 0).all()
            assert (phones[~silent & (at > 0.56) & (at < 1.44)] == 1).all()
            lengths.add(int(frames))
            n_silent += int(silent[at < 1.44].sum())
    assert len(lengths) > 3 and n_silent > 100


def test_words_are_whole_with_accents_and_any_apostrophe():
    assert tokens_of("Don\u2019t, r\u00e9sum\u00e9 na\u00efve we're 5") == [
        "don't", "r\u00e9sum\u00e9", "na\u00efve", "we're",
    ]  # fmt: skip
