"""Conversations that speak at once say what each would alone; joining, leaving and failing spoil no other."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import full_model, tiny_model

from generation import Conversation, Sampling
from inference_model import InferenceModel
from speaking_together import Together
from text_tokenizer import ByteTokenizer

TEXT = ByteTokenizer()
SHORT = Sampling(max_seconds=1.2, max_text_ids=9)
TEXTS = ("Hi.", "What a long sentence this is, is it not?", "Yes.", "No, never.")


def talks(inference, tokenizer) -> list[Conversation]:
    """Different lengths, seeds, sampling, batches of stage 2 and numbers of codebooks."""
    changes = ({}, {"temperature": 0.5}, {"max_seconds": 0.5}, {"codebooks": 3}, {"codebooks": 1})
    most = max(1, inference.config.acoustic_delay)
    return [
        Conversation(
            inference,
            tokenizer,
            TEXT,
            sampling=dataclasses.replace(SHORT, **change),
            seed=seed,
            acoustic_batch=1 + seed % most,
        )
        for seed, change in enumerate(changes)
    ]


@pytest.mark.parametrize("shared", ["_draw", "_read"])
def test_a_pass_that_fails_ends_its_turns_as_if_they_had_not_been(shared, tokenizer, monkeypatch):
    inference = InferenceModel(full_model())
    ours, theirs = talks(inference, tokenizer), talks(inference, tokenizer)
    together, real, calls = Together(), getattr(Together, shared), []

    def fail(self, asked):
        found = real(self, asked)
        calls.append(asked)
        if len(calls) == 3:
            raise MemoryError("no room")
        return found

    monkeypatch.setattr(Together, shared, fail)
    for name, talk in enumerate(ours):
        together.begin(name, talk, talk.steps(0, TEXTS[0]))
    errors = []
    while len(together):
        errors += [name for name, found in together.round() if isinstance(found, RuntimeError)]
    assert len(errors) > 1 and calls[2]
    monkeypatch.undo()
    for name in errors:
        assert not ours[name].turns and not ours[name].under_way
        for talk in (ours[name], theirs[name]):
            talk.add_turn(1, "Good day.", codes=torch.zeros(3, 4, dtype=torch.int64))
        assert ours[name].clock == theirs[name].clock
        assert ours[name].cache.keys.length == theirs[name].cache.keys.length


def heard(together: Together) -> dict:
    """Samples of all that speak, to their ends."""
    chunks: dict = {}
    while len(together):
        for name, found in together.round():
            if found is not None:
                assert not isinstance(found, Exception), found
                chunks.setdefault(name, []).append(found)
    return {name: np.concatenate(parts) for name, parts in chunks.items()}


@pytest.mark.parametrize("make", [tiny_model, full_model])
def test_each_says_what_it_would_alone_over_several_turns(make, tokenizer):
    inference = InferenceModel(make())
    alone, at_once = talks(inference, tokenizer), talks(inference, tokenizer)
    for turn in range(2):
        texts = [TEXTS[(turn + number) % len(TEXTS)] for number in range(len(alone))]
        if turn and inference.config.text_head:
            texts[0] = None  # answers with words of its own
        replies = [talk.speak(turn, text) for talk, text in zip(alone, texts, strict=True)]
        together = Together()
        for name, (talk, text) in enumerate(zip(at_once, texts, strict=True)):
            together.begin(name, talk, talk.steps(turn, text))
        samples = heard(together)
        for name, reply in enumerate(replies):
            assert torch.equal(at_once[name].turns[-1].codes, reply.codes), name
            np.testing.assert_allclose(samples.get(name, np.zeros(0)), reply.samples, atol=1e-5)
            assert at_once[name].ended == reply.ended
            assert at_once[name].turns[-1].text_ids == alone[name].turns[-1].text_ids
    assert len({len(talk.turns[-1].codes) for talk in alone}) > 1


def test_each_round_is_one_pass_of_the_backbone(tokenizer, monkeypatch):
    inference = InferenceModel(full_model())
    together, read = Together(), []
    several = inference.hidden_of_several
    monkeypatch.setattr(
        inference, "hidden_of_several", lambda rows, caches: read.append(len(rows)) or several(rows, caches)
    )
    for name, talk in enumerate(talks(inference, tokenizer)[:3]):
        together.begin(name, talk, talk.steps(0, TEXTS[1]))
    list(together.round())
    assert not read  # nobody has a frame yet
    for _ in range(2):
        list(together.round())
    assert read[0] == 3 and max(read) == 3  # however the second stage sets them apart later
    alone = inference.hidden
    monkeypatch.setattr(inference, "hidden", lambda *given: pytest.fail("read alone"))
    list(together.round())
    monkeypatch.setattr(inference, "hidden", alone)
    for name in range(3):
        together.stop(name)


def test_others_may_join_and_leave_at_any_time(tokenizer):
    inference = InferenceModel(full_model())
    alone, at_once = talks(inference, tokenizer), talks(inference, tokenizer)
    lasting = [talk.speak(0, TEXTS[1]).codes for talk in alone]
    together = Together()
    together.begin(0, at_once[0], at_once[0].steps(0, TEXTS[1]))
    for _ in range(3):
        list(together.round())
    together.begin(1, at_once[1], at_once[1].steps(0, TEXTS[1]))
    together.begin(2, at_once[2], at_once[2].steps(0, TEXTS[1]))
    for _ in range(2):
        list(together.round())
    together.stop(2)
    together.stop("nobody")
    heard(together)
    assert torch.equal(at_once[0].turns[-1].codes, lasting[0])
    assert torch.equal(at_once[1].turns[-1].codes, lasting[1])
    said = at_once[2].turns[-1].codes
    assert 0 < len(said) < len(lasting[2])
    assert torch.equal(said[:, :2], lasting[2][: len(said), :2])  # stage 2 was drawn early, for fewer frames
    assert len(at_once[2].speak(0, "Go on.").codes)


def test_who_rests_says_the_same_later(tokenizer):
    inference = InferenceModel(full_model())
    alone, at_once = talks(inference, tokenizer), talks(inference, tokenizer)
    replies = [talk.speak(0, TEXTS[1]) for talk in alone]
    together, chunks, random = Together(), {}, np.random.default_rng(0)
    for name, talk in enumerate(at_once):
        together.begin(name, talk, talk.steps(0, TEXTS[1]))
    while len(together):
        resting = [name for name in range(len(at_once)) if random.random() < 0.5]
        for name, found in together.round(resting):
            assert name not in resting
            chunks.setdefault(name, []).append(found)
    for name, reply in enumerate(replies):
        assert chunks[name].pop() is None
        assert np.allclose(np.concatenate(chunks[name]), reply.samples, atol=1e-4)


def test_who_reads_may_stop_a_speaker(tokenizer):
    inference = InferenceModel(tiny_model())
    together, (talk, *_) = Together(), talks(inference, tokenizer)
    together.begin("a", talk, talk.steps(0, TEXTS[1]))
    found = []
    while len(together):
        for name, samples in together.round():
            found.append(samples)
            together.stop(name)
    assert len(found) == 1 and len(talk.turns[-1].codes) >= 1


def test_who_is_stopped_when_its_row_has_been_read_holds_it_once(tokenizer):
    """The first one ends with the pass that has just read the rows of the others."""
    inference = InferenceModel(tiny_model())
    together, everyone = Together(), [talks(inference, tokenizer)[number] for number in (2, 0, 1)]
    for name, talk in enumerate(everyone):
        together.begin(name, talk, talk.steps(0, TEXTS[1]))
    while len(together):
        for name, found in together.round():
            if found is None and name == 0:
                assert together.states, "nobody's row has been read"
                together.stop(1)
                together.stop(2)
    for talk in everyone:
        assert talk.cache.keys.length == talk.clock.position
        again = Conversation(inference, tokenizer, TEXT, sampling=SHORT)
        again.add_turn(0, TEXTS[1], codes=talk.turns[-1].codes)
        assert again.clock.position == talk.clock.position


def test_the_error_of_one_ends_that_one_only(tokenizer):
    inference = InferenceModel(tiny_model())
    together, (good, bad, twice, *_) = Together(), talks(inference, tokenizer)
    expected = talks(inference, tokenizer)[0].speak(0, TEXTS[1]).codes
    together.begin("good", good, good.steps(0, TEXTS[1]))
    together.begin("bad", bad, bad.steps(0, "?!"))
    together.begin("reply", twice, twice.steps(0, None))
    errors = {}
    while len(together):
        errors |= {name: found for name, found in together.round() if isinstance(found, Exception)}
    assert sorted(errors) == ["bad", "reply"]
    assert "holds no letter" in str(errors["bad"]) and "cannot reply" in str(errors["reply"])
    assert torch.equal(good.turns[-1].codes, expected) and not bad.turns


def test_a_conversation_speaks_once_at_a_time_and_with_one_model(tokenizer):
    inference = InferenceModel(tiny_model())
    together, (talk, other, *_) = Together(), talks(inference, tokenizer)
    together.begin("a", talk, talk.steps(0, "Hi."))
    for name, again in (("a", other), ("b", talk)):
        with pytest.raises(ValueError, match="has the word already"):
            together.begin(name, again, again.steps(0, "Hi."))
    stranger = Conversation(tiny_model(), tokenizer, TEXT)
    with pytest.raises(ValueError, match="another InferenceModel"):
        together.begin("c", stranger, stranger.steps(0, "Hi."))


def some_codes(model, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(model.config.codebook_size, (n, model.config.n_codebooks), generator=generator)


def test_who_listens_shares_the_passes_of_those_who_speak_and_writes_what_it_would_alone(tokenizer, monkeypatch):
    inference = InferenceModel(full_model())
    alone, at_once = talks(inference, tokenizer), talks(inference, tokenizer)
    codes = some_codes(inference, 9)
    texts = [talk.listen(1, codes=codes) for talk in alone[:2]]
    reply = alone[2].speak(0, TEXTS[1])
    read, several = [], inference.hidden_of_several
    monkeypatch.setattr(
        inference, "hidden_of_several", lambda rows, caches: read.append(len(rows)) or several(rows, caches)
    )
    together, found = Together(), {}
    for name in range(2):
        together.begin(name, at_once[name], at_once[name].listening(1, codes=codes))
    together.begin(2, at_once[2], at_once[2].steps(0, TEXTS[1]))
    while len(together):
        found |= dict(together.round())
    assert [found[0], found[1]] == texts and found[2] is None and max(read) == 3
    assert torch.equal(at_once[2].turns[-1].codes, reply.codes)
    for one, other in zip(alone[:2], at_once[:2], strict=True):
        assert torch.equal(one.speak(0, "Yes.").codes, other.speak(0, "Yes.").codes)


def test_a_turn_whose_hearing_is_broken_off_was_none(tokenizer):
    inference = InferenceModel(full_model())
    (alone, *_), (talk, *_) = talks(inference, tokenizer), talks(inference, tokenizer)
    for each in (alone, talk):
        each.add_turn(0, "So.", codes=some_codes(inference, 5))
    together = Together()
    together.begin("a", talk, talk.listening(1, codes=some_codes(inference, 9)))
    for _ in range(2):
        assert list(together.round()) == []
    together.stop("a")
    assert len(talk.turns) == 1 and talk.clock == alone.clock
    talk.speaker.generator.set_state(alone.speaker.generator.get_state())  # what was drawn stays drawn
    assert torch.equal(talk.speak(0, TEXTS[1]).codes, alone.speak(0, TEXTS[1]).codes)


@pytest.mark.parametrize("rounds", range(1, 8))
def test_who_answers_may_be_interrupted_at_any_row(tokenizer, rounds):
    inference = InferenceModel(full_model())
    (talk, *_), (again, *_) = talks(inference, tokenizer), talks(inference, tokenizer)
    together = Together()
    together.begin("a", talk, talk.steps(0, None))
    for _ in range(rounds):
        list(together.round())
    together.stop("a")
    again.restore(talk.kept, *talk.standing())
    again.speaker.generator.set_state(talk.speaker.generator.get_state())
    assert torch.equal(talk.speak(1, TEXTS[0]).codes, again.speak(1, TEXTS[0]).codes)
