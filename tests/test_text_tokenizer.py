"""Text to ids and back; what cannot be spoken."""

import re

import pytest

from text_tokenizer import (
    ByteTokenizer,
    clean_text,
    encode_turn,
    load_text_tokenizer,
    shared_prefix,
    turn_prompt,
    turn_text,
)


@pytest.mark.parametrize("text", ["hello", "Žluťoučký kůň", "你好, 世界", "emoji 🙂 too", ""])
def test_bytes_come_back(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < 256 for i in ids)


def test_a_turn_carries_its_speaker_as_text():
    tokenizer = ByteTokenizer()
    ids = encode_turn(tokenizer, 1, "Hi")
    assert ids[0] == tokenizer.bos
    assert ids[-1] == tokenizer.eos
    assert tokenizer.decode(ids) == "[1]Hi"
    assert max(ids) < tokenizer.vocab_size


@pytest.mark.parametrize("speaker", [0, 7, 12])
@pytest.mark.parametrize("text", ["hello", "[3] is a number", "Žluťoučký kůň", "x"])
def test_a_turn_begins_with_its_speakers_prompt_and_its_text_comes_back(speaker, text):
    tokenizer = ByteTokenizer()
    prompt, ids = turn_prompt(tokenizer, speaker), encode_turn(tokenizer, speaker, text)
    assert prompt == [tokenizer.bos, *f"[{speaker}]".encode()]
    assert ids[: len(prompt)] == prompt
    assert turn_text(tokenizer, speaker, ids) == text


def test_text_that_a_model_wrote_is_read_as_far_as_it_goes():
    tokenizer = ByteTokenizer()
    cut = encode_turn(tokenizer, 1, "café")[:-2]  # in the middle of a letter, without an end
    assert turn_text(tokenizer, 1, cut) == "caf\ufffd"
    assert turn_text(tokenizer, 1, turn_prompt(tokenizer, 1)) == ""
    assert turn_text(tokenizer, 1, [*turn_prompt(tokenizer, 1), *b" hm ", tokenizer.eos]) == "hm"
    assert turn_text(tokenizer, 1, encode_turn(tokenizer, 0, "hi")) == "[0]hi"  # another speaker's tag is text


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [([1, 2, 3], [1, 2, 4], [1, 2]), ([1, 2], [1, 2, 3], [1, 2]), ([1, 2, 3], [1], [1]), ([1], [2], []), ([], [1], [])],
)
def test_a_shared_prefix_is_what_both_begin_with(one, other, both):
    assert shared_prefix(one, other) == shared_prefix(other, one) == both


class JoiningTokenizer(ByteTokenizer):
    """Joins a closing bracket with a letter behind it into one id, as learnt vocabularies do."""

    def encode(self, text: str) -> list[int]:
        pieces = re.findall(r"\][a-zA-Z]|.", text)
        return [ord(piece) if len(piece) == 1 else 1000 + ord(piece[1]) for piece in pieces]


def test_a_bracket_that_a_tokenizer_joins_with_the_text_is_no_part_of_the_prompt():
    tokenizer = JoiningTokenizer()
    assert encode_turn(tokenizer, 1, "hi") == [256, ord("["), ord("1"), 1000 + ord("h"), ord("i"), 257]
    assert turn_prompt(tokenizer, 1) == [256, ord("["), ord("1")]


def test_text_is_cleaned_not_changed():
    assert clean_text("  two\n words\t ") == "two words"
    assert clean_text("cafe\u0301 \u200bok\x07") == "caf\u00e9 ok"


@pytest.mark.parametrize("text", ["", "  \n", "...", "?!"])
def test_what_cannot_be_spoken_is_refused(text):
    with pytest.raises(ValueError, match="holds no letter or digit to speak"):
        clean_text(text)


def test_a_hugging_face_tokenizer_is_read_from_a_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "hello": 3, "you": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path)
    tokenizer = load_text_tokenizer(str(tmp_path))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (0, 1, 5)
    assert tokenizer.encode("hello you") == [3, 4]
    assert tokenizer.decode([3, 4]) == "hello you"


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"no tokenizer at .*: give a local folder, a hub name or 'bytes'"):
        load_text_tokenizer(str(tmp_path / "none"))
