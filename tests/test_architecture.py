"""The speech model: equality with transformers' csm, additions, losses, amortization, saving, impossible configs."""

import contextlib
import math

import pytest
import torch
from conftest import full_config, full_model, tiny_config, tiny_model

import architecture
import conversational_memory
from architecture import (
    CSM,
    CSMCache,
    Terms,
    count_targets,
    find_places,
    load_model,
    parameter_table,
    pick_depth_rows,
    save_model,
)
from checkpointing import load_weights, save_weights
from frames import IGNORE, N_PROSODY, ORDERS, Clock, Rows, Turn, concatenate
from model_sizes import CSMConfig, preset
from training import add, weighted_mean
from transformer import TransformerConfig
from weight_layouts import to_transformers

EQUAL = Terms(1.0, 1.0, 1.0, 1.0, 1.0)  # weights of the terms of the loss


def conversation_turns(config: CSMConfig, n_turns: int = 2, seed: int = 0, orders=("speak",), **changes) -> list[Turn]:
    """Random turns of 4 text ids and 6 frames, in the given orders by turns."""
    generator = torch.Generator().manual_seed(seed)
    turns = []
    for i in range(n_turns):
        text = torch.randint(0, config.text_vocab_size, (4,), generator=generator).tolist()
        codes = torch.randint(0, config.codebook_size, (6, config.n_codebooks), generator=generator)
        prosody = torch.randn(N_PROSODY, generator=generator)
        turn = Turn(text, codes, order=orders[i % len(orders)], gap=5.0 * i, prosody=prosody)
        turns.append(turn._replace(**changes))
    return turns


def sequence(config: CSMConfig, turns: list[Turn]) -> Rows:
    """The rows of a conversation."""
    clock = Clock()
    return concatenate([config.layout.turn_rows(turn, clock) for turn in turns])


def conversation_rows(config: CSMConfig, n_turns: int = 2, seed: int = 0, orders=("speak",), **changes) -> Rows:
    """Rows of `conversation_turns` as a batch of one."""
    return sequence(config, conversation_turns(config, n_turns, seed, orders, **changes)).batch()


def every_frame(rows: Rows) -> torch.Tensor:
    return pick_depth_rows(rows.targets, 1.0, torch.Generator())


def loss_of(model: CSM, rows: Rows, depth_rows: torch.Tensor) -> torch.Tensor:
    """The mean of codebook 0, of the depth codebooks and of the terms of the additions, all of the same weight."""
    sums, counts = model.loss(rows, depth_rows, guidance=True), count_targets(rows, depth_rows, guidance=True)
    return weighted_mean(sums, counts, EQUAL)


def assert_close(ours: Terms, theirs: Terms, **tolerance) -> None:
    for name, one, other in zip(Terms._fields, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def transformers_twin(model: CSM):
    """transformers' CsmForConditionalGeneration with the same weights."""
    from transformers import CsmConfig, CsmDepthDecoderConfig, CsmForConditionalGeneration, MimiConfig

    c = model.config
    rope = {
        "rope_type": "llama3",
        "factor": 32.0,
        "rope_theta": 500_000.0,
    }

    def dimensions(stack: TransformerConfig) -> dict:
        return {
            "hidden_size": stack.d_model,
            "intermediate_size": stack.d_ff,
            "num_hidden_layers": stack.n_layers,
            "num_attention_heads": stack.n_heads,
            "num_key_value_heads": stack.n_kv_heads,
            "head_dim": stack.d_head,
        }

    shared = {"num_codebooks": c.n_codebooks, "vocab_size": c.audio_vocab_size}
    pad = {"codebook_pad_token_id": c.audio_vocab_size - 1}
    depth = CsmDepthDecoderConfig(
        **dimensions(c.depth),
        **shared,
        backbone_hidden_size=c.backbone.d_model,
        max_position_embeddings=33,
        rope_parameters=rope
        | {"low_freq_factor": 0.001953125, "high_freq_factor": 0.0078125, "original_max_position_embeddings": 16},
    )
    codec = MimiConfig(
        hidden_size=16, num_filters=2, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, codebook_size=16, codebook_dim=8, vector_quantization_hidden_dimension=8,
        upsample_groups=16,
    )  # fmt: skip
    config = CsmConfig(
        **dimensions(c.backbone),
        **shared,
        **pad,
        text_vocab_size=c.text_vocab_size,
        max_position_embeddings=2048,
        depth_decoder_config=depth,
        codec_config=codec,
        rope_parameters=rope
        | {"low_freq_factor": 0.125, "high_freq_factor": 0.5, "original_max_position_embeddings": 1024},
    )
    twin = CsmForConditionalGeneration(config).eval()
    weights = twin.state_dict()
    for name, tensor in to_transformers(model.state_dict(), c).items():
        assert weights[name].shape == tensor.shape, name
        weights[name].copy_(tensor)
    return twin


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (2, 1)])
def test_logits_equal_those_of_transformers_csm(heads):
    n_heads, n_kv_heads = heads
    backbone = TransformerConfig(n_layers=3, d_model=64, n_heads=n_heads, n_kv_heads=n_kv_heads, d_ff=96, rope_scale=32)
    depth = TransformerConfig(n_layers=2, d_model=32, n_heads=n_heads, n_kv_heads=n_kv_heads, d_ff=64, rope_scale=32)
    changes = {"zero_end_of_turn": True, "n_special_codes": 3, "text_vocab_size": 50}
    model = tiny_model(backbone=backbone, depth=depth, **changes)
    twin = transformers_twin(model)
    rows = conversation_rows(model.config)
    with torch.inference_mode():
        ours = model.hidden(rows)
        theirs = twin.backbone_model(inputs_embeds=model.embed(rows.tokens, rows.mask)).last_hidden_state
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.codebook0_head(ours), twin.lm_head(theirs), atol=1e-4, rtol=1e-4)

        codes = torch.randint(0, 16, (5, 4))
        logits = model.depth_logits(ours[0, :5], codes)
        inputs = torch.nn.functional.pad(codes[:, :-1], (1, 0))  # position 0 is replaced by the backbone state
        expected = twin.depth_decoder(input_ids=inputs, backbone_last_hidden_state=ours[0, :5]).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_backbone_input_is_the_masked_sum_of_the_rows_embeddings(model):
    rows = conversation_rows(model.config)
    embedded = model.embed(rows.tokens, rows.mask)[0]
    A = model.config.audio_vocab_size
    for t, (token, mask) in enumerate(zip(rows.tokens[0], rows.mask[0], strict=True)):
        expected = torch.zeros(32)
        for k in range(4):
            if mask[k]:
                expected += model.audio_embedding.weight[k * A + token[k]]
        if mask[4]:
            expected += model.text_embedding.weight[token[4]]
        torch.testing.assert_close(embedded[t], expected, atol=1e-6, rtol=1e-5)


def test_csm_1b_has_the_published_parameters():
    table = parameter_table(preset("csm-1b"))
    assert table["total"] == 1_552_791_552
    with torch.device("meta"):
        model = CSM(preset("csm-1b"))
    assert model.audio_embedding.weight.shape == (65_632, 2048)
    assert model.depth_heads.shape == (31, 1024, 2051)
    assert model.depth.blocks[0].attention.k_proj.weight.shape == (256, 1024)


def test_nano_is_small_beyond_its_embedding_tables():
    table = parameter_table(preset("nano"))
    assert 10e6 < table["total"] - table["text_embedding"] - table["audio_embedding"] < 15e6


def test_a_model_that_adopts_codes_finds_those_alike_that_the_codec_does():
    config = full_config(n_codebooks=5, n_semantic=2)
    torch.manual_seed(0)
    vectors = [scale * torch.randn(16, 8) + 3.0 for scale in (4.0, 2.0, 1.0, 0.5, 0.1)]
    before, model = CSM(config), CSM(config)
    special = [p.detach().clone() for p in special_codes(model)]
    model.adopt_codes(vectors)
    assert all(torch.equal(*pair) for pair in zip(special, special_codes(model), strict=True))

    table = model.audio_embedding.weight.detach().view(5, -1, config.backbone.d_model)[:, :16]
    heads = [model.codebook0_head.weight[:16], *(head[:, :16].T for head in model.depth_heads)]
    for k, own in enumerate(vectors):
        for ours in (table[k], heads[k].detach()):
            near = torch.corrcoef(torch.stack([torch.pdist(own), torch.pdist(ours)]))[0, 1]
            assert near > 0.8, (k, near)
    for stack in (slice(0, 2), slice(2, 5)):  # sums of a stack's codes are one projection of the sums of its vectors
        centred = torch.cat([own - own.mean(dim=0) for own in vectors[stack]])
        solved = torch.linalg.lstsq(centred, torch.cat(list(table[stack]))).solution
        torch.testing.assert_close(centred @ solved, torch.cat(list(table[stack])), atol=1e-6, rtol=1e-4)

    frames = torch.stack([row[torch.randint(16, (500,))] for row in table]).sum(dim=0)
    assert frames.std().item() == pytest.approx(0.02, rel=0.3)
    rows = conversation_rows(config, n_turns=4)
    for own in (before, model):
        losses, counts = own.loss(rows, every_frame(rows)), count_targets(rows, every_frame(rows))
        assert (losses.codebook0 / counts.codebook0).item() == pytest.approx(math.log(17), abs=0.1)
        assert (losses.depth / counts.depth).tolist() == pytest.approx([math.log(17)] * 4, abs=0.1)


def special_codes(model: CSM) -> list[torch.Tensor]:
    """What belongs to the end of turn in tables and heads."""
    K, A, V = model.config.n_codebooks, model.config.audio_vocab_size, model.config.codebook_size
    table = model.audio_embedding.weight.view(K, A, -1)
    return [part.detach() for part in (table[:, V:], model.codebook0_head.weight[V:], model.depth_heads[..., V:])]


@pytest.mark.parametrize("config", [tiny_config(), full_config()], ids=["plain", "full"])
def test_a_new_model_is_as_unsure_as_it_should_be(config):
    torch.manual_seed(0)
    model = CSM(config)
    rows = conversation_rows(config, n_turns=4)
    depth_rows = every_frame(rows)
    losses, counts = model.loss(rows, depth_rows), count_targets(rows, depth_rows)
    assert (losses.codebook0 / counts.codebook0).item() == pytest.approx(math.log(17), abs=0.1)
    assert (losses.depth / counts.depth).tolist() == pytest.approx([math.log(17)] * 3, abs=0.1)
    if config.text_head:
        assert (losses.text / counts.text).item() == pytest.approx(math.log(258), abs=0.1)


def test_sums_over_counts_are_the_uniform_guess_of_a_model_without_an_opinion():
    model = full_model()
    with torch.no_grad():
        for weights in (model.codebook0_head.weight, model.depth_heads, model.text_embedding.weight):
            weights.zero_()
    rows = conversation_rows(model.config, 3, orders=ORDERS)
    depth_rows = every_frame(rows)[::2]
    sums, counts = model.loss(rows, depth_rows), count_targets(rows, depth_rows)
    assert counts.codebook0 == 3 * 7 and counts.depth.tolist() == [9] * 3 and counts.text == 3 * 3
    assert counts.memory == 3 * N_PROSODY and counts.guidance == 0
    assert sums.codebook0.item() == pytest.approx(21 * math.log(17), rel=1e-5)
    assert sums.depth.tolist() == pytest.approx([9 * math.log(17)] * 3, rel=1e-5)
    assert sums.text.item() == pytest.approx(9 * math.log(258), rel=1e-5)


@pytest.mark.parametrize("delay", [0, 3])
def test_the_semantic_codebooks_of_more_frames_are_learnt_as_if_those_frames_were_picked(delay):
    model = full_model(acoustic_delay=delay)
    S, rows = model.config.n_semantic, conversation_rows(model.config)
    every = every_frame(rows)
    few, more = every[::3], every[1::3]
    both = torch.cat((few, more))
    sums = model.loss(rows, few, semantic_rows=more)
    counts = count_targets(rows, few, semantic_rows=more, n_semantic=S)
    for end, picked in ((slice(S - 1), both), (slice(S - 1, None), few)):
        torch.testing.assert_close(sums.depth[end], model.loss(rows, picked).depth[end])
        assert torch.equal(counts.depth[end], count_targets(rows, picked).depth[end])
    assert 1 < S < model.config.n_codebooks
    assert torch.equal(model.loss(rows, few, semantic_rows=more[:0]).depth, model.loss(rows, few).depth)


def test_a_step_reads_nothing_back_from_its_device(monkeypatch):
    """The meta device holds no values, so that what would wait for one is an error there; it has no autocast."""
    monkeypatch.setattr(conversational_memory, "in_own_precision", lambda x: contextlib.nullcontext())
    model = full_model(acoustic_delay=3)
    rows = conversation_rows(model.config, orders=ORDERS, n_turns=3)
    every, places = every_frame(rows), find_places(rows, model.config)
    shown = rows.mask & (torch.rand(rows.mask.shape) < 0.8)
    arguments = (rows, every[::3], True, shown, every[1::3], places)
    here = model.loss(*arguments)
    assert all(float(part.detach().sum()) > 0 for part in here)
    assert_close(here, model.loss(*arguments[:-1]), atol=0, rtol=0)  # found by the model itself

    there = [part.to("meta") for part in arguments if part is not True]
    there.insert(2, True)
    model.to("meta")
    losses = model.loss(*there)
    assert [loss.shape for loss in losses] == [part.shape for part in here]
    sum(loss.sum() for loss in losses).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(NotImplementedError, match="meta"):
        model.loss(*there[:-1])


def test_amortized_losses_are_sums_over_the_picked_frames_only(model):
    rows = conversation_rows(model.config)
    every = every_frame(rows)
    assert len(every) == 12  # 2 turns of 6 frames; the ends of turn have one codebook only
    whole = model.loss(rows, every)
    parts = [model.loss(rows, part) for part in (every[:5], every[5:])]
    torch.testing.assert_close(parts[0].depth + parts[1].depth, whole.depth)
    counts = [count_targets(rows, part) for part in (every[:5], every[5:], every)]
    assert [count.depth.tolist() for count in counts] == [[5] * 3, [7] * 3, [12] * 3]
    assert torch.equal(parts[0].codebook0, whole.codebook0)
    assert [int(count.codebook0) for count in counts] == [14] * 3


def test_the_text_loss_is_over_the_ids_behind_the_prompt_only():
    model = full_model()
    nats = []
    for n_prompt in (1, 2, 4):
        rows = conversation_rows(model.config, n_turns=1, n_prompt=n_prompt)
        ids = rows.tokens[0, n_prompt:4, -1]
        logits = model.text_logits(model.hidden(rows)[0, n_prompt - 1 : 3])
        expected = torch.nn.functional.cross_entropy(logits, ids, reduction="sum") if len(ids) else torch.zeros(())
        nats.append(model.loss(rows, every_frame(rows)).text)
        torch.testing.assert_close(nats[-1], expected, atol=1e-4, rtol=1e-5)
        assert count_targets(rows, every_frame(rows)).text == 4 - n_prompt
    assert nats[0] > nats[1] > nats[2] == 0


def test_without_a_text_head_there_is_no_text_loss(model):
    rows = conversation_rows(model.config)
    assert model.loss(rows, every_frame(rows)).text == 0


def test_turns_not_to_be_learnt_are_context_without_a_loss():
    """The losses of each speaker's turns alone add up to the loss of all turns."""
    model = full_model()
    turns = conversation_turns(model.config, 4, orders=ORDERS)
    found, counts = [], []
    for learnt in ((0, 2), (1, 3), (0, 1, 2, 3)):
        rows = sequence(model.config, [turn._replace(learn=i in learnt) for i, turn in enumerate(turns)]).batch()
        found.append(model.loss(rows, every_frame(rows), guidance=True))
        counts.append(count_targets(rows, every_frame(rows), guidance=True))
    for name in Terms._fields:
        first, second, both = (getattr(terms, name) for terms in found)
        torch.testing.assert_close(first + second, both, atol=1e-3, rtol=1e-5)
        assert (first > 0).all() and (second > 0).all()
        assert torch.equal(*(sum(getattr(c, name) for c in some) for some in (counts[:2], counts[2:])))


@pytest.mark.parametrize("changes", [{"learn": False}, {"codes": None}], ids=["context only", "text only"])
def test_a_batch_without_a_frame_to_learn_still_has_its_other_losses(changes):
    model = full_model()
    rows = conversation_rows(model.config, **changes)
    assert len(every_frame(rows)) == 0
    losses, counts = model.loss(rows, every_frame(rows)), count_targets(rows, every_frame(rows))
    assert losses.codebook0 == 0 and losses.depth.tolist() == [0, 0, 0]
    assert (losses.text > 0) == (counts.text > 0) == ("codes" in changes)
    loss = weighted_mean(losses, counts, EQUAL)
    loss.backward()
    assert torch.isfinite(loss)
    assert model.depth_heads.grad is not None and not model.depth_heads.grad.any()


def test_the_depth_decoder_never_sees_an_empty_batch():
    """Flash attention on a GPU may refuse one."""
    model, sizes = full_model(), []
    rows = conversation_rows(model.config, codes=None)
    model.depth.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    losses = model.loss(rows, every_frame(rows), semantic_rows=every_frame(rows))
    assert len(sizes) == 2 and min(sizes) > 0
    assert losses.depth.tolist() == [0, 0, 0]


def test_the_amortized_share_is_redrawn_and_covers_all_frames():
    targets = torch.zeros(2, 100, 5, dtype=torch.int64)
    targets[:, :20] = IGNORE
    targets[..., -1] = IGNORE  # no text
    generator = torch.Generator().manual_seed(0)
    draws = [pick_depth_rows(targets, 1 / 16, generator) for _ in range(200)]
    assert {len(draw) for draw in draws} == {10}
    assert set(torch.cat(draws).tolist()) == {b * 100 + t for b in range(2) for t in range(20, 100)}
    again = [pick_depth_rows(targets, 1 / 16, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize("order", ORDERS)
def test_the_depth_decoder_learns_whole_frames_only(order):
    """Not the rows before text, nor the one before the end of turn."""
    rows = conversation_rows(full_config(), orders=(order,))
    assert len(every_frame(rows)) == 12
    assert (rows.targets.flatten(0, 1)[every_frame(rows), :-1] < 16).all()


def packed(*groups: list[Rows]) -> Rows:
    """A batch with a row for each group of sequences, padded on the right."""
    fill = Rows(0, False, IGNORE, 0, -1, -1, -1, 0.0, math.nan)
    joined = []
    for group in groups:
        parts, turns = [], 0
        for number, rows in enumerate(group):
            own = torch.full_like(rows.documents, number)
            parts.append(rows._replace(documents=own, conversations=own, turns=rows.turns + turns))
            turns += int(rows.turns.max()) + 1
        joined.append(concatenate(parts))
    L = max(len(rows.tokens) for rows in joined)
    columns = zip(*joined, strict=True)
    return Rows(
        *(
            torch.stack([torch.cat((x, x.new_full((L - len(x), *x.shape[1:]), value))) for x in column])
            for column, value in zip(columns, fill, strict=True)
        )
    )


@pytest.mark.parametrize("make", [tiny_model, full_model], ids=["plain", "full"])
def test_padding_and_neighbours_do_not_change_a_document(make):
    model = make()
    alone = [sequence(model.config, conversation_turns(model.config, 3, seed, ORDERS)) for seed in range(3)]
    batch = packed([alone[0], alone[1]], [alone[2]])
    with torch.no_grad():
        together = model.hidden(batch, batch.allowed())
        n = len(alone[0].tokens)
        for rows, states in zip(alone, (together[0, :n], together[0, n:], together[1, :n]), strict=True):
            torch.testing.assert_close(states, model.hidden(rows.batch())[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny_model, full_model], ids=["plain", "full"])
def test_the_loss_of_a_packed_batch_is_the_sum_of_its_conversations(make):
    model = make()
    lengths = (3, 1, 2, 4)
    alone = [
        sequence(model.config, conversation_turns(model.config, n, seed, ORDERS)) for seed, n in enumerate(lengths)
    ]
    batch = packed(alone[:3], alone[3:])
    assert (batch.documents == -1).any()
    with torch.no_grad():
        together = model.loss(batch, every_frame(batch), guidance=True)
        singles = [model.loss(rows.batch(), every_frame(rows.batch()), guidance=True) for rows in alone]
    assert_close(together, add(singles), atol=1e-3, rtol=1e-5)
    counts = [count_targets(rows.batch(), every_frame(rows.batch()), guidance=True) for rows in alone]
    assert_close(count_targets(batch, every_frame(batch), guidance=True), add(counts), atol=0, rtol=0)
    if model.config.has_memory:
        assert together.guidance > 0 and together.memory > 0


def test_the_memory_alone_carries_what_left_the_context_and_only_along_a_conversation():
    """The second document of a sequence depends on the first if both are of one conversation."""
    model = full_model()
    turns = conversation_turns(model.config, 2)
    other = turns[0]._replace(text_ids=[9, 8, 7, 6])
    states = {}
    for conversation in (0, 1):
        for name, first in (("one", turns[0]), ("other", other)):
            rows = sequence(model.config, [first, turns[1]])
            later = rows.turns == 1
            rows.documents[later], rows.conversations[later] = 1, conversation
            batch = rows.batch()
            states[conversation, name] = model.hidden(batch, batch.allowed())[0, later]
    assert (states[0, "one"] - states[0, "other"]).abs().max() > 1e-3
    torch.testing.assert_close(states[1, "one"], states[1, "other"], atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter_of_the_full_model():
    model = full_model()
    rows = conversation_rows(model.config, 4, orders=("speak", "joint", "listen"))
    loss_of(model, rows, every_frame(rows)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "additions",
    [
        {"cross_attention_every": 1},
        {"cross_attention_every": 2},
        {"semantic_heads": 2, "memory_key": 8, "memory_value": 8},
        {"prosodic_heads": 2, "memory_key": 8, "memory_value": 8},
        {"cross_attention_every": 1, "semantic_heads": 2, "prosodic_heads": 2, "memory_key": 8, "memory_value": 8},
    ],
)
def test_an_addition_changes_nothing_until_its_gates_open(additions):
    shared = {"n_semantic": 2, "acoustic_delay": 3, "text_head": True, "text_per_chunk": 3, "frames_per_chunk": 4}
    plain, extended = tiny_model(**shared), tiny_model(seed=1, **shared, **additions)
    missing, unknown = extended.load_state_dict(plain.state_dict(), strict=False)
    assert not unknown and missing and all(name.startswith(architecture.ADDED) for name in missing)
    rows = conversation_rows(plain.config, 4, orders=ORDERS)
    assert torch.equal(plain.hidden(rows), extended.hidden(rows))
    losses = [model.loss(rows, every_frame(rows)) for model in (plain, extended)]
    for name in ("codebook0", "depth", "text"):
        assert torch.equal(*(getattr(terms, name) for terms in losses))
    with torch.no_grad():
        for name, parameter in extended.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.7)
    assert (plain.hidden(rows) - extended.hidden(rows)).abs().max() > 1e-3


def test_the_number_of_semantic_codebooks_alone_changes_nothing(model):
    other = CSM(tiny_config(n_semantic=3))
    other.load_state_dict(model.state_dict())
    rows = [conversation_rows(own.config) for own in (model, other)]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*rows, strict=True))
    assert torch.equal(model.hidden(rows[0]), other.hidden(rows[1]))


def test_the_same_seed_gives_the_same_loss_and_gradients_twice():
    results = []
    for seed in (3, 3, 4):
        model = full_model(seed)
        rows = conversation_rows(model.config, 3, orders=ORDERS)
        loss = loss_of(model, rows, every_frame(rows))
        loss.backward()
        results.append((loss, [parameter.grad for parameter in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])


@pytest.mark.parametrize("sizes", [[1], [100], [1, 5, 2, 7]])
def test_rows_read_in_pieces_behind_a_cache_equal_those_read_at_once(sizes):
    model = full_model()
    clock = Clock()
    turns = conversation_turns(model.config, 6, orders=("speak", "joint", "listen", "listen"))
    turns[2] = turns[2]._replace(codes=None, prosody=None)
    parts = [model.config.layout.turn_rows(turn, clock) for turn in turns]
    cache, found = CSMCache(model), []
    with torch.no_grad():
        whole = model.hidden(concatenate(parts).batch())
        for rows in parts:
            start = 0
            while start < len(rows.tokens):
                stop = start + sizes[len(found) % len(sizes)]
                found.append(model.hidden(Rows(*(x[start:stop] for x in rows)).batch(), cache=cache))
                start = stop
            model.end_turn(cache, rows.prosody[:1])
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_more_rows_than_positions_are_refused():
    model = full_model(max_positions=20)
    rows = conversation_rows(model.config)
    with pytest.raises(ValueError, match="26 rows are more than the model's max_positions=20"):
        model.hidden(rows)


@pytest.mark.parametrize("config", [tiny_config(), full_config()], ids=["plain", "full"])
def test_one_batch_can_be_learnt_by_heart(config):
    torch.manual_seed(0)
    model = CSM(config)
    rows = conversation_rows(config)
    depth_rows = every_frame(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    counts = count_targets(rows, depth_rows)
    for _ in range(120):
        optimizer.zero_grad()
        sums = model.loss(rows, depth_rows)
        loss = weighted_mean(sums, counts, Terms(1.0, 1.0, float(config.text_head), 0.0, 0.0))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("make", [tiny_model, full_model], ids=["plain", "full"])
def test_a_saved_model_comes_back_exactly(tmp_path, make):
    model = make()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    rows = conversation_rows(model.config)
    assert torch.equal(model.hidden(rows), loaded.hidden(rows))


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, model):
    save_model(model, tmp_path)
    config, tensors = load_weights(tmp_path, architecture.WEIGHTS_KIND)
    wrong = dict(tensors, **{"projection.weight": torch.zeros(3, 3)})
    save_weights(tmp_path, architecture.WEIGHTS_KIND, config, wrong)
    with pytest.raises(ValueError, match=r"tensor projection.weight has shape \(3, 3\), expected \(32, 32\)"):
        load_model(tmp_path)
    del wrong["projection.weight"]
    save_weights(tmp_path, architecture.WEIGHTS_KIND, config, wrong)
    with pytest.raises(ValueError, match=r"tensor projection.weight \(32, 32\) is missing"):
        load_model(tmp_path)
    save_weights(tmp_path, architecture.WEIGHTS_KIND, config, dict(tensors, extra=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"tensor extra \(2,\) is not known"):
        load_model(tmp_path)
    save_weights(tmp_path, "rvq_tokenizer", config, tensors)
    with pytest.raises(ValueError, match="holds 'rvq_tokenizer' of format 1; expected 'csm'"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_codebooks": 1}, "n_codebooks=1 must be at least 2"),
        ({"codebook_size": 0}, "codebook_size=0 must be at least 2"),
        ({"n_special_codes": 0}, "n_special_codes=0 must be at least 1"),
        ({"max_positions": 1}, "max_positions=1 must be at least 2"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_an_unknown_size_is_refused_in_one_line(capsys):
    from command_line import EXIT_INPUT, run

    assert run(architecture.main, ["--model_size", "huge"]) == EXIT_INPUT
    assert (
        capsys.readouterr().err
        == "error: unknown model size 'huge'; choose one of nano, micro, tiny, small, medium, csm-1b\n"
    )
