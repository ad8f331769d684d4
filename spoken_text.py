"""English text as it is written -> as it is read aloud: numbers, dates, times, money, units, abbreviations, brackets.

Numbers become words by `num2words`; what stands around them is decided here. A text without any of these comes back
unchanged but for its spaces. Long texts are cut into pieces that a turn has room for.
"""

# ruff: noqa: RUF001 - characters that look alike are read alike here
from __future__ import annotations

import re
from collections.abc import Callable

from num2words import num2words

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
MONTH = "|".join([*MONTHS, *(rf"{name[:3]}\.?" for name in MONTHS if name != "May"), r"Sept\.?"])
CURRENCIES = {"$": ("USD", "dollars"), "€": ("EUR", "euros"), "£": ("GBP", "pounds")}
LARGE = {
    "thousand": "thousand", "million": "million", "billion": "billion", "trillion": "trillion",
    "k": "thousand", "K": "thousand", "m": "million", "M": "million", "mn": "million", "B": "billion", "bn": "billion",
}  # fmt: skip
ABBREVIATIONS = {
    "Mr.": "Mister", "Mrs.": "Misses", "Ms.": "Miz", "Dr.": "Doctor", "Prof.": "Professor", "Jr.": "Junior",
    "Sr.": "Senior", "vs.": "versus", "etc.": "et cetera", "e.g.": "for example", "i.e.": "that is",
    "approx.": "approximately", "dept.": "department", "est.": "established", "a.k.a.": "also known as",
    "Ave.": "Avenue", "Blvd.": "Boulevard", "Rd.": "Road",
}  # fmt: skip
BEHIND_TIMES = "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]*|Eastern|Central|Mountain|Pacific|[A-Z]{1,2}[SD]?T|UTC|GMT|I"
UNITS = {  # one, several
    "km/h": ("kilometer per hour", "kilometers per hour"), "mph": ("mile per hour", "miles per hour"),
    "m/s": ("meter per second", "meters per second"),
    "km": ("kilometer", "kilometers"), "cm": ("centimeter", "centimeters"), "mm": ("millimeter", "millimeters"),
    "m": ("meter", "meters"), "kg": ("kilogram", "kilograms"), "g": ("gram", "grams"),
    "mg": ("milligram", "milligrams"),
    "lbs": ("pound", "pounds"), "lb": ("pound", "pounds"), "oz": ("ounce", "ounces"), "ft": ("foot", "feet"),
    "l": ("liter", "liters"), "ml": ("milliliter", "milliliters"), "kWh": ("kilowatt hour", "kilowatt hours"),
    "GB": ("gigabyte", "gigabytes"), "MB": ("megabyte", "megabytes"), "kHz": ("kilohertz", "kilohertz"),
    "Hz": ("hertz", "hertz"), "ms": ("millisecond", "milliseconds"), "s": ("second", "seconds"),
    "min": ("minute", "minutes"), "h": ("hour", "hours"), "°C": ("degree Celsius", "degrees Celsius"),
    "°F": ("degree Fahrenheit", "degrees Fahrenheit"), "°": ("degree", "degrees"), "%": ("percent", "percent"),
}  # fmt: skip
SYMBOLS = {"&": "and", "+": "plus", "=": "equals", "#": "number", "@": "at", "§": "section", "×": "times"}
COMPARISONS = {
    "<": "less than", ">": "greater than", "<=": "less than or equal to", ">=": "greater than or equal to",
    "≤": "less than or equal to", "≥": "greater than or equal to",
}  # fmt: skip
PLAIN = {"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "−": "-", "\u00a0": " ", "\u202f": " "}
SENTENCE_END = r"(?<=[.!?])\s+|(?<=[.!?][\"'])\s+(?=[\"']?(?!I\b)[A-Z])"
NUMBER = r"\d{1,3}(?:,\d{3}){1,9}(?:\.\d+)?|\d+(?:\.\d+)?"


def read_aloud(text: str) -> str:
    """The words a reader would say, without digits."""
    for symbol, plain in PLAIN.items():
        text = text.replace(symbol, plain)
    text = " ".join(text.split())
    for pattern, words in RULES:
        text = " ".join(pattern.sub(words, text).split())  # long white space would make the next rules slow
    return text


def has_digits(text: str) -> bool:
    """Whether it does not say of itself how it is read."""
    return any(character.isdigit() for character in text)


def split_text(text: str, limit: int) -> list[str]:
    """Pieces of at most `limit` characters, cut behind sentences, else clauses, else words; joined they are `text`.

    A word longer than that is cut too.
    """
    if limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    pieces = [" ".join(text.split())]
    for border in (SENTENCE_END, r"(?<=[,;:])\s+", r"\s+"):
        pieces = [
            part
            for piece in pieces
            for part in ([piece] if len(piece) <= limit else packed(re.split(border, piece), limit))
        ]
    return [piece[start : start + limit] for piece in pieces for start in range(0, len(piece), limit)]


def split_sentences(text: str) -> list[str]:
    """Joined they are `text` but for its spaces."""
    return re.split(SENTENCE_END, text.strip())


def packed(parts: list[str], limit: int) -> list[str]:
    """Neighbours joined while they fit."""
    joined = parts[:1]
    for part in parts[1:]:
        if len(joined[-1]) + 1 + len(part) <= limit:
            joined[-1] += f" {part}"
        else:
            joined.append(part)
    return joined


# ---- numbers ---------------------------------------------------------------------------------------------------------


def number(text: str) -> str:
    """1,234.5 -> words; digits one by one where they are no quantity."""
    digits = text.replace(",", "")
    whole, _, fraction = digits.partition(".")
    if len(whole) > 15 or (len(whole) > 1 and whole[0] == "0"):
        spoken = one_by_one(whole)
    else:
        spoken = num2words(int(whole))
    return f"{spoken} point {one_by_one(fraction)}" if fraction else spoken


def one_by_one(digits: str) -> str:
    return " ".join(num2words(int(digit)) for digit in digits)


def ordinal(digits: str) -> str:
    return num2words(int(digits), to="ordinal") if len(digits) <= 15 else f"{one_by_one(digits)}th"


def year(digits: str) -> str:
    return num2words(int(digits), to="year") if len(digits) == 4 and digits[0] != "0" else number(digits)


def decade(digits: str) -> str:
    """1990 -> nineteen nineties"""
    words = year(digits)
    return words[:-1] + "ies" if words.endswith("y") else words + "s"


def month_name(written: str) -> str:
    """Sept. -> September"""
    return next(name for name in MONTHS if name.startswith(written[:3]))


def date(day: str, month: str, the_year: str | None) -> str:
    """The month by number or name."""
    name = MONTHS[int(month) - 1] if month.isdigit() else month_name(month)
    return f"{name} {ordinal(day)}" + (f", {year(the_year)}" if the_year else "")


def numeric_date(match: re.Match) -> str:
    """Month and day change places where the month cannot be one; a year of two digits is one of 1969 to 2068."""
    the_year, month, day = match["year"], match["month"], match["day"]
    if int(month) > 12:
        month, day = day, month
    if not (1 <= int(month) <= 12 and 1 <= int(day) <= 31):
        return " ".join(number(part) for part in re.findall(r"\d+", match[0]))
    if len(the_year) == 2:
        the_year = ("20" if int(the_year) < 69 else "19") + the_year
    return date(day, month, the_year)


def time(match: re.Match) -> str:
    """10:30, 9:05 pm, 14:00, 10:30:45"""
    hour, minute, second, half = int(match[1]), int(match[2]), int(match[3] or 0), match[4]
    words = num2words(hour)
    if minute:
        words += " oh " * (minute < 10) + " " * (minute >= 10) + num2words(minute)
    elif not half and hour in (0, 24):
        words = "midnight"
    elif not half:
        words += " o'clock" if hour <= 12 else " hundred"
    words += half_of_day(half)
    return f"{words} and {num2words(second)} {UNITS['s'][second != 1]}" if second else words


def abbreviation(match: re.Match) -> str:
    """etc. -> et cetera, with its full stop where a sentence begins behind it"""
    ends = match[1] == "etc." and match.string[match.end() + 1 : match.end() + 2].isupper()
    return ABBREVIATIONS[match[1]] + "." * ends


def half_of_day(half: str | None) -> str:
    return f" {half[0].lower()} m" if half else ""


def money(match: re.Match) -> str:
    """$5.20 -> five dollars, twenty cents; US$3M -> three million US dollars"""
    country, symbol, amount, large = match[1], match[2], match[3].replace(",", ""), LARGE.get(match[4])
    code, name = CURRENCIES[symbol]
    if large or len(amount) > 15 or len(amount.partition(".")[2]) > 2:
        words = " ".join(part for part in (number(amount), large, name) if part)
    else:
        words = num2words(amount if "." in amount else f"{amount}.00", to="currency", currency=code)
        words = re.sub(r"^zero \w+, (?!zero)|, zero \w+$", "", words)
        words = re.sub(r"(?<!^one) euro\b", " euros", words)
    return words.replace("dollar", f"{country} dollar") if country else words


def phone(match: re.Match) -> str:
    """(555) 123-4567 -> five five five, one two three, four five six seven"""
    return ", ".join(one_by_one(digits) for digits in re.findall(r"\d+", match[0]))


def version(match: re.Match) -> str:
    """2.0.1 -> two point zero point one; 1.2.0-1.2.9 is a range"""
    words = " point ".join(map(number, re.findall(r"[0-9]+", match[0])))
    return f" {words} to " if match[0][-1] in "-–" else f" {words} "


def long_number(digits: str) -> str:
    """A round one is a quantity, any other a name: its digits."""
    return number(digits) if digits.endswith("000") else one_by_one(digits)


def apart(match: re.Match, words: str) -> str:
    """The words for what matched, apart from letters, digits and commas that touch it."""
    text, start, end = match.string, match.start(), match.end()
    before, behind = text[max(0, start - 1) : start], text[end : end + 1]
    return " " * (before.isalnum() or before in ",;:.") + words + " " * behind.isalnum()


def comparison(match: re.Match) -> str:
    return f" {COMPARISONS[match[0]]} "


def quantity(match: re.Match) -> str:
    """5 km -> five kilometers"""
    return f"{number(match[1])} {UNITS[match[2]][match[1] != '1']}"


def fraction(match: re.Match) -> str:
    """1/2 -> one half"""
    upper, lower = int(match[1]), int(match[2])
    named = {2: "half", 4: "quarter"}.get(lower) or (num2words(lower, to="ordinal") if 2 < lower < 100 else None)
    if named is None or not 0 < upper < lower:
        return f"{number(match[1])} over {number(match[2])}"
    several = "halves" if named == "half" else f"{named}s"
    return f"{num2words(upper)} {named if upper == 1 else several}"


def mixed_fraction(match: re.Match) -> str:
    """1 1/2 -> one and a half"""
    if not 0 < int(match[2]) < int(match[3]):
        return match[0]
    return f"{number(match[1])} and {re.sub('^one ', 'a ', fraction(re.match(r'(.+)/(.+)', match[0].split()[1])))}"


def rule(pattern: str, words: str | Callable[[re.Match], str], flags: int = 0) -> tuple:
    return re.compile(pattern, flags), words


units = "|".join(re.escape(unit) for unit in sorted(UNITS, key=len, reverse=True))
multiples = "|".join(sorted(LARGE, key=len, reverse=True))
on = rf"(?-i:[a-z]|(?:{MONTH}|{BEHIND_TIMES})\b)"  # what may follow p.m. within a sentence
short = "|".join(re.escape(name) for name in sorted(ABBREVIATIONS, key=len, reverse=True))
RULES = (
    rule(r"(?<![\w-])(?:\+?1[-. ])?(?:\(\d{3}\) ?|\d{3}[-.]|[2-9]\d\d )\d{3}[-. ]\d{4}(?![\w-])", phone),
    rule(r"(?<![\w$€£-])[2-9]\d\d-(?!\d{3}0)\d{4}(?![\w%-])", phone),  # 500-1000 is a range
    rule(r"(?<=\w )[<>]=?(?=[ \d])|<=?(?=\d)", comparison),
    rule(
        r"\s*[(\[{<]\s*([^()\[\]{}<>]*?)\s*[)\]}>]\s*([.,;:!?]?)", lambda m: f", {m[1]}{m[2] or ','} " if m[1] else " "
    ),
    rule(r"[<>]=?(?=\d)|[≤≥]", comparison),
    rule(r"\bhttps?://(?:www\.)?", ""),
    rule(
        r"\b([A-Za-z0-9_-]{2,63}(?:[.@/][A-Za-z0-9_-]{1,63}){0,9}\.(?:com|org|net|edu|gov|io|de|uk|fr|cz))\b",
        lambda m: m[1].replace(".", " dot ").replace("@", " at ").replace("/", " slash "),
    ),
    rule(rf"(?<!\w)({short})(?=\W|$)", abbreviation),
    rule(r"\bSt\. (?=[A-Z])", "Saint "),
    rule(r"(?<![\w.])\.(?=\d)", "0."),
    rule(r"\bSt\.", "Street"),
    rule(r"\bNo\. ?(?=\d)", "number "),
    rule(r"(?<=\d-\d\d)T(?=\d\d:)", ", "),
    rule(r"(?<=:\d\d)Z\b", " UTC"),
    rule(r"\b(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})\b", numeric_date),
    rule(r"\b(?P<month>\d{1,2})/(?P<day>\d{1,2})/(?P<year>\d{4}|\d\d)\b", numeric_date),
    rule(r"\b(?P<day>\d{1,2})\.(?P<month>\d{1,2})\.(?P<year>\d{4})\b", numeric_date),
    rule(r"\b(?P<month>\d{1,2})-(?P<day>\d{1,2})-(?P<year>\d{4})\b", numeric_date),
    rule(r"(?<![\d-])\d{1,4}(?:-\d{1,4}){2,9}(?![\d-])", lambda m: m[0].replace("-", " ")),
    rule(r"(?<![\d.])\d{1,9}(?:\.\d{1,9}){2,9}(?![\d.]\d)(?:[-–](?=\d))?", version),
    rule(r"\b(?:24/7|9/11)\b(?!/)", lambda m: m[0].replace("/", " ")),
    rule(rf"(?<!\d)((?:{NUMBER})(?:\s?(?:{multiples}))?)\s?([$€£])(?!\d)", r"\2\1"),
    rule(r"([$€£])(\d[\d,]*(?:\.\d)?)[-–]\1?(?=\d)", r"\2 to \1"),
    rule(r"(?i)(?:(?<=:\d\d)|(?<=\d[ap]m)|(?<=\d [ap]m)|(?<=[ap]\.m\.)) ?[-–] ?(?=\d)", " to "),
    rule(
        r"(?:(?<=[\d%])|(?<=\d[kKMB]))(?:[-–]| ?[-–] ?(?!\d\d?(?::| ?[ap]\.?m)))"
        r"(?=(?:[A-Z]{0,2}[$€£])?(?:\d{1,4}|\d{2,9}000)(?![\d-]))",
        " to ",
    ),
    rule(rf"\b(?<=[Tt]he )(\d{{1,2}})(?:st|nd|rd|th)? (?=(?:{MONTH})\b)", lambda m: f"{ordinal(m[1])} of "),
    rule(rf"\b(\d{{1,2}})(?:st|nd|rd|th)? ({MONTH}),? (\d{{4}})\b", lambda m: date(m[1], m[2], m[3])),
    rule(rf"\b({MONTH}) (\d{{1,2}})(?:st|nd|rd|th)?,? (\d{{4}})\b", lambda m: date(m[2], m[1], m[3])),
    rule(rf"\b({MONTH}) (\d{{1,2}})(?:st|nd|rd|th)?\b(?![.:]\d)", lambda m: date(m[2], m[1], None)),
    rule(rf"\b(\d{{1,2}})(?:st|nd|rd|th)? ({MONTH})\b", lambda m: date(m[1], m[2], None)),
    rule(rf"\b({MONTH}) ((?:1[1-9]|20)\d\d)\b", lambda m: f"{month_name(m[1])} {year(m[2])}"),
    rule(r"\b([01]?\d|2[0-4])\.(?=[0-5]\d\s?[ap]\.?m\b)", r"\1:", re.IGNORECASE),
    rule(rf"\b([01]?\d|2[0-4]):([0-5]\d)(?::([0-5]\d))?(?:\s?([ap])(?:\.m\.(?=\s+{on})|\.?m\b))?", time, re.IGNORECASE),
    rule(
        rf"\b(\d{{1,2}})\s?([ap])(?:\.m\.(?=\s+{on})|\.?m\b)",
        lambda m: number(m[1]) + half_of_day(m[2]),
        re.IGNORECASE,
    ),
    rule(r"(?:(?<=[\s(])|^)(?:-|(?<!\d )–)(?=[$€£]?\d)", "minus "),
    rule(rf"(\b[A-Z]{{1,2}})?([$€£])\s?({NUMBER})(?:\s?({multiples})\b)?", money),
    rule(r"\b(\d{2,3}0)s\b", lambda m: decade(m[1])),
    rule(r"(?<!\b[Ff]or )(?<!\b[Ww]ait )(?<!\b[Aa]fter )(?<!\b[Ww]ithin )\b(\d0)s\b", lambda m: decade(m[1])),
    rule(r"(?<!\d)(\d{1,3}(?:,\d{3}){1,4}|\d+)(?:st|nd|rd|th)\b", lambda m: ordinal(m[1].replace(",", ""))),
    rule(rf"(?<!\d)({NUMBER})\s?({units})(?!\w)", quantity),
    rule(r"(?<![\w.,/])(\d{1,3}) (\d{1,2})/(\d{1,2})\b(?!/)", mixed_fraction),
    rule(r"\b(\d{1,4})/(\d{1,4})\b", fraction),
    rule(r"(?<=\d)\^(?=-?\d)", " to the power of "),
    rule(r"\s*[–—]\s*|(?:\s+|^)-+\s+|--+", ", "),
    rule(r"(?<![\d.,])((?:1[1-9]|20)\d\d)(?![\d%]|[.,]\d)", lambda m: year(m[1])),
    rule(r"(?<![\d.,])(\d{7,})(?![\d]|[.,]\d)", lambda m: f" {long_number(m[1])} "),
    rule(rf"(?:{NUMBER})", lambda m: apart(m, number(m[0]))),
    rule("[{}]".format(re.escape("".join(SYMBOLS))), lambda m: f" {SYMBOLS[m[0]]} "),
    rule(r"(?<=\w)/(?=\w)", " "),
    rule(r"[*_~^|<>{}\[\]()\\/`]", " "),
    rule(r"\s+([.,;:!?])", r"\1"),
    rule(r",(?:\s*,)+", ","),
    rule(r",\s*([.;:!?])", r"\1"),
    rule(r"^[\s,]+|[\s,]+$", ""),
)
