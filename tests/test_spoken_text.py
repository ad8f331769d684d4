"""Text as written to text as read aloud: examples of each kind, no digit left, plain text unchanged; splitting."""

# ruff: noqa: E501, RUF001
import random
import string

import pytest

from spoken_text import read_aloud, split_text

READ = [
    ("It's 10:30 (or 10:45 pm).", "It's ten thirty, or ten forty-five p m."),
    ("At 9 p.m. we left. At 5am. Then", "At nine p m we left. At five a m. Then"),
    ("9:05, 14:00, 12:00", "nine oh five, fourteen hundred, twelve o'clock"),
    ("on 2026-11-23", "on November twenty-third, twenty twenty-six"),
    ("11/23/2026 and 23.11.2026", " and ".join(["November twenty-third, twenty twenty-six"] * 2)),
    ("Nov. 3rd, 2021; 4 July 1776; May 5", "November third, twenty twenty-one; July fourth, seventeen seventy-six; May fifth"),
    ("I may 5 times", "I may five times"),
    ("1984, the 1990s, the '60s", "nineteen eighty-four, the nineteen nineties, the 'sixties"),
    ("in 2005.", "in two thousand and five."),
    ("$5.20, $1, £3 million, €0.99", "five dollars, twenty cents, one dollar, three million pounds, ninety-nine cents"),
    ("1,234.5 of 3.14 and -5", "one thousand, two hundred and thirty-four point five of three point one four and minus five"),
    ("the 21st, 2nd and 103rd", "the twenty-first, second and one hundred and third"),
    ("5 km, 1 kg, 20°C, 50%, 100 km/h", "five kilometers, one kilogram, twenty degrees Celsius, fifty percent, one hundred kilometers per hour"),
    ("1/2, 3/4, 2/3, 7/200", "one half, three quarters, two thirds, seven over two hundred"),
    ("call 5551234567 or 007", "call five five five one two three four five six seven or zero zero seven"),
    ("pages 10-20 — see 4.5", "pages ten to twenty, see four point five"),
    ("Dr. Smith, Baker St. near St. Paul's", "Doctor Smith, Baker Street near Saint Paul's"),
    ("e.g. this, i.e. that, etc.", "for example this, that is that, et cetera"),
    ("ann@example.com & www.example.org", "ann at example dot com and www dot example dot org"),
    ("A4 [sic] and/or C++", "A four, sic, and or C plus plus"),
    ("“Quoted” – it’s fine…", '"Quoted", it\'s fine...'),
]  # fmt: skip


@pytest.mark.parametrize(("written", "spoken"), READ)
def test_what_is_written_is_read_aloud(written, spoken):
    assert read_aloud(written) == spoken


def test_plain_text_is_left_alone():
    for text in (
        "Hello there, how are you?",
        "I don't know; well, maybe... Why not!",
        'She said: "Go."',
        "May I? In March.",
    ):
        assert read_aloud(text) == text


@pytest.mark.parametrize("seed", range(3))
def test_no_digit_is_left_in_any_text(seed):
    draw = random.Random(seed)
    alphabet = string.digits * 4 + string.ascii_letters + string.punctuation + "   €£°×–—…"
    for _ in range(1500):
        text = "".join(draw.choices(alphabet, k=draw.randint(0, 40)))
        spoken = read_aloud(text)
        assert not any(character in string.digits for character in spoken), (text, spoken)
    assert not any(c in string.digits for c in read_aloud("9" * 5000 + "st " + "$" + "8" * 5000 + "." + "7" * 5000))


def test_pieces_are_the_text_and_no_longer_than_asked():
    text = "One sentence. Another one, with a clause; and a third! " * 5 + "x" * 70
    for limit in (1, 5, 20, 60, 1000):
        pieces = split_text(text, limit)
        assert all(0 < len(piece) <= limit for piece in pieces)
        assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
    assert " ".join(split_text(text, 70)) == text
    assert split_text("One sentence. Another one. A third one.", 27) == ["One sentence. Another one.", "A third one."]
    assert split_text("first clause, second clause", 15) == ["first clause,", "second clause"]
    assert split_text("short", 5) == ["short"]
    with pytest.raises(ValueError, match="limit=0"):
        split_text("x", 0)
