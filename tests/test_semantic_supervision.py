"""Heads of the semantic codebooks: batches, reversal, disguises, and that characters are learnt from latents."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import voice

from audio import FRAME_SAMPLES, SAMPLE_RATE
from codec_batches import NO_PHONE, SPREAD, SemanticBatch, Utterances, draw_prefixes
from residual_quantizer import scale_gradient
from semantic_supervision import SemanticHeads, disagreement

NUMBERS = ("nought", "one", "two", "three", "four", "five")


def clips(n: int = 6) -> list[tuple[str, str, np.ndarray]]:
    return [
        (f"s{i % 2}", f"Hello number {NUMBERS[i]}!", voice(1.5 + 0.1 * i, 100 + 10 * i, SAMPLE_RATE)) for i in range(n)
    ]


def test_texts_become_the_letters_that_occur():
    utterances = Utterances([("s", "Čau, it's - o'clock!", voice(3.0, 100, SAMPLE_RATE))])
    letters = "".join(utterances.alphabet[i - 1] for i in utterances.items[0].characters)
    assert letters == "čau it's  o'clock"


def test_utterances_that_ctc_cannot_align_or_that_are_too_long_are_left_out():
    fits = ("s", "a b c", voice(1.0, 100, SAMPLE_RATE))
    hasty = ("s", "far too many words for the time", voice(0.4, 100, SAMPLE_RATE))
    long = ("s", "slow", voice(7.0, 100, SAMPLE_RATE))
    wordless = ("s", "...", voice(1.0, 100, SAMPLE_RATE))
    unspoken = ("s", "a 5 c", voice(1.0, 100, SAMPLE_RATE))  # how is it read?
    assert len(Utterances([fits, hasty, long, wordless, unspoken]).items) == 1


def test_a_batch_is_a_function_of_seed_and_step():
    one, again, other = (Utterances(clips()).batch(0, step, 4) for step in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert one.wave.shape != other.wave.shape or not torch.equal(one.wave, other.wave)


def test_every_text_of_a_batch_has_time_to_be_aligned():
    utterances = Utterances(clips())
    for step in range(20):
        batch = utterances.batch(0, step, 8)
        assert batch.wave.shape == (8, int(batch.n_frames.max()) * FRAME_SAMPLES)
        assert batch.wave.abs().max() <= 1
        assert (SPREAD * batch.n_frames >= batch.n_characters).all()
        assert len(batch.characters) == batch.n_characters.sum()


def test_some_frames_are_silent_and_speeds_differ():
    utterances = Utterances([("s", "a b", np.full(2 * SAMPLE_RATE, 0.5, dtype=np.float32))])
    batches = [utterances.batch(0, step, 1) for step in range(60)]
    silent = np.mean([(batch.wave[0, : int(batch.n_frames) * 1900] == 0).float().mean() for batch in batches])
    assert 0.1 < silent < 0.25
    assert len({int(batch.n_frames) for batch in batches}) > 5


def test_prefixes_reach_from_one_codebook_to_all():
    prefixes = torch.cat([draw_prefixes(0, step, 8, 10) for step in range(300)])
    assert set(prefixes.tolist()) == set(range(1, 11))
    share = prefixes.bincount(minlength=11) / len(prefixes)
    assert share[10] == pytest.approx(0.4 + 0.6 * math.log(11 / 10) / math.log(11), abs=0.04)
    assert share[1] == pytest.approx(0.6 * math.log(2) / math.log(11), abs=0.04)


@pytest.mark.parametrize("scale", [0.1, -0.5])
def test_a_gradient_is_scaled_and_the_value_is_not(scale):
    x = torch.randn(5, requires_grad=True)
    y = scale_gradient(x, scale)
    assert torch.equal(x, y)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((5,), scale))


def spoken_letters(n: int, generator: torch.Generator) -> tuple[torch.Tensor, SemanticBatch]:
    """Latents that tell the text: 3 frames of one of 4 vectors for every letter; and the speaker, by an offset."""
    letters = torch.randint(0, 4, (n, 5), generator=generator)
    speakers = torch.randint(0, 2, (n,), generator=generator)
    latents = torch.eye(8)[letters].repeat_interleave(3, dim=1)  # (B, T, D)
    latents[..., 7] += speakers[:, None]
    frames, characters = torch.full((n,), 15), torch.full((n,), 5)
    wave = torch.zeros(n, 15 * FRAME_SAMPLES)
    phones = letters.repeat_interleave(3 * SPREAD, dim=1)
    phones[:, ::2] = NO_PHONE
    told = (speakers, torch.zeros(n, 15, 0), phones)
    return latents, SemanticBatch(wave, frames, (letters + 1).flatten(), characters, *told)


def batch_of(batch: SemanticBatch, i: int) -> SemanticBatch:
    """One utterance of it."""
    parts = {name: getattr(batch, name)[i : i + 1] for name in batch._fields if name != "characters"}
    return SemanticBatch(characters=batch.characters.view(-1, 5)[i], **parts)


def test_characters_and_speakers_are_learnt_from_latents_that_tell_them():
    torch.manual_seed(0)
    heads = SemanticHeads(8, n_characters=4, n_speakers=2, width=32)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        nats, speaker, *_ = heads(*spoken_letters(16, generator))
        optimizer.zero_grad()
        (nats + speaker).backward()
        optimizer.step()
    assert nats < 0.2
    assert speaker < 0.1


def test_the_speaker_is_taken_out_of_the_latents_and_the_head_goes_on_looking():
    """The head learns from the latents and the latents from the head, never the same term both; no run-away."""
    torch.manual_seed(0)
    heads = SemanticHeads(8, 4, 2, width=32)
    latents, batch = spoken_letters(8, torch.Generator().manual_seed(1))
    latents.requires_grad_()
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        heads(latents, batch).speaker.backward()
        optimizer.step()
    assert latents.grad is None
    sure = heads(latents, batch)
    assert sure.speaker < 0.1 and sure.confusion > 0.5
    heads.zero_grad()
    sure.confusion.backward()
    assert all(p.grad is None for p in heads.parameters()) and latents.grad.abs().sum() > 0
    mover = torch.optim.Adam([latents], lr=0.05)
    for _ in range(100):
        mover.zero_grad()
        confusion = heads(latents, batch).confusion
        confusion.backward()
        mover.step()
    assert 0 <= confusion < 0.05 and latents.abs().max() < 10


def test_padding_frames_do_not_count():
    heads = SemanticHeads(8, 4, 2, width=32).eval()
    latents, batch = spoken_letters(2, torch.Generator().manual_seed(0))
    nats = heads(latents, batch)
    padded = torch.cat((latents, 5 * torch.ones(2, 4, 8)), dim=1)
    longer = batch._replace(phones=F.pad(batch.phones, (0, 4 * SPREAD), value=NO_PHONE))
    torch.testing.assert_close(tuple(heads(padded, longer)), tuple(nats))


def test_phones_are_learnt_from_latents_that_tell_them_and_only_where_they_are_known():
    torch.manual_seed(0)
    heads = SemanticHeads(8, 4, 2, n_phones=4, width=32)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=3e-2)
    generator = torch.Generator().manual_seed(0)
    first = None
    for _ in range(150):
        latents, batch = spoken_letters(16, generator)
        phones = heads(latents, batch).phones
        first = first or phones.item()
        optimizer.zero_grad()
        phones.backward()
        optimizer.step()
    assert first > 1 and phones < 0.1
    assert heads(latents, batch._replace(phones=(batch.phones + 1) % 4)).phones > 2  # another phone is not what is told
    nothing = batch._replace(phones=torch.full_like(batch.phones, NO_PHONE))
    assert heads(latents, nothing).phones == 0
    assert SemanticHeads(8, 4, 2, width=32)(latents, batch).phones == 0
    alone = [heads(latents[i : i + 1], batch_of(batch, i)).phones for i in range(16)]
    torch.testing.assert_close(torch.stack(alone).mean(), heads(latents, batch).phones)  # as on several processes


def test_disagreement_of_two_disguises():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(3, 40, 8, generator=generator) for _ in range(2))
    live = torch.arange(40) < torch.tensor([40, 20, 30])[:, None]
    assert disagreement(one, one, live) == 0
    assert disagreement(one, other, live).item() == pytest.approx(1, abs=0.2)  # unrelated
    assert disagreement(one, one + 3, live) > 2  # a voice that never changes counts too
    torch.testing.assert_close(disagreement(0.01 * one, 0.01 * other, live), disagreement(one, other, live))
    padded = torch.where(live[..., None], other, 100.0)
    torch.testing.assert_close(disagreement(one, padded, live), disagreement(one, other, live))
    alone = [disagreement(one[i : i + 1], other[i : i + 1], live[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.stack(alone).mean(), disagreement(one, other, live))  # as on several processes
