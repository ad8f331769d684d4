"""The shape of codes, the streams and the fingerprint that all audio tokenizers share, on a codec of one line."""

import pytest
import torch
from torch import Tensor, nn

from audio import FRAME_SAMPLES
from audio_tokenizer import (
    CHUNK_FRAMES,
    CodeShape,
    DecoderStream,
    EncoderStream,
    decode_whole,
    encode_whole,
    fingerprint,
)

DELAY = 100


class Counter:
    """Codes a frame as its number in the stream and the sign of its first sample; decodes them to levels, late."""

    config = CodeShape(n_codebooks=2, n_semantic=1, codebook_size=1000)
    device = torch.device("cpu")
    delay_samples = DELAY

    def __init__(self):
        self.lengths = []  # of all calls, in frames

    def encoder_state(self, batch_size: int) -> int:
        return 0

    def encode_frames(self, wave: Tensor, state: int) -> tuple[Tensor, int]:
        first = wave[:, ::FRAME_SAMPLES]  # (B, T)
        self.lengths.append(first.size(1))
        numbers = torch.arange(state, state + first.size(1)).expand(len(wave), -1)
        return torch.stack([numbers, (first > 0).long()], dim=-1), state + first.size(1)

    def decoder_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, DELAY)

    def decode_frames(self, codes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.lengths.append(codes.size(1))
        wave = torch.cat([state, codes.sum(dim=-1).float().repeat_interleave(FRAME_SAMPLES, dim=1)], dim=1)
        return wave[:, :-DELAY], wave[:, -DELAY:]

    def decode_end(self, state: Tensor) -> Tensor:
        return state


def test_long_pieces_pass_in_chunks_of_bounded_length():
    codec, n_frames = Counter(), 2 * CHUNK_FRAMES + 3
    codes = encode_whole(codec, torch.ones(1, n_frames * FRAME_SAMPLES))
    assert codec.lengths == [CHUNK_FRAMES, CHUNK_FRAMES, 3]
    assert codes[0, :, 0].tolist() == list(range(n_frames))
    codec.lengths.clear()
    wave = decode_whole(codec, codes)
    assert codec.lengths == [CHUNK_FRAMES, CHUNK_FRAMES, 3]
    assert torch.equal(wave[0, ::FRAME_SAMPLES], codes[0].sum(dim=-1).float())


def test_an_encoder_stream_keeps_no_more_than_the_unfinished_frame():
    stream = EncoderStream(Counter(), 1)
    assert stream.push(torch.ones(1, 50 * FRAME_SAMPLES + 7)).size(1) == 50
    assert stream.waiting.untyped_storage().nbytes() == 7 * 4
    assert stream.flush()[0, :, 0].tolist() == [50]
    assert stream.flush().shape == (1, 0, 2)  # as new


def test_a_decoder_stream_is_late_by_the_delay_of_its_codec():
    stream = DecoderStream(Counter(), 1)
    codes = torch.full((1, 3, 1), 5)
    wave = torch.cat([stream.push(codes), stream.flush()], dim=1)
    assert wave.size(1) == 3 * FRAME_SAMPLES + stream.delay_samples
    assert wave[:, :DELAY].abs().max() == 0 and (wave[:, DELAY:] == 5).all()


def test_streams_refuse_another_batch_size():
    with pytest.raises(ValueError, match="opened for 2"):
        EncoderStream(Counter(), 2).push(torch.zeros(1, 1920))
    with pytest.raises(ValueError, match="opened for 2"):
        DecoderStream(Counter(), 2).push(torch.zeros(1, 1, 2, dtype=torch.int64))


@pytest.mark.parametrize("change", [{"n_semantic": 2}, {"n_semantic": 0}, {"codebook_size": 0}])
def test_an_impossible_shape_of_codes_is_refused(change):
    values = {"n_codebooks": 2, "n_semantic": 1, "codebook_size": 4}
    with pytest.raises(ValueError, match=next(iter(change))):
        CodeShape(**{**values, **change})


def test_bits_per_second_count_the_codebooks_in_use():
    shape = CodeShape(n_codebooks=32, n_semantic=1, codebook_size=2048)
    assert shape.bits_per_second() == 4400 and shape.bits_per_second(8) == 1100 and shape.n_acoustic_codebooks == 31


def test_fingerprint_depends_on_config_names_and_values():
    shape = CodeShape(n_codebooks=2, n_semantic=1, codebook_size=4)
    module = nn.Linear(2, 2)
    seen = {fingerprint(shape, module), fingerprint(CodeShape(n_codebooks=3, n_semantic=1, codebook_size=4), module)}
    seen.add(fingerprint(shape, nn.Sequential(module)))
    with torch.no_grad():
        module.weight[0, 0] += 1
    seen.add(fingerprint(shape, module))
    assert len(seen) == 4
