"""The harness that judges metrics: it passes what is right, fails what is wrong, and goes on where it was stopped."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import turn_record, voice
from spoken_clips import SENTENCES, other_speaker, speech

import conversation_metrics as cm
import heard_conversations as hc
import metric_validation as mv
from audio import SAMPLE_RATE
from turn_shards import Collection


def conversation(n: int = 4, gap: float = 0.3) -> hc.Turns:
    """Two characters in turn."""
    turns: hc.Turns = []
    for i in range(n):
        samples = (speech if i % 2 == 0 else other_speaker)(i % len(SENTENCES))
        start = turns[-1].end + gap * (1 + i % 2) if turns else 0.0
        turns.append(hc.Turn("ab"[i % 2], SENTENCES[i % len(SENTENCES)], samples, start))
    return turns


def heard(turns: hc.Turns, original: hc.Turns) -> hc.Heard:
    human = hc.Human({"other": [each for each in hc.prosody_of_turns(original) if each]}, {"other": [0.2, 0.4, 0.6]})
    return hc.Heard("this", turns, original, human, hc.Ears("bundled"))


def verdict(table, severities=(0.0, 1.0, 2.0, 3.0, 4.0), expected=mv.RISES, monkeypatch=None) -> mv.Verdict:
    """A verdict on numbers: conversations x severities."""
    given = mv.Degradation(title="", change=lambda t, s, r: t, severities=severities, expected={"rate": expected})
    monkeypatch.setitem(mv.DEGRADATIONS, "made up", given)
    records = [mv.Record(str(i), "made up", "rate", list(row), [], list(severities)) for i, row in enumerate(table)]
    return mv.verdict_on("made up", "rate", expected, records, seed=0)


def base(n=12):
    return np.random.default_rng(0).normal(10, 2, (n, 1))


def test_a_metric_that_follows_the_severity_passes(monkeypatch):
    rising = base() + np.arange(5) + np.random.default_rng(1).normal(0, 0.3, (12, 5))
    found = verdict(rising, monkeypatch=monkeypatch)
    assert found.passed and found.low > 3 and found.effect > 5 and found.order == pytest.approx(1)
    assert verdict(-rising, expected=mv.FALLS, monkeypatch=monkeypatch).passed


def test_a_metric_that_does_not_tell_fails_with_the_reason(monkeypatch):
    noise = base() + np.random.default_rng(1).normal(0, 0.3, (12, 5))
    rising = base() + np.arange(5)
    falling = verdict(-rising, monkeypatch=monkeypatch)
    assert falling.passed is False and "wrong way" in falling.why
    assert verdict(noise, monkeypatch=monkeypatch).passed is False
    saw = base() + np.array([0.0, 6.0, 1.0, 5.0, 3.0]) + np.random.default_rng(2).normal(0, 0.2, (12, 5))
    assert "order" in verdict(saw, monkeypatch=monkeypatch).why
    one_of_many = base() + np.eye(12)[:, :1] * np.arange(5) * 3  # one conversation makes all of the change
    assert verdict(one_of_many, monkeypatch=monkeypatch).passed is False


def test_blindness_is_claimed_against_the_spread_between_conversations(monkeypatch):
    assert verdict(base() + 0.05 * np.arange(5), expected=mv.BLIND, monkeypatch=monkeypatch).passed
    moved = verdict(base() + np.arange(5), expected=mv.BLIND, monkeypatch=monkeypatch)
    assert moved.passed is False and "standard deviations" in moved.why
    ones = np.ones((12, 1)) - np.array([0, 0, 0, 0, 0.005])  # 1 by definition at severity 0
    assert verdict(ones, expected=mv.BLIND, monkeypatch=monkeypatch).passed
    assert verdict(ones - np.array([0, 0, 0, 0, 0.2]), expected=mv.BLIND, monkeypatch=monkeypatch).passed is False


def test_blindness_is_judged_where_the_metric_moves_most(monkeypatch):
    there_and_back = base() + np.array([0.0, 0.0, -3.0, 0.0, 0.0])
    found = verdict(there_and_back, expected=mv.BLIND, monkeypatch=monkeypatch)
    assert found.passed is False and found.change == pytest.approx(-3) and found.drift < -1


def test_what_cannot_be_measured_is_counted(monkeypatch):
    given = mv.DEGRADATIONS["slower"]
    monkeypatch.setitem(mv.DEGRADATIONS, "made up", dataclasses.replace(given, expected={"rate": mv.FALLS}))
    records = [mv.Record(str(i), "made up", "rate", [None] * 5, ["too short"] * 5, []) for i in range(3)]
    found = mv.verdict_on("made up", "rate", mv.FALLS, records, seed=0)
    assert found.passed is None and found.excluded == {"too short": 3}
    json.dumps(mv.plain_verdict(found), allow_nan=False)


def test_every_expectation_has_a_measure_a_title_and_a_definition():
    for degradation in mv.DEGRADATIONS.values():
        assert degradation.severities[0] == 0
        for metric in degradation.expected:
            assert metric in hc.MEASURES and metric in hc.METRICS_OF_CONVERSATIONS


def test_a_constant_would_fail():
    """What a degradation must leave alone, another one must move."""
    expected = [pair for degradation in mv.DEGRADATIONS.values() for pair in degradation.expected.items()]
    moved = {metric for metric, what in expected if what != mv.BLIND}
    assert {metric for metric, what in expected if what == mv.BLIND} <= moved


def test_nothing_is_expected_of_a_metric_that_is_given_the_same():
    turns, of_times = conversation(3), {"gap", "overlap", "gap_distance"}
    for name, degradation in mv.DEGRADATIONS.items():
        changed = degradation.change(turns, degradation.severities[-1], np.random.default_rng(0))
        sounds, before = (sorted((t.text, t.samples.tobytes()) for t in each) for each in (changed, turns))
        if sounds == before:
            assert not {*cm.DISTRIBUTED, "prosody_distance", "wer", "dnsmos"} & degradation.expected.keys(), name
        if [(t.speaker, t.start, t.end) for t in changed] == [(t.speaker, t.start, t.end) for t in turns]:
            assert not of_times & degradation.expected.keys(), name


def test_levels_made_even_and_codebooks_left_out_are_noticed():
    turns, lots = conversation(), np.random.default_rng(0)

    def after(name: str, metric: str) -> np.ndarray:
        degradation = mv.DEGRADATIONS[name]
        made = (degradation.change(turns, severity, lots) for severity in degradation.severities)
        return np.array([hc.MEASURES[metric](heard(each, turns)) for each in made])

    assert np.all(np.diff(after("even level", "level_spread")) < 0)
    assert np.all(np.diff(after("codec depth", "speaker_similarity")) < 0)


def test_what_is_known_of_a_sound_is_kept_where_only_its_place_changes(monkeypatch):
    turns, lots, analysed = conversation(), np.random.default_rng(0), []
    human = hc.Human.of({"this": turns})
    real = hc.cm.prosody_of
    monkeypatch.setattr(hc.cm, "prosody_of", lambda *given: analysed.append(given) or real(*given))
    for name in ("longer gaps", "gaps all alike", "exchanged speakers", "shuffled emotion"):
        changed = mv.DEGRADATIONS[name].change(turns, 0.5, lots)
        hc.Heard("this", changed, turns, human, hc.Ears()).coherence()
    assert not analysed
    leaves = mv.DEGRADATIONS["another style from the middle on"].change
    first, second = (leaves(turns, severity, lots) for severity in (0.5, 1.0))
    assert first[0] is second[0] and first[3] is not second[3] and len(first) == len(turns)


def test_degradations_of_conversations_change_only_what_they_name():
    turns, lots = conversation(), np.random.default_rng(0)
    for name in ("longer gaps", "talking over each other", "gaps all alike", "exchanged speakers", "shuffled emotion"):
        degradation = mv.DEGRADATIONS[name]
        assert degradation.change(turns, 0.0, lots) == turns
        for severity in degradation.severities[1:]:
            changed = degradation.change(turns, severity, lots)
            assert sum(len(turn.samples) for turn in changed) == sum(len(turn.samples) for turn in turns)
    later = mv.gaps_longer(turns, 0.5, lots)
    assert heard(later, turns).gaps == pytest.approx([gap + 0.5 for gap in heard(turns, turns).gaps])
    murmured = mv.murmured_at(turns, 1.0, lots)
    assert heard(murmured, turns).gaps == pytest.approx(heard(turns, turns).gaps) and len(murmured) == 2 * len(turns)
    counts = [hc.MEASURES["backchannels"](heard(mv.murmured_at(turns, s, lots), turns)) for s in mv.SHARES]
    assert counts[0] == 0 and np.all(np.diff(counts) > 0) and counts[-1] == 0.5
    alike = heard(mv.gaps_alike(turns, 1.0, lots), turns).gaps
    assert np.ptp(alike) < 1e-6 and np.median(alike) == pytest.approx(np.median(heard(turns, turns).gaps))


def test_turns_made_longer_or_shorter_keep_the_silences_between_them():
    turns, lots = conversation(), np.random.default_rng(0)
    for name in ("slower", "pauses", "dropped words", "another style from the middle on"):
        changed = mv.DEGRADATIONS[name].change(turns, mv.DEGRADATIONS[name].severities[-1], lots)
        assert sum(len(turn.samples) for turn in changed) != sum(len(turn.samples) for turn in turns)
        assert heard(changed, turns).gaps == pytest.approx(heard(turns, turns).gaps), name
    untimed = [dataclasses.replace(turn, start=None) for turn in turns]
    assert all(turn.start is None for turn in mv.DEGRADATIONS["slower"].change(untimed, 0.4, lots))


def test_exchanged_and_leaving_voices_are_noticed():
    turns = conversation()
    swapped = [dataclasses.replace(turns[3], speaker="a"), dataclasses.replace(turns[2], speaker="b")]
    assert heard(turns, turns).confusion() == 0
    assert heard([*turns[:2], *swapped[::-1]], turns).confusion() > 0.4
    left = mv.DEGRADATIONS["another voice from the middle on"].change(turns, 1.0, np.random.default_rng(0))
    run = hc.MEASURES["character_run"]
    assert run(heard(left, turns)) < run(heard(turns, turns)) - 0.1


def test_emotional_coherence_falls_when_ways_of_speaking_change_places():
    lots, turns = np.random.default_rng(0), []
    for i in range(6):  # one speaker, every second turn excited
        excited = mv.degradations.excite(speech(i % 4), 2.0 * (i % 2), lots)
        turns.append(hc.Turn("a", SENTENCES[i % 4], excited, 5.0 * i))
    assert heard(turns, turns).coherence() == pytest.approx(1)
    elsewhere = [  # the same sentences in the same places, the other ones of them excited
        dataclasses.replace(turn, samples=mv.degradations.excite(speech(i % 4), 2.0 * ((i + 1) % 2), lots))
        for i, turn in enumerate(turns)
    ]
    assert heard(elsewhere, turns).coherence() < 0
    higher = mv.each_turn(mv.degradations.shift_pitch)(turns, 3.0, lots)
    assert heard(higher, turns).coherence() > 0.7


def collected(folder, n=40, each=4):
    collection = Collection(folder)
    turns = []
    for c in range(n):
        for i in range(each):
            samples = voice(0.6 + 0.1 * (i % 3), 110 + 60 * (i % 2) + c)
            start = 1.5 * i
            times = {"start_s": start, "end_s": start + len(samples) / 16_000}
            turns.append(turn_record(f"talk{c:02d}", i, "ab"[i % 2], f"turn {i} of talk {c}", samples, **times))
    collection.commit("test", "1", [f"talk{c:02d}" for c in range(n)], turns, [])
    return folder


def test_conversations_are_held_out_and_too_few_are_refused(tmp_path):
    found = mv.conversations_of(collected(tmp_path / "data"), 16, seed=0)
    assert len(found) == 4 and all(len(turns) == 4 for turns in found.values())
    assert found.keys() == mv.conversations_of(tmp_path / "data", 16, seed=0).keys()
    assert [turn.start for turn in next(iter(found.values()))] == [0, 1.5, 3.0, 4.5]
    with pytest.raises(ValueError, match=r"holds 2 held-out .* 4 are needed"):
        mv.conversations_of(collected(tmp_path / "few", n=12), 60, seed=0)


def test_long_conversations_are_as_many_as_a_verdict_needs(tmp_path):
    """24 turns are three conversations of eight."""
    found = mv.conversations_of(collected(tmp_path / "data", each=9), 24, seed=0)
    assert [len(turns) for turns in found.values()] == [8] * mv.FEWEST


def test_a_stopped_validation_goes_on_and_gives_the_same_records(tmp_path, monkeypatch):
    """Only what is missing is measured again; a line that a kill cut off is one of these."""
    few = ("longer gaps", "gaps all alike")
    monkeypatch.setattr(mv, "DEGRADATIONS", {name: mv.DEGRADATIONS[name] for name in few})
    conversations = {str(i): conversation(gap=0.1 * (i + 1)) for i in range(2)}
    args = (conversations, ["pause_share"], hc.Ears(), 0, 1, tmp_path)
    whole = mv.measure_all(*args)
    (path,) = tmp_path.glob(f"*{mv.RECORDS}")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    again = mv.measure_all(*args)
    key = lambda r: (r.conversation, r.degradation, r.metric)  # noqa: E731
    assert sorted(map(repr, whole)) == sorted(map(repr, again))
    assert len(hc.kept_lines(path, dict)) == len(path.read_text().splitlines()) == len(whole)  # what was torn is gone
    assert len({key(record) for record in again}) == len(again) == len(whole)
    values = {key(record): record.values for record in whole}
    assert values["0", "longer gaps", "gap"] == pytest.approx([0.2, 0.45, 0.7, 1.2, 2.2])
    assert {record.metric for record in whole} == {"gap", "gap_distance", "overlap"}


def test_values_of_other_versions_or_severities_are_measured_anew(tmp_path, monkeypatch):
    few = {"longer gaps": mv.DEGRADATIONS["longer gaps"]}
    monkeypatch.setattr(mv, "DEGRADATIONS", few)
    measured = []

    def in_this_process(work, jobs, workers, start, given, title):
        measured.extend(jobs)
        start(*given)
        return [(number, work(*job)) for number, job in enumerate(jobs)]

    monkeypatch.setattr(mv, "in_processes", in_this_process)

    def levels_and_jobs() -> tuple[set[int], int]:
        measured.clear()
        found = mv.measure_all({"0": conversation()}, [], hc.Ears(), 0, 1, tmp_path)
        return {len(record.values) for record in found}, len(measured)

    assert levels_and_jobs() == ({5}, 1)
    monkeypatch.setitem(few, "longer gaps", dataclasses.replace(few["longer gaps"], severities=(0.0, 0.5, 1.0)))
    assert levels_and_jobs() == ({3}, 1)
    monkeypatch.setattr(mv, "VERSION", mv.VERSION + 1)
    assert levels_and_jobs() == ({3}, 1)
    monkeypatch.setattr(mv.degradations, "VERSION", mv.degradations.VERSION + 1)
    assert levels_and_jobs() == ({3}, 1)
    monkeypatch.setattr(hc.Human, "of", None)  # nobody to compare with is heard for nothing
    assert levels_and_jobs() == ({3}, 0)


def test_processes_give_results_by_number_and_one_that_dies_is_one_line():
    found = dict(hc.in_processes(pow, [(2, 3), (3, 2)], 1, abs, (0,), "counting"))
    assert found == {0: 8, 1: 9}
    with pytest.raises(ValueError, match="lower --workers"):
        list(hc.in_processes(os._exit, [(1,)], 1, abs, (0,), "dying"))


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """kill -9 leaves nobody behind who waits for work."""
    code = (
        "import os, time, pathlib, heard_conversations as hc\n"
        "if __name__ == '__main__':\n"
        "    for number, pid in hc.in_processes(os.getpid, [(), ()], 1, abs, (0,), 'x'):\n"
        f"        pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(pid))\n"
        "        time.sleep(60)\n"
    )
    (tmp_path / "many.py").write_text(code)
    root = str(Path(mv.__file__).parent)
    parent = subprocess.Popen([sys.executable, tmp_path / "many.py"], env={**os.environ, "PYTHONPATH": root})
    until = time.monotonic() + 60
    pid = 0
    while not pid and time.monotonic() < until:
        time.sleep(0.1)
        pid = int((tmp_path / "pid").read_text() or 0) if (tmp_path / "pid").is_file() else 0
    assert pid
    parent.kill()
    parent.wait()
    while time.monotonic() < until and is_alive(pid):
        time.sleep(0.1)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.is_file() and "\nState:\tZ" in status.read_text())  # nobody may be there to fetch its exit code


def test_unit_of_the_times():
    turn = hc.Turn("a", "x", np.zeros(SAMPLE_RATE, np.float32), 1.0)
    assert turn.end == 2.0


def test_kept_lines_of_another_form_are_left_out(tmp_path):
    path = tmp_path / "kept.jsonl"
    path.write_text('{"key": 1}\n[2]\n{"other": 3}\nno json\n{"key": 4}\n{"key":')
    for _ in range(2):  # the first time removes what was cut off
        assert hc.kept_lines(path, lambda row: row["key"]) == [1, 4]
    assert path.read_text().endswith('{"key": 4}\n')
