"""Properties of the codec: causality, streaming, prefixes of codebooks, refusals, files, command."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer, voice, voiced_tokenizer

import audio_tokenizer
import rvq_tokenizer
from audio import FRAME_SAMPLES, SAMPLE_RATE, read_audio, write_wav
from audio_tokenizer import fingerprint
from command_line import EXIT_INPUT, run
from rvq_tokenizer import (
    DELAY_SAMPLES,
    PRESETS,
    Disguise,
    RVQTokenizer,
    TokenizerConfig,
    load_tokenizer,
    save_tokenizer,
)

CONFIG = PRESETS["debug"]


@pytest.fixture(scope="module")
def tokenizer() -> RVQTokenizer:
    """Random weights, codebooks fitted to its own latents so that all of them matter; to so many that what is left for
    the last ones is not as small as a rounding error."""
    torch.manual_seed(0)
    model = RVQTokenizer(CONFIG).eval()
    with torch.no_grad():
        model.known_depth.normal_()
        model.depth_gain.normal_()
        content, acoustic = model.latents(speechlike(2, 240))
    generator = torch.Generator().manual_seed(0)
    model.semantic.fit(content.flatten(0, 1), 24, generator)
    model.acoustic.fit(acoustic.flatten(0, 1), 24, generator)
    return model


def speechlike(n_waves: int, n_frames: int, extra: int = 0, seed: int = 0) -> torch.Tensor:
    """Noise whose level and colour change over time, so that codes differ from frame to frame: (B, N)."""
    random = np.random.default_rng(seed)
    n_samples = n_frames * FRAME_SAMPLES + extra
    time = np.arange(n_samples) / SAMPLE_RATE
    waves = []
    for _ in range(n_waves):
        pitch = np.cumsum(120 + 60 * np.sin(2 * np.pi * random.uniform(0.5, 2) * time)) / SAMPLE_RATE
        level = 0.5 + 0.5 * np.sin(2 * np.pi * random.uniform(1, 4) * time)
        harmonics = sum(np.sin(2 * np.pi * k * pitch) / k for k in range(1, 9))
        waves.append(0.1 * level * harmonics + 0.01 * random.standard_normal(n_samples))
    return torch.from_numpy(np.stack(waves)).float()


# shapes and hierarchy


def test_encode_gives_one_frame_per_1920_samples_rounded_up(tokenizer):
    for n_samples, n_frames in ((1, 1), (1919, 1), (1920, 1), (1921, 2), (19200, 10)):
        codes = tokenizer.encode(torch.randn(2, n_samples) * 0.1)
        assert codes.shape == (2, n_frames, CONFIG.n_codebooks) and codes.dtype == torch.int64
        assert codes.min() >= 0 and codes.max() < CONFIG.codebook_size


def test_padding_the_end_with_zeros_changes_no_code(tokenizer):
    wave = speechlike(1, 4, extra=700)
    padded = torch.nn.functional.pad(wave, (0, FRAME_SAMPLES - 700))
    assert torch.equal(tokenizer.encode(wave), tokenizer.encode(padded))


def test_decode_takes_any_prefix_of_codebooks_and_each_one_matters(tokenizer):
    codes = tokenizer.encode(speechlike(1, 6))
    waves = [tokenizer.decode(codes[..., :k]) for k in range(1, CONFIG.n_codebooks + 1)]
    assert all(wave.shape == (1, 6 * FRAME_SAMPLES) for wave in waves)
    assert all((a - b).abs().max() > 0 for a, b in itertools.pairwise(waves))


def test_a_prefix_of_codebooks_is_what_the_model_trains_as_that_depth(tokenizer):
    wave = speechlike(4, 5)
    depths = torch.tensor([0, 1, 2, CONFIG.n_acoustic_codebooks])
    with torch.no_grad():
        trained = tokenizer(wave, torch.full((4,), CONFIG.n_semantic), depths)
    codes = tokenizer.encode(wave)
    for i, depth in enumerate(depths):
        used = tokenizer.decode(codes[i : i + 1, :, : CONFIG.n_semantic + depth])
        assert torch.allclose(trained.wave[i : i + 1], used, atol=1e-5)


def test_code_vectors_add_up_to_the_latents_of_both_stacks(tokenizer):
    vectors = tokenizer.code_vectors()
    codes = torch.randint(0, CONFIG.codebook_size, (2, 3, CONFIG.n_codebooks))
    S = CONFIG.n_semantic
    for stack, first, last in ((tokenizer.semantic, 0, S), (tokenizer.acoustic, S, CONFIG.n_codebooks)):
        added = sum(vectors[k][codes[..., k]] for k in range(first, last))
        torch.testing.assert_close(added, stack.decode(codes[..., first:last]))


def test_training_path_and_use_path_agree_on_codes_and_waveform(tokenizer):
    wave = speechlike(2, 5)
    full = torch.full((2,), CONFIG.n_semantic), torch.full((2,), CONFIG.n_acoustic_codebooks)
    with torch.no_grad():
        trained = tokenizer(wave, *full)
    codes = tokenizer.encode(wave)
    assert torch.equal(trained.codes, codes)
    assert torch.allclose(trained.wave, tokenizer.decode(codes), atol=1e-5)


def test_items_of_a_batch_do_not_mix(tokenizer):
    waves = speechlike(3, 5)
    codes = tokenizer.encode(waves)
    alone = torch.cat([tokenizer.encode(wave[None]) for wave in waves])
    assert torch.equal(codes, alone)
    assert torch.allclose(tokenizer.decode(codes)[1:2], tokenizer.decode(codes[1:2]), atol=1e-5)


# causality and streaming


def test_a_frame_of_codes_does_not_depend_on_later_samples(tokenizer):
    wave = speechlike(1, 10)
    changed = wave.clone()
    changed[:, 6 * FRAME_SAMPLES :] = torch.randn(1, 4 * FRAME_SAMPLES)
    codes, other = tokenizer.encode(wave), tokenizer.encode(changed)
    assert torch.equal(codes[:, :6], other[:, :6]) and not torch.equal(codes[:, 6:], other[:, 6:])


def test_a_sample_does_not_depend_on_codes_beyond_the_stated_delay(tokenizer):
    codes = tokenizer.encode(speechlike(1, 10))
    changed = codes.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % CONFIG.codebook_size
    wave, other = tokenizer.decode(codes), tokenizer.decode(changed)
    known = 6 * FRAME_SAMPLES - DELAY_SAMPLES
    assert torch.allclose(wave[:, :known], other[:, :known], atol=1e-6)
    assert (wave[:, known:] - other[:, known:]).abs().max() > 1e-4


@pytest.mark.parametrize("sizes", [[1920] * 9, [1] * 50 + [5000, 100, 12000], [480] * 36, [17_280]])
def test_encoder_stream_equals_encode(tokenizer, sizes):
    wave = speechlike(2, 9)[:, : sum(sizes)]
    stream = tokenizer.encoder_stream(2)
    parts = [stream.push(piece) for piece in wave.split(sizes, dim=1)]
    assert torch.equal(torch.cat([*parts, stream.flush()], dim=1), tokenizer.encode(wave))


@pytest.mark.parametrize("sizes", [[1] * 11, [4, 1, 6], [11]])
@pytest.mark.parametrize("depth", [CONFIG.n_codebooks, CONFIG.n_semantic])
def test_decoder_stream_equals_decode_after_the_stated_delay(tokenizer, sizes, depth):
    codes = tokenizer.encode(speechlike(2, 11))[..., :depth]
    stream = tokenizer.decoder_stream(2)
    parts = [stream.push(piece) for piece in codes.split(sizes, dim=1)]
    assert [part.size(1) for part in parts] == [size * FRAME_SAMPLES for size in sizes]
    streamed = torch.cat([*parts, stream.flush()], dim=1)
    assert (streamed[:, stream.delay_samples :] - tokenizer.decode(codes)).abs().max() < 1e-4


def test_stream_state_does_not_grow_and_a_flushed_stream_is_as_new(tokenizer):
    wave = speechlike(1, 8)
    stream = tokenizer.encoder_stream(1)
    first = stream.push(wave)
    sizes = [part.numel() for part in stream.state]
    stream.push(torch.cat([wave] * 4, dim=1))
    assert [part.numel() for part in stream.state] == sizes
    stream.flush()
    assert torch.equal(stream.push(wave), first)


def test_a_file_longer_than_a_chunk_equals_one_pass(tokenizer, monkeypatch):
    wave = speechlike(1, 25, extra=10)
    codes = tokenizer.encode(wave)
    decoded = tokenizer.decode(codes)
    monkeypatch.setattr(audio_tokenizer, "CHUNK_FRAMES", 4)
    assert torch.equal(tokenizer.encode(wave), codes)
    assert torch.allclose(tokenizer.decode(codes), decoded, atol=1e-5)


# refusals


@pytest.mark.parametrize(
    "wave",
    [
        torch.zeros(1920),
        torch.zeros(1, 2, 1920),
        torch.zeros(1, 1920, dtype=torch.int16),
        torch.full((1, 9), torch.nan),
    ],
    ids=["one dimension", "stereo", "integers", "not finite"],
)
def test_encode_refuses_bad_audio_in_one_line(tokenizer, wave):
    with pytest.raises(ValueError) as error:
        tokenizer.encode(wave)
    assert "\n" not in str(error.value)


def test_encode_refuses_no_samples(tokenizer):
    with pytest.raises(ValueError, match="no samples"):
        tokenizer.encode(torch.zeros(1, 0))


def test_silence_and_one_sample_are_encoded_and_decoded(tokenizer):
    for wave in (torch.zeros(1, 5000), torch.zeros(1, 1), torch.full((1, 1), 0.5)):
        assert torch.isfinite(tokenizer.decode(tokenizer.encode(wave))).all()


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(3, 32, dtype=torch.int64),
        torch.zeros(1, 3, 33, dtype=torch.int64),
        torch.zeros(1, 3, 0, dtype=torch.int64),
        torch.zeros(1, 0, 32, dtype=torch.int64),
        torch.zeros(1, 3, 32),
        torch.full((1, 3, 32), CONFIG.codebook_size),
        torch.full((1, 3, 32), -1),
    ],
    ids=["two dimensions", "too deep", "no codebooks", "no frames", "floats", "too large", "negative"],
)
def test_decode_refuses_bad_codes_in_one_line(tokenizer, codes):
    with pytest.raises(ValueError) as error:
        tokenizer.decode(codes)
    assert "codes" in str(error.value) and "\n" not in str(error.value)


def test_streams_refuse_another_batch_size(tokenizer):
    with pytest.raises(ValueError, match="opened for 2"):
        tokenizer.encoder_stream(2).push(torch.zeros(1, 1920))
    with pytest.raises(ValueError, match="opened for 2"):
        tokenizer.decoder_stream(2).push(torch.zeros(1, 1, 32, dtype=torch.int64))


@pytest.mark.parametrize("change", [{"n_semantic": 32}, {"codebook_size": 0}, {"codebook_decay": 1.0}])
def test_config_refuses_impossible_values(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        TokenizerConfig(**change)


# files and command


def test_saved_and_loaded_tokenizer_is_the_same(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    wave = speechlike(1, 4)
    assert loaded.config == tokenizer.config and not loaded.training
    assert torch.equal(loaded.encode(wave), tokenizer.encode(wave))
    assert loaded.fingerprint() == tokenizer.fingerprint()


def test_fingerprint_changes_with_what_makes_codes_and_not_with_what_decodes_them(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    other = load_tokenizer(tmp_path)
    with torch.no_grad():
        other.decoder.head.weight += 1e-3
        other.semantic_out.weight += 1e-3
    assert other.fingerprint() == tokenizer.fingerprint()
    assert fingerprint(other.config, other) != fingerprint(tokenizer.config, tokenizer)
    for weight in (other.acoustic.levels[-1]._codebook.embed, next(other.encoder.parameters())):
        before = other.fingerprint()
        with torch.no_grad():
            weight.view(-1)[0] += 1e-3
        assert other.fingerprint() != before


def random_codes(n_frames: int, n_codebooks: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(16, (n_frames, n_codebooks), generator=torch.Generator().manual_seed(seed))


def test_a_decoder_that_is_told_a_voice_follows_it_also_in_a_stream_and_after_loading(tmp_path):
    tokenizer = voiced_tokenizer()
    own, other = (tokenizer.voice_of(random_codes(9, seed=seed)) for seed in (1, 2))
    codes = random_codes(7, n_codebooks=2)[None]
    told, otherwise, untold = (tokenizer.decode(codes, voice) for voice in (own, other, None))
    assert not torch.allclose(told, untold) and not torch.allclose(told, otherwise)
    stream = tokenizer.decoder_stream(1, own)
    for _ in range(2):  # flushed, it tells the same voice again
        parts = [stream.push(codes[:, :3]), stream.push(codes[:, 3:]), stream.flush()]
        assert torch.allclose(torch.cat(parts, dim=1)[:, tokenizer.delay_samples :], told, atol=1e-5)
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert torch.equal(loaded.decode(codes, loaded.voice_of(random_codes(9, seed=1))), told)
    assert loaded.fingerprint() == tiny_tokenizer().fingerprint()  # codes mean what they did


def test_nothing_is_told_by_a_clip_without_all_codebooks_or_to_a_decoder_that_knows_no_voices(tokenizer):
    voiced = voiced_tokenizer()
    assert tokenizer.voice_of(random_codes(9)) is None
    assert voiced.voice_of(random_codes(9, n_codebooks=2)) is None and voiced.voice_of(random_codes(0)) is None
    unknown = torch.full((1, voiced.voice.width), torch.nan)
    known = voiced.statistics(random_codes(9))[None]
    both = voiced.voice(torch.cat((unknown, known)))
    assert not both[0].any() and torch.allclose(both[1:], voiced.voice(known), atol=1e-5) and both[1].any()


def test_what_all_clips_have_in_common_says_nothing_of_a_voice():
    voice = voiced_tokenizer().voice
    clips = torch.randn(50, voice.width) * torch.linspace(0, 3, voice.width) + 5  # the first is the same in all
    voice.fit(clips)
    normal = (clips - voice.centre) / voice.spread
    assert torch.allclose(normal.mean(dim=0), torch.zeros(voice.width), atol=1e-4)
    assert torch.allclose(normal.std(dim=0, correction=0)[1:], torch.ones(voice.width - 1), atol=1e-3)
    assert normal[:, 0].abs().max() < 1e-2


def test_frozen_decoding_of_given_codes_and_a_voice_equals_decoding_these():
    tokenizer = voiced_tokenizer()
    codes, wave = random_codes(6, n_codebooks=2), torch.randn(2, 6 * FRAME_SAMPLES) / 10
    statistics = torch.stack([tokenizer.statistics(random_codes(9)), torch.full((tokenizer.voice.width,), torch.nan)])
    given = torch.stack([codes, torch.full_like(codes, -1)])
    with torch.no_grad():
        found = tokenizer.decode_frozen(wave, torch.tensor([2, 2]), torch.tensor([0, 2]), given, statistics)
    expected = tokenizer.decode(codes[None], tokenizer.voice_of(random_codes(9)))
    assert torch.allclose(found[:1, : expected.size(1)], expected, atol=1e-5)
    own = tokenizer.decode(tokenizer.encode(wave[1:]))
    assert torch.allclose(found[1:, : own.size(1)], own, atol=1e-4)


def test_loading_refuses_a_missing_folder_and_another_config(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_tokenizer(tmp_path / "none")
    save_tokenizer(tokenizer, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["config"]["unheard_of"] = 1
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="another version"):
        load_tokenizer(tmp_path)


def test_cpu_preset_has_about_ten_million_parameters():
    model = RVQTokenizer(PRESETS["cpu"])
    assert 9e6 < sum(parameter.numel() for parameter in model.parameters()) < 12e6
    assert dataclasses.asdict(model.config)["n_semantic"] == 10
    assert model.config.bits_per_second() == 3600


def test_command_encodes_and_decodes_a_file(tokenizer, tmp_path, capsys):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    write_wav(tmp_path / "in.wav", speechlike(1, 8, extra=100)[0].numpy())
    arguments = [str(tmp_path / "in.wav"), str(tmp_path / "out.wav"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert run(rvq_tokenizer.main, [*arguments, "--codebooks", "10"]) == 0
    printed = capsys.readouterr().out
    assert "9 frames" in printed and "0.50 kbit/s" in printed and "real-time factor" in printed
    samples, rate = read_audio(tmp_path / "out.wav")
    assert len(samples) == 8 * FRAME_SAMPLES + 100 and rate == SAMPLE_RATE


def test_command_refuses_bad_input_in_one_line(tokenizer, tmp_path, capsys):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    (tmp_path / "text.wav").write_text("not audio")
    write_wav(tmp_path / "in.wav", np.zeros(2000, dtype=np.float32))
    flags = ["--tokenizer", str(tmp_path / "tokenizer")]
    out = str(tmp_path / "out.wav")
    cases = [
        [str(tmp_path / "text.wav"), out, *flags],
        [str(tmp_path / "none.wav"), out, *flags],
        [str(tmp_path / "in.wav"), out, *flags, "--codebooks", "33"],
        [str(tmp_path / "in.wav"), out, "--tokenizer", str(tmp_path / "none")],
    ]
    for case in cases:
        assert run(rvq_tokenizer.main, case) == EXIT_INPUT
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out.wav").exists()


@pytest.mark.parametrize("quantised", [False, True])
def test_the_reconstructions_gradient_into_the_content_branch_is_scaled(quantised):
    wave = torch.from_numpy(voice(0.32, 110, rate=24_000))[None]
    depth = torch.ones(1, dtype=torch.int64)
    gradients = []
    for scale in (1.0, 0.1):
        tokenizer = tiny_tokenizer()
        out = tokenizer(wave, depth, depth, scale).wave if quantised else tokenizer.autoencode(wave, depth, scale)
        out.square().sum().backward()
        encoder = tokenizer.encoder
        gradients.append((encoder.to_content.weight.grad, encoder.to_acoustic.weight.grad))
    torch.testing.assert_close(0.1 * gradients[0][0], gradients[1][0])
    assert gradients[1][0].abs().sum() > 0
    torch.testing.assert_close(gradients[0][1], gradients[1][1])


# another voice for the content branch


def disguise(**changes) -> Disguise:
    values = {"factors": 1.0, "tilt": 0.0, "bump_hz": 1000.0, "bump_db": 0.0, **changes}
    return Disguise(*(torch.tensor([value]) for value in values.values()))


def test_disguised_tone_looks_like_a_higher_tone_to_the_content_branch_alone():
    torch.manual_seed(0)
    tokenizer = RVQTokenizer(PRESETS["cpu"])
    time = torch.arange(8 * FRAME_SAMPLES) / SAMPLE_RATE
    low, high = (torch.sin(2 * torch.pi * f * time)[None] for f in (1000.0, 1200.0))
    encoder = tokenizer.encoder
    moved = encoder.disguised(encoder.log_mel(low), disguise(factors=1.2))
    before, after = ((mel - encoder.log_mel(high)).abs().mean() for mel in (encoder.log_mel(low), moved))
    assert after < 0.5 * before
    plain, heard = tokenizer.latents(low), tokenizer.latents(low, disguise(factors=1.2))
    assert torch.equal(plain[1], heard[1]) and not torch.allclose(plain[0], heard[0], atol=1e-3)
    torch.testing.assert_close(tokenizer.latents(low, disguise())[0], plain[0])
    for own, both in ((None, plain), (disguise(factors=1.2), heard)):
        assert torch.equal(encoder.content_alone(low, own), both[0])


def test_disguised_noise_is_as_loud_in_every_band_as_the_disguise_says():
    encoder = RVQTokenizer(PRESETS["cpu"]).encoder
    noise = 0.1 * torch.randn(1, 40 * FRAME_SAMPLES, generator=torch.Generator().manual_seed(0))
    mel = encoder.log_mel(noise)
    change = encoder.disguised(mel, disguise(tilt=3.0, bump_hz=2000.0, bump_db=6.0)) - mel  # (1, F, n_mels)
    decibels = (change * 2 * 20 / torch.tensor(10.0).log()).mean(dim=(0, 1))
    for hertz, expected in ((250, -6.0), (1000, 0.0 + 6 * 0.135), (2000, 3.0 + 6.0), (8000, 9.0)):
        band = int((encoder.centres - hertz).abs().argmin())
        assert decibels[band] == pytest.approx(expected, abs=0.4), hertz


# exact codes


def test_codes_do_not_depend_on_how_the_audio_is_cut():
    """Trained-like codebooks lie close together: many near ties. In float32 some of them go the other way."""
    torch.manual_seed(0)
    tokenizer = RVQTokenizer(dataclasses.replace(PRESETS["debug"], codebook_size=512)).eval()
    wave = 0.1 * torch.randn(2, 60 * FRAME_SAMPLES)
    content, acoustic = tokenizer.latents(wave)
    cloud = torch.randn(2048, 8, generator=torch.Generator().manual_seed(1))
    for stack, latents in ((tokenizer.semantic, content), (tokenizer.acoustic, acoustic)):
        stack.fit(cloud * latents.std(), 64, torch.Generator())  # deep levels hold equal codes
    whole = tokenizer.encode(wave)
    for pieces in (1, 777, FRAME_SAMPLES, 5 * FRAME_SAMPLES + 3):
        stream = tokenizer.encoder_stream(2)
        if pieces == 1:
            parts = [stream.push(wave[:, :1]), stream.push(wave[:, 1:])]
        else:
            parts = [stream.push(piece) for piece in wave.split(pieces, dim=1)]
        assert torch.equal(torch.cat([*parts, stream.flush()], dim=1), whole)


def test_codes_follow_the_weights_after_every_kind_of_change():
    """The float64 copy is made anew when weights or codebooks have changed in place, by training, or were loaded."""
    torch.manual_seed(0)
    tokenizer, wave = RVQTokenizer(PRESETS["debug"]), 0.1 * torch.randn(1, 20 * FRAME_SAMPLES)
    tokenizer.semantic.fit(torch.randn(64, 8), 16, torch.Generator())
    before, first = tokenizer.encode(wave), tokenizer.exact
    assert torch.equal(tokenizer.encode(wave), before) and tokenizer.exact is first
    with torch.no_grad():
        tokenizer.encoder.content_out[1].weight.neg_()
    assert not torch.equal(tokenizer.encode(wave), before) and tokenizer.exact is not first
    for stack, latents in zip((tokenizer.semantic, tokenizer.acoustic), tokenizer.latents(wave), strict=True):
        stack.fit(latents.detach().flatten(0, 1).repeat(4, 1), 16, torch.Generator())
    before = tokenizer.encode(wave)
    for _ in range(30):
        tokenizer.train()(0.3 * torch.randn(1, 20 * FRAME_SAMPLES), torch.tensor([10]), torch.tensor([22]))
    trained = RVQTokenizer(PRESETS["debug"])
    trained.load_state_dict(tokenizer.state_dict())
    codes = tokenizer.encode(wave)
    assert not torch.equal(codes, before) and torch.equal(codes, trained.encode(wave))
    assert torch.equal(tokenizer.decode(codes), trained.decode(codes))
    torch.manual_seed(5)
    other = RVQTokenizer(PRESETS["debug"])
    tokenizer.load_state_dict(other.state_dict())
    assert torch.equal(tokenizer.encode(wave), other.encode(wave))


def test_frozen_decoding_equals_decoding_the_codes_and_teaches_the_decoder_alone():
    torch.manual_seed(0)
    tokenizer, wave = RVQTokenizer(PRESETS["debug"]), 0.1 * torch.randn(2, 20 * FRAME_SAMPLES)
    for stack, latents in zip((tokenizer.semantic, tokenizer.acoustic), tokenizer.latents(wave), strict=True):
        stack.fit(latents.detach().flatten(0, 1).repeat(2, 1), 16, torch.Generator())
    before = tokenizer.semantic.levels[0].codebook.clone()
    frozen = tokenizer.decode_frozen(wave, torch.tensor([10, 4]), torch.tensor([22, 0]))
    codes = tokenizer.encode(wave)
    torch.testing.assert_close(frozen[:1], tokenizer.decode(codes[:1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(frozen[1:], tokenizer.decode(codes[1:, :, :4]), rtol=0, atol=1e-5)
    frozen.square().mean().backward()
    assert all(p.grad is None for p in tokenizer.encoder.parameters())
    assert all(p.grad is not None for p in tokenizer.decoder.parameters())
    assert torch.equal(tokenizer.semantic.levels[0].codebook, before)


def test_frozen_decoding_hears_the_codes_of_encode_under_autocast(monkeypatch):
    """In bfloat16 some would be others: the decoder would learn from codes that no clip has."""
    torch.manual_seed(0)
    tokenizer, wave = RVQTokenizer(PRESETS["debug"]), 0.1 * torch.randn(2, 40 * FRAME_SAMPLES)
    for stack, latents in zip((tokenizer.semantic, tokenizer.acoustic), tokenizer.latents(wave), strict=True):
        stack.fit(latents.detach().flatten(0, 1).repeat(2, 1), 16, torch.Generator())
    heard = []
    monkeypatch.setattr(tokenizer, "synthesize", lambda *latents: heard.append(latents[:2]))
    depths = torch.tensor([10, 10]), torch.tensor([22, 22])
    tokenizer.decode_frozen(wave, *depths)
    with torch.autocast("cpu", torch.bfloat16):
        tokenizer.decode_frozen(wave, *depths)
    for plain, mixed in zip(*heard, strict=True):
        assert torch.equal(plain, mixed)
