"""The speech model: equality with transformers' csm, losses, amortization, saving, configs that cannot work."""

import math

import pytest
import torch
from conftest import tiny_config, tiny_model

import architecture
from architecture import CSM, CSMConfig, load_model, parameter_table, pick_depth_rows, preset, save_model
from checkpointing import load_weights, save_weights
from frames import IGNORE, Turn, concatenate, next_frame_targets
from transformer import TransformerConfig
from weight_layouts import to_transformers


def conversation_rows(config: CSMConfig, n_turns: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    turns = []
    for _ in range(n_turns):
        text = torch.randint(0, config.text_vocab_size, (4,), generator=generator).tolist()
        turns.append(Turn(text, torch.randint(0, config.codebook_size, (6, config.n_codebooks), generator=generator)))
    return concatenate([config.layout.turn_rows(turn) for turn in turns])


def loss_of(model, rows, depth_rows):
    positions = torch.arange(len(rows.tokens))[None]
    targets = next_frame_targets(rows)[None]
    return model.loss(rows.tokens[None], rows.mask[None], targets, positions, None, depth_rows)


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
    tokens, mask = rows.tokens[None], rows.mask[None]
    with torch.inference_mode():
        ours = model.hidden(tokens, mask)
        theirs = twin.backbone_model(inputs_embeds=model.embed(tokens, mask)).last_hidden_state
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.codebook0_head(ours), twin.lm_head(theirs), atol=1e-4, rtol=1e-4)

        codes = torch.randint(0, 16, (5, 4))
        logits = model.depth_logits(ours[0, :5], codes)
        inputs = torch.nn.functional.pad(codes[:, :-1], (1, 0))  # position 0 is replaced by the backbone state
        expected = twin.depth_decoder(input_ids=inputs, backbone_last_hidden_state=ours[0, :5]).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_backbone_input_is_the_masked_sum_of_the_rows_embeddings(model):
    rows = conversation_rows(model.config)
    embedded = model.embed(rows.tokens[None], rows.mask[None])[0]
    A = model.config.audio_vocab_size
    for t, (token, mask) in enumerate(zip(rows.tokens, rows.mask, strict=True)):
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


def test_a_new_model_is_as_unsure_as_it_should_be():
    torch.manual_seed(0)
    model = CSM(tiny_config())
    rows = conversation_rows(model.config, n_turns=4)
    losses = loss_of(model, rows, pick_depth_rows(next_frame_targets(rows)[None], 1.0, torch.Generator()))
    assert (losses.c0_sum / losses.c0_count).item() == pytest.approx(math.log(17), abs=0.1)
    assert (losses.depth_sum / losses.depth_count).tolist() == pytest.approx([math.log(17)] * 3, abs=0.1)


def test_amortized_losses_are_sums_over_the_picked_frames_only(model):
    rows = conversation_rows(model.config)
    targets = next_frame_targets(rows)[None]
    every = pick_depth_rows(targets, 1.0, torch.Generator())
    assert len(every) == 12  # 2 turns of 6 frames; the ends of turn have one codebook only
    whole = loss_of(model, rows, every)
    parts = [loss_of(model, rows, part) for part in (every[:5], every[5:])]
    torch.testing.assert_close(parts[0].depth_sum + parts[1].depth_sum, whole.depth_sum)
    assert torch.equal(parts[0].depth_count + parts[1].depth_count, whole.depth_count)
    assert torch.equal(parts[0].c0_sum, whole.c0_sum)
    assert whole.c0_count == 14


def test_the_amortized_share_is_redrawn_and_covers_all_frames():
    targets = torch.zeros(2, 100, 4, dtype=torch.int64)
    targets[:, :20] = IGNORE
    generator = torch.Generator().manual_seed(0)
    draws = [pick_depth_rows(targets, 1 / 16, generator) for _ in range(200)]
    assert {len(draw) for draw in draws} == {10}
    assert set(torch.cat(draws).tolist()) == {b * 100 + t for b in range(2) for t in range(20, 100)}
    again = [pick_depth_rows(targets, 1 / 16, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*again)


def test_padding_and_neighbours_do_not_change_a_document(model):
    first, second = conversation_rows(model.config, seed=1), conversation_rows(model.config, seed=2)
    n, m = len(first.tokens), len(second.tokens)
    packed = concatenate([first, second])
    documents = torch.tensor([0] * n + [1] * m)
    allowed = ((documents[:, None] == documents) & torch.ones(n + m, n + m).tril().bool())[None, None]
    positions = torch.cat((torch.arange(n), torch.arange(m)))[None]
    together = model.hidden(packed.tokens[None], packed.mask[None], positions, allowed)
    alone = model.hidden(second.tokens[None], second.mask[None])
    torch.testing.assert_close(together[:, n:], alone, atol=1e-5, rtol=1e-5)


def test_one_batch_can_be_learnt_by_heart():
    torch.manual_seed(0)
    model = CSM(tiny_config())
    rows = conversation_rows(model.config)
    depth_rows = pick_depth_rows(next_frame_targets(rows)[None], 1.0, torch.Generator())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        loss = loss_of(model, rows, depth_rows).total()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_a_saved_model_comes_back_exactly(tmp_path, model):
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    rows = conversation_rows(model.config)
    assert torch.equal(
        model.hidden(rows.tokens[None], rows.mask[None]), loaded.hidden(rows.tokens[None], rows.mask[None])
    )


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
    assert capsys.readouterr().err == "error: unknown model size 'huge'; choose one of nano, csm-1b\n"
