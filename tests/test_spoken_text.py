"""Text as written to text as read aloud: examples of each kind, no digit left, plain text unchanged; splitting."""

# ruff: noqa: E501, RUF001
import random
import string
import time

import pytest

from spoken_conversations import MOST_CHARACTERS, turns_of
from spoken_text import read_aloud, split_sentences, split_text

READ = [
    ("It's 10:30 (or 10:45 pm).", "It's ten thirty, or ten forty-five p m."),
    ("At 9 p.m. we left. At 5am. Then", "At nine p m we left. At five a m. Then"),
    ("It leaves at 9 p.m. The bus at 10:30 a.m. Monday. At 9 P.M. we", "It leaves at nine p m. The bus at ten thirty a m Monday. At nine p m we"),
    ("9 p.m. EST, 10 a.m. Mon, at 9 p.m. I left", "nine p m EST, ten a m Mon, at nine p m I left"),
    ("pears, etc. Then go on, etc.", "pears, et cetera. Then go on, et cetera"),
    ("1,2,3 and 3:1, p.5", "one, two, three and three: one, p. five"),
    ("a 10-minute walk, COVID-19, \"1\" and a1b", "a ten-minute walk, COVID-nineteen, \"one\" and a one b"),
    ("$1.5-2 million, $2.5–$3bn", "one point five to two million dollars, two point five to three billion dollars"),
    ("$5.20-$6.30 for 10000-20000 people", "five dollars, twenty cents to six dollars, thirty cents for ten thousand to twenty thousand people"),
    ("Wait 30s, then for 20s. In the '30s and 40s, mid-30s", "Wait thirty seconds, then for twenty seconds. In the 'thirties and forties, mid-thirties"),
    ("9:05, 14:00, 12:00", "nine oh five, fourteen hundred, twelve o'clock"),
    ("on 2026-11-23", "on November twenty-third, twenty twenty-six"),
    ("11/23/2026 and 23.11.2026", " and ".join(["November twenty-third, twenty twenty-six"] * 2)),
    ("Nov. 3rd, 2021; 4 July 1776; May 5", "November third, twenty twenty-one; July fourth, seventeen seventy-six; May fifth"),
    ("I may 5 times", "I may five times"),
    ("1984, the 1990s, the '60s", "nineteen eighty-four, the nineteen nineties, the 'sixties"),
    ("in 2005.", "in two thousand and five."),
    ("$5.20, $1, £3 million, €0.99", "five dollars, twenty cents, one dollar, three million pounds, ninety-nine cents"),
    ("1,234.5 of 3.14 and -5", "one thousand, two hundred and thirty-four point five of three point one four and minus five"),
    ("-5°C, -3%, -$20 and −4 km", "minus five degrees Celsius, minus three percent, minus twenty dollars and minus four kilometers"),
    ("$.99 for .5 liters", "ninety-nine cents for zero point five liters"),
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
    ("10:30-11:30, 2:30–1:45, 12:30-1 pm", "ten thirty to eleven thirty, two thirty to one forty-five, twelve thirty to one p m"),
    ("9am-5pm, 9-5pm, 9 a.m. - 5 p.m. daily", "nine a m to five p m, nine to five p m, nine a m to five p m daily"),
    ("Day 2 - 9am, room 5 - 10:30, 3 - 4", "Day two, nine a m, room five, ten thirty, three to four"),
    ("10:30:45, 1:02:01 pm, 10:30:00", "ten thirty and forty-five seconds, one oh two p m and one second, ten thirty"),
    ("10.30 am, 0:00, 24:00, 0:30", "ten thirty a m, midnight, midnight, zero thirty"),
    ("12/25/24, 7/4/76", "December twenty-fifth, twenty twenty-four, July fourth, nineteen seventy-six"),
    ("9/11, 24/7, 24/11", "nine eleven, twenty-four seven, twenty-four over eleven"),
    ("05.06.2024, 05/06/2024", "June fifth, twenty twenty-four, May sixth, twenty twenty-four"),
    ("Nov. 2023, May 2023", "November twenty twenty-three, May twenty twenty-three"),
    ("2024-05-06T10:30, 2024-05-06T10:30:00Z", "May sixth, twenty twenty-four, ten thirty, May sixth, twenty twenty-four, ten thirty UTC"),
    ("May 5-10, 5-10 km, 5%-10%", "May fifth to ten, five to ten kilometers, five percent to ten percent"),
    ("$10-$20, $10-20 million", "ten to twenty dollars, ten to twenty million dollars"),
    ("$10 - $20, I had $10 - nobody else did", "ten dollars to twenty dollars, I had ten dollars, nobody else did"),
    ("US$5-US$6, $1k-$2k", "five US dollars to six US dollars, one thousand dollars to two thousand dollars"),
    ("$100k, $5M, $3bn, $1.5 million", "one hundred thousand dollars, five million dollars, three billion dollars, one point five million dollars"),
    ("US$5, A$1.20, 5 $10 notes", "five US dollars, one A dollar, twenty cents, five ten dollars notes"),
    ("5€, 1 €, €21.50, 3 million €", "five euros, one euro, twenty-one euros, fifty cents, three million euros"),
    ("call 555-1234 or 555-123-4567", "call five five five, one two three four or five five five, one two three, four five six seven"),
    ("(555) 123-4567", "five five five, one two three, four five six seven"),
    ("+1 (555) 123-4567, 1-800-555-1234", "one, five five five, one two three, four five six seven, one, eight zero zero, five five five, one two three four"),
    ("500-1000 people, 100-2000", "five hundred to one thousand people, one hundred to two thousand"),
    ("1000000, 2500000, 1234567", "one million, two million, five hundred thousand, one two three four five six seven"),
    ("x < 5 and y > 3, <5, z>2, a <= b, ≥4", "x less than five and y greater than three, less than five, z greater than two, a less than or equal to b, greater than or equal to four"),
    ("$0.002 per token, $0.0005, $3.45", "zero point zero zero two dollars per token, zero point zero zero zero five dollars, three dollars, forty-five cents"),
    ("the 1,000th visitor, the 21st", "the one thousandth visitor, the twenty-first"),
    ("In 2020 1/3 of us, 1,500 1/2-inch screws", "In twenty twenty one third of us, one thousand, five hundred one half-inch screws"),
    ("1st,2nd,3rd, 5-10-15 mg, 1998-1999-2000", "first,second,third, five ten fifteen milligrams, nineteen ninety-eight nineteen ninety-nine two thousand"),
    ("1.2.0-1.2.9, 192.168.0.1-10, lines of 100 200 3000 words", "one point two point zero to one point two point nine, one hundred and ninety-two point one hundred and sixty-eight point zero point one to ten, lines of one hundred two hundred three thousand words"),
    ("2 3/4 cups, 1 1/2 cups, 3/4", "two and three quarters cups, one and a half cups, three quarters"),
    ("It is –5 °C, 10–12, 10 –12", "It is minus five degrees Celsius, ten to twelve, ten to twelve"),
    ("v2.0.1, 10.0.0.1, see 3.2.1.", "v two point zero point one, ten point zero point zero point one, see three point two point one."),
    ("05-06-2024, 1-2-3, 5-10", "May sixth, twenty twenty-four, one two three, five to ten"),
    ("555 123 4567, +1 555 123 4567", "five five five, one two three, four five six seven, one, five five five, one two three, four five six seven"),
    ("the 5th May 2024, on 5 May, the 4th July parade", "the fifth of May twenty twenty-four, on May fifth, the fourth of July parade"),
    ("5 m/s, 10^3", "five meters per second, ten to the power of three"),
    ("  - one\n  - two", "one, two"),
    ("<b>bold</b> (  spaced   out )", "b, bold, b, spaced out"),
]  # fmt: skip


@pytest.mark.parametrize(("written", "spoken"), READ)
def test_what_is_written_is_read_aloud(written, spoken):
    assert read_aloud(written) == spoken


def test_sentences_end_behind_quotes_too_and_not_within_one():
    sentences = [
        'He said "Stop."',
        "Then he left at nine p m.",
        'The rest asked "why?" and stayed.',
        '"Really?" I said.',
    ]
    text = 'He said "Stop." Then he left at 9 p.m. The rest asked "why?" and stayed. "Really?" I said.'
    assert split_sentences(read_aloud(text)) == sentences


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


HOSTILE = [
    "a(" + " " * 20_000 + "b",
    *("1" * 20_000 + end for end in ("", "x", "st", " km", "€", ".5", "-")),
    *("a" + part * (20_000 // len(part)) for part in (
        "(", ")", "()", "( ", "[{<", "< ", "1,", "1,111,", "1,234", ".1", "1.1", "1-", "1 - ", "1:", "1/", "$1", "1€", "$1-",
        "$ ", ",", ", ", " ,", ".", ". ", "-", "- ", " - ", "—", "*", "_", "a-", "a.", "aa.a", "a@", "US$", "May ", "May 5 ",
        "555-", "(555) ", "10:30 ", "9 am-",
    )),
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"{text[:9]}{text[-3:]}")
def test_no_text_takes_long(text):
    start = time.process_time()
    read_aloud(text)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("end", ["." * 500, " 🙂", "🙂" * 300, " ? ! ?" * 100, ""])
@pytest.mark.parametrize("raw_text", [False, True])
def test_every_turn_of_a_long_text_can_be_spoken(end, raw_text):
    sentences = ["x" * (MOST_CHARACTERS - 1) + ".", "Bye" + end, "Again" + "?" * 400]
    pieces = turns_of(" ".join(sentences), raw_text)
    assert all(any(character.isalnum() for character in piece) for piece in pieces)
    assert "Bye" in " ".join(pieces) and "Again" in " ".join(pieces)


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
