"""Systems side by side: values, tests, pages; each comes out right for systems whose difference is known."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from spoken_clips import SENTENCES, other_speaker, speech

import degradations
import system_comparison as sc
from audio import SAMPLE_RATE, encode_pcm16, read_audio, resample, write_wav
from command_line import EXIT_DONE, EXIT_INPUT, EXIT_PARTIAL, run
from conversation_metrics import CONVERSATION_METRICS
from evaluation_framework import main
from generation import Reply
from heard_conversations import MEASURES, METRICS_OF_CONVERSATIONS, Ears, Heard, Human, Turn, hash_of
from listening_models import LISTENER_METRICS
from pronunciation import conversations
from speech_metrics import NotMeasurable
from spoken_conversations import measure
from synthetic_voices import load_voice, speak

LOTS = np.random.default_rng(0)


def write_system(folder, degrade=lambda samples: samples, n=2):
    """`n` conversations of four turns by two voices, from 0.3 s after each other."""
    folder.mkdir(parents=True)
    rows = []
    for c in range(n):
        for i in range(4):
            samples = degrade((speech if i % 2 == 0 else other_speaker)((i + c) % 4))
            write_wav(folder / f"{c}-{i}.wav", samples)
            row = {"audio": f"{c}-{i}.wav", "text": SENTENCES[(i + c) % 4], "speaker": "ab"[i % 2]}
            rows.append({**row, "conversation": f"talk{c}", "turn_index": i, "start": 5.0 * i})
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The real turns beside monotone ones, with a listening page; what was printed last."""
    folder = tmp_path_factory.mktemp("compared")
    write_system(folder / "real")
    write_system(folder / "flat", lambda samples: degradations.flatten_pitch(samples, 1.0, LOTS))
    flags = ["--out", str(folder / "out"), "--workers", "1", "--listening", "4"]
    systems = ["--systems", f"real={folder / 'real'}", f"flat={folder / 'flat'}"]
    assert run(main, [*flags, *systems]) == EXIT_DONE
    return folder, [*flags, *systems]


def test_values_of_known_systems(compared):
    report = json.loads((compared[0] / "out" / "comparison.json").read_text())
    figures = report["figures"]
    unasked = {*sc.OF_SENTENCES, *sc.OF_TIMES, *LISTENER_METRICS}
    assert set(figures) | unasked == set(MEASURES) <= set(METRICS_OF_CONVERSATIONS) and not set(figures) & unasked
    assert figures["pitch_spread"]["real"]["value"] > 1.5 > 0.4 > figures["pitch_spread"]["flat"]["value"]
    assert figures["pitch_contour"]["real"]["value"] == pytest.approx(1)
    assert abs(figures["pitch_contour"]["flat"]["value"]) < 0.2
    assert figures["speaker_similarity"]["real"]["value"] == pytest.approx(1, abs=1e-4)
    assert figures["confusion"]["real"]["value"] == 0
    assert figures["character_other"]["real"]["value"] < figures["character_run"]["real"]["value"] - 0.1
    assert figures["turn_seconds"]["real"]["value"] == pytest.approx(4, abs=1)
    assert figures["backchannels"]["real"]["value"] == 0
    assert report["metrics"]["character_run"]["needs"] == ["resemblyzer"]
    assert figures["wer"]["real"]["value"] < 0.1
    assert any("2 conversation(s)" in line for line in report["warnings"])
    assert set(report["metrics"]) == set(figures) and report["metrics"]["wer"]["definition"]
    for name in ("comparison.md", "comparison.html"):
        text = (compared[0] / "out" / name).read_text()
        assert "Pitch spread" in text and CONVERSATION_METRICS["pitch_spread"].definition[:40] in text
    page = (compared[0] / "out" / "comparison.html").read_text()
    for path in re.findall(r'src="([^"]+)"', page):
        assert (compared[0] / "out" / path).is_file()


def test_sentences_written_for_a_metric_bring_it_in(tmp_path):
    voice, rows = load_voice(0), []
    for name, (text,) in [(n, texts) for n, texts in conversations().items() if n.startswith("lead-")][:3]:
        samples, rate = speak(voice, text)
        write_wav(tmp_path / f"{name}.wav", resample(samples, rate, SAMPLE_RATE))
        rows.append({"audio": f"{name}.wav", "text": text, "speaker": "0", "conversation": name, "turn_index": 0})
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    flags = ["--systems", f"voice={tmp_path}", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert run(main, flags) == EXIT_DONE
    figures = json.loads((tmp_path / "out" / "comparison.json").read_text())["figures"]
    assert figures["homographs"]["voice"]["n"] == 3 and "pronunciation_kept" not in figures


def test_sentences_that_were_asked_for_but_cannot_be_heard_stay_in_the_table():
    lost = {"homographs": sc.Measured(None, "no homograph sentence can be aligned with the audio", {})}
    other = {"homographs": sc.Measured(None, "not asked: no turn is one of the homograph sentences", {})}
    assert sc.figures_of({"voice": {"a": lost, "b": other}}, seed=0)["homographs"]["voice"].value is None
    assert not sc.figures_of({"voice": {"b": other}}, seed=0)


def test_a_turn_said_twice_is_refused_by_name(tmp_path):
    write_wav(tmp_path / "hello.wav", speech(0))
    (tmp_path / "hello.txt").write_text("Hello.")
    soundfile.write(tmp_path / "hello.flac", speech(1), SAMPLE_RATE)
    (tmp_path / "other.wav").write_bytes((tmp_path / "hello.wav").read_bytes())
    (tmp_path / "other.txt").write_text("Other.")
    found = sc.read_system("one", tmp_path)
    assert {name: len(turns) for name, turns in found.conversations.items()} == {"hello": 1, "other": 1}
    assert len(found.refused) == 1 and "has a turn 0 already" in found.refused[0]


def test_who_answered_with_a_broken_file_has_not_forgotten(tmp_path):
    for name in ("recall-pet-0", "talk"):
        rows = [{"speaker": 1, "text": text, "file": f"{text}.wav"} for text in ("One", "Two")]
        (tmp_path / name).mkdir()
        asked = {"turns": [{"speaker": 1, "text": row["text"]} for row in rows]}
        (tmp_path / name / sc.RESULT).write_text(json.dumps({"request": asked, "turns": rows}))
        write_wav(tmp_path / name / "One.wav", speech(0))
        (tmp_path / name / "Two.wav").write_bytes(b"broken")
    found = sc.read_system("one", tmp_path)
    assert list(found.conversations) == ["talk"] and len(found.refused) == 3
    for turn in ({"text": 5}, {"real_time_factor": "fast"}, {"text": None}):
        torn = {"speaker": 1, "text": "One", "file": "One.wav", **turn}
        content = {"request": {"turns": [{"speaker": 1}]}, "turns": [torn]}
        (tmp_path / "talk" / sc.RESULT).write_text(json.dumps(content))
        with pytest.raises(ValueError, match="not what demo"):
            sc.read_system("one", tmp_path)


def test_replies_alone_are_not_compared_with_whole_conversations():
    whole = system_of("real", **{f"talk{i}": [speech(0)] * 4 for i in range(12)})
    half = sc.System("ours", {name: turns[1::2] for name, turns in whole.conversations.items()}, [])
    measured = {
        name: {f"talk{i}": {"pitch": sc.Measured(i + up, "", {})} for i in range(12)}
        for name, up in (("real", 0.0), ("ours", 5.0))
    }
    apart = {"ours": sc.unlike(half, whole)}
    assert len(sc.differences(measured, 0)) == 1 and sc.differences(measured, 0, apart) == []
    assert any(
        "says other turns than real in 12 conversations" in line for line in sc.warnings_of([whole, half], {}, [])
    )
    assert sc.unlike(whole, whole) == set()


def test_an_answer_without_words_is_one_that_recalls_nothing(tmp_path):
    answer = {"text": "", "file": None}
    write_batch(tmp_path, "recall-pet-0", [{"text": "I have a dog."}, {}], [{"text": "I have a dog."}, answer])
    system = sc.read_system("ours", tmp_path)
    assert [turn.text for turn in system.conversations["recall-pet-0"]] == ["I have a dog.", ""] and not system.refused


def test_few_differences_may_be_sure_behind_many_that_are():
    def one(n: int, p: float) -> sc.Difference:
        return sc.Difference(system="ours", metric="rate", value=1.0, low=0.5, high=1.5, p=p, p_holm=p, conversations=n)

    sure, few = [one(60, 1e-4)] * 10, [one(9, 2 / 2**9) for _ in range(10)]
    assert not any(sc.is_hopeless(each, [*sure, *few]) for each in few)
    assert all(sc.is_hopeless(each, [*few, *(one(60, 0.5) for _ in range(20))]) for each in few)


def test_few_conversations_behind_any_figure_are_warned_of():
    def measured(n: int) -> dict:
        values = {f"{i}": {"rate": sc.Measured(1.0 + i, "", {}), "gap": sc.Measured(0.2, "", {})} for i in range(n)}
        return {**values, "0": {**values["0"], "rate": sc.Measured(None, "the clip is silent", {})}}

    def warned(systems: int, n: int) -> str:
        table = {f"{i}": measured(n) for i in range(systems)}
        figures, found = sc.figures_of(table, 0), sc.differences(table, 0)
        said = {f"{i}": [Turn("a", "Hello.", speech(0), 0.0)] for i in range(n)}
        one = sc.System("0", said, [])
        return " ".join(sc.warnings_of([one], figures, found))

    assert "rest on 9 conversation(s)" in warned(1, 10) and not warned(1, 11)
    assert "none of them could be told from chance" in warned(40, 11) and "could be told" not in warned(2, 11)


def test_a_second_run_measures_nothing_anew(compared, monkeypatch):
    folder, flags = compared
    before = (folder / "out" / "comparison.json").read_text()
    lines = (folder / "out" / sc.MEASURED).read_text().splitlines()
    assert len(lines) == 4
    (folder / "out" / sc.MEASURED).write_text("\n".join(lines) + '\n{"key": "cut off')
    assert run(main, flags) == EXIT_DONE
    assert len((folder / "out" / sc.MEASURED).read_text().splitlines()) == 4
    assert json.loads(before)["measured"] == json.loads((folder / "out" / "comparison.json").read_text())["measured"]


def test_listening_is_blind_and_its_answers_are_counted(compared, capsys):
    folder, flags = compared
    page = (folder / "out" / "listening.html").read_text()
    shown = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    key = json.loads((folder / "out" / sc.KEY).read_text())["items"]
    assert {item["item"] for item in shown["items"]} == set(key) and len(key) >= 4
    assert "flat" not in page and "real" not in page
    assert {order["A"] for order in key.values()} == {"real", "flat"}  # neither always comes first
    for item in shown["items"]:
        letters = ("A", "B", "before") if item["context"] else ("A", "B")
        assert all((folder / "out" / "listening" / f"{item['item']}-{letter}.wav").is_file() for letter in letters)
    likes_real = {item: -2 if order["A"] == "real" else 2 for item, order in key.items()}
    (folder / "answers.json").write_text(json.dumps({"answers": likes_real, "listener": "one"}))
    count = ["--out", str(folder / "out"), "--answers", str(folder / "answers.json"), "--json"]
    assert run(main, count) == EXIT_DONE
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["without context"]["cmos"]["value"] == 2 and found["without context"]["preferred"]["value"] == 1
    assert found["without context"]["cmos"]["conversations"] == 2  # and not as many as there were answers
    capsys.readouterr()
    assert run(main, [*count[:-1], str(folder / "answers.json")]) == EXIT_INPUT
    assert "of one listener" in capsys.readouterr().err
    (folder / "nan.json").write_text(json.dumps({"answers": dict.fromkeys(key, float("nan"))}))
    assert run(main, [*count[:-2], str(folder / "nan.json")]) == EXIT_INPUT
    assert "not about" in capsys.readouterr().err
    (folder / "strange.json").write_text(json.dumps({"answers": {"nothing": 1}}))
    assert run(main, [*count[:-2], str(folder / "strange.json")]) == EXIT_INPUT
    (folder / "broken.json").write_text("{")
    assert run(main, [*count[:-2], str(folder / "broken.json")]) == EXIT_INPUT
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_bad_files_are_named_and_the_others_go_on(tmp_path, capsys):
    folder = write_system(tmp_path / "real")
    (folder / "0-1.wav").write_bytes(b"no audio")
    write_wav(folder / "1-0.wav", np.zeros(24_000, np.float32))
    write_wav(folder / "1-1.wav", speech(0)[:1200])
    assert run(main, ["--out", str(tmp_path / "out"), "--workers", "1", "--systems", f"a={folder}"]) == EXIT_PARTIAL
    printed = capsys.readouterr().out
    assert "0-1.wav" in printed and "not readable" in printed
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert report["figures"]["pitch"]["a"]["n"] == 2


def test_what_a_batch_spoke_is_a_system(tmp_path):
    """Spoken turns only; who says nothing has no file, and his turn is empty."""
    folder = tmp_path / "batch" / "soup"
    folder.mkdir(parents=True)
    rows = [{"speaker": 0, "text": "heard only", "heard": "a.wav", "seconds": 1.0}]
    for number, samples in ((2, speech(0)), (3, speech(0)[:0])):
        path = folder / f"turn-{number}-speaker-1.wav"
        if len(samples):
            write_wav(path, samples)
        rows.append(measure(Reply(samples, torch.zeros(0, 4), SENTENCES[0], True, 0.1, 0.2), 1, path))
    asked = {"turns": [{"speaker": 0, "audio": "a.wav"}, *({"speaker": 1, "text": SENTENCES[0]} for _ in rows[1:])]}
    (folder / sc.RESULT).write_text(json.dumps({"request": asked, "turns": rows}))
    system = sc.read_system("spoken", tmp_path / "batch")
    turn, empty = system.conversations["soup"]
    assert (turn.speaker, turn.text, turn.start, system.refused) == ("1", SENTENCES[0], None, [])
    np.testing.assert_allclose(turn.samples, speech(0), atol=1e-4)
    assert (empty.speaker, empty.text, len(empty.samples)) == ("1", SENTENCES[0], 0)
    taken = 0.2 / len(speech(0)) * SAMPLE_RATE
    assert (turn.first_audio, turn.real_time_factor) == (0.1, pytest.approx(taken, abs=1e-4))
    untimed = dataclasses.replace(turn, first_audio=None)
    heard, other = (Heard("soup", turns, turns, Human({}, {}), Ears()) for turns in ([turn, empty], [turn, untimed]))
    assert MEASURES["first_audio"](heard) == 0.1  # who says nothing has taken no time to say it
    assert MEASURES["real_time_factor"](heard) == turn.real_time_factor
    with pytest.raises(NotMeasurable, match="how long it took"):
        MEASURES["first_audio"](other)
    assert hash_of([turn]) != hash_of([untimed])
    assert any("1 of 2 turns are silent" in line for line in sc.warnings_of([system], {}, []))
    (folder / sc.RESULT).write_text("{")
    with pytest.raises(ValueError, match="not what demo"):
        sc.read_system("spoken", tmp_path / "batch")


def test_files_with_texts_beside_them_pair_whatever_their_suffix(tmp_path):
    for name, suffix in (("one", ".wav"), ("other", ".flac")):
        (tmp_path / name).mkdir()
        for stem, text in (("a", f"{SENTENCES[0]}\n"), ("b", "\n")):
            (tmp_path / name / f"{stem}{suffix}").write_bytes(encode_pcm16(speech(0), SAMPLE_RATE, suffix[1:].upper()))
            (tmp_path / name / f"{stem}.txt").write_text(text)
    one, other = (sc.read_system(name, tmp_path / name) for name in ("one", "other"))
    assert one.conversations.keys() == other.conversations.keys() == {"a"}
    assert one.conversations["a"][0].text == SENTENCES[0]
    assert sc.aligned(one.conversations["a"], other.conversations["a"])
    assert one.refused == other.refused == ["b: no transcript"]


def system_of(name: str, **conversations: list[np.ndarray]) -> sc.System:
    turns = {key: [Turn("a", SENTENCES[0], x, None) for x in waves] for key, waves in conversations.items()}
    return sc.System(name, turns, [])


def test_values_are_kept_by_all_that_they_depend_on(tmp_path, monkeypatch):
    def at_once(work, jobs, workers, start, given, title):
        start(*given)
        yield from ((number, work(*job)) for number, job in enumerate(jobs))

    def values(*systems: sc.System) -> dict:
        return sc.measure_systems(systems, set(MEASURES) - {"pitch_contour"}, Ears(), 1, tmp_path)["our"]

    def kept() -> int:
        return len((tmp_path / sc.MEASURED).read_text().splitlines())

    monkeypatch.setattr(sc, "in_processes", at_once)
    real, our = system_of("real", talk=[speech(0)]), system_of("our", talk=[other_speaker(0)])
    misnamed = system_of("our", other=[other_speaker(0)])
    assert values(real, misnamed)["other"]["pitch_contour"][0] is None
    assert values(real, our)["talk"]["pitch_contour"][0] is not None
    with monkeypatch.context() as nothing_new:
        nothing_new.setattr(Human, "of", lambda conversations: pytest.fail("nothing is new"))
        assert values(real, our)["talk"]["pitch_contour"][0] is not None and kept() == 3
    renamed = system_of("real", other=[speech(0)])
    assert values(renamed, misnamed)["other"]["pitch_contour"][0] is not None
    before = kept()
    monkeypatch.setattr(sc, "VERSION", "another")
    values(real, our)
    assert kept() == before + 2


def test_what_a_silent_system_leaves_out_is_shown(tmp_path, monkeypatch):
    monkeypatch.setitem(sc._WORKER, "human", Human({}, {}))
    monkeypatch.setitem(sc._WORKER, "ears", Ears())
    mute = system_of("mute", talk=[speech(0)[:0], speech(0)])
    measured = {"mute": {"talk": sc.measure_in_worker("talk", mute.conversations["talk"], None, ["pitch_spread"])}}
    figures = sc.figures_of(measured, seed=0)
    assert figures["pitch_spread"]["mute"].excluded == {"turn left out: the clip is silent": 1}
    assert "n=1 without 1 turn(s)" in sc.rows_of(figures, [])[0][1]


def test_an_empty_turn_can_be_drawn_and_played(tmp_path):
    mute, real = system_of("mute", talk=[speech(0)[:0]] * 2), system_of("real", talk=[speech(0)] * 2)
    sc.draw_comparison(tmp_path, [mute], {})
    sc.players(tmp_path, [mute])
    assert len(read_audio(tmp_path / "audio" / "0-0.wav"))
    assert sc.write_listening_page(tmp_path, mute, real, 2, seed=0) == 3


def write_batch(folder: Path, name: str, asked: list[dict], turns: list[dict]) -> None:
    """As `demo.py --mode batch` leaves a conversation."""
    (folder / name).mkdir(parents=True)
    rows = []
    for index, turn in enumerate(turns):
        write_wav(folder / name / f"turn-{index}.wav", speech(index), SAMPLE_RATE)
        rows.append({"speaker": 0, "file": f"turn-{index}.wav"} | turn)
    content = {"request": {"turns": [{"speaker": 0} | each for each in asked]}, "turns": rows}
    (folder / name / "result.json").write_text(json.dumps(content))


def test_a_batch_says_what_it_was_asked_for_however_it_was_read_aloud(tmp_path):
    price = "It costs $3.50 on March 3, 2021."
    write_batch(tmp_path, "shop", [{"text": price}, {}], [{"text": "It costs three dollars"}, {"text": "Thank you."}])
    assert [turn.text for turn in sc.read_system("ours", tmp_path).conversations["shop"]] == [price, "Thank you."]


def test_what_the_last_batch_failed_to_speak_is_refused_though_an_older_result_lies_there(tmp_path):
    for name in ("fresh", "stale"):
        write_batch(tmp_path, name, [{"text": "Hello."}], [{"text": "Hello."}])
    told = [{"id": "fresh", "status": "done"}, {"id": "stale", "status": "failed", "reason": "no clip"}]
    (tmp_path / "summary.json").write_text(json.dumps({"conversations": told}))
    system = sc.read_system("ours", tmp_path)
    assert list(system.conversations) == ["fresh"] and system.refused == [
        "stale: the batch failed to speak it: no clip"
    ]


def test_a_reply_of_its_own_is_played_with_its_words(tmp_path):
    real = system_of("real", talk=[speech(0)] * 2)
    words = "Quite another answer."
    ours = sc.System("ours", {"talk": [dataclasses.replace(real.conversations["talk"][0], text=words)]}, [])
    page = sc.players(tmp_path, [real, ours])
    assert page.count("<audio") == 2 and page.count(words) == 1 and "nothing said" not in page


def test_answers_count_for_the_comparison_they_were_given_in(tmp_path):
    def items(one: sc.System, other: sc.System) -> set[str]:
        sc.write_listening_page(tmp_path, one, other, 2, seed=0)
        return set(json.loads((tmp_path / sc.KEY).read_text())["items"])

    a, b = system_of("a", talk=[speech(0)] * 2), system_of("b", talk=[speech(1)] * 2)
    assert items(a, b) == items(a, b)
    assert not items(a, b) & items(a, system_of("c", talk=[speech(1)] * 2))
    assert not items(a, b) & items(a, system_of("b", talk=[speech(2)] * 2))


def test_the_same_texts_are_found_without_the_normaliser(monkeypatch):
    def absent(text: str) -> str:
        raise ModuleNotFoundError("whisper_normalizer")

    monkeypatch.setattr(sc, "normalise", absent)
    turns = [Turn("a", text, speech(0), None) for text in ("Well, yes!", "well yes", "No.")]
    assert sc.aligned(turns[:1], turns[1:2]) and not sc.aligned(turns[:1], turns[2:])


def test_one_system_alone_is_warned_of_its_own_conversations():
    assert any(
        "rest on 1 conversation(s)" in line for line in sc.warnings_of([system_of("a", talk=[speech(0)])], {}, [])
    )
    many = system_of("a", **{f"talk{i}": [speech(0)] for i in range(sc.FEWEST_CONVERSATIONS)})
    assert sc.warnings_of([many], {}, []) == []


@pytest.mark.parametrize(
    ("systems", "words"),
    [
        (["a=REAL", "a=REAL"], "one name"),
        (["a=nowhere"], "does not exist"),
        (["a=EMPTY"], "no audio"),
        (["a=REAL", "--listening", "3"], "two systems"),
    ],
)
def test_wrong_requests_are_one_line(tmp_path, capsys, systems, words):
    folder = write_system(tmp_path / "real", n=1)
    (tmp_path / "empty").mkdir()
    given = [each.replace("REAL", str(folder)).replace("EMPTY", str(tmp_path / "empty")) for each in systems]
    assert run(main, ["--out", str(tmp_path / "out"), "--systems", *given]) == EXIT_INPUT
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1


def test_paired_test_tells_a_shift_from_chance():
    random = np.random.default_rng(0)
    low, high, p = sc.paired(random.normal(1, 1, 30), seed=0)
    assert low > 0 and high > 1 and p < 0.001
    low, high, p = sc.paired(random.normal(0, 1, 30), seed=0)
    assert low < 0 < high and p > 0.05
    assert sc.paired(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), seed=0)[2] == 2 / 32  # exact: all signs alike


def test_paired_test_is_right_as_often_as_it_says():
    """Without a difference, p is below 0.05 in about 5 % of the trials (2 to 8.5 % for 400, p > 0.999)."""
    random = np.random.default_rng(1)
    hits = sum(sc.paired(random.normal(0, 1, 12), seed=0)[2] < 0.05 for _ in range(400))
    assert 8 <= hits <= 34


def test_holm():
    assert sc.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert sc.holm([0.9, 0.8]) == [1.0, 1.0]
    assert sc.holm([]) == []
