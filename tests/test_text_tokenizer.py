"""Text to ids and back; what cannot be spoken."""

import pytest

from text_tokenizer import ByteTokenizer, clean_text, encode_turn, load_text_tokenizer


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
