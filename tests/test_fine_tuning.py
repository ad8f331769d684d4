"""Starting from existing weights: additions are no-ops until they learn, refusals; LoRA: no-op, gradients, merge."""

import errno

import pytest
import torch
from conftest import full_model, tiny_model
from safetensors.torch import load_file, save_file
from test_architecture import conversation_rows, every_frame, loss_of
from test_weight_layouts import ADDITIONS, CSM_LIKE

from architecture import ADDED, WEIGHTS_KIND, load_model, save_model
from checkpointing import load_into, load_state, save_state, save_weights
from command_line import MissingRequirement
from fine_tuning import add_lora, find_weights, merged_state, start_from
from weight_layouts import save_published


@pytest.fixture
def csm():
    return tiny_model(**CSM_LIKE)


@pytest.fixture
def published(tmp_path, csm):
    save_published(csm, tmp_path / "csm", "sesame")
    return str(tmp_path / "csm")


def names_of(model) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def assert_same_losses(one, other, rows) -> None:
    """Of what both models have; the prosody that a new memory expects is a term of its own."""
    with torch.no_grad():
        assert torch.equal(one.hidden(rows), other.hidden(rows))
        first, second = (model.loss(rows, every_frame(rows)) for model in (one, other))
    assert torch.equal(first.codebook0, second.codebook0)
    assert torch.equal(first.depth, second.depth)


@pytest.mark.parametrize("additions", [{}, ADDITIONS, {**ADDITIONS, "text_head": True, "n_semantic": 2}])
@pytest.mark.parametrize("layout", ["sesame", "transformers"])
def test_a_published_start_gives_what_its_source_gives(tmp_path, csm, layout, additions):
    save_published(csm, tmp_path, layout)
    before = torch.get_rng_state()
    model, new = start_from(str(tmp_path / "model.safetensors"), additions, 1, csm.config)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert new == names_of(model) - names_of(csm)
    assert_same_losses(csm, model, conversation_rows(csm.config, 3))


def test_new_parameters_are_drawn_from_the_seed(published, csm):
    torch.manual_seed(3)
    first, new = start_from(published, ADDITIONS, 1, csm.config)
    again, _ = start_from(published, ADDITIONS, 1, csm.config)
    other, _ = start_from(published, ADDITIONS, 2, csm.config)
    assert all(torch.equal(first.get_parameter(name), again.get_parameter(name)) for name in new)
    drawn = {name for name in new if not torch.equal(first.get_parameter(name), other.get_parameter(name))}
    assert {"cross_attention.0.voice.q_proj.weight", "memory.stores.prosodic.out.weight"} <= drawn


def test_a_start_from_ours_keeps_all_it_has_and_adds_the_rest(tmp_path):
    source = full_model(cross_attention_every=0, prosodic_heads=0)  # its gates are open
    save_model(source, tmp_path)
    model, new = start_from(str(tmp_path), {"cross_attention_every": 1, "prosodic_heads": 2}, 1)
    assert new == names_of(model) - names_of(source)
    assert {name.split(".")[0] for name in new} == {"cross_attention", "memory"}
    assert "memory.stores.prosodic.gate" in new
    assert "memory.stores.semantic.gate" not in new
    assert_same_losses(source, model, conversation_rows(source.config, 3))
    same, new = start_from(str(tmp_path), {}, 1)
    assert same.config == source.config
    assert not new


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"semantic_heads": 0}, r"has semantic_heads=2, which cannot become 0"),
        ({"prosodic_heads": 4}, r"has prosodic_heads=2, which cannot become 4"),
        ({"cross_attention_every": 2}, r"has cross_attention_every=1, which cannot become 2"),
        ({"text_head": False}, r"has text_head=True, which cannot become False"),
        ({"audio_tokenizer": "another"}, r"has audio_tokenizer=one, which cannot become another; .* or --other_codes"),
        ({"memory_key": 4}, r"tensor memory\.\S+ has shape \(16, 64\), expected \(8, 64\)"),
        ({"n_codebooks": 5}, r"tensor depth_heads has shape \(3, 32, 17\), expected \(4, 32, 17\)"),
        ({"acoustic_delay": -1}, r"acoustic_delay=-1 must be at least 0"),
    ],
)
def test_a_change_that_the_weights_cannot_take_is_refused(tmp_path, changes, message):
    save_model(full_model(audio_tokenizer="one"), tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        start_from(str(tmp_path), changes, 1)
    assert "\n" not in str(refusal.value)


def test_weights_that_know_other_codes_are_taken_when_asked(tmp_path):
    source = full_model(audio_tokenizer="one")
    save_model(source, tmp_path)
    model, new = start_from(str(tmp_path), {"audio_tokenizer": "another"}, 1, other_codes=True)
    assert model.config.audio_tokenizer == "another" and not new
    assert_same_losses(source, model, conversation_rows(source.config, 3))


def test_csm_1b_takes_no_acoustic_delay(published, csm):
    with pytest.raises(ValueError, match="acoustic_delay=2 must be 0 with zero_end_of_turn"):
        start_from(published, {"acoustic_delay": 2}, 1, csm.config)


@pytest.mark.parametrize("name", ["memory.stores.semantic.gate", "projection.weight"])
def test_a_tensor_that_the_checkpoint_should_have_is_not_drawn_anew(tmp_path, name):
    save_model(full_model(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"tensor {name} .* is missing"):
        start_from(str(tmp_path), {}, 1)


def test_a_path_comes_before_the_hub(tmp_path, monkeypatch):
    def asked(name, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "csm-1b").mkdir()
    assert find_weights("csm-1b").is_dir()
    for source in ("no/such/folder", "none.safetensors", "./none/here"):
        with pytest.raises(FileNotFoundError, match=f"no weights at {source}: give a folder, a file, or a name"):
            find_weights(source)


@pytest.mark.parametrize("source", ["csm-1b", "sesame/csm-1b"])
def test_a_hub_name_is_downloaded(monkeypatch, published, csm, source):
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        assert {"*.safetensors", "config.json"} <= set(allow_patterns)
        return published

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model, _ = start_from(source, {}, 1, csm.config)
    assert asked == ["sesame/csm-1b"]
    assert torch.equal(model.depth_heads, csm.depth_heads)


def test_without_network_the_way_out_is_named_in_one_line(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(name, **options):
        raise LocalEntryNotFoundError("Got: ConnectError\nAn error happened while trying to locate the files")

    def full(name, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(MissingRequirement, match=r"sesame/csm-1b .* give its local folder") as refusal:
        start_from("csm-1b", {}, 1)
    assert "\n" not in str(refusal.value)
    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        start_from("csm-1b", {}, 1)


def with_lora(published, csm, seed: int = 5):
    """A model with every addition and LoRA of rank 4, the additions learning too."""
    model, new = start_from(published, ADDITIONS, 1, csm.config)
    return model, new, add_lora(model, 4, 8.0, seed, keep=new)


def loss_on(model, rows, bf16: bool = False) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # it keeps casts of weights, so one for each pass
        return loss_of(model, rows, every_frame(rows))


def learn(model, trainable, rows, steps: int = 3, bf16: bool = False) -> None:
    optimizer = torch.optim.SGD(trainable, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_on(model, rows, bf16).backward()
        optimizer.step()


def test_lora_changes_nothing_at_first_and_alone_learns_with_what_is_kept(published, csm):
    rows = conversation_rows(csm.config, 3)
    model, new, trainable = with_lora(published, csm)
    assert_same_losses(csm, model, rows)
    loss_on(model, rows).backward()
    learnt = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    low_rank = {name for name in names_of(model) if name.endswith((".A", ".B"))}
    layers = csm.config.backbone.n_layers + csm.config.depth.n_layers
    assert len(low_rank) == 2 * 7 * layers
    assert low_rank <= learnt <= low_rank | new
    assert {id(p) for p in trainable} == {id(model.get_parameter(name)) for name in low_rank | new}
    assert all(model.get_parameter(name).grad.any() for name in low_rank if name.endswith(".B"))


@pytest.mark.parametrize("bf16", [False, True])
def test_merged_weights_give_the_same_loss(tmp_path, published, csm, bf16):
    rows = conversation_rows(csm.config, 3)
    model, _, trainable = with_lora(published, csm)
    untrained = loss_on(model, rows, bf16).item()
    learn(model, trainable, rows, bf16=bf16)
    expected = loss_on(model, rows, bf16)
    assert abs(expected.item() - untrained) > 1e-2
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_weights(tmp_path / "out", WEIGHTS_KIND, model.config.to_dict(), merged_state(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    loss = loss_on(load_model(tmp_path / "out"), rows, bf16)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)


def test_a_model_without_lora_is_merged_already(csm):
    merged = merged_state(csm)
    assert merged.keys() == csm.state_dict().keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in csm.state_dict().items())


def test_training_state_comes_back_into_a_model_with_lora(tmp_path, published, csm):
    rows = conversation_rows(csm.config, 3)
    model, new, trainable = with_lora(published, csm)
    learn(model, trainable, rows)
    path = save_state(tmp_path, 3, {"model": model.state_dict()})
    again, _, trainable_again = with_lora(published, csm, seed=6)
    load_into(again, load_state(path)["model"], str(path))
    assert len(trainable_again) == len(trainable)
    for each, parameters in ((model, trainable), (again, trainable_again)):
        learn(each, parameters, rows, steps=1)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert any(name.startswith(ADDED) for name in new)


def test_the_first_step_of_adam_changes_a_matrix_as_much_as_without_lora(csm):
    rows, rate = conversation_rows(csm.config, 3), 1e-3
    before = {name: tensor.clone() for name, tensor in csm.state_dict().items()}
    trainable = add_lora(csm.double(), rank=8, alpha=8.0, seed=0)
    loss_on(csm, rows).backward()
    torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0).step()
    after = merged_state(csm)
    changes = [(after[name] - before[name]).flatten() for name in before if name.endswith("_proj.weight")]
    assert 0.8 < torch.cat(changes).square().mean().sqrt() / rate < 1.2


@pytest.mark.parametrize(("rank", "alpha"), [(0, 8.0), (17, 8.0), (4, 0.0)])
def test_a_rank_or_alpha_that_cannot_work_is_refused(csm, rank, alpha):
    with pytest.raises(ValueError, match=r"rank=\d+ must lie in 1..16|alpha=0.0 must be above 0"):
        add_lora(csm, rank, alpha, seed=0)
    assert all(parameter.requires_grad for parameter in csm.parameters())
