"""Speaking, replying, listening: cached == uncached, chunks == frame by frame, streaming == whole, limits."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import full_model, tiny_model, tiny_tokenizer, voice, voiced_tokenizer

from conversational_memory import MemoryState
from frames import IGNORE, Clock, Rows, Turn, concatenate
from generation import COLDEST, Conversation, Sampling, draw
from text_tokenizer import ByteTokenizer, encode_turn, turn_prompt, turn_text

GREEDY = Sampling(temperature=0, text_temperature=0, max_seconds=1.0)
LASTING = dataclasses.replace(GREEDY, max_seconds=0.9, min_seconds=0.6, max_text_ids=7)  # 8 to 11 frames
TEXT = ByteTokenizer()


@pytest.fixture
def talk(model, tokenizer):
    def start(sampling=GREEDY, seed=0, own=model, acoustic_batch=None):
        return Conversation(own, tokenizer, TEXT, sampling=sampling, seed=seed, acoustic_batch=acoustic_batch)

    return start


def some_codes(n_frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 16, (n_frames, 4), generator=torch.Generator().manual_seed(seed))


def sequence(model, turns: list[Turn], clock: Clock) -> list[Rows]:
    """The rows of a conversation, turn by turn."""
    return [model.config.layout.turn_rows(turn, clock) for turn in turns]


@torch.no_grad()
def uncached_greedy(model, turns: list[Turn], prompt: Turn, sampling: Sampling = GREEDY) -> torch.Tensor:
    """The frames of the turn that `prompt` begins, with the whole sequence read anew for each and each code."""
    c, layout = model.config, model.config.layout
    spoken: list[torch.Tensor] = []
    while len(spoken) < sampling.max_frames:
        clock = Clock()
        parts = sequence(model, turns, clock)
        clock.begin_turn(prompt.gap)
        parts.append(layout.text_rows(prompt.text_ids, prompt.n_prompt, clock))
        parts += [layout.audio_row(torch.stack(spoken[: i + 1]), clock) for i in range(len(spoken))]
        hidden = model.hidden(concatenate(parts).batch())[:, -1]
        codes = torch.zeros(1, c.n_codebooks, dtype=torch.int64)
        may_end = len(spoken) >= sampling.min_frames
        codes[0, 0] = model.codebook0_head(hidden)[:, : c.codebook_size + may_end].argmax()
        if layout.is_end_of_turn(codes[0]):
            break
        for k in range(1, c.n_codebooks):
            codes[0, k] = model.depth_logits(hidden, codes)[0, k - 1, : c.codebook_size].argmax()
        spoken.append(codes[0])
    return torch.stack(spoken) if spoken else torch.empty(0, c.n_codebooks, dtype=torch.int64)


def prompt_of(speaker: int, text: str, gap: float = 0.0) -> Turn:
    return Turn(encode_turn(TEXT, speaker, text), None, len(turn_prompt(TEXT, speaker)), gap=gap)


@torch.no_grad()
def assert_greedy_without_a_cache(model, turns: list[Turn]) -> None:
    """What the last turn holds is what the model holds likeliest at each of its rows, all rows read at once.

    Given ids and a last id that was put there because the text grew too long are left out.
    """
    c, parts = model.config, sequence(model, turns, Clock())
    own = slice(-len(parts[-1].tokens), None)
    states, targets = model.hidden(concatenate(parts).batch())[0, own], parts[-1].targets
    framed = targets[:, -2] != IGNORE
    codes = targets[framed, :-1]
    assert torch.equal(codes, turns[-1].codes)
    logits = model.codebook0_head(states[framed])[:, : c.codebook_size]
    assert torch.equal(logits.argmax(dim=-1), codes[:, 0])
    logits = model.depth_logits(states[framed], codes)[..., : c.codebook_size]
    assert torch.equal(logits.argmax(dim=-1), codes[:, 1:])
    written = targets[:, -1] != IGNORE
    logits = model.text_logits(states[written])
    logits[:, TEXT.bos] = -torch.inf
    free = targets[written, -1] != TEXT.eos
    assert torch.equal(logits.argmax(dim=-1)[free], targets[written, -1][free])


@torch.no_grad()
def assert_cache_holds_the_turns(conversation: Conversation) -> None:
    """The next row gets the state that it gets when the rows of all kept turns are read at once. Reads that row."""
    model, clock = conversation.model, Clock()
    parts = sequence(model, conversation.turns, clock)
    assert conversation.cache.keys.length == sum(len(rows.tokens) for rows in parts)
    assert conversation.clock == clock
    clock.begin_turn(2.0)
    probe = model.config.layout.text_rows([7], 1, clock)
    expected = model.hidden(concatenate([*parts, probe]).batch())[:, -1]
    torch.testing.assert_close(conversation._read(probe), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_cached_frames_equal_uncached_ones_over_two_turns(talk, seed):
    model = tiny_model(seed)
    conversation = talk(own=model)
    conversation.add_turn(0, "hello you", codes=some_codes(5))
    for text in ("and you", "me too"):
        expected = uncached_greedy(model, conversation.turns, prompt_of(1, text))
        assert torch.equal(conversation.speak(1, text).codes, expected)


@pytest.mark.parametrize("acoustic_batch", [1, None])
@pytest.mark.parametrize("delay", [0, 1, 3])
def test_cached_frames_of_the_full_model_equal_uncached_ones_over_several_turns(talk, delay, acoustic_batch):
    """Chunked acoustics are compared with frame by frame ones too, since nothing uncached is chunked."""
    model = full_model(acoustic_delay=delay)
    conversation = talk(LASTING, own=model, acoustic_batch=acoustic_batch)
    conversation.add_turn(0, "hello you", codes=some_codes(5))
    lengths = []
    for speaker, text, gap in ((1, "and you", 0.0), (0, "me too", 0.5), (1, "well", 0.1)):
        prompt = prompt_of(speaker, text, gap * 12.5)
        expected = uncached_greedy(model, conversation.turns, prompt, LASTING)
        assert torch.equal(conversation.speak(speaker, text, gap).codes, expected)
        lengths.append(len(expected))
    assert min(lengths) >= LASTING.min_frames
    assert len({tuple(codes.tolist()) for turn in conversation.turns for codes in turn.codes}) > 5
    assert_cache_holds_the_turns(conversation)


@pytest.mark.parametrize("delay", [2, 3])
@pytest.mark.parametrize("max_seconds", [0.08, 0.4, 0.96])  # 1, 5 and 12 frames: a last batch may be short
def test_frames_in_batches_equal_those_one_by_one(talk, tokenizer, delay, max_seconds):
    sampling = dataclasses.replace(GREEDY, max_seconds=max_seconds, min_seconds=max_seconds / 2)
    model, spoken = full_model(acoustic_delay=delay), []
    for acoustic_batch in range(1, delay + 1):
        conversation = talk(sampling, own=model, acoustic_batch=acoustic_batch)
        chunks = list(conversation.stream(0, "hello"))
        spoken.append(conversation.turns[-1].codes)
        whole = tokenizer.decode(spoken[-1][None])[0].numpy()
        np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-5)
    assert len(spoken[0]) >= sampling.min_frames > 0
    assert all(torch.equal(codes, spoken[0]) for codes in spoken)


@pytest.mark.parametrize(
    ("delay", "expected"), [(0, [1] * 6), (1, [1] * 6), (2, [1, 2, 2]), (3, [1, 2, 3]), (8, [1, 2, 4])]
)
def test_the_first_frame_is_heard_before_the_second_is_drawn_and_batches_grow(talk, tokenizer, delay, expected):
    conversation = talk(LASTING, own=full_model(acoustic_delay=delay))
    first_codes = conversation.speaker.begin_frame
    begun, heard = [], []
    conversation.speaker.begin_frame = lambda *given: begun.append(len(heard)) or first_codes(*given)
    for samples in conversation.stream(0, "hello"):
        heard.append(len(samples))
    assert begun[:2] == [0, 1]
    assert heard[0] == 1920 - tokenizer.decoder_stream(1).delay_samples
    assert [n // 1920 for n in heard[1 : 1 + len(expected)]] == expected


@pytest.mark.parametrize(("delay", "wrong"), [(0, 2), (1, 2), (3, 4), (3, 0), (3, -1)])
def test_a_batch_of_frames_that_the_delay_does_not_allow_is_refused(talk, delay, wrong):
    model = full_model(acoustic_delay=delay)
    with pytest.raises(ValueError, match=f"acoustic_batch={wrong} must lie between 1 and the model's {max(1, delay)}"):
        talk(own=model, acoustic_batch=wrong)


def test_streamed_audio_equals_the_whole_decoded_at_once(talk, tokenizer):
    conversation = talk(Sampling(max_seconds=2.0), seed=1)
    chunks = list(conversation.stream(0, "hello"))
    codes = conversation.turns[-1].codes
    assert len(codes) > 2
    whole = tokenizer.decode(codes[None])[0].numpy()
    np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-5)


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("codebooks", [1, 2, 3])
def test_the_first_codebooks_alone_are_drawn_heard_and_fed_back(talk, tokenizer, codebooks, delay):
    model = full_model(acoustic_delay=delay)
    few = dataclasses.replace(LASTING, codebooks=codebooks)
    conversation = talk(few, own=model)
    conversation.add_turn(0, "hello you", codes=some_codes(5))
    reply = conversation.speak(1, "and you")
    assert reply.codes.shape[1] == codebooks and len(reply.codes) >= LASTING.min_frames
    whole = tokenizer.decode(reply.codes[None])[0].numpy()
    np.testing.assert_allclose(reply.samples, whole, atol=1e-5)
    begun = talk(LASTING, own=model)
    begun.add_turn(0, "hello you", codes=some_codes(5))
    assert torch.equal(reply.codes[0], begun.speak(1, "and you").codes[0, :codebooks])

    turns, clock = conversation.turns, Clock()  # what it holds of the turn is what training would show of it
    rows = concatenate(sequence(model, turns, clock))
    spoken = rows.mask[rows.turns == 1]
    assert spoken[:, :codebooks].any(dim=0).all() and not spoken[:, codebooks:-1].any()
    again = talk(few, own=model)
    for speaker, turn, text in zip((0, 1), turns, ("hello you", "and you"), strict=True):
        again.add_turn(speaker, text, codes=turn.codes)
    continued = [each.speak(0, "fine").codes for each in (conversation, again)]
    assert torch.equal(*continued)


@pytest.mark.parametrize("max_text_ids", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("max_seconds", [0.08, 0.32, 0.4, 1.0])
def test_a_reply_is_what_the_model_holds_likeliest_and_its_rows_are_those_of_training(talk, max_text_ids, max_seconds):
    """Text and audio in chunks of 3 ids and 4 frames, also when the turn is cut before its text is written."""
    model = full_model(seed=2)
    conversation = talk(dataclasses.replace(GREEDY, max_text_ids=max_text_ids, max_seconds=max_seconds), own=model)
    conversation.add_turn(0, "hello you", codes=some_codes(5))
    reply = conversation.reply(1, gap_seconds=0.3)
    turn = conversation.turns[-1]
    assert turn.order == "joint" and turn.gap == pytest.approx(0.3 * 12.5)
    assert turn.text_ids[: turn.n_prompt] == turn_prompt(TEXT, 1)
    assert reply.text == turn_text(TEXT, 1, turn.text_ids)
    assert 1 <= len(turn.text_ids) - turn.n_prompt <= max_text_ids
    assert_greedy_without_a_cache(model, conversation.turns)
    assert_cache_holds_the_turns(conversation)


def test_a_reply_does_not_end_before_its_text(talk):
    """7 ids are written in chunks of 3, before frames 0, 4 and 8."""
    sampling = dataclasses.replace(GREEDY, max_text_ids=7, max_seconds=2.0)
    conversation = talk(sampling, own=with_end_of_turn_logit(full_model(), 1e9))
    reply = conversation.reply(1)
    assert len(conversation.turns[-1].text_ids) == len(turn_prompt(TEXT, 1)) + 7
    assert reply.ended and len(reply.codes) == 8
    assert_cache_holds_the_turns(conversation)


@pytest.mark.parametrize("n_frames", [0, 2, 9])
def test_what_is_heard_is_written_as_the_model_holds_likeliest(talk, n_frames):
    model = full_model(seed=2)
    conversation = talk(LASTING, own=model)
    conversation.add_turn(0, "hello you", codes=some_codes(5))
    for gap in (0.0, 0.8):
        text = conversation.listen(1, codes=some_codes(n_frames, seed=1), gap_seconds=gap)
        turn = conversation.turns[-1]
        assert turn.order == "listen" and turn.gap == pytest.approx(12.5 * gap)
        assert text == turn_text(TEXT, 1, turn.text_ids)
        parts = sequence(model, conversation.turns, Clock())
        own, targets = slice(-len(parts[-1].tokens), None), parts[-1].targets[:, -1]
        with torch.no_grad():
            logits = model.text_logits(model.hidden(concatenate(parts).batch())[0, own])
        logits[:, TEXT.bos] = -torch.inf
        drawn = (targets != IGNORE) & (targets != TEXT.eos)
        assert drawn.sum() >= LASTING.max_text_ids - 1
        assert torch.equal(logits.argmax(dim=-1)[drawn], targets[drawn])
    assert_cache_holds_the_turns(conversation)


def test_speaking_replying_and_listening_may_alternate(talk):
    conversation = talk(LASTING, own=full_model(seed=1))
    conversation.listen(0, codes=some_codes(6))
    conversation.reply(1)
    conversation.add_turn(0, "I see", codes=some_codes(7, seed=1), gap_seconds=1.0)
    conversation.speak(1, "fine")
    conversation.listen(0, codes=some_codes(3, seed=2))
    assert [turn.order for turn in conversation.turns] == ["listen", "joint", "speak", "speak", "listen"]
    assert_cache_holds_the_turns(conversation)


def test_text_is_cut_at_max_text_ids_and_never_holds_a_beginning(talk):
    sampling = Sampling(text_temperature=100, text_top_k=258, max_text_ids=60, max_seconds=0.5)
    model = full_model(max_positions=2048)
    lengths = []
    for seed in range(8):
        conversation = talk(sampling, seed, own=model)
        conversation.listen(0, codes=some_codes(4))
        ids = conversation.turns[-1].text_ids[len(turn_prompt(TEXT, 0)) :]
        assert ids.index(TEXT.eos) == len(ids) - 1
        assert TEXT.bos not in ids
        lengths.append(len(ids))
    assert max(lengths) == 60


@pytest.mark.parametrize("verb", ["reply", "listen"])
def test_a_model_without_a_text_head_only_speaks(talk, verb):
    conversation = talk(own=full_model(text_head=False), sampling=LASTING)
    with pytest.raises(ValueError, match=f"the model cannot {verb}: it was trained with text_head=False"):
        conversation.reply(0) if verb == "reply" else conversation.listen(0, codes=some_codes(3))
    assert not conversation.turns and conversation.cache.keys.length == 0
    conversation.speak(0, "hello")
    assert_cache_holds_the_turns(conversation)


def test_the_same_seed_says_the_same_and_another_does_not(talk):
    replies = [talk(Sampling(max_seconds=1.0), seed).speak(0, "hello").codes for seed in (3, 3, 4)]
    assert torch.equal(replies[0], replies[1])
    assert not torch.equal(replies[0], replies[2])


def test_the_same_seed_replies_with_the_same_words_and_voice(talk):
    sampling = Sampling(max_seconds=1.0, max_text_ids=9)
    replies = [talk(sampling, seed, own=full_model()).reply(0) for seed in (3, 3, 4)]
    assert replies[0].text == replies[1].text != replies[2].text
    assert torch.equal(replies[0].codes, replies[1].codes)


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


def test_the_coldest_temperature_can_be_drawn_with(talk):
    reply = talk(Sampling(temperature=COLDEST, text_temperature=COLDEST, max_seconds=0.5)).speak(0, "hello")
    assert torch.equal(reply.codes, talk(dataclasses.replace(GREEDY, max_seconds=0.5)).speak(0, "hello").codes)


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


@pytest.mark.parametrize(
    ("acoustic_batch", "n_chunks", "n_frames"),
    [(1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 3, 4), (3, 1, 1), (3, 2, 2), (3, 3, 4), (3, 4, 7)],
)
def test_a_caller_who_stops_listening_leaves_a_whole_turn(talk, acoustic_batch, n_chunks, n_frames):
    model = full_model()
    whole = talk(LASTING, own=model).speak(0, "hello").codes
    conversation = talk(LASTING, own=model, acoustic_batch=acoustic_batch)
    stream = conversation.stream(0, "hello")
    for _ in range(n_chunks):
        next(stream)
    stream.close()
    codes = conversation.turns[-1].codes
    assert len(codes) == n_frames
    assert torch.equal(codes, whole[: len(codes)])
    assert_cache_holds_the_turns(conversation)


def test_a_caller_who_stops_listening_to_a_plain_model_leaves_a_whole_turn(talk):
    conversation = talk(Sampling(max_seconds=2.0), seed=1)
    stream = conversation.stream(0, "hello")
    next(stream)
    next(stream)
    stream.close()
    assert len(conversation.turns[-1].codes) == 2
    assert_cache_holds_the_turns(conversation)


@pytest.mark.parametrize(("n_chunks", "n_frames"), [(1, 1), (3, 4), (4, 7)])
def test_a_caller_who_interrupts_a_reply_leaves_a_whole_turn(talk, n_chunks, n_frames):
    conversation = talk(dataclasses.replace(LASTING, max_text_ids=50), own=full_model())
    conversation.add_turn(0, "hello", codes=some_codes(4))
    stream = conversation.stream(1, None)
    for _ in range(n_chunks):
        next(stream)
    stream.close()
    turn = conversation.turns[-1]
    assert len(turn.codes) == n_frames and TEXT.eos not in turn.text_ids
    assert_cache_holds_the_turns(conversation)


@pytest.mark.parametrize("begin", ["stream", "listening"])
def test_a_turn_beside_one_that_is_under_way_is_refused_and_breaks_neither(talk, begin):
    conversation = talk(LASTING, own=full_model())
    first = conversation.stream(0, "hello") if begin == "stream" else conversation.listening(0, codes=some_codes(4))
    next(first)
    others = [
        lambda: conversation.speak(1, "and I?"),
        lambda: conversation.listen(1, codes=some_codes(3)),
        lambda: conversation.add_turn(1, "and I?", codes=some_codes(3)),
    ]
    for other in others:
        with pytest.raises(ValueError, match="under way"):
            other()
    first.close()
    for other in others:
        other()
    assert len(conversation.turns) == 3 + (begin == "stream")
    assert_cache_holds_the_turns(conversation)


def test_an_immediate_end_of_a_delayed_model_is_an_empty_turn(talk):
    conversation = talk(own=with_end_of_turn_logit(full_model(), 1e9))
    for speaker in (0, 1):
        with pytest.warns(UserWarning, match="at once"):
            conversation.speak(speaker, "hello")
    assert [len(turn.codes) for turn in conversation.turns] == [0, 0]
    assert_cache_holds_the_turns(conversation)


def test_oldest_turns_leave_when_the_context_is_full(talk, model):
    conversation = talk(Sampling(temperature=0, max_seconds=2.0))
    codes = some_codes(80)
    conversation.add_turn(0, "first", codes=codes)
    conversation.add_turn(1, "second", codes=codes)
    with pytest.warns(UserWarning, match="1 oldest turns left the context of 256 positions"):
        conversation.add_turn(0, "third one", codes=codes)
    kept = list(conversation.turns)
    assert len(kept) == 2
    assert torch.equal(kept[0].codes, codes)
    expected = uncached_greedy(model, kept, prompt_of(1, "go on"), conversation.sampling)
    assert torch.equal(conversation.speak(1, "go on").codes, expected)


@pytest.mark.filterwarnings("ignore:.*oldest turns left")
def test_a_voice_stays_in_the_window_while_other_turns_leave_it(talk, model):
    conversation = talk(Sampling(temperature=0, max_seconds=2.0))
    conversation.add_turn(0, "an earlier one", codes=some_codes(20, 7))
    conversation.add_turn(1, "my voice", codes=some_codes(20, 8), pinned=True)
    for number in range(12):
        conversation.add_turn(number % 2, "some words", codes=some_codes(40, number))
    kept = list(conversation.turns)
    assert torch.equal(kept[0].codes, some_codes(20, 8)) and torch.equal(kept[-1].codes, some_codes(40, 11))
    assert 2 < len(kept) < 6 and list(conversation.voices) == [1]
    expected = uncached_greedy(model, kept, prompt_of(1, "go on"), conversation.sampling)
    assert torch.equal(conversation.speak(1, "go on").codes, expected)


@pytest.mark.filterwarnings("ignore:.*oldest turns left")
@pytest.mark.parametrize("make", [tiny_model, full_model])
def test_a_speaker_has_one_voice_the_newest(talk, make):
    conversation = talk(own=make())
    for number in range(8):
        conversation.add_turn(0, "a voice", codes=some_codes(150, number), pinned=True)
        conversation.add_turn(1, "some words", codes=some_codes(20))
    assert torch.equal(conversation.voices[0].codes, some_codes(150, 7))
    assert sum(kept.voice_of is not None for kept in conversation.kept) == 1


def test_a_turn_that_does_not_fit_beside_the_voices_is_refused_and_leaves_them(talk):
    conversation = talk(LASTING)
    conversation.add_turn(0, "a voice", codes=some_codes(100), pinned=True)
    conversation.add_turn(1, "well", codes=some_codes(3))
    length = conversation.layout.turn_length(len(conversation.turns[0].text_ids), 100)
    with pytest.raises(ValueError, match=f"not fit the model's 256 positions beside {length} rows of voices; shorten"):
        conversation.add_turn(1, "a long one", codes=some_codes(150))
    assert [len(turn.codes) for turn in conversation.turns] == [100, 3]
    assert_cache_holds_the_turns(conversation)


@pytest.mark.filterwarnings("ignore:.*oldest turns left")
@pytest.mark.parametrize("pinned", [False, True])
def test_a_full_window_is_read_anew_once_in_several_turns(talk, pinned):
    conversation = talk(LASTING, own=full_model(max_positions=512))
    conversation.add_turn(0, "a voice", codes=some_codes(60), pinned=pinned)
    restore, reread, most = conversation.restore, [], 0
    conversation.restore = lambda *given: reread.append(len(conversation.kept)) or restore(*given)
    for number in range(40):
        conversation.add_turn(number % 2, "some words", codes=some_codes(25, number), gap_seconds=0.3)
        most = max(most, conversation.clock.position)
    assert 3 <= len(reread) <= 8
    assert most > 512 - 45  # nothing leaves before the window is full


@pytest.mark.filterwarnings("ignore:.*oldest turns left")
def test_the_newest_turn_leaves_for_lack_of_room_only(talk):
    conversation = talk()
    conversation.add_turn(0, "a short one", codes=some_codes(30))
    conversation.add_turn(1, "a long one", codes=some_codes(140))
    conversation.add_turn(0, "the next", codes=some_codes(60))
    assert [len(turn.codes) for turn in conversation.turns] == [140, 60]


def same_memory(one: MemoryState, other: MemoryState) -> bool:
    pairs = zip((*one.matrices, one.seconds), (*other.matrices, other.seconds), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_memory_stays_as_it_was_when_turns_leave_the_context(talk):
    """It is the one of a model of the same weights with a window that holds everything, until turns are heard anew."""
    small, large = talk(own=full_model()), talk(own=full_model(max_positions=2048))
    for conversation in (small, large):
        for number in range(2):
            conversation.add_turn(number, "some words", codes=some_codes(80, number), gap_seconds=0.4)
    before = small.cache.memory.state
    assert all(matrix.abs().max() > 1e-3 for matrix in before.matrices)
    with pytest.warns(UserWarning, match="1 oldest turns left"):
        small.add_turn(0, "third one", codes=some_codes(80, 2), gap_seconds=0.4)
    large.add_turn(0, "third one", codes=some_codes(80, 2), gap_seconds=0.4)
    assert same_memory(small.kept[-1].memory, before)
    assert same_memory(small.kept[0].memory, large.kept[1].memory)
    assert not same_memory(small.cache.memory.state, before)
    assert small.clock == dataclasses.replace(large.clock, position=small.clock.position)
    assert small.cache.keys.length == small.clock.position < large.clock.position


def test_a_turn_after_all_others_left_the_context_is_read_as_in_training(talk):
    """As a new document of the same conversation, with positions from 0."""
    model = full_model()
    conversation = talk(own=model)
    for number, n_frames in enumerate((80, 70)):
        conversation.add_turn(number, "some words", codes=some_codes(n_frames, number), gap_seconds=0.4)
    turns = list(conversation.turns)
    with pytest.warns(UserWarning, match="2 oldest turns left"):
        conversation.add_turn(0, "a long one", codes=some_codes(200, 3), gap_seconds=0.4)
    assert len(conversation.turns) == 1
    clock = Clock()
    parts = sequence(model, turns, clock)
    clock.position = 0
    parts += sequence(model, conversation.turns, clock)
    assert conversation.clock == clock
    clock.begin_turn()
    parts.append(model.config.layout.text_rows([7], 1, clock))
    rows = concatenate(parts).batch()
    rows.documents[rows.turns >= 2] = 1
    with torch.no_grad():
        expected = full_model(max_positions=1024).hidden(rows, rows.allowed())[:, -1]
        found = conversation._read(parts[-1])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_turns_read_anew_see_the_memory_as_it_was_before_them(talk):
    """The second turn leaves the same keys and values whether the first left the context before it or after it."""
    caches = []
    for forget_first in (True, False):
        conversation = talk(own=full_model())
        conversation.add_turn(0, "some words", codes=some_codes(20), gap_seconds=0.4)
        if forget_first:
            conversation.restore(conversation.kept[1:], *conversation.standing())
        conversation.add_turn(1, "other words", codes=some_codes(30, 1), gap_seconds=0.4)
        if not forget_first:
            conversation.restore(conversation.kept[1:], *conversation.standing())
        assert len(conversation.turns) == 1
        caches.append(conversation.cache.keys)
    n = caches[0].length
    assert n == caches[1].length > 30
    torch.testing.assert_close(caches[0].keys[..., :n, :], caches[1].keys[..., :n, :], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(caches[0].values[..., :n, :], caches[1].values[..., :n, :], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [full_model, tiny_model])
def test_a_turn_that_left_the_context_is_remembered_by_a_memory_only(talk, make):
    states = []
    for text in ("yes", "no way"):
        conversation = talk(own=make())
        conversation.add_turn(0, text, codes=some_codes(80, len(text)))
        with pytest.warns(UserWarning, match="1 oldest turns left"):
            conversation.add_turn(1, "a long one", codes=some_codes(200))
        clock = Clock(position=conversation.clock.position, turn=1, now=conversation.clock.now)
        clock.begin_turn()
        states.append(conversation._read(make().config.layout.text_rows([7], 1, clock)))
    difference = float((states[0] - states[1]).abs().max())
    assert difference > 1e-3 if make is full_model else difference == 0


@pytest.mark.filterwarnings("ignore:.*oldest turns left")
def test_a_full_conversation_goes_on_for_two_hundred_turns(talk):
    conversation = talk(dataclasses.replace(LASTING, min_seconds=0.3), own=full_model(max_positions=128))
    for number in range(100):
        conversation.listen(0, codes=some_codes(20, number), gap_seconds=0.3)
        reply = conversation.reply(1)
        assert 4 <= len(reply.codes) <= LASTING.max_frames
        lengths = [conversation.layout.turn_length(len(t.text_ids), len(t.codes)) for t in conversation.turns]
        assert conversation.cache.keys.length == conversation.clock.position == sum(lengths) <= 128
    assert conversation.clock.turn == 199
    assert 0 < len(conversation.turns) < 12
    assert float(conversation.cache.memory.state.seconds) == pytest.approx(conversation.clock.now / 12.5, abs=0.01)


@pytest.mark.parametrize("make", [full_model, tiny_model])
def test_codes_that_cannot_be_are_refused_and_leave_the_conversation_as_it_was(talk, make):
    conversation = talk(LASTING, own=make())
    conversation.add_turn(0, "hello", codes=some_codes(5))
    for codes in (torch.full((3, 4), 16), torch.zeros(3, 5, dtype=torch.int64)):
        with pytest.raises(ValueError, match="codes must"):
            conversation.add_turn(1, "and you", codes=codes, gap_seconds=1.0)
    assert len(conversation.turns) == 1
    assert_cache_holds_the_turns(conversation)


def test_a_turn_that_can_never_fit_is_refused(talk):
    with pytest.raises(ValueError, match=r"a turn of 265 rows .* does not fit the model's 256 positions"):
        talk(Sampling(max_seconds=20)).speak(0, "hello you")


def test_sampling_follows_temperature_and_top_k():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    drawn = draw(logits, 1.0, 4, generator).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, logits[0].softmax(dim=0), atol=0.02, rtol=0)
    assert set(draw(logits, 1.0, 2, generator).tolist()) == {2, 3}
    assert set(draw(logits, 0, 50, generator).tolist()) == {3}


def test_min_p_leaves_out_what_is_less_likely_than_a_share_of_the_likeliest():
    logits = torch.tensor([[0.5, 0.4, 0.04, 0.06]]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(draw(logits, 1.0, 4, generator).tolist()) == {0, 1, 2, 3}
    drawn = draw(logits, 1.0, 4, generator, min_p=0.1).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, torch.tensor([0.5, 0.4, 0.0, 0.06]) / 0.96, atol=0.02, rtol=0)
    assert set(draw(logits, 1.0, 4, generator, min_p=1.0).tolist()) == {0}


@pytest.mark.parametrize("make", [tiny_model, full_model])
def test_a_turn_whose_reading_is_broken_off_was_none(talk, make, monkeypatch):
    ours, theirs = talk(LASTING, own=make()), talk(LASTING, own=make())
    for conversation in (ours, theirs):
        conversation.add_turn(0, "Hello.", codes=some_codes(6))
    end_rows = ours.model.hidden

    def interrupted(*args, **kwargs):
        end_rows(*args, **kwargs)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(ours.model, "hidden", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ours.add_turn(1, "Good morning.", codes=some_codes(9))
    assert len(ours.turns) == 1
    for conversation in (ours, theirs):
        conversation.add_turn(1, "Good evening.", codes=some_codes(4))
    assert torch.equal(ours.speak(0, "Hello.").codes, theirs.speak(0, "Hello.").codes)


def interrupt(conversation, after: int, monkeypatch) -> None:
    """The next pass but `after` of its backbone is done, and then there is no next one: as Ctrl-C would have it."""
    read, left = conversation._states, [after]

    def interrupted(*args):
        states = read(*args)
        left[0] -= 1
        if left[0] < 0:
            monkeypatch.undo()
            raise KeyboardInterrupt
        return states

    monkeypatch.setattr(conversation, "_states", interrupted)


@pytest.mark.parametrize("after", [0, 1, 4, 7])
@pytest.mark.parametrize("verb", ["speak", "reply", "listen"])
def test_a_turn_that_is_broken_off_within_a_pass_was_none(talk, verb, after, monkeypatch):
    greedy = dataclasses.replace(GREEDY, max_text_ids=30, min_seconds=1.0)
    ours, theirs = talk(greedy, own=full_model()), talk(greedy, own=full_model())
    for conversation in (ours, theirs):
        conversation.add_turn(0, "Hello.", codes=some_codes(6))
    take = {
        "speak": lambda: ours.speak(1, "Good morning."),
        "reply": lambda: ours.reply(1),
        "listen": lambda: ours.listen(1, codes=some_codes(9)),
    }
    interrupt(ours, after, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        take[verb]()
    assert len(ours.turns) == 1 and not ours.under_way
    assert torch.equal(ours.reply(1).codes, theirs.reply(1).codes)
    assert torch.equal(ours.speak(0, "Hello.").codes, theirs.speak(0, "Hello.").codes)
    assert_cache_holds_the_turns(ours)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_window_whose_reading_anew_is_broken_off_loses_no_turn(talk, after, monkeypatch):
    ours, theirs = talk(own=full_model()), talk(own=full_model())
    for number in range(5):
        for conversation in (ours, theirs):
            conversation.add_turn(number % 2, f"Turn {number}.", codes=some_codes(30, number))
    interrupt(ours, after, monkeypatch)
    with pytest.warns(UserWarning, match="left the context"), pytest.raises(KeyboardInterrupt):
        ours.add_turn(1, "One more.", codes=some_codes(60))
    with pytest.warns(UserWarning, match="left the context"):
        theirs.add_turn(1, "One more.", codes=some_codes(60))
    kept = [turn.codes for turn in theirs.turns[:-1]]
    assert len(kept) > 1 and all(map(torch.equal, [turn.codes for turn in ours.turns], kept))
    ours.add_turn(1, "One more.", codes=some_codes(60))
    assert len(ours.turns) == len(theirs.turns) and ours.clock == theirs.clock
    assert torch.equal(ours.speak(0, "Hello.").codes, theirs.speak(0, "Hello.").codes)


@pytest.mark.parametrize("make", [tiny_model, full_model])
def test_weights_in_bf16_speak_too(talk, make):
    conversation = talk(LASTING, own=make().bfloat16())
    conversation.add_turn(1, "Hello.", codes=some_codes(6))
    assert len(conversation.speak(0, "Hello.").codes) >= LASTING.min_frames
    if conversation.model.config.text_head:
        assert len(conversation.reply(1).codes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature=-1 must be 0, for the likeliest, or 0.001 or more"),
        ({"text_temperature": -1}, "text_temperature=-1 must be 0, for the likeliest, or 0.001 or more"),
        ({"temperature": 1e-38}, "temperature=1e-38 must be 0"),
        ({"max_seconds": math.inf}, "max_seconds=inf must be finite"),
        ({"max_seconds": math.nan}, "max_seconds=nan must be finite"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"text_top_k": 0}, "text_top_k=0 must be at least 1"),
        ({"max_text_ids": 0}, "max_text_ids=0 must be at least 1"),
        ({"codebooks": 0}, "codebooks=0 must be at least 1"),
        ({"min_p": 1.5}, "min_p=1.5 must lie between 0 and 1"),
        ({"min_seconds": 11}, "min_seconds=11 must lie between 0 and max_seconds=10"),
        ({"max_seconds": 0}, "max_seconds=0 must be finite and at least a frame"),
    ],
)
def test_impossible_sampling_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


def test_more_codebooks_than_the_model_has_are_refused(talk):
    with pytest.raises(ValueError, match="codebooks=5 must be at most the model's 4"):
        talk(Sampling(codebooks=5))


def test_a_tokenizer_the_model_does_not_know_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the tokenizer has codebook_size=16, the model 32"):
        Conversation(tiny_model(codebook_size=32), tokenizer, TEXT)
    trained_on = tiny_model(audio_tokenizer=tokenizer.fingerprint())
    Conversation(trained_on, tokenizer, TEXT)
    with pytest.raises(ValueError, match="trained on codes of another tokenizer"):
        Conversation(trained_on, tiny_tokenizer(seed=1), TEXT)


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


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_damaged_weights_are_told_and_the_turn_was_none(tokenizer, temperature):
    model = full_model()
    talk = Conversation(model, tokenizer, ByteTokenizer(), sampling=Sampling(temperature=temperature, max_seconds=0.8))
    talk.speak(0, "Hello.")
    with torch.no_grad():
        whole = model.codebook0_head.weight.clone()
        model.codebook0_head.weight[3].fill_(torch.nan)
    with pytest.raises(ValueError, match="the model's logits are no numbers"):
        talk.speak(1, "And you?")
    assert len(talk.turns) == 1
    with torch.no_grad():
        model.codebook0_head.weight.copy_(whole)
    assert len(talk.speak(1, "And you?").codes) and len(talk.turns) == 2


def test_a_reply_of_semantic_codes_sounds_as_the_clip_of_its_speaker_tells():
    model, tokenizer = full_model(seed=3), voiced_tokenizer()
    sampling = dataclasses.replace(LASTING, codebooks=2)
    clips = [some_codes(9, seed) for seed in (1, 2, 3)]
    talk = Conversation(model, tokenizer, TEXT, sampling=sampling)
    assert talk.shown_voice(0) is None
    reply = talk.speak(0, "one two")  # nothing is known of the voice
    assert torch.allclose(torch.from_numpy(reply.samples), tokenizer.decode(reply.codes[None])[0], atol=1e-5)
    talk.add_turn(1, "another", codes=clips[0])
    assert talk.shown_voice(0) is None  # what it said itself has no acoustic codes
    talk.add_turn(0, "three", codes=clips[1])
    talk.add_turn(0, "four", codes=clips[2])
    assert torch.equal(talk.shown_voice(0), tokenizer.voice_of(clips[1]))  # the oldest: what it says later may drift
    reply = talk.speak(0, "five")
    told = tokenizer.decode(reply.codes[None], tokenizer.voice_of(clips[1]))[0]
    assert torch.allclose(torch.from_numpy(reply.samples), told, atol=1e-5)
    assert not torch.allclose(told, tokenizer.decode(reply.codes[None])[0], atol=1e-3)
    talk.add_turn(0, "six", codes=clips[2], pinned=True)
    assert torch.equal(talk.shown_voice(0), tokenizer.voice_of(clips[2]))
    every = Conversation(model, tokenizer, TEXT, sampling=dataclasses.replace(sampling, codebooks=None))
    every.add_turn(0, "three", codes=clips[1], pinned=True)
    assert every.shown_voice(0) is None  # its own acoustic codes have the voice
