"""The folded loop over codebooks against the depth decoder as it is trained."""

import pytest
import torch
from conftest import full_model, tiny_model

from architecture import CSMCache
from frames import Rows, Turn
from generation import Conversation, Sampling
from inference_model import DepthLoop, InferenceModel, NativeDepthLoop
from native_stack import compilers
from text_tokenizer import ByteTokenizer


def model_with_norms():
    model = full_model(n_codebooks=6, n_semantic=3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # scales of 1 would hide where they are folded
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


LOOPS = [DepthLoop, pytest.param(NativeDepthLoop, marks=pytest.mark.skipif(not compilers(), reason="no C++ compiler"))]


@pytest.mark.parametrize("make_loop", LOOPS)
@pytest.mark.parametrize(("n", "k", "stop"), [(1, 1, 6), (1, 1, 3), (4, 3, 6), (2, 5, 6), (3, 1, 2)])
def test_every_code_is_drawn_from_the_logits_of_the_trained_decoder(n, k, stop, make_loop):
    model, seen = model_with_norms(), []
    random = torch.Generator().manual_seed(2)
    hidden = torch.randn(n, model.config.backbone.d_model, generator=random)
    given = torch.randint(0, model.config.codebook_size, (n, k), generator=random)

    def choose(logits):
        seen.append(logits)
        return logits.argmax(dim=1)

    with torch.inference_mode():
        codes = make_loop(model).continue_frames(hidden, given, stop, choose)
        expected = model.depth_logits(hidden, codes)[:, k - 1 :, : model.config.codebook_size]
    assert codes.shape == (n, stop) and torch.equal(codes[:, :k], given)
    torch.testing.assert_close(torch.stack(seen, dim=1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make_loop", LOOPS)
def test_the_blocks_are_those_of_the_moment_it_was_made(make_loop):
    model = model_with_norms()
    hidden, given = torch.ones(1, model.config.backbone.d_model), torch.tensor([[1]])
    logits, loop = [], make_loop(model)
    for make in (lambda: loop, lambda: loop, lambda: make_loop(model)):
        with torch.inference_mode():
            make().continue_frames(hidden, given, 2, lambda x: logits.append(x) or x.argmax(dim=1))
        with torch.no_grad():
            model.depth.blocks[0].attention.v_proj.weight.mul_(2)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("compiled", [False, None])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("make", [tiny_model, full_model])
def test_rows_of_several_conversations_are_read_as_each_alone(make, int8, compiled):
    """Different lengths, turns and times; several steps, so that what one pass leaves behind serves the next."""
    model = make()
    inference, random = InferenceModel(model, int8, compiled), torch.Generator().manual_seed(3)
    given = [
        model.config.layout.turn_rows(Turn(list(range(n)), torch.randint(0, 16, (n, 4), generator=random))).batch()
        for n in (5, 9, 14)
    ]
    with torch.inference_mode():
        alone, together = ([CSMCache(model) for _ in given] for _ in range(2))
        for caches in (alone, together):
            for rows, cache in zip(given, caches, strict=True):
                inference.hidden(Rows(*(column[:, :-4] for column in rows)), cache)
        for place in range(-4, 0):
            end = place + 1 or None
            each = [Rows(*(column[:, place:end] for column in rows)) for rows in given]
            expected = torch.cat([inference.hidden(row, cache) for row, cache in zip(each, alone, strict=True)])
            found = inference.hidden_of_several(each, together)
            assert found.shape == (3, 1, model.config.backbone.d_model)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert [cache.keys.length for cache in together] == [cache.keys.length for cache in alone]
    assert len({cache.keys.length for cache in alone}) == 3


@pytest.mark.parametrize("compiled", [False, None])
def test_with_8_bits_it_speaks_nearly_as_the_model_does(tokenizer, compiled):
    model = full_model()
    rows = model.config.layout.turn_rows(Turn(list(range(20)), torch.randint(0, 16, (9, 4)))).batch()
    inference = InferenceModel(model, int8=True, compiled=compiled)
    with torch.inference_mode():
        exact = model.hidden(rows, cache=CSMCache(model))
        cache = CSMCache(model)
        first, last = (Rows(*(column[:, part] for column in rows)) for part in (slice(0, 25), slice(25, None)))
        found = torch.cat((inference.hidden(first, cache), inference.hidden(last, cache)), dim=1)
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < 0.05
    talk = Conversation(inference, tokenizer, ByteTokenizer(), sampling=Sampling(max_seconds=0.8))
    assert len(talk.speak(0, "Hello.").codes) and len(talk.reply(1).codes)


def test_conversations_share_one_and_say_what_they_would_alone(tokenizer):
    model = full_model()
    shared, short = InferenceModel(model), Sampling(max_seconds=0.8)
    together = [Conversation(shared, tokenizer, ByteTokenizer(), sampling=short, seed=seed) for seed in (0, 1)]
    alone = [Conversation(model, tokenizer, ByteTokenizer(), sampling=short, seed=seed) for seed in (0, 1)]
    for text in ("Hello.", "And you?"):
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one.speak(0, text).codes, other.speak(0, text).codes)
    assert together[0].speaker.inference is together[1].speaker.inference is shared
