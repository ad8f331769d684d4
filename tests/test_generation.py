"""Speaking: cached == uncached, streaming == whole, determinism, limits."""

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer, voice

from frames import Turn, concatenate
from generation import Conversation, Sampling, draw
from text_tokenizer import ByteTokenizer, encode_turn

GREEDY = Sampling(temperature=0, max_seconds=1.0)


@pytest.fixture
def talk(model, tokenizer):
    def start(sampling=GREEDY, seed=0, own=model):
        return Conversation(own, tokenizer, ByteTokenizer(), sampling=sampling, seed=seed)

    return start


def uncached_greedy(model, turns: list[Turn], n_frames: int) -> torch.Tensor:
    """The same frames, with the whole sequence read anew for each and the depth decoder for each code."""
    c, layout = model.config, model.config.layout
    spoken = []
    for _ in range(n_frames):
        rows = concatenate(
            [layout.turn_rows(turn) for turn in turns] + [layout.audio_rows(code[None]) for code in spoken]
        )
        hidden = model.hidden(rows.tokens[None], rows.mask[None])[:, -1]
        codes = torch.zeros(1, c.n_codebooks, dtype=torch.int64)
        codes[0, 0] = model.codebook0_head(hidden).argmax()
        if layout.is_end_of_turn(codes[0]):
            break
        for k in range(1, c.n_codebooks):
            codes[0, k] = model.depth_logits(hidden, codes)[0, k - 1, : c.codebook_size].argmax()
        spoken.append(codes[0])
    return torch.stack(spoken)


@pytest.mark.parametrize("seed", range(3))
def test_cached_frames_equal_uncached_ones_over_two_turns(talk, seed):
    model = tiny_model(seed)
    conversation = talk(own=model)
    first = Turn(encode_turn(ByteTokenizer(), 0, "hello you"), torch.randint(0, 16, (5, 4)))
    conversation.add_turn(0, "hello you", codes=first.codes)
    for text in ("and you", "me too"):
        turns = [*conversation.turns, Turn(encode_turn(ByteTokenizer(), 1, text), None)]
        with torch.no_grad():
            expected = uncached_greedy(model, turns, GREEDY.max_frames)
        assert torch.equal(conversation.speak(1, text).codes, expected)


def test_streamed_audio_equals_the_whole_decoded_at_once(talk, tokenizer):
    conversation = talk(Sampling(max_seconds=2.0), seed=1)
    chunks = list(conversation.stream(0, "hello"))
    codes = conversation.turns[-1].codes
    assert len(codes) > 2
    whole = tokenizer.decode(codes[None])[0].numpy()
    np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-5)


def test_the_same_seed_says_the_same_and_another_does_not(talk):
    replies = [talk(Sampling(max_seconds=1.0), seed).speak(0, "hello").codes for seed in (3, 3, 4)]
    assert torch.equal(replies[0], replies[1])
    assert not torch.equal(replies[0], replies[2])


def test_a_reply_knows_its_times(talk):
    reply = talk().speak(0, "hello")
    assert reply.duration == len(reply.codes) * 0.08
    assert 0 < reply.seconds_to_first_audio <= reply.seconds
    assert reply.real_time_factor == pytest.approx(reply.seconds / reply.duration)


def with_end_of_turn_logit(model, change: float):
    """The model with `change` added to the end of turn's logit."""
    one_hot = change * torch.nn.functional.one_hot(torch.tensor(16), 17)
    model.codebook0_head.register_forward_hook(lambda module, inputs, logits: logits + one_hot)
    return model


def test_a_turn_is_cut_at_max_seconds(talk, model):
    reply = talk(Sampling(max_seconds=0.5), own=with_end_of_turn_logit(model, -1e9)).speak(0, "hello")
    assert len(reply.codes) == 6
    assert not reply.ended


def test_an_immediate_end_is_empty_audio_and_a_warning(talk, model):
    conversation = talk(own=with_end_of_turn_logit(model, 1e9))
    with pytest.warns(UserWarning, match="ended the turn 'hello' at once"):
        reply = conversation.speak(0, "hello")
    assert len(reply.samples) == 0
    assert reply.ended
    assert np.isnan(reply.real_time_factor)
    with pytest.warns(UserWarning, match="at once"):  # and the conversation goes on
        conversation.speak(1, "well")
    assert len(conversation.turns) == 2


def test_a_turn_does_not_end_before_min_seconds(talk, model):
    sampling = Sampling(temperature=0, max_seconds=2.0, min_seconds=0.5)
    reply = talk(sampling, own=with_end_of_turn_logit(model, 1e9)).speak(0, "hello")
    assert len(reply.codes) == 7
    assert reply.ended


def test_codes_above_the_codebooks_are_never_drawn(talk):
    model = tiny_model(n_special_codes=3)
    with torch.no_grad():
        model.depth_heads[:, :, 16:] = 3 * model.depth_heads[:, :, :3]  # special codes would often win
        model.codebook0_head.weight[17:] = 3 * model.codebook0_head.weight[:2]
    codes = talk(Sampling(max_seconds=3.0), own=model).speak(0, "hello").codes
    assert codes.max() < 16


def test_a_caller_who_stops_listening_leaves_a_whole_turn(talk, model):
    conversation = talk(Sampling(max_seconds=2.0), seed=1)
    stream = conversation.stream(0, "hello")
    next(stream)
    next(stream)
    stream.close()
    assert len(conversation.turns[-1].codes) == 2
    rows = concatenate([model.config.layout.turn_rows(turn) for turn in conversation.turns])
    assert conversation.cache.length == len(rows.tokens)
    probe = model.config.layout.text_rows([7])
    again = concatenate([rows, probe])
    expected = model.hidden(again.tokens[None], again.mask[None])[0, -1]
    torch.testing.assert_close(conversation._read(probe)[0], expected.detach(), atol=1e-4, rtol=1e-4)


def test_oldest_turns_leave_when_the_context_is_full(talk, model):
    conversation = talk(Sampling(temperature=0, max_seconds=2.0))
    codes = torch.randint(0, 16, (80, 4), generator=torch.Generator().manual_seed(0))
    conversation.add_turn(0, "first", codes=codes)
    conversation.add_turn(1, "second", codes=codes)
    with pytest.warns(UserWarning, match="1 oldest turns left the context of 256 positions"):
        conversation.add_turn(0, "third one", codes=codes)
    kept = list(conversation.turns)
    assert len(kept) == 2
    assert torch.equal(kept[0].codes, codes)
    reply = conversation.speak(1, "go on")
    prompt = Turn(encode_turn(ByteTokenizer(), 1, "go on"), None)
    with torch.no_grad():
        expected = uncached_greedy(model, [*kept, prompt], len(reply.codes))
    assert torch.equal(reply.codes, expected)


def test_a_turn_that_can_never_fit_is_refused(talk):
    with pytest.raises(ValueError, match=r"a turn of 265 rows .* does not fit the model's 256 positions"):
        talk(Sampling(max_seconds=20)).speak(0, "hello you")


def test_sampling_follows_temperature_and_top_k():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    drawn = draw(logits, Sampling(temperature=1.0, top_k=4), generator).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, logits[0].softmax(dim=0), atol=0.02, rtol=0)
    assert set(draw(logits, Sampling(temperature=1.0, top_k=2), generator).tolist()) == {2, 3}
    assert set(draw(logits, Sampling(temperature=0), generator).tolist()) == {3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature=-1 must be 0 or more"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"min_seconds": 11}, "min_seconds=11 must lie between 0 and max_seconds=10"),
        ({"max_seconds": 0}, "max_seconds=0 must be at least one frame"),
    ],
)
def test_impossible_sampling_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


def test_a_tokenizer_the_model_does_not_know_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the tokenizer has codebook_size=16, the model 32"):
        Conversation(tiny_model(codebook_size=32), tokenizer, ByteTokenizer())
    trained_on = tiny_model(audio_tokenizer=tokenizer.fingerprint())
    Conversation(trained_on, tokenizer, ByteTokenizer())
    with pytest.raises(ValueError, match="trained on codes of another tokenizer"):
        Conversation(trained_on, tiny_tokenizer(seed=1), ByteTokenizer())


def test_recorded_turns_are_encoded_by_the_codec(talk, tokenizer):
    conversation = talk()
    samples = voice(0.7, 150, rate=24_000)
    conversation.add_turn(0, "listen", samples=samples)
    expected = tokenizer.encode(torch.from_numpy(samples)[None])[0]
    assert torch.equal(conversation.turns[0].codes, expected)


def test_a_turn_needs_text_and_one_kind_of_audio(talk):
    with pytest.raises(ValueError, match="holds no letter or digit to speak"):
        talk().speak(0, " ... ")
    with pytest.raises(ValueError, match="either samples or codes"):
        talk().add_turn(0, "hello")
