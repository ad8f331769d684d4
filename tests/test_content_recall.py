"""Content recall: the conversations, and answers that hold what was told or do not."""

import numpy as np
import pytest
from spoken_clips import speech

import content_recall
import heard_conversations as hc
from audio import SAMPLE_RATE, resample
from content_recall import conversations, recalled
from speech_metrics import NotMeasurable
from spoken_conversations import read_requests
from synthetic_voices import load_voice, speak


def test_the_fact_is_told_and_asked_for_with_so_many_exchanges_between():
    made = conversations([0, 3])
    assert len(made) == 2 * 10
    for name, turns in made.items():
        told, asked, answer = turns[0], turns[-2], turns[-1]
        assert told["speaker"] == asked["speaker"] == 0 and asked["text"].endswith("?")
        assert answer == {"speaker": 1}  # in the system's own words
        assert len(turns) == 4 + 2 * int(name.rsplit("-", 1)[1])
        assert recalled(name, told["text"])  # what was told holds the answer
        assert not any(recalled(name, turn["text"]) for turn in turns[1:-1])  # nothing else does


def test_distances_that_there_are_no_exchanges_for_are_refused():
    with pytest.raises(ValueError, match="0 to 6 are there"):
        conversations([7])


def test_the_answer_is_what_is_heard():
    voice = load_voice(0)

    def heard(name: str, answer: np.ndarray) -> float:
        turns = [hc.Turn("1", "", answer, None)]
        return hc.MEASURES["content_recall"](hc.Heard(name, turns, turns, hc.Human({}, {}), hc.Ears()))

    samples, rate = speak(voice, "Of course, you have an old dog.")
    right = resample(samples, rate, SAMPLE_RATE)
    assert heard("recall-pet-2", right) == 1.0
    assert heard("recall-food-2", right) == 0.0
    assert heard("recall-pet-2", speech(0)) == 0.0
    assert heard("recall-pet-2", np.zeros(0, np.float32)) == 0.0
    asked = [hc.Turn("0", "", right, None)]  # he who asks says it, nobody answers
    assert hc.MEASURES["content_recall"](hc.Heard("recall-pet-2", asked, asked, hc.Human({}, {}), hc.Ears())) == 0.0
    for other in ("recall-nothing-2", "weather-1"):
        with pytest.raises(NotMeasurable, match="asks for what was told"):
            heard(other, right)


def test_the_conversations_can_be_spoken_by_the_demo(tmp_path):
    out = tmp_path / "recall.json"
    assert content_recall.main(["--out", str(out), "--between", "1"]) == 0
    requests, refused = read_requests(out)
    assert len(requests) == 10 and not refused
