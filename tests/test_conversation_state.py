"""Conversations in files: what goes on from a file equals what never stopped; damage and strangers are refused."""

import json

import pytest
import torch
from conftest import full_model, tiny_model, tiny_tokenizer, voice
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conversation_state import KIND, load_conversation, load_notes, save_conversation
from generation import Conversation, Sampling
from text_tokenizer import ByteTokenizer

TEXT = ByteTokenizer()
SHORT = Sampling(max_seconds=0.8, max_text_ids=6)


def begun(model, tokenizer) -> Conversation:
    """Two turns, one heard and one spoken."""
    talk = Conversation(model, tokenizer, TEXT, sampling=SHORT, seed=3)
    talk.add_turn(0, "What did you say?", samples=voice(0.5, 140, rate=24_000), gap_seconds=0.2)
    talk.speak(1, "Nothing at all.", gap_seconds=0.4)
    return talk


def next_replies(talk: Conversation) -> list:
    verbs = [talk.speak(0, "And now?")]
    if talk.model.config.text_head:
        verbs.append(talk.reply(1, gap_seconds=0.1))
    return verbs


@pytest.mark.parametrize("make", [tiny_model, full_model])
def test_a_conversation_goes_on_from_its_file_as_if_it_had_not_stopped(make, tokenizer, tmp_path):
    model, path = make(), tmp_path / "new" / "talk.safetensors"
    talk = begun(model, tokenizer)
    save_conversation(talk, path)
    again = load_conversation(path, model, tokenizer, TEXT)
    assert [turn.text_ids for turn in again.turns] == [turn.text_ids for turn in talk.turns]
    assert again.sampling == SHORT
    for one, other in zip(next_replies(talk), next_replies(again), strict=True):
        assert torch.equal(one.codes, other.codes)
        assert one.text == other.text
    assert again.clock == talk.clock
    if model.memory is not None:
        for one, other in zip(again.standing()[1].matrices, talk.standing()[1].matrices, strict=True):
            torch.testing.assert_close(one, other)
            assert one.abs().sum() > 0


def test_the_memory_of_turns_that_left_the_window_is_kept(tokenizer, tmp_path):
    model = full_model(max_positions=60)
    talk = begun(model, tokenizer)
    for number in range(3):
        with pytest.warns(UserWarning, match="left the context"):
            talk.speak(number % 2, "More and more words.")
    save_conversation(talk, tmp_path / "talk")
    again = load_conversation(tmp_path / "talk", model, tokenizer, TEXT)
    assert len(again.turns) == len(talk.turns) < 5
    with pytest.warns(UserWarning, match="left the context"):
        assert torch.equal(talk.speak(0, "Once more, please.").codes, again.speak(0, "Once more, please.").codes)


def test_a_conversation_without_turns_can_be_kept(model, tokenizer, tmp_path):
    talk = Conversation(model, tokenizer, TEXT, sampling=SHORT, seed=5)
    save_conversation(talk, tmp_path / "talk")
    again = load_conversation(tmp_path / "talk", model, tokenizer, TEXT)
    assert torch.equal(talk.speak(0, "Hello.").codes, again.speak(0, "Hello.").codes)


def test_other_sampling_may_be_asked_for(model, tokenizer, tmp_path):
    save_conversation(begun(model, tokenizer), tmp_path / "talk")
    other = Sampling(temperature=0, max_seconds=0.4)
    assert load_conversation(tmp_path / "talk", model, tokenizer, TEXT, sampling=other).sampling == other


def test_a_file_cut_anywhere_or_of_another_kind_is_refused(model, tokenizer, tmp_path):
    path = tmp_path / "talk"
    save_conversation(begun(model, tokenizer), path)
    whole = path.read_bytes()
    for end in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="no conversation, or is damaged"):
            load_conversation(path, model, tokenizer, TEXT)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no conversation, or is damaged"):
        load_conversation(path, model, tokenizer, TEXT)
    with pytest.raises(FileNotFoundError, match="no conversation at"):
        load_conversation(tmp_path / "nowhere", model, tokenizer, TEXT)


@pytest.mark.filterwarnings("ignore:.*oldest turns left")
@pytest.mark.parametrize("make", [tiny_model, full_model])
def test_voices_stay_in_the_window_of_a_conversation_from_a_file(make, tokenizer, tmp_path):
    model = make()
    talk = Conversation(model, tokenizer, TEXT, sampling=SHORT)
    talk.add_turn(1, "my voice", samples=voice(1.0, 140, rate=24_000), pinned=True)
    save_conversation(talk, tmp_path / "talk")
    again = load_conversation(tmp_path / "talk", model, tokenizer, TEXT)
    for number in range(8):
        again.add_turn(number % 2, "some words", codes=talk.turns[0].codes.repeat(4, 1))
    assert len(again.turns) < 9
    assert again.turns[0].text_ids == talk.turns[0].text_ids
    assert torch.equal(again.voices[1].codes, talk.turns[0].codes)


def test_notes_are_kept_and_a_file_of_before_there_were_any_is_read(model, tokenizer, tmp_path):
    path, talk = tmp_path / "talk", begun(model, tokenizer)
    save_conversation(talk, path, {"seed": 7, "voices": {"0": "Ann"}})
    assert load_notes(path) == {"seed": 7, "voices": {"0": "Ann"}}

    def age(content, tensors) -> None:
        content.pop("notes")
        for facts in content["turns"]:
            facts.pop("voice_of")

    changed(path, age)
    assert load_notes(path) == {}
    again = load_conversation(path, model, tokenizer, TEXT)
    assert not again.voices and len(again.turns) == 2
    changed(path, lambda content, tensors: content.update(notes=3))
    with pytest.raises(ValueError, match="is damaged"):
        load_notes(path)


def changed(path, change) -> None:
    """Write a file anew with its JSON changed."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()[KIND])
    change(content, tensors)
    save_file(tensors, path, {KIND: json.dumps(content)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content, tensors: content.update(format=99), "format 99"),
        (lambda content, tensors: content.pop("clock"), "damaged"),
        (lambda content, tensors: content["turns"][0].update(text_ids=[9999]), "turn 0 holds text ids"),
        (lambda content, tensors: content["turns"][1].update(order="backwards"), "order 'backwards'"),
        (lambda content, tensors: content["turns"][1].pop("clock"), "damaged"),
        (lambda content, tensors: content["turns"][1].update(voice_of="Ann"), "voice of 'Ann', which is no speaker"),
        (lambda content, tensors: content["sampling"].update(top_k=0), "top_k=0 must be"),
        (lambda content, tensors: content["of"].update(codebooks=8), "codebooks=8"),
        (lambda content, tensors: tensors.pop("turn.0.codes"), "damaged"),
        (lambda content, tensors: tensors["turn.0.codes"].fill_(99), "codes must lie in"),
        (lambda content, tensors: tensors.pop("memory.seconds"), "memory: tensor seconds is missing"),
    ],
)
def test_content_that_cannot_be_is_refused_in_one_line(change, message, tokenizer, tmp_path):
    path, model = tmp_path / "talk", full_model()
    save_conversation(begun(model, tokenizer), path)
    changed(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_conversation(path, model, tokenizer, TEXT)
    assert "\n" not in str(caught.value)


def test_a_conversation_of_another_tokenizer_is_refused(model, tokenizer, tmp_path):
    save_conversation(begun(model, tokenizer), tmp_path / "talk")
    with pytest.raises(ValueError, match="audio_tokenizer"):
        load_conversation(tmp_path / "talk", model, tiny_tokenizer(seed=1), TEXT)


def test_draws_of_another_device_begin_anew_with_a_warning(model, tokenizer, tmp_path):
    save_conversation(begun(model, tokenizer), tmp_path / "talk")
    changed(tmp_path / "talk", lambda content, tensors: tensors.update(draws=torch.zeros(16, dtype=torch.uint8)))
    with pytest.warns(UserWarning, match="begin anew"):
        load_conversation(tmp_path / "talk", model, tokenizer, TEXT)
