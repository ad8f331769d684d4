"""VoiceTextCrossAttention: causality, pools, times, caching, attention maps and the loss that guides them."""

import pytest
import torch
from conftest import full_config, full_model

from architecture import CSM, CSMCache, Traces, count_targets, pick_depth_rows
from cross_attention import (
    CrossCache,
    KeyStore,
    StreamState,
    VoiceTextCrossAttention,
    find_streams,
    guidance_loss,
    guided_rows,
    progress,
    put,
    take,
)
from frames import Clock, Rows, Turn, concatenate
from training_start import new_model
from transformer import TransformerConfig, rope_angles

CROSS_ONLY = {"semantic_heads": 0, "prosodic_heads": 0, "text_head": False}
LAYOUT = full_config().layout
EVERY_ORDER = [("speak", 9), ("joint", 14), ("listen", 6), ("speak", None), ("joint", 5), ("speak", 7)]


def turn_parts(turns, seed: int = 0, n_text: int = 7, layout=LAYOUT, n_prompt: int = 2) -> list[Rows]:
    """One conversation of (order, frames) turns with random codes, gaps and prosody; `None` frames: text only."""
    generator = torch.Generator().manual_seed(seed)
    clock, parts = Clock(), []
    for i, (order, n_frames) in enumerate(turns):
        ids = torch.randint(0, 256, (n_text,), generator=generator).tolist()
        codes = None
        if n_frames is not None:
            codes = torch.randint(0, 16, (n_frames, 4), generator=generator)
        prosody = torch.randn(6, generator=generator)
        parts.append(layout.turn_rows(Turn(ids, codes, n_prompt, order, gap=2.5 * i, prosody=prosody), clock))
    return parts


def conversation(turns, **options) -> Rows:
    return concatenate(turn_parts(turns, **options)).batch()


def kinds(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) which rows of a batch of one are text, and which are audio."""
    return rows.mask[0, :, -1], rows.mask[0, :, :-1].any(dim=-1)


def layers(n: int = 2, n_heads: int = 4, n_kv_heads: int = 2, seed: int = 0, **gates) -> torch.nn.ModuleList:
    """Layers of width 32 with large weights; gates 0.7 unless given as voice=, text=, feed_forward=."""
    torch.manual_seed(seed)
    config = TransformerConfig(n_layers=2, d_model=32, n_heads=n_heads, n_kv_heads=n_kv_heads, d_ff=48)
    stack = torch.nn.ModuleList(VoiceTextCrossAttention(config, 32) for _ in range(n))
    with torch.no_grad():
        for layer in stack:
            for parameter in layer.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8)
            layer.pool_query.normal_()
            for name in ("voice", "text", "feed_forward"):
                getattr(layer, f"{name}_gate").fill_(gates.get(name, 0.7))
    return stack


def run_layers(stack, x: torch.Tensor, rows: Rows) -> torch.Tensor:
    streams = find_streams(rows)
    for layer in stack:
        x = layer(x, streams)
    return x


def open_model(**changes) -> CSM:
    """`full_model` with pools that are not plain means."""
    model = full_model(**changes)
    with torch.no_grad():
        for layer in model.cross_attention:
            layer.pool_query.normal_()
    return model


def dependence(function, x: torch.Tensor) -> torch.Tensor:
    """(T, T) size of the derivative of output row t with respect to input row s of a (1, T, D) -> (1, T, D) function.

    Every output row is projected on one random direction, so that a zero is a row that does not count.
    """
    direction = torch.randn(x.size(-1), generator=torch.Generator().manual_seed(1))
    jacobian = torch.autograd.functional.jacobian(lambda x: (function(x) @ direction)[0], x)  # (T, 1, T, D)
    return jacobian[:, 0].abs().sum(dim=-1)


def backbone_dependence(model: CSM, rows: Rows) -> torch.Tensor:
    """`dependence` of the backbone's states on the embedded rows."""

    def states(x):
        handle = model.backbone.register_forward_pre_hook(lambda module, inputs: (x, *inputs[1:]))
        with handle:
            return model.hidden(rows, rows.allowed())

    return dependence(states, model.embed(rows.tokens, rows.mask).detach())


ORDERINGS = {
    "speak": [("speak", 9), ("speak", 6), ("speak", None), ("speak", 5)],
    "joint": [("joint", 9), ("joint", 14), ("joint", 2)],
    "listen": [("listen", 9), ("listen", 6), ("listen", 5)],
    "mixed": EVERY_ORDER,
}


@pytest.mark.parametrize("turns", ORDERINGS.values(), ids=ORDERINGS)
def test_no_row_depends_on_a_later_row_through_two_layers(turns):
    rows = conversation(turns)
    x = torch.randn(1, rows.tokens.size(1), 32)
    found = dependence(lambda x: run_layers(layers(2), x, rows), x)
    assert torch.equal(found.triu(1), torch.zeros_like(found))
    assert (found.tril(-1) > 0).sum() > 0.2 * len(found) ** 2  # most pairs of different kinds


@pytest.mark.parametrize("additions", [CROSS_ONLY, {}], ids=["cross attention", "cross attention and memory"])
@pytest.mark.parametrize("turns", ORDERINGS.values(), ids=ORDERINGS)
def test_no_state_of_the_model_depends_on_a_later_row(turns, additions):
    rows = conversation(turns)
    found = backbone_dependence(open_model(**additions), rows)
    assert torch.equal(found.triu(1), torch.zeros_like(found))
    assert (found.tril() > 0).sum() == len(found) * (len(found) + 1) / 2


def test_no_row_depends_on_a_row_of_another_document():
    parts = turn_parts([("speak", 9), ("speak", 6), ("joint", 9)])
    parts[1:] = [part._replace(documents=part.documents + 1) for part in parts[1:]]
    rows = concatenate(parts).batch()
    found = dependence(lambda x: run_layers(layers(2), x, rows), torch.randn(1, rows.tokens.size(1), 32))
    first = len(parts[0].tokens)
    assert not found[first:, :first].any()
    assert found[first + len(parts[1].tokens) :, first : first + len(parts[1].tokens)].any()


def test_in_speak_order_no_text_row_depends_on_its_own_turns_audio_and_voice_depends_on_all_text_before():
    rows = conversation([("speak", 9), ("speak", 10)])
    found = dependence(lambda x: run_layers(layers(1), x, rows), torch.randn(1, rows.tokens.size(1), 32))
    text, audio = kinds(rows)
    own = rows.turns[0][:, None] == rows.turns[0]
    assert not found[text[:, None] & audio & own].any()
    voice_of_the_second, text_of = audio & (rows.turns[0] == 1), [text & (rows.turns[0] == i) for i in range(2)]
    for past_or_own in text_of:
        assert (found[voice_of_the_second][:, past_or_own] > 0).all()


def test_text_hears_past_voice_through_the_text_path_alone():
    rows = conversation([("speak", 9), ("speak", 10)])
    x = torch.randn(1, rows.tokens.size(1), 32)
    stack = layers(1, voice=0.0, feed_forward=0.0)
    found = dependence(lambda x: run_layers(stack, x, rows), x)
    text, audio = kinds(rows)
    later_text, past_audio = text & (rows.turns[0] == 1), audio & (rows.turns[0] == 0)
    heard = found[later_text][:, past_audio] > 0  # 9 frames and 3 closing rows: three pools
    assert heard.all() and heard.size(1) == 12
    assert torch.equal(run_layers(stack, x, rows)[0, audio], x[0, audio])


def test_a_new_layer_is_an_exact_no_op():
    torch.manual_seed(0)
    layer = VoiceTextCrossAttention(TransformerConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48), 32)
    rows = conversation(EVERY_ORDER)
    x = torch.randn(1, rows.tokens.size(1), 32)
    assert torch.equal(layer(x, find_streams(rows)), x)
    with torch.no_grad():
        layer.voice_gate.fill_(1e-3)
    assert not torch.equal(layer(x, find_streams(rows)), x)


def test_a_new_model_with_cross_attention_gives_exactly_the_states_of_the_one_without():
    plain = full_model(**CROSS_ONLY, cross_attention_every=0)
    model = CSM(full_config(**CROSS_ONLY)).eval()
    missing, unknown = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unknown and all(name.startswith("cross_attention.") for name in missing)
    rows = conversation(EVERY_ORDER)
    with torch.inference_mode():
        assert torch.equal(model.hidden(rows, rows.allowed()), plain.hidden(rows, rows.allowed()))


def test_in_a_model_trained_from_scratch_its_gates_are_open(tokenizer):
    model = new_model(full_config(), 0, tokenizer)
    gates = {name: p.item() for name, p in model.named_parameters() if name.endswith("gate")}
    opened = {name for name, value in gates.items() if value == 1.0}
    assert opened == {name for name in gates if name.startswith("cross_attention.")}
    assert len(opened) == 3 * len(model.config.cross_layers) < len(gates)


def test_rows_with_nothing_to_attend_get_exactly_zero_and_finite_gradients():
    parts = turn_parts([("listen", 9), ("speak", 5)], n_prompt=0)  # voice without text before, text before any pool
    rows = concatenate(parts).batch()
    x = torch.randn(1, rows.tokens.size(1), 32, requires_grad=True)
    stack = layers(1, feed_forward=0.0)
    out = run_layers(stack, x, rows)
    text, audio = kinds(rows)
    lonely = audio & (rows.turns[0] == 0)  # in listen order its text comes after it
    assert lonely.sum() == 12 and torch.equal(out[0, lonely], x[0, lonely])
    assert not torch.isclose(out[0, ~lonely], x[0, ~lonely]).all(dim=-1).any()
    (out**2).sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in stack.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("turns", [[("speak", None)], [("speak", None), ("speak", 0)]], ids=["text", "no pool"])
def test_conversations_without_pools_pass_with_their_text_unchanged(turns):
    rows = conversation(turns)
    x = torch.randn(1, rows.tokens.size(1), 32, requires_grad=True)
    out = run_layers(layers(1, feed_forward=0.0), x, rows)
    text, _ = kinds(rows)
    assert torch.equal(out[0, text], x[0, text])
    out.sum().backward()
    assert x.grad.isfinite().all()


def padded(rows: Rows, length: int) -> Rows:
    """A sequence (T, ...) with padding behind it, as the data pipeline pads."""
    fill = Rows(0, False, -100, 0, -1, -1, -1, 0.0, torch.nan)
    pads = [x.new_full((length - len(x), *x.shape[1:]), value) for x, value in zip(rows, fill, strict=True)]
    return Rows(*(torch.cat(pair) for pair in zip(rows, pads, strict=True)))


def test_a_padded_batch_of_unlike_conversations_equals_each_alone_and_leaves_the_padding_unchanged():
    sequences = [
        concatenate(turn_parts(turns, seed=i)) for i, turns in enumerate((*ORDERINGS.values(), [("speak", 0)]))
    ]
    L = max(len(rows.tokens) for rows in sequences)
    batch = Rows(*(torch.stack(column) for column in zip(*(padded(rows, L) for rows in sequences), strict=True)))
    x = torch.randn(len(sequences), L, 32)
    stack = layers(2, feed_forward=0.0)
    out = run_layers(stack, x, batch)
    for i, rows in enumerate(sequences):
        T = len(rows.tokens)
        torch.testing.assert_close(out[i, :T], run_layers(stack, x[i : i + 1, :T], rows.batch())[0])
        assert torch.equal(out[i, T:], x[i, T:])


def test_text_hears_whole_pools_of_four_rows_of_one_turn_only():
    rows = conversation([("speak", 7), ("speak", 7), ("speak", 7)])  # 10 audio rows each: two pools, two rows over
    x = torch.randn(1, rows.tokens.size(1), 32)
    stack = layers(2)
    before = run_layers(stack, x, rows)
    text, audio = kinds(rows)
    for turn in range(2):
        of_turn = (audio & (rows.turns[0] == turn)).nonzero().squeeze(1)
        for place, row in enumerate(of_turn.tolist()):
            changed = x.clone()
            changed[0, row] += torch.randn(32)
            after = run_layers(stack, changed, rows)
            same = (after[0] == before[0]).all(dim=-1)
            later_text = text & (rows.turns[0] > turn)
            if place < 8:
                assert not same[later_text].any()
                assert same[text & ~later_text].all()
            else:
                assert same[text].all()


def test_in_joint_order_text_hears_the_chunks_spoken_before_it():
    rows = conversation([("joint", 14)], n_text=11, n_prompt=1)
    text, audio = kinds(rows)
    stack = layers(1, voice=0.0, feed_forward=0.0)
    found = dependence(lambda x: run_layers(stack, x, rows), torch.randn(1, rows.tokens.size(1), 32)) > 0
    spoken_before = torch.tensor([int(audio[:row].sum()) for row in text.nonzero().squeeze(1)])
    assert torch.equal(found[text][:, audio].sum(dim=1), spoken_before)
    assert spoken_before.unique().tolist() == [0, 4, 8, 12]  # chunks of 4 frames are whole pools


def cached(model_or_stack, x, parts: list[Rows], sizes: list[int]) -> torch.Tensor:
    """Layers over (B, T, 32), read in pieces of these sizes in turn."""
    rows = Rows(*(torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)))
    state, caches, out, start, i = StreamState(), [CrossCache() for _ in model_or_stack], [], 0, 0
    while start < x.size(1):
        end = start + sizes[i % len(sizes)]
        streams = find_streams(Rows(*(column[:, start:end] for column in rows)), state)
        piece = x[:, start:end]
        for layer, cache in zip(model_or_stack, caches, strict=True):
            piece = layer(piece, streams, state, cache)
        out.append(piece)
        start, i = end, i + 1
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("sizes", [[1], [2], [3], [4], [5], [7], [16], [1, 9, 2, 6], [1000]], ids=str)
def test_layers_read_in_pieces_equal_those_read_at_once(sizes):
    rows = conversation(EVERY_ORDER)
    x = torch.randn(1, rows.tokens.size(1), 32)
    stack = layers(2)
    torch.testing.assert_close(cached(stack, x, [rows], sizes), run_layers(stack, x, rows), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", [[1], [3], [4, 1], [1000]], ids=str)
def test_a_cached_batch_of_two_conversations_of_one_structure_equals_each_alone(sizes):
    model = open_model()
    own = [turn_parts(EVERY_ORDER, seed=seed) for seed in range(2)]
    own[1] = [part._replace(times=part.times + 30.0 * i) for i, part in enumerate(own[1])]  # longer silences

    def states(parts: list[Rows], batch: int) -> torch.Tensor:
        cache, out = CSMCache(model, batch), []
        for part in parts:
            start, i, T = 0, 0, part.tokens.size(1)
            while start < T:
                end = start + sizes[i % len(sizes)]
                out.append(model.hidden(Rows(*(column[:, start:end] for column in part)), cache=cache))
                start, i = end, i + 1
            model.end_turn(cache, part.prosody[:, 0])
        return torch.cat(out, dim=1)

    with torch.inference_mode():
        pairs = [Rows(*(torch.stack(pair) for pair in zip(*parts, strict=True))) for parts in zip(*own, strict=True)]
        together = states(pairs, 2)
        assert not torch.allclose(together[0], together[1])
        for i, parts in enumerate(own):
            alone = states([part.batch() for part in parts], 1)
            torch.testing.assert_close(together[i], alone[0], atol=2e-5, rtol=1e-4)
            whole = concatenate(parts).batch()
            torch.testing.assert_close(alone, model.hidden(whole, whole.allowed()), atol=2e-5, rtol=1e-4)


def test_attention_maps_are_causal_and_their_rows_sum_to_one_or_to_zero_with_nothing_to_see():
    rows = conversation([("listen", 9), ("joint", 14), ("speak", 6)], n_prompt=0)
    model, traces = open_model(**CROSS_ONLY), Traces()
    with torch.inference_mode():
        model.hidden(rows, rows.allowed(), traces=traces, maps=True)
    text, audio = (flags.nonzero().squeeze(1) for flags in kinds(rows))
    assert len(traces.maps) == 2
    earlier = text[None] < audio[:, None]  # (Q, M)
    for weights in traces.maps:
        assert weights.shape == (1, 4, len(audio), len(text))
        assert not weights[:, :, ~earlier].any() and (weights[:, :, earlier] > 0).float().mean() > 0.9
        sums = weights.sum(dim=-1)
        torch.testing.assert_close(sums, earlier.any(dim=-1).float().expand_as(sums))
    assert not earlier.any(dim=-1).all()


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_the_output_follows_from_the_attention_map(n_kv_heads):
    rows = conversation([("listen", 9), ("joint", 14), ("speak", 6)])
    x = torch.randn(1, rows.tokens.size(1), 32)
    (layer,) = layers(1, n_kv_heads=n_kv_heads, text=0.0, feed_forward=0.0)
    streams, maps = find_streams(rows), []
    out = layer(x, streams, maps=maps)
    values = layer.voice.heads(layer.voice.v_proj(take(layer.norm(x), streams.text)))
    values = values.repeat_interleave(4 // n_kv_heads, dim=1)  # (1, H, M, d)
    heard = layer.voice.o_proj((maps[0] @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, put(x, streams.audio, layer.voice_gate.tanh() * heard), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_kv_heads", [2, 1])
def test_grouped_heads_are_full_heads_that_share_keys_and_values(n_kv_heads):
    grouped, full = layers(1, n_kv_heads=n_kv_heads), layers(1, n_kv_heads=4)
    weights = grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = (
                weights[name].view(n_kv_heads, 8, 32).repeat_interleave(4 // n_kv_heads, dim=0).flatten(0, 1)
            )
    full.load_state_dict(weights)
    rows = conversation(EVERY_ORDER)
    x = torch.randn(1, rows.tokens.size(1), 32)
    torch.testing.assert_close(run_layers(grouped, x, rows), run_layers(full, x, rows), atol=1e-5, rtol=1e-5)


def test_only_differences_of_time_count():
    rows = conversation(EVERY_ORDER)
    x = torch.randn(1, rows.tokens.size(1), 32)
    stack = layers(2)
    out = run_layers(stack, x, rows)
    later = run_layers(stack, x, rows._replace(times=rows.times + 64))
    torch.testing.assert_close(later, out, atol=1e-4, rtol=1e-4)
    slower = run_layers(stack, x, rows._replace(times=2 * rows.times))
    assert (slower - out).abs().max() > 0.01


def test_the_time_of_a_pool_is_that_of_its_last_row():
    rows = conversation([("speak", 6), ("speak", 0)])  # 9 audio rows: pools end at rows 3 and 7 of the audio
    streams = find_streams(rows)
    _, audio = kinds(rows)
    assert torch.equal(streams.pool_times[0, :2], rows.times[0, audio][[3, 7]])
    assert torch.equal(rope_angles(torch.ones(1), streams.pool_times)[0][0, 0, :2, 0], streams.pool_times[0, :2].cos())


def one_turn(n_text: int, n_audio: int) -> Rows:
    """A speak turn with so many text and audio rows."""
    return conversation([("speak", n_audio - LAYOUT.closing_rows)], n_text=n_text)


def map_of(choice: list[int], n_text: int) -> torch.Tensor:
    """(1, 1, Q, M) attention of each audio row to one text row."""
    return torch.nn.functional.one_hot(torch.tensor(choice), n_text).float()[None, None]


def test_guidance_is_zero_for_a_diagonal_map_and_near_one_for_attention_to_the_far_end():
    n = 20
    rows = one_turn(n, n)
    streams = find_streams(rows)
    diagonal = guidance_loss(map_of(list(range(n)), n), streams, rows)
    assert float(diagonal) == pytest.approx(0.0, abs=1e-5)
    far = guidance_loss(map_of([n - 1] * (n // 2) + [0] * (n // 2), n), streams, rows) / n
    assert 0.95 < float(far) < 1.0
    reversed_map = guidance_loss(map_of(list(range(n))[::-1], n), streams, rows) / n
    assert 0.7 < float(reversed_map) < 0.8  # it crosses the diagonal: 1 - sqrt(pi / 2) g = 0.75


def test_guidance_of_one_weight_is_its_gaussian_of_the_distance():
    rows = one_turn(4, 8)
    for text_row in range(4):
        weights = torch.zeros(1, 2, 8, 4)
        weights[0, 0, 2, text_row] = 1.0  # one of two heads
        distance = 2.5 / 8 - (text_row + 0.5) / 4
        expected = 0.5 * (1 - torch.exp(torch.tensor(-(distance**2) / 0.08)))
        torch.testing.assert_close(guidance_loss(weights, find_streams(rows), rows), expected)


def test_guidance_of_attention_to_another_turns_text_is_one():
    rows = conversation([("speak", 6), ("speak", 6)])  # 7 text and 9 audio rows each
    streams = find_streams(rows)
    weights = torch.zeros(1, 1, 18, 14)
    weights[0, 0, 9:, 0] = 1.0
    assert float(guidance_loss(weights, streams, rows)) == pytest.approx(9.0)


def test_guidance_counts_the_audio_rows_of_text_first_turns_only():
    rows = conversation([("speak", 9), ("joint", 14), ("listen", 6), ("speak", None), ("joint", 3), ("speak", 7)])
    guided = guided_rows(find_streams(rows), rows)
    turns = rows.turns[0, kinds(rows)[1]]
    expected = (turns == 0) | (turns == 4) | (turns == 5)  # a short joint turn is text first too
    assert torch.equal(guided[0], expected)
    depth_rows = pick_depth_rows(rows.targets, 1.0, torch.Generator())
    assert int(count_targets(rows, depth_rows, True).guidance) == 12 + 6 + 10
    assert int(count_targets(rows, depth_rows, False).guidance) == 0
    ones = torch.ones(1, 1, len(turns), int(kinds(rows)[0].sum()))
    alone = conversation([("joint", 14), ("listen", 6)])
    n_audio, n_text = (int(flags.sum()) for flags in reversed(kinds(alone)))
    assert float(guidance_loss(ones[:, :, :n_audio, :n_text], find_streams(alone), alone)) == 0.0


def test_the_guidance_of_the_loss_is_the_mean_over_the_layers_and_zero_unless_asked_for():
    model, rows, traces = open_model(**CROSS_ONLY), conversation(EVERY_ORDER), Traces()
    depth_rows = pick_depth_rows(rows.targets, 1.0, torch.Generator())
    with torch.inference_mode():
        model.hidden(rows, rows.allowed(), traces=traces, maps=True)
        each = [guidance_loss(weights, find_streams(rows), rows) for weights in traces.maps]
        assert not torch.isclose(each[0], each[1])
        torch.testing.assert_close(model.loss(rows, depth_rows, True).guidance, (each[0] + each[1]) / 2)
        assert float(model.loss(rows, depth_rows).guidance) == 0.0


def test_descending_the_guidance_loss_makes_a_map_more_diagonal():
    rows = one_turn(12, 24)
    streams = find_streams(rows)
    (layer,) = layers(1)
    x = torch.randn(1, rows.tokens.size(1), 32)
    far = ((torch.arange(24) + 0.5) / 24)[:, None] - (torch.arange(12) + 0.5) / 12

    def step(optimizer):
        maps = []
        layer(x, streams, maps=maps)
        optimizer.zero_grad()
        (guidance_loss(maps[0], streams, rows) / 24).backward()
        optimizer.step()
        return float((maps[0].detach().mean(dim=1) * far.abs()).sum() / 24)

    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    distances = [step(optimizer) for _ in range(60)]
    assert distances[-1] < 0.5 * distances[0]


def test_progress_says_where_in_its_turn_a_row_stands():
    turns = torch.tensor([[0, 0, 0, 0, 1, 1, 3, 3, 3, -1, -1]])
    flags = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    share, total = progress(flags, turns)
    live = flags & (turns >= 0)
    torch.testing.assert_close(share[live], torch.tensor([0.25, 0.75, 0.5, 1 / 6, 3 / 6, 5 / 6]))
    assert total[0, :9].tolist() == [2, 2, 2, 2, 1, 1, 3, 3, 3]


def test_a_store_to_which_nothing_is_added_is_not_copied():
    store = KeyStore()
    empty, some = torch.zeros(1, 2, 0, 4), torch.ones(1, 2, 3, 4)
    assert store.append(empty, empty)[0].size(2) == 0
    store.append(some, 2 * some)
    before = store.keys, store.values
    keys, values = store.append(empty, empty)
    assert keys is store.keys is before[0] and values is store.values is before[1]
    assert store.append(some, some)[1][0, 0, :, 0].tolist() == [2, 2, 2, 1, 1, 1]
