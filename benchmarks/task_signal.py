"""Which reasoning-gym tasks give SmolLM2-135M-Instruct something to learn from?

A group teaches only if its rewards differ.  For each candidate this samples groups at temperature
1 with vLLM and reports the mean reward, the share of groups whose rewards differ, and lengths.

    python benchmarks/task_signal.py [--prompts 8] [--out benchmarks/results/task_signal.json]

Takes about five minutes on two idle CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from asystem_bridge.models.smollm2 import smollm2_checkpoint
from asystem_bridge.tasks.chat_source import TaskPromptSource
from asystem_bridge.tasks.reasoning_gym_tasks import ReasoningGymOptions, ReasoningGymTask
from asystem_bridge.vllm_backend.client import vllm_environment

NUMBER_ONLY = "Answer with the number only."
SHORT = "Answer with the result only."

CANDIDATES = (
    ReasoningGymOptions(
        dataset="basic_arithmetic",
        dataset_options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        answer="last_number",
    ),
    ReasoningGymOptions(
        dataset="basic_arithmetic",
        dataset_options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        instruction=NUMBER_ONLY,
        answer="last_number",
    ),
    ReasoningGymOptions(
        dataset="basic_arithmetic",
        dataset_options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        instruction=NUMBER_ONLY,
    ),
    ReasoningGymOptions(
        dataset="chain_sum",
        dataset_options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        answer="last_number",
    ),
    ReasoningGymOptions(
        dataset="chain_sum",
        dataset_options={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
        answer="last_number",
    ),
    ReasoningGymOptions(
        dataset="products",
        dataset_options={"min_digits": 1, "max_digits": 1},
        answer="last_number",
    ),
    ReasoningGymOptions(dataset="gcd", dataset_options={"max_value": 20}, answer="last_number"),
    ReasoningGymOptions(dataset="lcm", dataset_options={"max_value": 10}, answer="last_number"),
    ReasoningGymOptions(
        dataset="products",
        dataset_options={"min_digits": 1, "max_digits": 1},
        instruction=NUMBER_ONLY,
        answer="last_number",
    ),
    ReasoningGymOptions(
        dataset="gcd",
        dataset_options={"max_value": 20},
        instruction=NUMBER_ONLY,
        answer="last_number",
    ),
    ReasoningGymOptions(
        dataset="letter_counting",
        dataset_options={"min_words": 2, "max_words": 4},
        instruction=NUMBER_ONLY,
        answer="last_number",
    ),
    ReasoningGymOptions(
        dataset="number_format",
        dataset_options={"max_num_candidates": 2, "min_n": 10, "max_n": 1000},
        answer="last_number",
    ),
    ReasoningGymOptions(
        dataset="count_bits",
        dataset_options={"max_n": 15},
        instruction=NUMBER_ONLY,
        answer="last_number",
    ),
    ReasoningGymOptions(
        dataset="simple_equations",
        dataset_options={"max_terms": 2, "max_value": 10},
        answer="last_number",
    ),
    ReasoningGymOptions(dataset="number_sequence", instruction=NUMBER_ONLY, answer="last_number"),
    ReasoningGymOptions(dataset="syllogism", answer="first_word"),
    ReasoningGymOptions(dataset="ransom_note", instruction="Answer True or False."),
    ReasoningGymOptions(
        dataset="ransom_note",
        dataset_options={"max_note_length": 3, "max_magazine_length": 6},
        instruction="Answer True or False.",
        answer="first_word",
    ),
    ReasoningGymOptions(dataset="family_relationships"),
    ReasoningGymOptions(
        dataset="spell_backward",
        dataset_options={"min_word_len": 3, "max_word_len": 4},
        instruction=SHORT,
    ),
    ReasoningGymOptions(
        dataset="word_sequence_reversal", dataset_options={"min_words": 3, "max_words": 3}
    ),
    ReasoningGymOptions(
        dataset="sentence_reordering",
        dataset_options={"max_words_in_sentence": 5},
        instruction="Answer with the sentence only.",
    ),
    ReasoningGymOptions(
        dataset="number_filtering",
        dataset_options={"max_numbers": 4, "max_decimals": 0},
        instruction=SHORT,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=6, help="groups per task")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--max-prompt-tokens", type=int, default=160)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/task_signal.json"))
    arguments = parser.parse_args()

    os.environ.update(vllm_environment(threads=1))
    import torch
    import vllm

    torch.set_num_threads(1)
    llm = vllm.LLM(
        model=str(smollm2_checkpoint()),
        dtype=arguments.dtype,
        max_model_len=arguments.max_prompt_tokens + arguments.max_new_tokens,
        max_num_seqs=64,
        enable_chunked_prefill=False,
        kv_cache_memory_bytes=2**30,
    )
    tasks = [ReasoningGymTask(options) for options in CANDIDATES]
    prompts = [
        _first_prompts(task, llm.get_tokenizer(), arguments.prompts, arguments.max_prompt_tokens)
        for task in tasks
    ]
    flat = [prompt for of_task in prompts for prompt in of_task]
    start = time.monotonic()
    outputs = iter(
        llm.generate(
            [vllm.TokensPrompt(prompt_token_ids=list(prompt.token_ids)) for prompt in flat],
            vllm.SamplingParams(
                n=arguments.group_size, temperature=1.0, max_tokens=arguments.max_new_tokens, seed=0
            ),
        )
    )
    seconds = time.monotonic() - start

    rows = []
    for task, of_task in zip(tasks, prompts, strict=True):
        groups = [(prompt, next(outputs).outputs) for prompt in of_task]
        rows.append(_summarise(task, groups))
    rows.sort(key=lambda row: -row["groups_with_signal"])
    _print_table(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "model": "SmolLM2-135M-Instruct",
        "temperature": 1.0,
        "vllm": vllm.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "arguments": {k: v for k, v in vars(arguments).items() if k != "out"},
        "generation_seconds": round(seconds, 1),
        "tasks": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _first_prompts(
    task: ReasoningGymTask, tokenizer: Any, count: int, max_prompt_tokens: int
) -> list[Any]:
    source = TaskPromptSource(task, tokenizer, max_prompt_tokens=max_prompt_tokens)
    return [source.next_prompt() for _ in range(count)]


def _summarise(task: ReasoningGymTask, groups: list[tuple[Any, list[Any]]]) -> dict[str, Any]:
    rewards = [
        [task.reward(completion.text, prompt.record) for completion in completions]
        for prompt, completions in groups
    ]
    completions = [completion for _, group in groups for completion in group]
    options = task.options
    return {
        "dataset": options.dataset,
        "dataset_options": options.dataset_options,
        "instruction": options.instruction,
        "answer": options.answer,
        "mean_reward": round(statistics.mean(r for group in rewards for r in group), 4),
        "groups_with_signal": sum(max(group) > min(group) for group in rewards) / len(rewards),
        "mean_std_in_group": round(statistics.mean(statistics.pstdev(g) for g in rewards), 4),
        "mean_prompt_tokens": round(
            statistics.mean(len(prompt.token_ids) for prompt, _ in groups), 1
        ),
        "mean_completion_tokens": round(
            statistics.mean(len(completion.token_ids) for completion in completions), 1
        ),
        "share_cut_off": sum(c.finish_reason == "length" for c in completions) / len(completions),
        "examples": [
            {"completion": completion.text, "reward": reward}
            for completion, reward in zip(groups[0][1][:3], rewards[0][:3], strict=True)
        ],
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    print("reward  std in group  groups with signal  prompt  completion  cut off  task")
    for row in rows:
        options = ", ".join(f"{k}={v}" for k, v in row["dataset_options"].items())
        print(
            f"{row['mean_reward']:6.3f}  {row['mean_std_in_group']:12.3f}  "
            f"{row['groups_with_signal']:18.0%}  {row['mean_prompt_tokens']:6.0f}  "
            f"{row['mean_completion_tokens']:10.0f}  {row['share_cut_off']:7.0%}  "
            f"{row['dataset']}({options}) {row['answer']} {row['instruction']!r}"
        )


if __name__ == "__main__":
    main()
