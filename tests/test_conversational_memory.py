"""ConversationalMemory: the delta rule and its parallel form, decay, gradients, state, and that it can be learnt."""

import math
import re

import pytest
import torch
from conftest import full_config, full_model, tiny_config
from safetensors.torch import load_file

from architecture import CSM, CSMCache, count_targets, pick_depth_rows
from audio import FRAME_RATE
from checkpointing import save_tensors
from conversational_memory import (
    LONGEST,
    N_WRITES,
    PROSODIC_SECONDS,
    SEMANTIC_SECONDS,
    SHORTEST,
    ConversationalMemory,
    MemoryCache,
    MemoryState,
    MemoryStore,
    TurnTimes,
    Writes,
    find_turns,
    prosody_loss,
    prosody_targets,
    turn_prosody,
)
from frames import Clock, Rows, Turn, concatenate

LAYOUT = full_config().layout
TALKS = [
    [("speak", 9), ("joint", 14), ("speak", None), ("listen", 6)],
    [("speak", None), ("speak", 4), ("speak", 0), ("speak", 7)],
    [("listen", 5)],
]


def turn_parts(turns, seed: int = 0, gap: float = 40.0) -> list[Rows]:
    """One conversation of (order, frames) turns, `gap` frames of silence between them; `None` frames: text only."""
    generator = torch.Generator().manual_seed(seed)
    clock, parts = Clock(), []
    for i, (order, n_frames) in enumerate(turns):
        ids = torch.randint(0, 256, (6,), generator=generator).tolist()
        codes = None if n_frames is None else torch.randint(0, 16, (n_frames, 4), generator=generator)
        prosody = torch.randn(6, generator=generator)
        parts.append(LAYOUT.turn_rows(Turn(ids, codes, 2, order, gap * i, prosody), clock))
    return parts


def conversation(turns, **options) -> Rows:
    return concatenate(turn_parts(turns, **options)).batch()


def packed(conversations: list[Rows], length: int) -> Rows:
    """Conversations (T, ...) in one row of `length`, numbered through and padded as the data pipeline does."""
    parts, n_turns = [], 0
    for i, rows in enumerate(conversations):
        numbers = {"documents": rows.documents + i, "conversations": rows.conversations + i}
        parts.append(rows._replace(**numbers, turns=rows.turns + n_turns))
        n_turns += int(rows.turns.max()) + 1
    rows = concatenate(parts)
    fill = Rows(0, False, -100, 0, -1, -1, -1, 0.0, math.nan)
    pads = [x.new_full((length - len(x), *x.shape[1:]), value) for x, value in zip(rows, fill, strict=True)]
    return Rows(*(torch.cat(pair) for pair in zip(rows, pads, strict=True)))


def stacked(rows: list[Rows]) -> Rows:
    return Rows(*(torch.stack(column) for column in zip(*rows, strict=True)))


def packed_batch() -> Rows:
    """Two rows of packed conversations of unlike lengths, with padding."""
    talks = [concatenate(turn_parts(turns, seed)) for seed, turns in enumerate(TALKS)]
    return stacked([packed(talks, 150), packed([talks[1], talks[1]], 150)])


def open_memory(semantic: int = 2, prosodic: int = 2, seed: int = 0) -> ConversationalMemory:
    """Width 32, large weights, gates 0.7, half-lives of the order of the gaps."""
    torch.manual_seed(seed)
    memory = ConversationalMemory(32, semantic, prosodic, 8, 4)
    with torch.no_grad():
        for parameter in memory.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
        for store in memory.stores.values():
            store.gate.fill_(0.7)
            store.log_half_life.copy_(torch.linspace(0.5, 2.5, store.n_heads))
            store.strength.bias.normal_()
    return memory


def step_by_step(memory: ConversationalMemory, x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """What `forward` should give, turn after turn with the plain recurrence M <- M + b (v - M k) k^T."""
    states, turns = memory.norm(x), find_turns(rows)
    writes = memory.writes(states, turns, turn_prosody(rows, turns))
    out = x.clone()
    for b in range(x.size(0)):
        for conversation_index in rows.conversations[b].unique().tolist():
            if conversation_index < 0:
                continue
            own = rows.turns[b][rows.conversations[b] == conversation_index].unique().tolist()
            for name, store in memory.stores.items():
                w, matrix, now = writes[name], torch.zeros(store.n_heads, store.d_value, store.d_key), 0.0
                half_lives = store.half_lives()[:, None, None]
                for turn in own:
                    members = rows.turns[b] == turn
                    begin = rows.times[b, members].min() / FRAME_RATE
                    faded = matrix * 2 ** (-(begin - now).clamp(min=0) / half_lives)
                    q = store.queries(states[b : b + 1, members])[0]  # (H, t, Dk)
                    read = torch.einsum("htk,hvk->thv", q, faded).flatten(1)
                    out[b, members] += store.gate.tanh() * store.out(read)
                    audio = members & rows.mask[b, :, :-1].any(dim=-1)
                    end = rows.times[b, audio if audio.any() else members].max() / FRAME_RATE
                    matrix, now = matrix * 2 ** (-(end - now).clamp(min=0) / half_lives), end
                    for i in range(turn * N_WRITES, (turn + 1) * N_WRITES):
                        k, v, strength = w.keys[b, :, i], w.values[b, :, i], w.strengths[b, :, i]
                        old = torch.einsum("hvk,hk->hv", matrix, k)
                        matrix = matrix + torch.einsum("h,hv,hk->hvk", strength, v - old, k)
    return out


def run_cached(memory: ConversationalMemory, x: torch.Tensor, parts: list[Rows], cache: MemoryCache, piece: int = 5):
    """(1, T, 32) over the turns of one conversation, each read in pieces and then written."""
    out, start = [], 0
    for rows in (part.batch() for part in parts):
        T = rows.tokens.size(1)
        for low in range(0, T, piece):
            part = Rows(*(column[:, low : low + piece] for column in rows))
            out.append(memory.read(x[:, start + low : start + low + part.tokens.size(1)], part, cache))
        memory.end_turn(cache, rows.prosody[:, 0])
        start += T
    return torch.cat(out, dim=1)


def test_the_parallel_form_equals_the_recurrence_turn_by_turn():
    memory, rows = open_memory(), packed_batch()
    x = torch.randn(2, 150, 32)
    with torch.no_grad():
        out, _ = memory(x, rows, find_turns(rows))
        torch.testing.assert_close(out, step_by_step(memory, x, rows), atol=2e-5, rtol=1e-4)
    later = rows.turns[0] == 3  # the last turn of the first conversation
    assert ((out - x)[0, later].abs().max(dim=-1).values > 0.01).all()


@pytest.mark.parametrize("stores", [(2, 2), (3, 0), (0, 1)], ids=["both", "semantic", "prosodic"])
@pytest.mark.parametrize("piece", [1, 5, 1000])
def test_reading_and_writing_turn_by_turn_equals_the_parallel_form(stores, piece):
    memory = open_memory(*stores)
    for seed, turns in enumerate(TALKS):
        parts = turn_parts(turns, seed)
        rows = concatenate(parts).batch()
        x = torch.randn(1, rows.tokens.size(1), 32)
        with torch.no_grad():
            whole, _ = memory(x, rows, find_turns(rows))
            out = run_cached(memory, x, parts, MemoryCache(memory.empty(1)), piece)
        torch.testing.assert_close(out, whole, atol=2e-5, rtol=1e-4)


def test_a_new_memory_is_an_exact_no_op_but_its_output_matrix_is_not_zero():
    torch.manual_seed(0)
    memory, rows = ConversationalMemory(32, 2, 2, 8, 4), packed_batch()
    x = torch.randn(2, 150, 32)
    out, _ = memory(x, rows, find_turns(rows))
    assert torch.equal(out, x)
    assert all(store.out.weight.std() > 0.01 for store in memory.stores.values())


def test_a_new_model_with_a_memory_gives_exactly_the_states_of_the_one_without():
    none = {"semantic_heads": 0, "prosodic_heads": 0}
    plain = full_model(**none)
    model = CSM(full_config()).eval()
    missing, unknown = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unknown and all(name.startswith("memory.") for name in missing)
    rows = packed_batch()
    with torch.inference_mode():
        assert torch.equal(model.hidden(rows, rows.allowed()), plain.hidden(rows, rows.allowed()))


def test_the_first_gradient_step_moves_the_gates_and_the_second_all_that_the_read_depends_on():
    torch.manual_seed(0)
    memory, rows = ConversationalMemory(32, 2, 2, 8, 4), packed_batch()
    x, wanted = torch.randn(2, 150, 32), torch.randn(2, 150, 32)
    optimizer = torch.optim.SGD(memory.parameters(), lr=0.1)
    own = {n: p for n, p in memory.named_parameters() if "prosody_head" not in n}
    moved = []
    for _ in range(2):
        before = {name: parameter.detach().clone() for name, parameter in own.items()}
        optimizer.zero_grad()
        out, _ = memory(x, rows, find_turns(rows))
        ((out - wanted) ** 2).sum().backward()
        optimizer.step()
        moved.append({name for name, parameter in own.items() if not torch.equal(parameter, before[name])})
    assert moved[0] == {"stores.semantic.gate", "stores.prosodic.gate"}
    assert moved[1] == set(own)


def one_store(d_key: int = 4, d_value: int = 3, n_heads: int = 1) -> MemoryStore:
    torch.manual_seed(0)
    return MemoryStore(32, n_heads, d_key, d_value, SEMANTIC_SECONDS, 0)


def writes_of(keys, values, strengths) -> Writes:
    """Writes of one head and one conversation."""
    parts = (torch.tensor(part, dtype=torch.float32)[None, None] for part in (keys, values, strengths))
    return Writes(*parts)


FIRST, SECOND = [1.0, 0, 0, 0], [0, 1.0, 0, 0]


@pytest.mark.parametrize(
    ("keys", "values", "strengths", "asked", "found"),
    [
        ([FIRST], [[1, 2, 3]], [1.0], FIRST, [1, 2, 3]),
        ([FIRST], [[1, 2, 3]], [0.5], FIRST, [0.5, 1, 1.5]),
        ([FIRST], [[1, 2, 3]], [0.0], FIRST, [0, 0, 0]),
        ([FIRST, FIRST], [[1, 2, 3], [4, 5, 6]], [1.0, 1.0], FIRST, [4, 5, 6]),
        ([FIRST, FIRST], [[1, 2, 3], [4, 5, 6]], [1.0, 0.25], FIRST, [1.75, 2.75, 3.75]),
        ([FIRST, SECOND], [[1, 2, 3], [4, 5, 6]], [1.0, 1.0], FIRST, [1, 2, 3]),
        ([FIRST, SECOND], [[1, 2, 3], [4, 5, 6]], [1.0, 1.0], SECOND, [4, 5, 6]),
        ([FIRST], [[1, 2, 3]], [1.0], [0.6, 0.8, 0, 0], [0.6, 1.2, 1.8]),
        ([FIRST], [[1, 2, 3]], [1.0], SECOND, [0, 0, 0]),
    ],
    ids=[
        "a read returns the value",
        "half strength",
        "no strength",
        "one key overwrites",
        "in part",
        "orthogonal keys do not disturb the first",
        "nor the second",
        "a similar key finds a share",
        "an orthogonal key finds nothing",
    ],
)
def test_the_delta_rule_gives_the_known_answer(keys, values, strengths, asked, found):
    store, writes = one_store(), writes_of(keys, values, strengths)
    matrices = store.update(torch.zeros(1, 1, 3, 4), writes)
    torch.testing.assert_close(matrices[0, 0] @ torch.tensor(asked), torch.tensor(found, dtype=torch.float32))

    # The parallel form: a turn for every pair of writes, read by one row of a turn after them, all at one time.
    n = len(keys) + len(keys) % 2
    empty = Writes(torch.zeros(1, 1, n - len(keys), 4), torch.zeros(1, 1, n - len(keys), 3), torch.zeros(1, 1, 0))
    empty = empty._replace(strengths=torch.zeros(1, 1, n - len(keys)))
    after = Writes(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2))
    padded = Writes(*(torch.cat(columns, dim=2) for columns in zip(writes, empty, after, strict=True)))
    N = n // 2 + 1
    turns = TurnTimes(torch.zeros(1, N), torch.zeros(1, N), torch.zeros(1, N, dtype=torch.int64), None, None)
    with torch.no_grad():
        store.query.weight.zero_()
        store.query.weight[:, 0] = torch.tensor(asked)
    read = store.read_all(torch.ones(1, 1, 32), padded, turns, torch.tensor([[N - 1]]))
    torch.testing.assert_close(read[0, 0], torch.tensor(found, dtype=torch.float32))


@pytest.mark.parametrize(
    ("semantic", "prosodic", "half_life"), [(1, 0, SEMANTIC_SECONDS[0]), (0, 1, PROSODIC_SECONDS[0])]
)
def test_a_silence_of_one_half_life_halves_what_is_read(semantic, prosodic, half_life):
    memory = open_memory(semantic, prosodic)
    (store,) = memory.stores.values()
    with torch.no_grad():
        store.log_half_life.fill_(math.log(half_life))

    def changes(silence: float) -> list[torch.Tensor]:
        """What a second turn reads after so many seconds, both ways."""
        parts = turn_parts([("speak", 9), ("speak", 5)], gap=silence * FRAME_RATE)
        rows = concatenate(parts).batch()
        x = torch.randn(1, rows.tokens.size(1), 32, generator=torch.Generator().manual_seed(1))
        later = rows.turns[0] == 1
        whole, _ = memory(x, rows, find_turns(rows))
        cached = run_cached(memory, x, parts, MemoryCache(memory.empty(1)))
        return [(out - x)[0, later] for out in (whole, cached)]

    with torch.no_grad():
        for at_once, after_one, after_three in zip(
            changes(0.0), changes(half_life), changes(3 * half_life), strict=True
        ):
            assert at_once.abs().max() > 0.01
            torch.testing.assert_close(after_one, at_once / 2, atol=5e-7, rtol=1e-4)
            torch.testing.assert_close(after_three, at_once / 8, atol=5e-7, rtol=1e-4)


def test_a_long_turn_fades_what_was_stored_before_it():
    store = one_store()
    with torch.no_grad():
        store.log_half_life.fill_(math.log(2.0))
    memory = open_memory(1, 0)
    memory.stores["semantic"] = store
    cache = MemoryCache(memory.empty(1)._replace(matrices=(torch.ones(1, 1, 3, 4),)))
    rows = turn_parts([("speak", 50)])[0].batch()  # 50 frames: 4 s, two half-lives
    with torch.no_grad():
        store.strength.bias.fill_(-100.0)  # writes nothing
        memory.read(torch.randn(1, rows.tokens.size(1), 32), rows, cache)
        memory.end_turn(cache, rows.prosody[:, 0])
    torch.testing.assert_close(cache.state.matrices[0], torch.full((1, 1, 3, 4), 0.25))
    assert float(cache.state.seconds) == 4.0


def test_half_lives_start_evenly_in_their_logarithm():
    memory = ConversationalMemory(32, 4, 3, 8, 4)
    for name, (low, high) in (("semantic", SEMANTIC_SECONDS), ("prosodic", PROSODIC_SECONDS)):
        half_lives = memory.stores[name].half_lives()
        assert half_lives[0].item() == pytest.approx(low, rel=1e-5)
        assert half_lives[-1].item() == pytest.approx(high, rel=1e-5)
        ratios = half_lives[1:] / half_lives[:-1]
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


def test_half_lives_are_held_between_their_bounds():
    store = one_store(n_heads=2)
    with torch.no_grad():
        store.log_half_life.copy_(torch.tensor([-50.0, 50.0]))
    torch.testing.assert_close(store.half_lives(), torch.tensor([SHORTEST, LONGEST]))


def test_every_half_life_gets_a_gradient_and_a_longer_one_keeps_more():
    memory, rows = open_memory(2, 2), conversation([("speak", 9), ("speak", 5)], gap=25.0)
    x = torch.randn(1, rows.tokens.size(1), 32)
    out, _ = memory(x, rows, find_turns(rows))
    ((out - x) ** 2).sum().backward()
    assert all((store.log_half_life.grad != 0).all() for store in memory.stores.values())
    store = memory.stores["semantic"]
    left = store.decay(torch.tensor([2.0]))[0]
    assert left[1] > left[0]


def test_gradients_of_the_last_turns_read_reach_the_first_turns_states_through_all_turns():
    memory = open_memory()
    parts = turn_parts([("speak", 5)] * 5, gap=5.0)
    rows = concatenate(parts).batch()
    x = torch.randn(1, rows.tokens.size(1), 32, requires_grad=True)
    read = torch.randn(rows.tokens.size(1), 32)
    last, own = (rows.turns[0] == 4)[:, None], (rows.turns[0] == 4)

    def gradient(out):
        (found,) = torch.autograd.grad(((out - x)[0] * read * last).sum(), x)
        return found[0]

    parallel = gradient(memory(x, rows, find_turns(rows))[0])
    by_steps = gradient(step_by_step(memory, x, rows))
    cached = gradient(run_cached(memory, x, parts, MemoryCache(memory.empty(1))))
    assert (parallel.abs().max(dim=-1).values > 0)[~own].all()  # every row of every earlier turn
    torch.testing.assert_close(parallel, by_steps, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(parallel, cached, atol=1e-4, rtol=1e-3)


def test_gradients_of_the_parallel_form_equal_finite_differences():
    torch.manual_seed(0)
    rows = concatenate(turn_parts([("speak", 2), ("speak", None), ("speak", 2)], gap=20.0)).batch()
    rows = rows._replace(times=rows.times.double())
    turns, T = find_turns(rows), rows.tokens.size(1)
    store = MemoryStore(6, 2, 3, 2, (1.0, 4.0), 6).double()
    with torch.no_grad():
        for parameter in store.parameters():
            if parameter.ndim > 1:
                parameter.mul_(30)
    prosody = turn_prosody(rows, turns).double()
    speaker = torch.randn(1, 3, 6, dtype=torch.float64)
    last = rows.turns[0] == 2

    def read(states, prosody, speaker):
        writes = store.writes(states, turns.text, speaker, prosody)
        return store.read_all(states, writes, turns, rows.turns)[0, last]

    states = torch.randn(1, T, 6, dtype=torch.float64, requires_grad=True)
    arguments = (states, prosody.requires_grad_(), speaker.requires_grad_())
    first = torch.autograd.grad(read(*arguments).abs().sum(), states)[0][0, rows.turns[0] == 0]
    assert first.abs().max() > 1e-3
    assert torch.autograd.gradcheck(read, arguments)


def test_permuting_a_batch_permutes_the_results():
    memory = open_memory()
    talks = [packed([concatenate(turn_parts(turns, seed))], 90) for seed, turns in enumerate(TALKS)]
    x, order = torch.randn(3, 90, 32), [2, 0, 1]
    rows, moved = stacked(talks), stacked([talks[i] for i in order])
    with torch.no_grad():
        out, expected = memory(x, rows, find_turns(rows))
        again, expected_again = memory(x[order], moved, find_turns(moved))
    torch.testing.assert_close(again, out[order], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(expected_again, expected[order], atol=1e-6, rtol=1e-5)


def test_a_conversation_does_not_depend_on_its_neighbours_in_batch_row_or_padding():
    memory = open_memory()
    talks = [concatenate(turn_parts(turns, seed)) for seed, turns in enumerate(TALKS)]
    xs = [torch.randn(len(rows.tokens), 32) for rows in talks]
    alone = [memory(x[None], rows.batch(), find_turns(rows.batch()))[0][0] for x, rows in zip(xs, talks, strict=True)]
    for order in ([0, 1, 2], [2, 0, 1]):
        rows = stacked([packed([talks[i] for i in order], 150), packed(talks[:1], 150)])
        x = torch.zeros(2, 150, 32)
        joined = torch.cat([xs[i] for i in order])
        x[0, : len(joined)] = joined
        out, _ = memory(x, rows, find_turns(rows))
        found = out[0, : len(joined)].split([len(xs[i]) for i in order])
        for i, own in zip(order, found, strict=True):
            torch.testing.assert_close(own, alone[i], atol=2e-5, rtol=1e-4)


def test_no_gradient_crosses_from_one_conversation_to_another():
    memory, rows = open_memory(), packed_batch()
    x = torch.randn(2, 150, 32, requires_grad=True)
    out, expected = memory(x, rows, find_turns(rows))
    second = rows.conversations[0] == 1
    (found,) = torch.autograd.grad(out[0, second].sum() + expected[0, second].sum(), x)
    assert not found[0, ~second].any() and not found[1].any()
    assert found[0, second].any(dim=-1).float().mean() > 0.5


def state_bytes(cache: MemoryCache) -> int:
    tensors = [*cache.state.to_tensors().values(), *cache.current, *cache.states]
    return sum(t.nbytes for t in tensors) + sum(column.nbytes for rows in cache.rows for column in rows)


def test_the_memory_does_not_grow_with_the_turns():
    memory, sizes = open_memory(), []
    cache = MemoryCache(memory.empty(1))
    with torch.no_grad():
        for part in turn_parts([("speak", 5)] * 12):
            run_cached(memory, torch.randn(1, len(part.tokens), 32), [part], cache)
            sizes.append(state_bytes(cache))
    matrices = 4 * (2 + 2) * 8 * 4
    assert set(sizes) == {2 * matrices + 4}  # the state, its faded copy, and the time


def test_a_saved_memory_goes_on_bit_for_bit(tmp_path):
    memory = open_memory()
    parts = turn_parts([("speak", 9), ("joint", 8), ("speak", 5), ("listen", 4)])
    xs = [torch.randn(1, len(part.tokens), 32) for part in parts]
    with torch.no_grad():
        cache = MemoryCache(memory.empty(1))
        run_cached(memory, torch.cat(xs[:2], dim=1), parts[:2], cache)
        save_tensors(tmp_path / "memory.safetensors", cache.state.to_tensors())
        restored = MemoryState.from_tensors(load_file(tmp_path / "memory.safetensors"), memory.empty(1))
        second = MemoryCache(restored)
        rest = torch.cat(xs[2:], dim=1)
        expected, found = (run_cached(memory, rest, parts[2:], c) for c in (cache, second))
    assert torch.equal(found, expected)
    assert not torch.equal(found, rest)
    for one, other in zip(second.state.to_tensors().values(), cache.state.to_tensors().values(), strict=True):
        assert torch.equal(one, other)


def test_a_memory_that_does_not_fit_is_refused_by_the_name_of_the_tensor():
    memory = open_memory()
    like = memory.empty(1)
    for name, tensor in like.to_tensors().items():
        tensors = like.to_tensors()
        tensors[name] = torch.zeros(5, 7)
        message = re.escape(f"tensor {name} is (5, 7), expected {tuple(tensor.shape)}")
        with pytest.raises(ValueError, match=message):
            MemoryState.from_tensors(tensors, like)
        del tensors[name]
        with pytest.raises(ValueError, match=f"tensor {name} is missing"):
            MemoryState.from_tensors(tensors, like)
    other = open_memory(1, 2).empty(1)
    with pytest.raises(ValueError, match=r"matrices\.0"):
        MemoryState.from_tensors(other.to_tensors(), like)


def test_a_turn_is_read_before_it_is_written_and_seen_from_the_next_turn_on():
    memory, rows = open_memory(), conversation([("speak", 5), ("joint", 9), ("speak", 5)])
    x = torch.randn(1, rows.tokens.size(1), 32)

    def reads(x):
        return memory(x, rows, find_turns(rows))[0] - x

    turns = rows.turns[0]
    changed = x.clone()
    changed[0, turns == 1] += torch.randn(int((turns == 1).sum()), 32)
    with torch.no_grad():
        before, after = reads(x)[0], reads(changed)[0]
    assert not before[turns == 0].any()
    assert torch.equal(before[turns == 0], after[turns == 0])
    assert not torch.isclose(before[turns == 2], after[turns == 2]).all(dim=-1).any()

    # Its own rows read with other queries, so let one row alone change: the others of the turn must not notice.
    for row in (turns == 1).nonzero().squeeze(1).tolist():
        changed = x.clone()
        changed[0, row] += 1.0
        with torch.no_grad():
            after = reads(changed)[0]
        others = turns < 2
        others[row] = False
        torch.testing.assert_close(after[others], before[others], atol=1e-6, rtol=1e-6)


def test_the_sound_of_a_turn_reaches_later_turns_only():
    model, rows = full_model(), conversation([("speak", 5), ("joint", 9), ("speak", 5)])
    sound = rows.prosody.clone().requires_grad_()
    states = model.hidden(rows._replace(prosody=sound), rows.allowed())
    turns = rows.turns[0]
    for turn in range(3):
        (found,) = torch.autograd.grad(states[0, turns == turn].sum(), sound, retain_graph=True)
        reached = turns[found[0].any(dim=-1)].unique().tolist()
        assert reached == list(range(turn))


def test_writing_twice_or_before_reading_is_a_mistake():
    memory = open_memory()
    cache = MemoryCache(memory.empty(1))
    (part,) = turn_parts([("speak", 5)])
    with pytest.raises(AssertionError):
        memory.end_turn(cache, part.prosody[:1])
    with torch.no_grad():
        run_cached(memory, torch.randn(1, len(part.tokens), 32), [part], cache)
    with pytest.raises(AssertionError):
        memory.end_turn(cache, part.prosody[:1])


def test_a_cached_conversation_is_read_turn_by_turn():
    memory, rows = open_memory(), conversation([("speak", 5), ("speak", 5)])
    with pytest.raises(AssertionError, match="turn by turn"):
        memory.read(torch.randn(1, rows.tokens.size(1), 32), rows, MemoryCache(memory.empty(1)))


def test_the_prosody_loss_compares_what_the_row_before_the_voice_expects():
    rows = conversation([("speak", 5), ("speak", None), ("listen", 4)])
    turns = find_turns(rows)
    expected = torch.full((1, rows.tokens.size(1), 6), 100.0)
    audio = rows.mask[0, :, :-1].any(dim=-1)
    first = [int((audio & (rows.turns[0] == turn)).nonzero()[0]) for turn in (0, 2)]
    sounds = [rows.prosody[0, row] for row in first]
    expected[0, first[0] - 1] = sounds[0] + torch.tensor([1.0, 0, 0, 0, 0, 2])
    expected[0, first[1] - 1] = sounds[1] + torch.tensor([0.0, 3, 0, 0, 0, 0])
    assert float(prosody_loss(expected, rows, turns)) == pytest.approx(1 + 4 + 9, rel=1e-5)


def test_features_that_were_not_measured_and_turns_without_voice_have_no_prosody_loss():
    rows = conversation([("speak", 5), ("speak", None), ("speak", 4)])
    prosody = rows.prosody.clone()
    prosody[:, rows.turns[0] == 0, 2] = math.nan
    prosody[:, rows.turns[0] == 2] = math.nan
    rows = rows._replace(prosody=prosody)
    turns = find_turns(rows)
    assert (~prosody_targets(rows, turns).isnan()).sum(dim=-1).tolist() == [[5, 0, 0]]
    expected = torch.zeros(1, rows.tokens.size(1), 6, requires_grad=True)
    loss = prosody_loss(expected, rows, turns)
    torch.testing.assert_close(loss, prosody[0, 0].nan_to_num(0.0).square().sum())
    loss.backward()
    assert expected.grad.isfinite().all()
    assert expected.grad[0].any(dim=-1).nonzero().squeeze(1).tolist() == [5]  # the row before the first turn's voice
    assert expected.grad[0, 5, 2] == 0


def test_of_a_first_turn_the_memory_expects_its_bias():
    memory, rows = open_memory(), conversation([("speak", 5), ("speak", 5)])
    with torch.no_grad():
        memory.prosody_head.bias.normal_()
        _, expected = memory(torch.randn(1, rows.tokens.size(1), 32), rows, find_turns(rows))
    first = rows.turns[0] == 0
    assert (expected[0, first] == memory.prosody_head.bias).all()
    assert not torch.isclose(expected[0, ~first], memory.prosody_head.bias).all(dim=-1).any()


def test_the_expected_prosody_trains_the_store_before_its_gate_opens():
    model = CSM(full_config())
    rows = conversation([("speak", 5), ("speak", 5), ("speak", 4)])
    model.loss(rows, pick_depth_rows(rows.targets, 1.0, torch.Generator())).memory.backward()
    store = model.memory.stores["prosodic"]
    assert store.value.weight.grad.any() and store.key.weight.grad.any() and store.query.weight.grad.any()


def test_a_text_only_turn_writes_the_semantic_store_but_not_the_prosodic_one():
    memory = open_memory()
    cache = MemoryCache(memory.empty(1))
    parts = turn_parts([("speak", None), ("speak", 5)])
    with torch.no_grad():
        run_cached(memory, torch.randn(1, len(parts[0].tokens), 32), parts[:1], cache)
        semantic, prosodic = cache.state.matrices
        assert semantic.any() and not prosodic.any()
        run_cached(memory, torch.randn(1, len(parts[1].tokens), 32), parts[1:], cache)
        assert cache.state.matrices[1].any()

    rows = concatenate(parts[:1] + turn_parts([("speak", None)] * 2)[1:]).batch()
    x = torch.randn(1, rows.tokens.size(1), 32)
    only_prosodic = open_memory(0, 2)
    with torch.no_grad():
        assert torch.equal(only_prosodic(x, rows, find_turns(rows))[0], x)


def test_the_parallel_form_computes_in_fp32_under_autocast():
    memory, rows = open_memory(), packed_batch()
    x = torch.randn(2, 150, 32)
    with torch.no_grad():
        out, expected = memory(x, rows, find_turns(rows))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again, expected_again = memory(x, rows, find_turns(rows))
    assert again.dtype == torch.float32
    assert torch.equal(again, out) and torch.equal(expected_again, expected)


def test_the_cached_form_computes_in_fp32_under_autocast():
    memory = open_memory()
    parts = turn_parts(TALKS[0])
    x = torch.randn(1, sum(len(part.tokens) for part in parts), 32)
    with torch.no_grad():
        caches = [MemoryCache(memory.empty(1)) for _ in range(2)]
        out = run_cached(memory, x, parts, caches[0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = run_cached(memory, x, parts, caches[1])
    assert torch.equal(again, out)
    for one, other in zip(caches[0].state.matrices, caches[1].state.matrices, strict=True):
        assert torch.equal(one, other)


def test_a_model_forgets_its_window_but_keeps_its_memory():
    model, parts = full_model(), turn_parts([("speak", 5), ("speak", 5)])
    with torch.inference_mode():
        cache = CSMCache(model)
        model.hidden(parts[0].batch(), cache=cache)
        model.end_turn(cache, parts[0].prosody[:1])
        cache.forget_context()
        second = parts[1]._replace(positions=parts[1].positions - len(parts[0].tokens))
        with_memory = model.hidden(second.batch(), cache=cache)
        without = model.hidden(second.batch(), cache=CSMCache(model))
        rows = concatenate([parts[0], second._replace(documents=second.documents + 1)]).batch()
        whole = model.hidden(rows, rows.allowed())[:, len(parts[0].tokens) :]
    torch.testing.assert_close(with_memory, whole, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(with_memory, without, atol=1e-2)


def style_config(with_memory: bool):
    heads = {"semantic_heads": 1, "memory_key": 16, "memory_value": 16} if with_memory else {}
    return tiny_config(n_codebooks=2, **heads)


def style_batch(config, size: int, generator: torch.Generator) -> tuple[Rows, torch.Tensor]:
    """Conversations of 3 or 4 turns and (size,) their styles 0..3.

    The first turn names the style in one byte of its text. The voice of each later turn is one frame with the style's
    code, which no input row shows, and every turn is a document of its own: only the memory can know it.
    """
    styles = torch.randint(0, 4, (size,), generator=generator)
    sequences = []
    for style in styles.tolist():
        clock, parts = Clock(), []
        for turn in range(int(torch.randint(3, 5, (1,), generator=generator))):
            filler = int(torch.randint(97, 123, (1,), generator=generator))
            ids = [256, 63 if turn else 65 + style, filler, 257]
            codes = torch.tensor([[style, 0]])
            rows = config.layout.turn_rows(Turn(ids, codes, len(ids), gap=12.5, learn=turn > 0), clock)
            rows.mask[len(ids) :, :-1] = False
            own = {"positions": torch.arange(len(rows.tokens)), "documents": torch.full_like(rows.documents, turn)}
            parts.append(rows._replace(**own))
        sequences.append(packed([concatenate(parts)], 24))
    return stacked(sequences), styles


def style_recall(with_memory: bool, steps: int = 150) -> float:
    """Share of later turns that a trained model answers with the style of the first, on new conversations."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = CSM(style_config(with_memory))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    batches = [style_batch(model.config, 32, generator)[0] for _ in range(20)]
    for step in range(steps):
        rows = batches[step % len(batches)]
        depth_rows = pick_depth_rows(rows.targets, 0.05, generator)
        loss = model.loss(rows, depth_rows).codebook0 / count_targets(rows, depth_rows).codebook0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows, styles = style_batch(model.config, 200, generator)
    with torch.inference_mode():
        answers = model.codebook0_head(model.hidden(rows, rows.allowed())).argmax(dim=-1)
    asked = (rows.targets[..., 0] >= 0) & (rows.targets[..., 0] < 16)  # not the end of turn
    assert torch.equal(rows.targets[..., 0][asked], styles[:, None].expand_as(answers)[asked])
    return float((answers == styles[:, None])[asked].float().mean())


def test_a_style_shown_once_outside_the_window_is_recalled_with_the_memory_and_not_without():
    assert style_recall(with_memory=False) < 0.45
    assert style_recall(with_memory=True) > 0.95
