"""Tokens on disk: made once, in parts or at a stretch, whole after any interruption."""

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer, write_tiny_data

import token_cache
from conversations import load_clips
from prosody import prosody_features
from token_cache import TokenCache, cache_folder, tokenise


def test_cached_codes_are_those_of_the_tokenizer(shared_data, tokenizer):
    cache = TokenCache(shared_data, tokenizer)
    for turn, samples in load_clips(shared_data, "val"):
        codes = tokenizer.encode(torch.from_numpy(samples)[None])[0]
        assert np.array_equal(cache.codes[turn.utt_id], codes.numpy())


def test_cached_prosody_is_that_of_the_normalised_samples(shared_data, tokenizer):
    cache = TokenCache(shared_data, tokenizer)
    for turn, samples in load_clips(shared_data, "val"):
        expected = prosody_features(samples, len(turn.text)).numpy()
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(cache.prosody[turn.utt_id], expected)
        assert cache.prosody[turn.utt_id].dtype == np.float32


def test_tokens_are_made_once_per_shard_and_tokenizer(tmp_path, tokenizer):
    data = write_tiny_data(tmp_path / "data", n_conversations=4)
    assert tokenise(data, tokenizer) == 2
    assert tokenise(data, tokenizer) == 0
    assert cache_folder(data, tiny_tokenizer(seed=1)) != cache_folder(data, tokenizer)


def assert_same(cache: TokenCache, wanted: TokenCache) -> None:
    assert cache.codes.keys() == wanted.codes.keys()
    for utt_id, codes in wanted.codes.items():
        np.testing.assert_array_equal(cache.codes[utt_id], codes)
        np.testing.assert_array_equal(cache.prosody[utt_id], wanted.prosody[utt_id])


@pytest.mark.parametrize("kept", ["no line", "torn line", "torn codes"])
def test_an_interrupted_run_goes_on_to_the_same_cache(tokenizer, tmp_path, kept):
    data = write_tiny_data(tmp_path / "data")
    wanted = TokenCache(data, tokenizer)
    index = cache_folder(data, tokenizer) / "index-000.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    codes = token_cache.codes_beside(index)
    whole = codes.read_bytes()
    wanted.codes = {utt_id: codes.copy() for utt_id, codes in wanted.codes.items()}  # no longer mapped
    index.write_bytes(lines[0] + (lines[1][:40] if kept == "torn line" else b""))
    if kept == "torn codes":
        codes.write_bytes(whole[:-5])
    assert_same(TokenCache(data, tokenizer), wanted)
    assert codes.read_bytes() == whole and index.read_bytes() == b"".join(lines)


def test_parts_made_apart_are_one_cache(tmp_path, tokenizer):
    data, other = (write_tiny_data(tmp_path / name, n_conversations=12) for name in ("data", "other"))
    made = [tokenise(data, tokenizer, part=part, of=3) for part in range(3)]
    assert sum(made) == 2 and tokenise(data, tokenizer) == 0
    assert_same(TokenCache(data, tokenizer), TokenCache(other, tokenizer))


def test_codes_are_mapped_and_not_copied(shared_data, tokenizer):
    cache = TokenCache(shared_data, tokenizer)
    assert not any(codes.flags.owndata or codes.flags.writeable for codes in cache.codes.values())


def test_shards_that_are_no_longer_collected_are_not_read(tmp_path, tokenizer):
    data = write_tiny_data(tmp_path / "data", n_conversations=4)
    everything = len(TokenCache(data, tokenizer).codes)
    ledger = data / "shards.jsonl"
    ledger.write_bytes(ledger.read_bytes().splitlines(keepends=True)[0])
    assert 0 < len(TokenCache(data, tokenizer).codes) < everything


def test_a_shard_that_is_not_what_was_collected_is_not_tokenised(tmp_path, tokenizer):
    """Of a flipped bit in a text Parquet knows nothing."""
    data = write_tiny_data(tmp_path / "data", n_conversations=2)
    shard = next(data.rglob("*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 4
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"does not have the recorded SHA-256; mend with: .*--verify"):
        TokenCache(data, tokenizer)


@pytest.mark.parametrize("file", ["codes-000.bin", "index-000.jsonl"])
def test_a_damaged_token_file_is_named(tmp_path, tokenizer, file):
    data = write_tiny_data(tmp_path / "data", n_conversations=2)
    TokenCache(data, tokenizer)
    path = cache_folder(data, tokenizer) / file
    content = path.read_bytes()
    path.write_bytes(content[:30] if path.suffix == ".bin" else b"{torn" + content)
    with pytest.raises(ValueError, match=rf"{file} is damaged .*delete|{file} is damaged: 30 bytes"):
        TokenCache(data, tokenizer)


def test_codes_are_not_written_behind_a_hole(tmp_path, tokenizer):
    data = write_tiny_data(tmp_path / "data", n_conversations=12)
    TokenCache(data, tokenizer)
    index = cache_folder(data, tokenizer) / "index-000.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    assert len(lines) > 1
    index.write_text(lines[0])  # the others are to be made
    index.with_name("codes-000.bin").unlink()
    with pytest.raises(ValueError, match=r"codes-000\.bin is damaged: 0 bytes, \d+ expected; delete"):
        TokenCache(data, tokenizer)


@pytest.mark.parametrize("extra", [1, 2, 6])
def test_a_torn_end_of_another_parts_codes_is_not_looked_at(tmp_path, tokenizer, extra):
    data = write_tiny_data(tmp_path / "data", n_conversations=12)
    wanted = TokenCache(write_tiny_data(tmp_path / "other", n_conversations=12), tokenizer)
    for part in range(2):
        tokenise(data, tokenizer, part=part, of=2)
    for codes in cache_folder(data, tokenizer).glob("codes-*.bin"):
        codes.write_bytes(codes.read_bytes() + b"x" * extra)
    assert_same(TokenCache(data, tokenizer), wanted)


@pytest.mark.parametrize(
    "line", ["null", "{}", '{"shard": "a", "codebooks": 4, "first": 0, "ids": ["x"], "lengths": []}']
)
def test_a_line_of_the_index_that_lacks_something_is_named(tmp_path, tokenizer, line):
    data = write_tiny_data(tmp_path / "data", n_conversations=2)
    TokenCache(data, tokenizer)
    with open(cache_folder(data, tokenizer) / "index-000.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"index-000\.jsonl is damaged .*delete it"):
        TokenCache(data, tokenizer)


def test_no_collection_leaves_no_trace(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="no collected data in"):
        tokenise(tmp_path / "typo", tokenizer)
    assert not (tmp_path / "typo").exists()
