"""Published layouts: exact round trips, the same logits from each, what does not fit is named."""

import pytest
import torch
from conftest import full_config, full_model, tiny_config, tiny_model
from safetensors.torch import save_file
from test_architecture import conversation_rows, conversation_turns, every_frame, loss_of, transformers_twin

import weight_layouts
from architecture import ADDED, CSMCache, load_model, save_model
from command_line import EXIT_DONE, EXIT_INPUT, run
from frames import IGNORE, Clock, concatenate
from generation import Sampling, Speaker
from transformer import TransformerConfig, rope_frequencies
from weight_layouts import (
    TIED_AUDIO,
    from_sesame,
    from_transformers,
    half_rows,
    interleaved_rows,
    load_published,
    save_published,
    to_sesame,
    to_transformers,
)

STACK = TransformerConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, rope_scale=32)
CSM_LIKE = {"zero_end_of_turn": True, "n_special_codes": 3, "backbone": STACK, "depth": STACK}


@pytest.fixture
def csm():
    return tiny_model(**CSM_LIKE)


@pytest.mark.parametrize(("there", "back"), [(to_sesame, from_sesame), (to_transformers, from_transformers)])
def test_round_trips_are_exact(csm, there, back):
    own = csm.state_dict()
    again = back(there(own, csm.config), csm.config)
    assert again.keys() == own.keys()
    assert all(torch.equal(again[name], own[name]) for name in own)


def test_names_are_the_published_ones(csm):
    sesame = to_sesame(csm.state_dict(), csm.config)
    assert {
        "audio_head",
        "decoder.layers.1.attn.output_proj.weight",
        "backbone.layers.0.sa_norm.scale",
    } <= sesame.keys()
    theirs = transformers_twin(csm).state_dict()
    ours = to_transformers(csm.state_dict(), csm.config)
    missing = {name for name in theirs if not name.startswith("codec_model.")} - ours.keys()
    assert missing == {TIED_AUDIO[0]}
    assert all(theirs[name].shape == tensor.shape for name, tensor in ours.items())


def test_interleaved_rotation_of_sesames_rows_equals_ours_of_the_permuted_rows():
    d, x = STACK.d_head, torch.randn(5, 32)
    weight = torch.randn(4 * d, 32)  # as Sesame stores it
    angles = torch.arange(5)[:, None].float() * rope_frequencies(STACK)  # (5, d / 2)
    pairs = (x @ weight.T).view(5, 4, d // 2, 2)  # torchtune: channels 2i and 2i + 1 turn together
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    ours = (x @ half_rows(weight, d).T).view(5, 4, d)
    real, imaginary = ours[..., : d // 2], ours[..., d // 2 :]
    rotated = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(rotated, turned)
    assert torch.equal(interleaved_rows(half_rows(weight, d), d), weight)
    assert not torch.equal(half_rows(weight, d), weight)


@pytest.mark.parametrize("layout", ["sesame", "transformers"])
def test_a_published_file_gives_the_same_model(tmp_path, csm, layout):
    save_published(csm, tmp_path, layout)
    loaded = load_published(tmp_path, csm.config)
    rows = conversation_rows(csm.config)
    hidden = [model.hidden(rows) for model in (csm, loaded)]
    assert torch.equal(*hidden)
    codes = torch.randint(0, 16, (3, 4))
    assert torch.equal(*(model.depth_logits(hidden[0][0, :3], codes) for model in (csm, loaded)))


ADDITIONS = {"cross_attention_every": 1, "semantic_heads": 2, "prosodic_heads": 2, "memory_key": 8, "memory_value": 8}


@pytest.mark.parametrize("layout", ["sesame", "transformers"])
@pytest.mark.parametrize("additions", [ADDITIONS, {**ADDITIONS, "text_head": True, "n_semantic": 2}])
def test_a_published_file_in_a_model_with_additions_gives_the_same_states_until_they_learn(
    tmp_path, csm, layout, additions
):
    save_published(csm, tmp_path, layout)
    extended = tiny_config(**CSM_LIKE, **additions)
    torch.manual_seed(3)
    loaded = load_published(tmp_path, extended)
    assert loaded.config == extended
    rows = conversation_rows(csm.config, 3)
    with torch.no_grad():
        assert torch.equal(csm.hidden(rows), loaded.hidden(rows))
        losses = [model.loss(rows, every_frame(rows)) for model in (csm, loaded)]
        assert torch.equal(losses[0].codebook0, losses[1].codebook0)
        assert torch.equal(losses[0].depth, losses[1].depth)
        added = {name: p for name, p in loaded.named_parameters() if name.startswith(ADDED)}
        assert all(torch.isfinite(parameter).all() for parameter in added.values())
        for name, parameter in added.items():
            if name.endswith("gate"):
                assert parameter.item() == 0
                parameter.fill_(5.0)
        assert not torch.equal(csm.hidden(rows), loaded.hidden(rows))  # the additions are there
    torch.manual_seed(3)
    again = load_published(tmp_path, extended)
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in added.items() if not n.endswith("gate"))


@pytest.mark.parametrize("layout", ["sesame", "transformers"])
@pytest.mark.parametrize("name", ["cross_attention_every", "semantic_heads", "prosodic_heads", "acoustic_delay"])
def test_a_model_with_an_addition_cannot_be_written_in_a_published_layout(tmp_path, layout, name):
    changes = {"cross_attention_every": 0, "semantic_heads": 0, "prosodic_heads": 0, "acoustic_delay": 0}
    value = getattr(full_config(), name)
    model = full_model(**{**changes, name: value})
    with pytest.raises(ValueError, match=f"{name}={value}: the layout {layout} cannot hold it; write ours"):
        save_published(model, tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()
    save_published(model, tmp_path / "out", "ours")
    rows = conversation_rows(model.config)
    assert torch.equal(load_model(tmp_path / "out").hidden(rows), model.hidden(rows))


@pytest.mark.parametrize("copies", [TIED_AUDIO[:1], TIED_AUDIO[1:], TIED_AUDIO])
def test_either_copy_of_the_tied_table_is_enough(tmp_path, csm, copies):
    tensors = to_transformers(csm.state_dict(), csm.config)
    table = tensors.pop(TIED_AUDIO[1])
    tensors |= {name: table.clone() for name in copies}
    tensors["codec_model.anything"] = torch.zeros(3)
    half = dict(list(tensors.items())[:9])
    save_file(half, tmp_path / "transformers-00001-of-00002.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if name not in half}
    save_file(rest, tmp_path / "transformers-00002-of-00002.safetensors")
    loaded = load_published(tmp_path, csm.config)
    assert torch.equal(loaded.audio_embedding.weight, table)


def test_two_copies_that_differ_are_refused(csm):
    tensors = to_transformers(csm.state_dict(), csm.config)
    tensors[TIED_AUDIO[0]] = tensors[TIED_AUDIO[1]] + 1
    with pytest.raises(ValueError, match=r"the tied tensors .* differ"):
        from_transformers(tensors, csm.config)


def test_what_does_not_fit_is_named(tmp_path, csm):
    tensors = {name: tensor.clone() for name, tensor in to_sesame(csm.state_dict(), csm.config).items()}
    del tensors["projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor projection.weight \(32, 32\) is missing"):
        load_published(tmp_path, csm.config)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is damaged"):
        load_published(tmp_path, csm.config)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise RuntimeError('a pickle was run')",))


def test_a_checkpoint_file_is_never_unpickled(tmp_path, csm):
    torch.save(to_sesame(csm.state_dict(), csm.config), tmp_path / "ckpt.pt")
    assert torch.equal(load_published(tmp_path, csm.config).projection.weight, csm.projection.weight)
    torch.save({"bomb": Bomb()}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="damaged or not a file of tensors"):
        load_published(tmp_path / "ckpt.pt", csm.config)
    for content, kind in (([torch.ones(2)], "list"), (torch.ones(2), "Tensor")):
        torch.save(content, tmp_path / "ckpt.pt")
        with pytest.raises(ValueError, match=f"holds a {kind}, expected a dict of tensors by name"):
            load_published(tmp_path / "ckpt.pt", csm.config)


def test_a_model_that_ends_turns_in_its_own_way_cannot_be_written_in_a_published_layout(tmp_path):
    with pytest.raises(ValueError, match="zero_end_of_turn=False"):
        save_published(tiny_model(), tmp_path / "out", "transformers")


def test_the_command_converts_ours_to_a_published_layout_and_back(tmp_path, csm, capsys):
    save_model(csm, tmp_path / "ours")
    assert run(weight_layouts.main, [str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "sesame"]) == EXIT_DONE
    loaded = load_published(tmp_path / "out", csm.config)
    assert torch.equal(loaded.depth_heads, load_model(tmp_path / "ours").depth_heads)
    assert run(weight_layouts.main, [str(tmp_path / "none"), str(tmp_path / "out")]) == EXIT_INPUT
    assert "no weights at" in capsys.readouterr().err
    assert tiny_config(**CSM_LIKE) == csm.config


def twin_inputs(twin, rows) -> torch.Tensor:
    """(1, T, D) inputs of transformers' backbone, by its own tables."""
    audio = twin.backbone_model.embed_tokens(rows.tokens[..., :-1])
    text = twin.embed_text_tokens(rows.tokens[..., -1])
    return torch.where(rows.mask[..., -1:], text, audio)


def test_loss_and_gradients_equal_those_of_transformers_csm():
    model = tiny_model(**CSM_LIKE, text_vocab_size=50)
    twin = transformers_twin(model)
    rows = conversation_rows(model.config, n_turns=3)
    labels = torch.where(rows.mask[..., :-1], rows.tokens[..., :-1], IGNORE)
    theirs = twin(inputs_embeds=twin_inputs(twin, rows), labels=labels).loss
    theirs.backward()
    ours = loss_of(model, rows, every_frame(rows))
    ours.backward()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = {name: parameter.grad for name, parameter in twin.named_parameters() if parameter.grad is not None}
    for name, gradient in to_transformers(gradients, model.config).items():
        if name not in TIED_AUDIO:
            torch.testing.assert_close(
                gradient, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    tied = sum(expected[name] for name in TIED_AUDIO if name in expected)
    torch.testing.assert_close(gradients["audio_embedding.weight"], tied, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_fifty_greedy_frames_equal_those_of_transformers_csm(seed):
    model = tiny_model(seed, **{**CSM_LIKE, "n_special_codes": 0}, text_vocab_size=258)
    twin = transformers_twin(model)
    layout, clock = model.config.layout, Clock()
    parts = [layout.turn_rows(turn, clock) for turn in conversation_turns(model.config)]
    clock.begin_turn()
    rows = concatenate([*parts, layout.text_rows([256, 72, 105, 257], 1, clock)]).batch()
    with torch.inference_mode():
        expected = []
        embedded = twin_inputs(twin, rows)
        for _ in range(50):
            hidden = twin.backbone_model(inputs_embeds=embedded).last_hidden_state[:, -1]
            frame = twin.lm_head(hidden).argmax(dim=-1, keepdim=True)  # (1, 1)
            for _ in range(1, model.config.n_codebooks):
                inputs = torch.nn.functional.pad(frame, (1, 0))
                logits = twin.depth_decoder(input_ids=inputs, backbone_last_hidden_state=hidden).logits
                frame = torch.cat((frame, logits[:, -1:].argmax(dim=-1)), dim=1)
            expected.append(frame[0])
            embedded = torch.cat((embedded, twin.backbone_model.embed_tokens(frame[None])), dim=1)

        cache = CSMCache(model)
        speaker = Speaker(model, Sampling(temperature=0), torch.Generator())
        hidden = model.hidden(rows, cache=cache)[:, -1]
        for frame in expected:
            codes = speaker.first_codes(hidden)
            assert torch.equal(codes[0], frame)
            hidden = model.hidden(layout.audio_row(codes, clock).batch(), cache=cache)[:, -1]
    assert len(set(torch.stack(expected)[:, 1].tolist())) > 1  # the frames differ from one another
