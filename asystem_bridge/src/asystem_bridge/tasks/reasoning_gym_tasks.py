"""reasoning-gym's procedural tasks with their own verifiers.

Every data set of that package is numbered and seeded, so question ``index`` is the same in every
process.  The score is the data set's own ``score_answer``, between 0 and 1.  Many give partial
credit: for a right answer inside a longer text, or 0.01 for any answer at all.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from typing import Any

from asystem_bridge.errors import ConfigError
from asystem_bridge.tasks.answer_extraction import EXTRACTORS
from asystem_bridge.tasks.base import Question


@dataclass(frozen=True, kw_only=True)
class ReasoningGymOptions:
    """Options of ``ReasoningGymTask``.

    Attributes:
        dataset: a name in ``reasoning_gym.factory.DATASETS``, such as ``"basic_arithmetic"``.
        dataset_options: keyword arguments of that data set's configuration.
        instruction: put after the question, on a line of its own; empty for none.
        answer: which part of the completion the verifier sees: the name of a function of
            ``asystem_bridge.tasks.answer_extraction``.
        size: how many different questions there are; after the last comes the first again.  Most
            data sets make an item when it is asked for, but some draw up all of them at the start.
        seed: of the questions.

    Raises:
        ValueError: ``answer`` is not one of these, or ``size`` is not positive.
    """

    dataset: str
    dataset_options: dict[str, Any] = field(default_factory=dict)
    instruction: str = ""
    answer: str = "whole"
    size: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.answer not in EXTRACTORS:
            raise ValueError(f"answer = {self.answer!r}: allowed are {', '.join(EXTRACTORS)}")
        if self.size < 1:
            raise ValueError(f"size = {self.size}: must be at least 1")
        reserved = {"seed", "size"} & self.dataset_options.keys()
        if reserved:
            raise ValueError(
                f"dataset_options has {', '.join(sorted(reserved))}: set it as an option of the "
                "task itself"
            )


class ReasoningGymTask:
    """One data set.  A completion without an extractable answer scores what "no answer" scores.

    Raises:
        ConfigError: reasoning-gym is missing, the data set is unknown, refuses its options
            or ignores its seed.
    """

    raw = False

    def __init__(self, options: ReasoningGymOptions) -> None:
        self.options = options
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # of its dependency cellpylib
                import reasoning_gym
                from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ConfigError(
                f"the task reasoning_gym needs the package reasoning-gym ({error}). "
                "Install it: pip install reasoning-gym==0.1.25"
            ) from error
        if options.dataset not in DATASETS:
            raise ConfigError(
                f"reasoning-gym has no data set {options.dataset!r}. It has: "
                f"{', '.join(sorted(DATASETS))}"
            )
        try:
            make = functools.partial(
                reasoning_gym.create_dataset,
                options.dataset,
                seed=options.seed,
                **options.dataset_options,
            )
            self._dataset = make(size=options.size)
            probes = [[entry["question"] for entry in make(size=4)] for _ in range(2)]
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(
                f"reasoning-gym's data set {options.dataset!r} refuses the options "
                f"{options.dataset_options}: {error}"
            ) from error
        if probes[0] != probes[1]:
            raise ConfigError(
                f"reasoning-gym's data set {options.dataset!r} gives other questions each time it "
                "is made, whatever the seed, so a run on it could not be resumed. Choose another"
            )
        self._extract = EXTRACTORS[options.answer]
        # The members of a group are scored one after the other.
        self._entry = functools.lru_cache(maxsize=256)(self._dataset.__getitem__)

    def question(self, index: int) -> Question:
        index %= self.options.size
        text = self._entry(index)["question"].strip()
        if self.options.instruction:
            text += "\n" + self.options.instruction
        # The entry itself may hold what JSON cannot, so the reward makes it again by its index.
        return Question(text=text, record={"index": index})

    def reward(self, completion: str, record: dict[str, Any]) -> float:
        entry = self._entry(record["index"])
        return float(self._dataset.score_answer(self._extract(completion), entry))
