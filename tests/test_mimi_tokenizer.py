"""Mimi behind our interface: equality with transformers, streams, prefixes, bounded state, refusals, loading.

The weights are random and few; the strides are the real ones.
"""

import json
import sys

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from transformers import MimiConfig, MimiModel

import audio_tokenizer
import rvq_tokenizer
from audio import FRAME_SAMPLES, read_audio, write_wav
from audio_tokenizer import CodeShape
from command_line import MissingRequirement, run
from generation import Conversation, Sampling
from mimi_tokenizer import HUB_NAME, MimiTokenizer, is_mimi, load_mimi
from rvq_tokenizer import RVQTokenizer, load_tokenizer
from text_tokenizer import ByteTokenizer

K, V = 8, 16
WINDOW = 6  # steps of the transformers, half as many frames
UNUSUAL = {"pad_mode": "replicate", "use_conv_shortcut": True, "num_residual_layers": 2}


def tiny_mimi(seed: int = 0, **changes) -> MimiModel:
    torch.manual_seed(seed)
    config = {
        "hidden_size": 16, "num_filters": 2, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 16, "codebook_size": V, "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8, "upsample_groups": 16, "num_quantizers": K,
        "sliding_window": WINDOW, "layer_scale_initial_scale": 0.5,
    }  # fmt: skip
    model = MimiModel(MimiConfig(**{**config, **changes})).eval()
    for module in model.quantizer.modules():
        if hasattr(module, "embed_sum"):
            module.embed_sum.normal_()
    with torch.no_grad():  # waveforms of about full scale
        scale = 0.3 / MimiTokenizer(model).decode(torch.randint(V, (2, 20, K))).std()
        list(model.decoder.parameters())[-2].mul_(scale)
    return model


@pytest.fixture(scope="module")
def mimi() -> MimiModel:
    return tiny_mimi()


@pytest.fixture(scope="module")
def codec(mimi) -> MimiTokenizer:
    return MimiTokenizer(mimi)


@pytest.fixture(scope="module")
def folder(mimi, tmp_path_factory):
    path = tmp_path_factory.mktemp("mimi")
    mimi.save_pretrained(path)
    return path


def noise(n_waves: int, n_frames: int, extra: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(n_waves, n_frames * FRAME_SAMPLES + extra, generator=torch.Generator().manual_seed(1))


def some_codes(n_sequences: int, n_frames: int) -> torch.Tensor:
    return torch.randint(V, (n_sequences, n_frames, K), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def library_encode(mimi: MimiModel, wave: torch.Tensor) -> torch.Tensor:
    return mimi.encode(wave[:, None]).audio_codes.transpose(1, 2)


@torch.no_grad()
def library_decode(mimi: MimiModel, codes: torch.Tensor) -> torch.Tensor:
    return mimi.decode(codes.transpose(1, 2)).audio_values[:, 0]


# equality with transformers


@pytest.mark.parametrize("changes", [{}, UNUSUAL], ids=["as published", "unusual"])
def test_codes_and_waveform_are_those_of_transformers(changes):
    mimi = tiny_mimi(**changes)
    codec = MimiTokenizer(mimi)
    wave = noise(2, 12)
    codes = codec.encode(wave)
    assert codes.dtype == torch.int64 and len(codes.unique()) > V // 2
    assert torch.equal(codes, library_encode(mimi, wave))
    codes = some_codes(2, 12)
    decoded = codec.decode(codes)
    assert 0.1 < decoded.std() < 1
    assert (decoded - library_decode(mimi, codes)).abs().max() < 1e-5


def test_long_audio_passes_in_chunks_and_equals_one_pass(mimi, codec, monkeypatch):
    monkeypatch.setattr(audio_tokenizer, "CHUNK_FRAMES", 4)
    wave, codes = noise(1, 15), some_codes(1, 15)
    assert torch.equal(codec.encode(wave), library_encode(mimi, wave))
    assert (codec.decode(codes) - library_decode(mimi, codes)).abs().max() < 1e-5


def test_encode_gives_one_frame_per_1920_samples_rounded_up(codec):
    for n_samples, n_frames in ((1, 1), (1919, 1), (1920, 1), (1921, 2), (9600, 5)):
        codes = codec.encode(0.1 * torch.randn(2, n_samples))
        assert codes.shape == (2, n_frames, K)


def test_an_unfinished_frame_is_padded_with_zero_samples(mimi, codec):
    wave = noise(1, 5, extra=700)
    codes = codec.encode(wave)
    assert torch.equal(codes, codec.encode(torch.nn.functional.pad(wave, (0, FRAME_SAMPLES - 700))))
    theirs = library_encode(mimi, wave)
    assert theirs.shape == codes.shape and torch.equal(theirs[:, :5], codes[:, :5])


@pytest.mark.parametrize("depth", [1, 2, K])
def test_decode_takes_any_prefix_of_codebooks(mimi, codec, depth):
    codes = some_codes(1, 6)
    decoded = codec.decode(codes[..., :depth])
    assert decoded.shape == (1, 6 * FRAME_SAMPLES)
    assert (decoded - library_decode(mimi, codes[..., :depth])).abs().max() < 1e-5
    if depth < K:
        assert (decoded - codec.decode(codes)).abs().max() > 1e-2


def test_fewer_codebooks_are_the_first_ones(mimi, codec):
    few = MimiTokenizer(mimi, 3)
    assert few.config == CodeShape(n_codebooks=3, n_semantic=1, codebook_size=V)
    wave = noise(1, 4)
    assert torch.equal(few.encode(wave), codec.encode(wave)[..., :3])
    assert few.fingerprint() != codec.fingerprint()


def test_code_vectors_add_up_to_the_latents_of_transformers(mimi, codec):
    codes, S, vectors = some_codes(2, 5), codec.config.n_semantic, codec.code_vectors()
    assert len(vectors) == codec.config.n_codebooks
    latents = 0
    for stack, part in (
        (mimi.quantizer.semantic_residual_vector_quantizer, range(S)),
        (mimi.quantizer.acoustic_residual_vector_quantizer, range(S, len(vectors))),
    ):
        added = sum(vectors[k][codes[..., k]] for k in part)  # (B, T, d)
        latents = latents + stack.output_proj(added.transpose(1, 2))
    torch.testing.assert_close(latents, mimi.quantizer.decode(codes.transpose(1, 2)))


def test_items_of_a_batch_do_not_mix(codec):
    waves, codes = noise(3, 5), some_codes(3, 5)
    assert torch.equal(codec.encode(waves), torch.cat([codec.encode(wave[None]) for wave in waves]))
    alone = torch.cat([codec.decode(one[None]) for one in codes])
    assert (codec.decode(codes) - alone).abs().max() < 1e-5


# streams


@pytest.mark.parametrize("sizes", [[1920] * 12, [1] * 50 + [9000, 100, 13_890], [480] * 48, [23_000]])
def test_encoder_stream_equals_encode(codec, sizes):
    wave = noise(2, 12)[:, : sum(sizes)]
    stream = codec.encoder_stream(2)
    parts = [stream.push(piece) for piece in wave.split(sizes, dim=1)]
    assert torch.equal(torch.cat([*parts, stream.flush()], dim=1), codec.encode(wave))


@pytest.mark.parametrize("changes", [{}, UNUSUAL], ids=["as published", "unusual"])
@pytest.mark.parametrize("sizes", [[1] * 13, [4, 1, 8], [2] * 6 + [1], [13]])
@pytest.mark.parametrize("depth", [1, K])
def test_decoder_stream_equals_decode_without_delay(sizes, depth, changes):
    mimi = tiny_mimi(**changes)
    codes = some_codes(2, 13)[..., :depth]
    stream = MimiTokenizer(mimi).decoder_stream(2)
    parts = [stream.push(piece) for piece in codes.split(sizes, dim=1)]
    assert [part.size(1) for part in parts] == [size * FRAME_SAMPLES for size in sizes]
    last = stream.flush()
    assert stream.delay_samples == 0 and last.shape == (2, 0)
    assert (torch.cat(parts, dim=1) - library_decode(mimi, codes)).abs().max() < 1e-4


def test_stream_state_stops_growing_with_the_window_and_a_flushed_stream_is_as_new(codec):
    def size(state) -> int:
        """Elements of memory, the hidden part of a view included."""
        cached = [tensor for layer in state.keys.layers for tensor in (layer.keys, layer.values)]
        tensors = [*state.convolutions.values(), *cached]
        return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in tensors)

    codes, wave = some_codes(1, 1), noise(1, 1)
    for stream, piece in ((codec.decoder_stream(1), codes), (codec.encoder_stream(1), wave)):
        first, sizes = stream.push(piece), []
        for _ in range(3 * WINDOW):
            stream.push(piece)
            sizes.append(size(stream.state))
        assert sizes[WINDOW] == sizes[-1]
        assert all(layer.keys.size(-2) == WINDOW - 1 for layer in stream.state.keys.layers)
        stream.flush()
        assert torch.equal(stream.push(piece), first)


def test_two_streams_do_not_share_their_state(codec):
    codes = some_codes(2, 4)
    streams = [codec.decoder_stream(1) for _ in codes]
    parts = [[stream.push(one[None, t : t + 1]) for stream, one in zip(streams, codes, strict=True)] for t in range(4)]
    woven = torch.cat([torch.cat(step) for step in parts], dim=1)
    assert (woven - codec.decode(codes)).abs().max() < 1e-4


def test_codebooks_follow_the_module_to_another_type_or_device(mimi):
    codec = MimiTokenizer(tiny_mimi())
    codec.encode(noise(1, 1))  # the library computes its codebooks at the first call and keeps them
    codec.double()
    books = [module.embed for module in codec.quantizer.modules() if hasattr(module, "embed_sum")]
    assert len(books) == K and all(book.dtype == torch.float64 for book in books)


# refusals


@pytest.mark.parametrize(
    "wave",
    [
        torch.zeros(1920),
        torch.zeros(1, 2, 1920),
        torch.zeros(1, 1920, dtype=torch.int16),
        torch.full((1, 9), torch.nan),
        torch.zeros(1, 0),
    ],
    ids=["one dimension", "stereo", "integers", "not finite", "no samples"],
)
def test_encode_refuses_bad_audio_in_one_line(codec, wave):
    with pytest.raises(ValueError, match="audio") as error:
        codec.encode(wave)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(3, K, dtype=torch.int64),
        torch.zeros(1, 3, K + 1, dtype=torch.int64),
        torch.zeros(1, 0, K, dtype=torch.int64),
        torch.zeros(1, 3, K),
        torch.full((1, 3, K), V),
        torch.full((1, 3, K), -1),
    ],
    ids=["two dimensions", "too deep", "no frames", "floats", "too large", "negative"],
)
def test_decode_refuses_bad_codes_in_one_line(codec, codes):
    with pytest.raises(ValueError, match="codes") as error:
        codec.decode(codes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("n_codebooks", [0, 1, K + 1])
def test_an_impossible_number_of_codebooks_is_refused(mimi, n_codebooks):
    with pytest.raises(ValueError, match=f"n_codebooks={n_codebooks} must lie in 2..{K}"):
        MimiTokenizer(mimi, n_codebooks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upsampling_ratios": [8, 6, 5, 2]}, "frame_rate|samples per frame"),
        ({"sampling_rate": 16_000}, "sampling_rate=16000"),
        ({"audio_channels": 2}, "audio_channels=2"),
        ({"use_causal_conv": False}, "use_causal_conv=False"),
        ({"pad_mode": "reflect"}, "pad_mode='reflect'"),
    ],
)
def test_a_mimi_with_other_frames_or_look_ahead_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_mimi(**changes)


# loading


def test_a_saved_mimi_is_found_by_its_folder_and_is_the_same(codec, folder):
    wave = noise(1, 3)
    for loaded in (load_mimi(folder), load_tokenizer(folder), load_tokenizer(str(folder))):
        assert isinstance(loaded, MimiTokenizer) and not loaded.training
        assert loaded.config == codec.config and loaded.fingerprint() == codec.fingerprint()
        assert torch.equal(loaded.encode(wave), codec.encode(wave))
    assert load_mimi(folder, 4).config.n_codebooks == 4


def test_our_own_folder_is_loaded_as_before(tokenizer_folder, tmp_path):
    assert not is_mimi(tokenizer_folder) and not is_mimi(tmp_path) and not is_mimi("nowhere")
    assert isinstance(load_tokenizer(tokenizer_folder), RVQTokenizer)


def test_fingerprint_changes_with_any_weight(folder):
    one, other = load_mimi(folder), load_mimi(folder)
    with torch.no_grad():
        other.upsample.conv.weight[0, 0, 0] += 1e-3
    assert one.fingerprint() != other.fingerprint()


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def torn(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, "model.safetensors is missing"),
        (torn, "damaged"),
        (without_a_tensor, "tensor .* is missing"),
        (of_another_size, "not a whole Mimi"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(mimi, tmp_path, damage, message):
    mimi.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_said_in_one_line(tmp_path, tokenizer_folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no Mimi at .*none: give a folder, or kyutai/mimi"):
        load_mimi(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no config\.json of a Mimi"):
        load_mimi(tokenizer_folder)

    def no_network(*args, **kwargs):
        raise OSError("We couldn't connect to the hub\nand so on")

    monkeypatch.setattr(MimiModel, "from_pretrained", no_network)
    assert is_mimi(HUB_NAME)
    with pytest.raises(MissingRequirement, match="neither in the local cache nor to be had from the hub") as error:
        load_tokenizer(HUB_NAME)
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingRequirement, match="needs transformers: python setup_environment"):
        load_tokenizer(HUB_NAME)


# use


def test_a_conversation_runs_on_it(codec):
    model = tiny_model(n_codebooks=K, codebook_size=V, audio_tokenizer=codec.fingerprint())
    sampling = Sampling(max_seconds=0.16, min_seconds=0.16)
    conversation = Conversation(model, codec, ByteTokenizer(), sampling=sampling)
    conversation.add_turn(0, "Hello.", samples=noise(1, 3)[0].numpy())
    reply = conversation.speak(1, "Hi.")
    assert reply.codes.shape == (2, K) and reply.samples.shape == (2 * FRAME_SAMPLES,)
    assert abs(reply.samples - codec.decode(reply.codes[None])[0].numpy()).max() < 1e-4


def test_the_command_of_the_codec_takes_it(folder, tmp_path, capsys):
    write_wav(tmp_path / "in.wav", noise(1, 3, extra=100)[0].clamp(-1, 1).numpy())
    arguments = [str(tmp_path / "in.wav"), str(tmp_path / "out.wav"), "--tokenizer", str(folder), "--codebooks", "1"]
    assert run(rvq_tokenizer.main, arguments) == 0
    assert "4 frames" in capsys.readouterr().out
    assert len(read_audio(tmp_path / "out.wav")[0]) == 3 * FRAME_SAMPLES + 100
