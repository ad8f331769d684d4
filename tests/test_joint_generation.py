"""One layout and one training step for three directions: what was learnt by heart is spoken, replied and heard."""

import pytest
import torch
from conftest import full_config

from architecture import CSM, count_targets, pick_depth_rows
from dataset_pipeline import in_one_row
from frames import Turn
from generation import Conversation, Sampling
from text_tokenizer import ByteTokenizer, encode_turn, turn_prompt
from training import batch_losses, gradient_step, make_optimizer, weighted_mean
from training_config import TrainConfig, lr_at, term_weights

TEXT = {0: "hello", 1: "good day"}
GREEDY = Sampling(temperature=0, text_temperature=0, max_seconds=2.0)
CONFIG = TrainConfig(max_steps=300, lr=1e-2, depth_share=1.0)
CPU = torch.device("cpu")


def turn_of(speaker: int, order: str) -> Turn:
    generator = torch.Generator().manual_seed(speaker)
    codes = torch.randint(0, 16, (9 + 3 * speaker, 4), generator=generator)
    prompt = turn_prompt(ByteTokenizer(), speaker)
    return Turn(encode_turn(ByteTokenizer(), speaker, TEXT[speaker]), codes, len(prompt), order)


@pytest.fixture(scope="module")
def learnt() -> CSM:
    """A model that knows one turn of each of two speakers by heart, in every order."""
    torch.manual_seed(0)
    model = CSM(full_config())
    turns = [turn_of(speaker, order) for speaker in TEXT for order in ("speak", "joint", "listen")]
    rows = in_one_row([model.config.layout.turn_rows(turn) for turn in turns]).batch()
    optimizer = make_optimizer(model, CONFIG)
    micro = [(rows, pick_depth_rows(rows.targets, 1.0, torch.Generator()))]
    for step in range(CONFIG.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, CONFIG)
        gradient_step(model, optimizer, micro, CONFIG, CPU, step)
    return model.eval()


def test_all_terms_of_the_loss_were_learnt(learnt):
    rows = in_one_row([learnt.config.layout.turn_rows(turn_of(s, "joint")) for s in TEXT]).batch()
    depth_rows = pick_depth_rows(rows.targets, 1.0, torch.Generator())
    sums, counts = batch_losses(learnt, rows, depth_rows, CPU), count_targets(rows, depth_rows)
    assert counts.text == sum(len(text) + 1 for text in TEXT.values())
    assert weighted_mean(sums, counts, term_weights(0, CONFIG, learnt.config)) < 0.1


@pytest.mark.parametrize("speaker", list(TEXT))
def test_it_speaks_the_text_it_is_given(learnt, tokenizer, speaker):
    reply = Conversation(learnt, tokenizer, ByteTokenizer(), sampling=GREEDY).speak(speaker, TEXT[speaker])
    assert reply.ended
    assert torch.equal(reply.codes, turn_of(speaker, "speak").codes)


@pytest.mark.parametrize("speaker", list(TEXT))
def test_it_replies_with_text_and_voice(learnt, tokenizer, speaker):
    reply = Conversation(learnt, tokenizer, ByteTokenizer(), sampling=GREEDY).reply(speaker)
    assert reply.ended
    assert reply.text == TEXT[speaker]
    assert torch.equal(reply.codes, turn_of(speaker, "joint").codes)


@pytest.mark.parametrize("speaker", list(TEXT))
def test_it_writes_down_what_it_hears(learnt, tokenizer, speaker):
    conversation = Conversation(learnt, tokenizer, ByteTokenizer(), sampling=GREEDY)
    assert conversation.listen(speaker, codes=turn_of(speaker, "listen").codes) == TEXT[speaker]
