"""Reading, writing and measuring audio; files that cannot be used."""

import io

import numpy as np
import pytest
import soundfile

from audio import (
    FRAME_RATE,
    FRAME_SAMPLES,
    PEAK_DBFS,
    SAMPLE_RATE,
    TARGET_LUFS,
    at_loudness,
    encode_pcm16,
    loudness_lufs,
    read_audio,
    resample,
    rms_dbfs,
    to_pcm16,
    write_wav,
)


def tone(seconds: float, hertz: float = 440, rate: int = SAMPLE_RATE, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def test_rates_fit_each_other():
    assert FRAME_SAMPLES * FRAME_RATE == SAMPLE_RATE


def test_a_wav_comes_back_within_half_a_step(tmp_path):
    samples = tone(0.5)
    write_wav(tmp_path / "a.wav", samples)
    back, rate = read_audio(tmp_path / "a.wav")
    assert rate == SAMPLE_RATE
    assert np.abs(back - samples).max() <= 0.5 / 32768 + 1e-7
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_the_documented_formats_are_read(tmp_path, container):
    path = tmp_path / f"a.{container.lower()}"
    soundfile.write(path, tone(1.0), SAMPLE_RATE, format=container)
    samples, _ = read_audio(path)
    assert len(samples) == pytest.approx(SAMPLE_RATE, rel=0.06)
    assert rms_dbfs(samples) == pytest.approx(-9, abs=0.6)


def test_channels_are_averaged_and_the_rate_converted():
    stereo = np.stack([tone(1.0, rate=8000), np.zeros(8000, dtype=np.float32)], axis=1)
    buffer = io.BytesIO()
    soundfile.write(buffer, stereo, 8000, format="WAV", subtype="FLOAT")
    samples, rate = read_audio(buffer.getvalue())
    assert rate == SAMPLE_RATE
    assert len(samples) == SAMPLE_RATE
    np.testing.assert_allclose(samples[2000:-2000], 0.5 * tone(1.0)[2000:-2000], atol=2e-3)


def test_resampling_there_and_back_keeps_the_signal():
    samples = tone(1.0, rate=16_000)
    back = resample(resample(samples, 16_000, SAMPLE_RATE), SAMPLE_RATE, 16_000)
    np.testing.assert_allclose(back[1000:-1000], samples[1000:-1000], atol=2e-3)


def test_full_scale_is_clipped_not_wrapped():
    samples = to_pcm16(np.array([2.0, -2.0, 1.0, 0.0]))
    assert samples.tolist() == [32767, -32768, 32767, 0] and to_pcm16(samples) is samples


def test_loudness_of_a_known_tone_and_of_less():
    assert loudness_lufs(tone(2.0, hertz=997, level=1.0), SAMPLE_RATE) == pytest.approx(-3.0, abs=0.4)  # BS.1770
    quiet = loudness_lufs(tone(2.0, hertz=997, level=0.1), SAMPLE_RATE)
    assert quiet == pytest.approx(-23.0, abs=0.4)
    assert loudness_lufs(tone(0.2, level=1.0), SAMPLE_RATE) == pytest.approx(-3.0, abs=0.1)
    assert rms_dbfs(np.zeros(10)) == float("-inf")


def broken_files(folder):
    samples = tone(1.0)
    wav = encode_pcm16(samples, SAMPLE_RATE, "WAV")
    flac = encode_pcm16(samples, SAMPLE_RATE)
    (folder / "text.wav").write_text("this is no audio")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "no-samples.wav").write_bytes(encode_pcm16(samples[:0], SAMPLE_RATE, "WAV"))
    (folder / "cut.flac").write_bytes(flac[: len(flac) // 2])
    not_finite = io.BytesIO()
    soundfile.write(not_finite, np.array([0.1, np.nan, 0.2]), SAMPLE_RATE, format="WAV", subtype="FLOAT")
    (folder / "nan.wav").write_bytes(not_finite.getvalue())
    (folder / "cut.wav").write_bytes(wav[: len(wav) // 2])
    ogg = io.BytesIO()
    soundfile.write(ogg, samples, SAMPLE_RATE, format="OGG")
    (folder / "cut.ogg").write_bytes(ogg.getvalue()[: len(ogg.getvalue()) // 2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.wav", "not readable as wav, flac, ogg or mp3"),
        ("empty.wav", "not readable as wav, flac, ogg or mp3"),
        ("no-samples.wav", "holds no samples"),
        ("cut.flac", "truncated|not readable"),
        ("cut.wav", "truncated, the file ends before"),
        ("cut.ogg", "truncated, the file ends before"),
        ("nan.wav", "not finite"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, message):
    broken_files(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        read_audio(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_file_cut_anywhere_is_refused(subtype):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(3.0), SAMPLE_RATE, format="OGG", subtype=subtype)
    whole = buffer.getvalue()
    assert len(read_audio(whole)[0]) == 3 * SAMPLE_RATE
    last_page = whole.rfind(b"OggS")
    for end in (4, last_page - 1, last_page + 4, last_page + 5, last_page + 20, last_page + 40, len(whole) - 1):
        with pytest.raises(ValueError, match="truncated"):
            read_audio(whole[:end])


def test_too_short_for_a_sample_at_the_wanted_rate_is_refused(tmp_path):
    write_wav(tmp_path / "click.wav", tone(1.0)[:1], 96_000)
    assert read_audio(tmp_path / "click.wav", None)[0].shape == (1,)
    with pytest.raises(ValueError, match="holds no samples at 24000 Hz"):
        read_audio(tmp_path / "click.wav")


def test_a_wav_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"folder'$"):
        write_wav(tmp_path / "folder", tone(0.1))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no audio file at .*gone.wav"):
        read_audio(tmp_path / "gone.wav")


def test_at_loudness_brings_speech_to_a_level_below_the_peak_and_leaves_silence():
    quiet = 0.003 * np.random.default_rng(0).standard_normal(2 * SAMPLE_RATE).astype(np.float32)
    for gain in (1.0, 30.0):
        assert loudness_lufs(at_loudness(gain * quiet), SAMPLE_RATE) == pytest.approx(TARGET_LUFS, abs=0.05)
    click = 3 * quiet
    click[100] = 0.8
    assert np.abs(at_loudness(click)).max() == pytest.approx(10 ** (PEAK_DBFS / 20))
    for level in (0.0, 0.1):
        assert np.array_equal(at_loudness(level * quiet), level * quiet)  # nobody speaks
    assert at_loudness(quiet[:100] * 30).dtype == np.float32
