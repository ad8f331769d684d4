"""The codes that a speech model guesses of recorded turns."""

import dataclasses

import pytest
import torch
from conftest import full_config, full_model, tiny_tokenizer

import spoken_codes
from dataset_pipeline import as_read_by
from frames import Turn
from generation import Conversation, Sampling
from inference_model import InferenceModel
from spoken_codes import guess_codes, guessed_turns, likeliest
from text_tokenizer import ByteTokenizer, encode_turn, prompt_length

S, K = 2, 4  # codebooks of `full_model`, semantic and all
TEXT = "two of three"


def rows_of(model, codes, text=TEXT):
    """One turn as the model reads it in training."""
    texts = ByteTokenizer()
    ids = encode_turn(texts, 0, text)
    return model.config.layout.turn_rows(Turn(ids, codes, prompt_length(texts, 0, ids))).batch()


def some_codes(n_frames: int, seed: int = 0, n_codebooks: int = K) -> torch.Tensor:
    return torch.randint(16, (n_frames, n_codebooks), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("compiled", [False, None])
def test_a_turn_the_model_spoke_itself_is_guessed_as_it_was_spoken(compiled):
    model = full_model(seed=3)
    inference = InferenceModel(model, compiled=compiled)
    sampling = Sampling(temperature=0, codebooks=S, max_seconds=1.0)
    talk = Conversation(inference, tiny_tokenizer(), ByteTokenizer(), sampling=sampling)
    said = talk.speak(0, TEXT).codes
    assert len(said) >= 4 and said.size(1) == S and len(said.unique(dim=0)) >= 4
    guess = guess_codes(inference, rows_of(model, said), S)
    assert torch.equal(guess, said)


def test_guesses_are_the_likeliest_after_the_true_first_code_and_guesses_of_what_came_before():
    model = full_model(seed=1)
    codes = some_codes(6)
    rows, inference = rows_of(model, codes), InferenceModel(model, compiled=False)
    before = (rows.targets[0, :, S - 1] >= 0).nonzero().squeeze(1)
    seen = rows._replace(tokens=rows.tokens.clone(), mask=rows.mask.clone())
    seen.mask[..., S:K] = False
    with torch.inference_mode():
        for _ in range(2):
            states = model.hidden(seen)[0, before]
            logits = model.depth_logits(states, codes[:, :S])[:, 0, :16]  # of codebook 1, after the true codebook 0
            seen.tokens[0, before + 1, 1] = likeliest(logits)
    expected = seen.tokens[0, before + 1, :S]
    guess = guess_codes(inference, rows, S)
    assert torch.equal(guess, expected) and not torch.equal(guess[:, 1], codes[:, 1])
    assert torch.equal(rows.tokens, rows_of(model, codes).tokens)  # what was given stays as it was


def test_guesses_know_neither_acoustic_codes_nor_what_comes_later():
    model = full_model(seed=2)
    inference, codes = InferenceModel(model, compiled=False), some_codes(8)
    guess = guess_codes(inference, rows_of(model, codes), S)
    other = codes.clone()
    other[:, S:] = some_codes(8, seed=1)[:, S:]
    assert torch.equal(guess_codes(inference, rows_of(model, other), S), guess)
    other = torch.cat((codes[:5], some_codes(3, seed=2)))
    assert torch.equal(guess_codes(inference, rows_of(model, other), S)[:5], guess[:5])


def test_every_turn_of_a_split_is_guessed_with_the_turns_before_it(shared_data, monkeypatch):
    tokenizer = tiny_tokenizer()
    model = full_model(seed=4)
    dataset = as_read_by(model.config, shared_data, "val", tokenizer)
    inference = InferenceModel(model, compiled=False)
    found = guessed_turns(inference, dataset)
    turns = [turn for conversation in dataset.conversations for turn in conversation.turns]
    assert found.keys() == {turn.utt_id for turn in turns}
    assert {utt_id: len(codes) for utt_id, codes in found.items()} == {
        turn.utt_id: len(dataset.cache.codes[turn.utt_id]) for turn in turns
    }
    first = dataset.conversations[0].turns[0]
    alone = rows_of(model, torch.from_numpy(dataset.cache.codes[first.utt_id].astype("int64")), first.text)
    assert (found[first.utt_id] == guess_codes(inference, alone, S).numpy()).all()

    # a window that holds two turns: each is guessed once, after what fits before it
    small = dataclasses.replace(full_config(), max_positions=max(map(max, dataset.lengths)) + 40)
    cut = as_read_by(small, shared_data, "val", tokenizer)
    assert len(cut.samples()) > len(cut)
    again = guessed_turns(inference, cut)
    assert {utt_id: codes.shape for utt_id, codes in again.items()} == {u: c.shape for u, c in found.items()}
    assert (again[first.utt_id] == found[first.utt_id]).all()
    monkeypatch.setattr(spoken_codes, "PASSES", 1)
    assert any((guessed_turns(inference, dataset)[u] != codes).any() for u, codes in found.items())
