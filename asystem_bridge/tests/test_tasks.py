"""Tasks, the registry and the prompt source."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asystem_bridge.errors import ConfigError
from asystem_bridge.models.char_tokenizer import UNK_ID, char_tokenizer
from asystem_bridge.tasks import answer_extraction
from asystem_bridge.tasks.base import Question
from asystem_bridge.tasks.chat_source import TaskPromptSource
from asystem_bridge.tasks.digit_sort import DigitSort, DigitSortOptions
from asystem_bridge.tasks.registry import TASK_NAMES, build_task

EASY_SUM = {
    "dataset": "basic_arithmetic",
    "dataset_options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}


# --- digit sort


def test_digit_sort_answers_are_sorted_and_only_they_score():
    task = DigitSort(DigitSortOptions(min_digits=3, max_digits=5))
    lengths = set()
    for index in range(200):
        question = task.question(index)
        digits = question.text.removeprefix("sort:").removesuffix("=")
        answer = question.record["answer"]
        assert list(answer) == sorted(digits)
        assert task.reward(answer, question.record) == 1.0
        for wrong in (answer[:-1], answer + "0", " " + answer, ""):
            assert task.reward(wrong, question.record) == 0.0
        lengths.add(len(digits))
    assert lengths == {3, 4, 5}


def test_digit_sort_depends_on_index_and_seed_alone():
    questions = [DigitSort(DigitSortOptions(seed=s)).question(i) for s in (0, 1) for i in (0, 7)]
    assert questions == [
        DigitSort(DigitSortOptions(seed=s)).question(i) for s in (0, 1) for i in (0, 7)
    ]
    assert len({question.text for question in questions}) == 4


def test_digit_sort_text_needs_no_unknown_token():
    tokenizer = char_tokenizer(model_max_length=64)
    question = DigitSort(DigitSortOptions()).question(0)
    for text in (question.text, question.record["answer"]):
        token_ids = tokenizer(text)["input_ids"]
        assert len(token_ids) == len(text)
        assert UNK_ID not in token_ids
        assert tokenizer.decode(token_ids) == text


# --- answers out of completions


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("7", "7"),
        ("3 + 4 = 7", "7"),
        ("The answer is 12.", "12"),
        ("It is 1,234, I think.", "1234"),
        ("x = -3.50", "-3.50"),
        ("5-3", "3"),
        ("numbers 1,2", "2"),
        ("step 1: none", "1"),
        ("H2O", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_last_number(completion: str, expected: str | None):
    assert answer_extraction.last_number(completion) == expected


@pytest.mark.parametrize(
    ("name", "completion", "expected"),
    [
        ("whole", "  Yes.\nBecause.\n", "Yes.\nBecause."),
        ("whole", " \n", None),
        ("first_line", "\n Yes.\nBecause.", "Yes."),
        ("first_line", "", None),
        ("first_word", "**Yes**, it does", "Yes"),
        ("first_word", "...", None),
        ("answer_tag", "<answer>1</answer> no, <answer> 2 </answer>.", "2"),
        ("answer_tag", "The answer is 2", None),
    ],
)
def test_other_extractors(name: str, completion: str, expected: str | None):
    assert answer_extraction.EXTRACTORS[name](completion) == expected


def test_answer_tag_agrees_with_reasoning_gym():
    from reasoning_gym.utils import extract_answer

    for completion in ("<answer>1</answer>", "a <answer>\n x\ny </answer> b", "none", "<answer>"):
        assert answer_extraction.answer_tag(completion) == extract_answer(completion)


# --- reasoning-gym


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ("basic_arithmetic", EASY_SUM["dataset_options"]),
        ("letter_counting", {}),
        ("sentence_reordering", {}),
        ("time_intervals", {}),  # its entries hold dates, which JSON cannot
        ("spell_backward", {}),
    ],
)
def test_reasoning_gym_scores_as_the_data_set_does(dataset: str, options: dict[str, Any]):
    import reasoning_gym

    task = build_task("reasoning_gym", {"dataset": dataset, "dataset_options": options, "seed": 3})
    reference = reasoning_gym.create_dataset(dataset, size=20, seed=3, **options)
    for index in (0, 1, 19):
        question = task.question(index)
        record = json.loads(json.dumps(question.record))
        assert question.text == reference[index]["question"].strip()
        answer = reference[index]["answer"]
        assert task.reward(answer, record) == reference.score_answer(answer, reference[index])
        assert task.reward(answer, record) > 0.9
        assert task.reward("", record) == reference.score_answer(None, reference[index])
        assert task.reward("no such answer", record) < 0.1


def test_reasoning_gym_instruction_extraction_and_wrap_around():
    options = EASY_SUM | {"instruction": "Number only.", "answer": "last_number", "size": 5}
    task = build_task("reasoning_gym", options)
    question = task.question(2)
    assert question.text.endswith("\nNumber only.")
    assert task.question(7) == question
    assert task.question(3) != question
    answer = str(eval(question.text.removeprefix("Calculate ").split(".")[0]))
    assert task.reward(f"Let me see: that makes {answer}.", question.record) == 1.0
    assert task.reward("Let me see: that makes 999.", question.record) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "no_such"}, "no data set 'no_such'.*basic_arithmetic"),
        ({"dataset": "chain_sum", "dataset_options": {"terms": 3}}, "refuses the options.*terms"),
        (
            {"dataset": "chain_sum", "dataset_options": {"min_terms": 5, "max_terms": 2}},
            "refuses the options",
        ),
        ({"dataset": "chain_sum", "dataset_options": {"seed": 1}}, "option of the task itself"),
        ({"dataset": "chain_sum", "answer": "magic"}, "'magic'.*allowed are whole"),
        ({"dataset": "chain_sum", "size": 0}, "size = 0"),
        ({"dataset": "list_functions"}, "other questions each time"),
    ],
)
def test_reasoning_gym_refusals(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build_task("reasoning_gym", options)


# --- mixture and registry


def test_mixture_takes_turns_and_scores_with_the_right_task():
    task = build_task(
        "mixture",
        {
            "tasks": [
                {"name": "digit_sort", "seed": 1},
                {"name": "digit_sort", "seed": 2, "min_digits": 9, "max_digits": 9},
            ]
        },
    )
    parts = [DigitSort(DigitSortOptions(seed=1))]
    parts += [DigitSort(DigitSortOptions(seed=2, min_digits=9, max_digits=9))]
    assert task.raw
    for index in range(6):
        question = task.question(index)
        expected = parts[index % 2].question(index // 2)
        assert question.text == expected.text
        assert task.reward(expected.record["answer"], question.record) == 1.0
        assert task.reward("x", question.record) == 0.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sort", {}, "unknown task 'sort': allowed are " + ", ".join(TASK_NAMES)),
        ("digit_sort", {"digits": 3}, "unknown key digits; allowed are max_digits, min_digits"),
        ("digit_sort", {"min_digits": "3"}, "min_digits = '3': .*valid integer"),
        ("digit_sort", {"seed": True}, "seed = True: .*valid integer"),
        ("digit_sort", {"min_digits": 5, "max_digits": 4}, "min_digits = 5 with max_digits = 4"),
        ("digit_sort", {"min_digits": 0}, "min_digits = 0"),
        ("reasoning_gym", {}, "dataset is missing"),
        ("mixture", {}, "needs 'tasks'"),
        ("mixture", {"tasks": []}, "at least one task"),
        ("mixture", {"tasks": [{"seed": 1}]}, "number 1 of 'tasks' has no name"),
        ("mixture", {"tasks": [{"name": "digit_sort", "sed": 1}]}, "unknown key sed"),
        (
            "mixture",
            {"tasks": [{"name": "digit_sort"}, {"name": "reasoning_gym", **EASY_SUM}]},
            "raw tasks together with chat tasks",
        ),
    ],
)
def test_registry_refusals(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build_task(name, options)


# --- the prompt source


class Words:
    """``count`` questions; number i repeats a letter i + 1 times."""

    def __init__(self, count: int, *, raw: bool = True) -> None:
        self.count, self.raw = count, raw

    def question(self, index: int) -> Question | None:
        return Question(text="a" * (index + 1), record={"i": index}) if index < self.count else None

    def reward(self, completion: str, record: dict[str, Any]) -> float:
        raise NotImplementedError


def test_source_numbers_prompts_and_ends():
    source = TaskPromptSource(Words(3), char_tokenizer(model_max_length=64), max_prompt_tokens=8)
    prompts = [source.next_prompt() for _ in range(4)]
    assert prompts[3] is None
    assert [prompt.uid for prompt in prompts[:3]] == ["0", "1", "2"]
    assert [len(prompt.token_ids) for prompt in prompts[:3]] == [1, 2, 3]
    assert [prompt.record for prompt in prompts[:3]] == [{"i": 0}, {"i": 1}, {"i": 2}]


def test_source_goes_on_where_its_state_was_taken():
    tokenizer = char_tokenizer(model_max_length=64)
    source = TaskPromptSource(Words(9), tokenizer, max_prompt_tokens=4, start=2)
    first = source.next_prompt()
    assert first.uid == "2"
    state = json.loads(json.dumps(source.state_dict()))
    rest = [source.next_prompt() for _ in range(2)]
    assert rest[1] is None  # questions 4 to 8 have 5 tokens and more
    assert source.skipped == 5

    resumed = TaskPromptSource(Words(9), tokenizer, max_prompt_tokens=4)
    resumed.load_state_dict(state)
    assert [resumed.next_prompt() for _ in range(2)] == rest
    assert resumed.state_dict() == source.state_dict()


def test_source_stops_where_nothing_fits():
    source = TaskPromptSource(
        Words(10**6), char_tokenizer(model_max_length=64), max_prompt_tokens=4, start=4
    )
    with pytest.raises(ConfigError, match="1000 questions in a row are longer"):
        source.next_prompt()


def test_source_refuses_chat_without_a_template():
    with pytest.raises(ConfigError, match="no chat template"):
        TaskPromptSource(
            Words(3, raw=False), char_tokenizer(model_max_length=64), max_prompt_tokens=8
        )
    with pytest.raises(ConfigError, match="max_prompt_tokens = 0"):
        TaskPromptSource(Words(3), char_tokenizer(model_max_length=64), max_prompt_tokens=0)


def test_source_applies_the_chat_template():
    tokenizer = char_tokenizer(model_max_length=64)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    source = TaskPromptSource(Words(3, raw=False), tokenizer, max_prompt_tokens=20)
    assert tokenizer.decode(source.next_prompt().token_ids) == "user:a;a:"
