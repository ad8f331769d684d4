"""Metrics of conversations: known answers, and the right change for speech that was changed in a known way."""

import numpy as np
import pytest
from spoken_clips import SENTENCES, other_speaker, speech

import conversation_metrics as cm
import degradations
from audio import SAMPLE_RATE
from speech_metrics import NotMeasurable

NO_LOTS = np.random.default_rng(0)


def buzz(hertz: np.ndarray) -> np.ndarray:
    """A voice-like sound of the F0 given for every sample."""
    phase = 2 * np.pi * np.cumsum(hertz) / SAMPLE_RATE
    return (0.1 * sum(np.sin(h * phase) / h for h in range(1, 12))).astype(np.float32)


def prosody(**changes) -> cm.Prosody:
    values = dict.fromkeys(("pitch", "pitch_spread", "level", "level_spread", "rate", "pause_share", "tilt"), 1.0)
    return cm.Prosody(**{**values, **changes})


def test_pitch_of_known_sounds():
    t = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    steady = cm.prosody_of(buzz(np.full_like(t, 200.0)), "a steady tone")
    assert steady.pitch == pytest.approx(12.0, abs=0.05)  # an octave above 100 Hz
    assert steady.pitch_spread < 0.05
    swinging = cm.prosody_of(buzz(150 * 2 ** (np.sin(2 * np.pi * t) * 3 / 12)), "a swinging tone")
    assert swinging.pitch_spread == pytest.approx(3 / np.sqrt(2), rel=0.06)


def test_rate_and_pauses_of_known_lengths():
    word = buzz(np.full(SAMPLE_RATE // 2, 120.0))
    silence = np.zeros(SAMPLE_RATE // 4, np.float32)
    found = cm.prosody_of(np.concatenate([silence, word, silence, word, silence]), "ten letter")
    assert found.rate == pytest.approx(9 / 1.0, rel=0.03)  # silence at the ends is no pause
    assert found.pause_share == pytest.approx(0.25 / 1.25, abs=0.02)


@pytest.mark.parametrize(
    ("samples", "text", "reason"),
    [
        (np.zeros(SAMPLE_RATE, np.float32), "a", "silent"),
        (buzz(np.full(SAMPLE_RATE // 20, 120.0)), "a", "shorter than"),
        (buzz(np.full(SAMPLE_RATE, 120.0)), "...", "no letters"),
        (np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE).astype(np.float32), "a", "voiced"),
    ],
)
def test_what_cannot_be_measured_says_why(samples, text, reason):
    with pytest.raises(NotMeasurable, match=reason):
        cm.prosody_of(samples, text)


def test_samples_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        cm.prosody_of(np.full(SAMPLE_RATE, np.nan, np.float32), "a")


def test_contour_of_a_reading_is_followed_flattened_and_turned_over():
    clip = speech(0)
    same = degradations.flatten_pitch(clip, 0.0, NO_LOTS)
    assert cm.pitch_contour(clip, same) > 0.95
    assert cm.pitch_contour(clip, degradations.stretch(clip, 0.3, NO_LOTS)) > 0.9  # aligned in time
    assert cm.pitch_contour(clip, degradations.flatten_pitch(clip, 1.0, NO_LOTS)) == 0.0
    assert cm.pitch_contour(clip, degradations.misplace_pitch(clip, 1.0, NO_LOTS)) < -0.9


def test_arousal_rises_with_excitement_and_not_with_the_speaker():
    turns = []
    for speaker, wave_of in (("a", speech), ("b", other_speaker)):
        for i in range(3):
            excited = degradations.excite(wave_of(i), float(i == 1), NO_LOTS)
            turns.append((speaker, cm.prosody_of(excited, SENTENCES[i])))
    found = cm.arousal(turns).reshape(2, 3)
    assert (found.argmax(axis=1) == 1).all()
    assert found.mean(axis=1) == pytest.approx([0, 0], abs=1e-9)  # b is higher as a person, not more aroused


def test_arousal_of_one_turn_is_unknown():
    assert np.isnan(cm.arousal([("a", prosody())])).all()


def test_rank_correlation():
    rising = np.array([1.0, 2.0, 3.0, 4.0, np.nan])
    assert cm.rank_correlation(rising, rising**3) == pytest.approx(1)
    assert cm.rank_correlation(rising, -rising) == pytest.approx(-1)
    assert cm.rank_correlation(np.full(5, 2.0), rising) == 0
    with pytest.raises(NotMeasurable, match="never changes"):
        cm.rank_correlation(rising, np.full(5, 2.0))
    with pytest.raises(NotMeasurable, match="fewer than 4"):
        cm.rank_correlation(rising[2:], rising[2:])


def test_human_turns_that_are_alike_by_chance_are_no_unit():
    alike = [("a", prosody())] * 4
    shifted = [("a", prosody(pause_share=1.1, rate=2.0))] * 4
    assert cm.prosody_distance(shifted, alike) == pytest.approx((0.1 / 0.02 + 1.0 / 0.5) / 5)
    with pytest.raises(NotMeasurable, match="fewer than 2"):
        cm.prosody_distance(shifted[:1], alike)


def test_prosody_distance_is_a_shift_in_human_units():
    random = np.random.default_rng(0)
    human = [("a", prosody(**dict.fromkeys(cm.DISTRIBUTED, x))) for x in random.normal(5, 2, 400)]
    shifted = [(s, prosody(**{name: getattr(p, name) + 2 for name in cm.DISTRIBUTED})) for s, p in human]
    assert cm.prosody_distance(human, human) == pytest.approx(0, abs=0.01)
    # pitch is taken from the speaker's median, so four of the five features move, each by 1 standard deviation
    assert cm.prosody_distance(shifted, human) == pytest.approx(4 / 5 * 0.27, rel=0.1)
    with pytest.raises(NotMeasurable):
        cm.prosody_distance(human, human[:2])


def unit(*values: float) -> np.ndarray:
    return np.array(values) / np.linalg.norm(values)


def test_character_of_known_voices():
    steady = cm.character(np.stack([unit(1, 0)] * 4))
    assert (steady.run, steady.half, steady.drift) == pytest.approx((1, 1, 0))
    leaving = cm.character(np.stack([unit(1, 0), unit(1, 0.2), unit(1, 0.6), unit(1, 1.5)]))
    assert leaving.drift < -0.1 and leaving.half < 0.9
    with pytest.raises(NotMeasurable):
        cm.character(np.stack([unit(1, 0)]))


def test_confusion_finds_the_exchanged_turn():
    voices = np.stack([unit(1, 0), unit(0, 1), unit(1, 0.1), unit(0.1, 1), unit(0, 1), unit(0, 1)])
    assert cm.confused(voices, ["a", "b", "a", "b", "a", "b"]).tolist() == [0, 0, 0, 0, 1, 0]
    assert np.isnan(cm.confused(voices, ["a"] * 6)).all()  # nobody to be confused with


def test_likeness_to_the_other_characters_of_known_voices():
    one, two, three = np.eye(3)
    assert cm.to_others(np.stack([one, two, one]), ["a", "b", "a"]).tolist() == [0, 0, 0]
    mixed = cm.to_others(np.stack([one, one, two, three]), ["a", "b", "b", "c"])
    assert mixed == pytest.approx([np.sqrt(0.5), 1, 0, 0], abs=1e-6)  # b is half as a
    assert np.isnan(cm.to_others(np.stack([one, two]), ["a", "a"])).all()


def test_gaps_and_overlaps_of_known_times():
    turns = [cm.Span("a", 0, 1), cm.Span("b", 1.2, 2), cm.Span("b", 2.1, 3), cm.Span("a", 2.8, 4), cm.Span("b", 5, 6)]
    found = cm.gaps(turns)
    assert found == pytest.approx([0.2, -0.2, 1.0])  # b goes on after 0.1 s: one turn
    assert cm.gap(found) == pytest.approx(0.2)
    assert cm.overlap(found) == pytest.approx(1 / 3)
    for measure in (cm.gap, cm.overlap):
        with pytest.raises(NotMeasurable):
            measure([])


def test_turns_end_to_end_do_not_overlap():
    assert cm.overlap([0.1 + 0.2 - 0.3 - 5.6e-17, -0.005]) == 0.0 and cm.overlap([-0.02, 0.1]) == 0.5


def test_who_agrees_within_a_turn_takes_no_turn():
    """Before, between and after what counts: b says "mm" while a speaks, also across the breath that a takes."""
    turns = [
        cm.Span("a", 0, 4),
        cm.Span("b", 1, 1.5),
        cm.Span("b", 3.9, 4.2),
        cm.Span("a", 4.1, 6),
        cm.Span("b", 6.5, 8),
    ]
    assert cm.gaps(turns) == pytest.approx([0.5])
    assert cm.gaps(turns[:2]) == []
    assert cm.backchannels(turns) == pytest.approx(2 / 4)  # what a says across the breath is one turn
    assert cm.backchannels([cm.Span("a", 0, 2), cm.Span("b", 1.5, 3)]) == 0
    with pytest.raises(NotMeasurable, match="nobody else"):
        cm.backchannels([cm.Span("a", 0, 2), cm.Span("a", 3, 4)])
    assert cm.gaps([cm.Span("a", 0, 2), cm.Span("b", 1.5, 3)]) == [-0.5]  # going on alone is no backchannel


def pairs_apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.mean([abs(a - b) for a in ours for b in theirs]))


def test_energy_distance_is_its_definition_over_all_pairs():
    random = np.random.default_rng(0)
    x, y = random.normal(size=7), random.normal(1, 2, size=5)
    within = [pairs_apart(z, z) * len(z) / (len(z) - 1) for z in (x, y)]  # a number with itself is no pair
    assert cm.energy_distance(x, y) == pytest.approx(pairs_apart(x, y) - sum(within) / 2)
    assert cm.energy_distance(y, x) == pytest.approx(cm.energy_distance(x, y))
    assert cm.energy_distance(x + 9, y + 9) == pytest.approx(cm.energy_distance(x, y))


@pytest.mark.parametrize("n", [2, 4, 8])
def test_few_numbers_of_the_same_kind_are_nearer_on_average_than_numbers_that_vary_less(n):
    random = np.random.default_rng(n)
    human = random.normal(size=300)
    same, half = ([cm.energy_distance(s * random.normal(size=n), human) for _ in range(1000)] for s in (1.0, 0.5))
    constant = cm.energy_distance(np.zeros(n), human)
    assert abs(np.mean(same)) < 0.02 < 0.03 < np.mean(half) < 0.08 < 0.2 < constant


def test_equal_gaps_differ_from_varied_ones_of_the_same_median():
    varied = [0.0, 0.2, 0.4]
    alike = cm.energy_distance([0.2] * 3, varied)
    assert alike == pytest.approx(0.4 / 3 - 0.8 / 6)
    assert cm.energy_distance([0.2] * 30, varied * 10) > cm.energy_distance(varied * 10, varied * 10) + 0.02


def test_a_style_is_kept_or_lost_some_turns_later():
    def turns(*pitches: float) -> list[tuple[str, cm.Prosody]]:
        return [("ab"[i % 2], prosody(pitch=pitch)) for i, pitch in enumerate(pitches)]

    others = [(f"talk/{pitch}", prosody(pitch=pitch)) for pitch in (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)]
    high, low = 6.5, 0.5
    assert cm.style_kept(turns(high, low, 3, 3, high, low), others) == [1.0, 1.0]
    lost = cm.style_kept(turns(high, low, 3, 3, low, high), others)
    assert max(lost) <= 0.25
    # of 28 pairs of people 4, 3, 2 and 1 are 4, 5, 6 and 7 semitones apart
    assert cm.style_kept(turns(high, low, 3, 3, 3.0, low), others) == [10 / 28, 1.0]
    assert cm.style_kept([*turns(high, low, 3, 3), None, ("b", prosody(pitch=low))], others) == [1.0]
    with pytest.raises(NotMeasurable, match="comes back after 4 turns"):
        cm.style_kept(turns(high, low, high), others)
    with pytest.raises(NotMeasurable, match="human turns"):
        cm.style_kept(turns(high, low, 3, 3, high), others[:3])
    with pytest.raises(NotMeasurable, match="all of one speaker"):
        cm.style_kept(turns(high, low, 3, 3, high), [("talk/a", prosody(pitch=p)) for p in (0.0, 1.0, 2.0, 3.0)])


def test_a_system_that_is_louder_darker_or_higher_than_people_keeps_a_style_no_better_for_that():
    random = np.random.default_rng(0)

    def independent(n: int, **offset: float) -> list[cm.Prosody]:
        drawn = random.normal(size=(n, len(cm.AROUSAL)))
        return [prosody(**{k: v + offset.get(k, 0.0) for k, v in zip(cm.AROUSAL, row, strict=True)}) for row in drawn]

    people = [(f"talk/{i}", each) for i, each in enumerate(independent(200))]
    for offset in ({}, {"level": -12.0}, {"tilt": -12.0}, {"pitch": 6.0}):
        turns = [("ab"[i % 2], each) for i, each in enumerate(independent(400, **offset))]
        assert np.mean(cm.style_kept(turns, people)) == pytest.approx(0.5, abs=0.07), offset
