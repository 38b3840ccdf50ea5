"""A reward for questions.jsonl: half for the right answer, half for at most ten words.

The loop calls the function that ``"module:function"`` names, here ``"short_answers:reward"``, with
the model's text and the whole line of the prompts file.  It is plain Python: import what you need.
Left out: any judgement of the language.
"""

from __future__ import annotations

import re
from typing import Any

MOST_WORDS = 10


def reward(completion: str, record: dict[str, Any]) -> float:
    """0, 0.5 or 1.

    Args:
        completion: what the model wrote, without special tokens.
        record: the prompt's JSON object; ``answers`` lists the accepted answers.
    """
    words = completion.split()
    is_short = 1 <= len(words) <= MOST_WORDS
    is_right = any(
        re.search(rf"\b{re.escape(answer)}\b", completion, re.IGNORECASE)
        for answer in record["answers"]
    )
    return 0.5 * is_short + 0.5 * is_right
