"""Which part of a completion is the answer.  Verifiers want the answer alone; chat models chat."""

from __future__ import annotations

import re
from collections.abc import Callable

# A comma or point inside a number belongs to it only if digits follow: "1,234." is 1,234.
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?")
_ANSWER_TAG = re.compile(r"<answer>\s?(.*?)\s?</answer>", re.DOTALL)


def whole(completion: str) -> str | None:
    """Everything, without the white space around it."""
    return completion.strip() or None


def first_line(completion: str) -> str | None:
    """The first line that is not blank."""
    stripped = completion.strip()
    return stripped.splitlines()[0].strip() if stripped else None


def first_word(completion: str) -> str | None:
    """The first word without punctuation: "Yes, because ..." answers "Yes"."""
    found = re.search(r"\w+", completion)
    return found.group() if found else None


def last_number(completion: str) -> str | None:
    """The last number, without thousands separators; a minus sign counts only before a digit.

    A sum written out ("3 + 4 = 7") is answered by its right side, as it should be.
    """
    numbers = _NUMBER.findall(completion)
    return numbers[-1].replace(",", "") if numbers else None


def answer_tag(completion: str) -> str | None:
    """The inside of the last ``<answer>...</answer>``, reasoning-gym's own convention."""
    answers = _ANSWER_TAG.findall(completion)
    return answers[-1].strip() if answers else None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    extractor.__name__: extractor
    for extractor in (whole, first_line, first_word, last_number, answer_tag)
}
