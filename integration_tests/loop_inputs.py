"""Small real inputs for the loop's tests: a configuration, prompts and a reward with a gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def digit_share(completion: str, record: dict[str, Any]) -> float:
    """The share of digits in the completion: an untrained model already differs within groups."""
    return sum(c.isdigit() for c in completion) / max(1, len(completion))


def write_config(folder: Path, *, steps: int = 4, **trainer: int) -> Path:
    """A configuration with the tiny Ring-architecture model: seconds per run, real engines."""
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"sort:{n}=\n" for n in range(1000, 1200)))
    extra = "".join(f"{key} = {value}\n" for key, value in trainer.items())
    path = folder / "loop.toml"
    path.write_text(f"""
name = "test"
[model]
checkpoint = "tiny-ring"
trust_remote_code = true
[task]
name = "prompts_file"
options = {{path = {json.dumps(str(prompts))}, reward = "loop_inputs:digit_share", raw = true}}
max_prompt_tokens = 16
[c3po]
token_budget = 96
pool_capacity = 16
group_size = 4
max_new_tokens = 24
max_retention = 1
[trainer]
learning_rate = 1e-2
row_tokens = 512
threads = 1
{extra}
[rollout]
dtype = "float32"
max_model_len = 64
max_num_seqs = 16
kv_cache_gib = 0.1
[run]
steps = {steps}
checkpoint_every_steps = 1
engine_threads = 1
""")
    return path


class LoopProcess:
    """``asystem-bridge loop`` in its own process, as a user starts it."""

    def __init__(self, config: Path, output: Path, *options: str) -> None:
        self.output = output
        self._log = output.with_name(output.name + ".out")
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "asystem_bridge", "loop", "--config", str(config),
                 "--output", str(output), *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=HERE,
                env={**os.environ, "PYTHONPATH": str(HERE)},
            )  # fmt: skip

    @property
    def printed(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self, timeout_s: float = 600) -> int:
        return self.process.wait(timeout_s)

    def wait_for_checkpoint(self, step: int, timeout_s: float = 600) -> None:
        deadline = time.monotonic() + timeout_s
        while not (self.output / "checkpoints" / f"step_{step:06d}").is_dir():
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.01)


def rollouts(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "rollouts.jsonl").read_text().splitlines()]


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def worker_processes() -> list[int]:
    """Pids of every worker of any run on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it ended while we were looking
            continue
        if b"asystem_bridge.runtime.worker_main" in words:
            found.append(int(path.parent.name))
    return found


def wait_until_gone(pids: set[int], timeout_s: float = 20) -> set[int]:
    deadline = time.monotonic() + timeout_s
    while (left := pids & set(worker_processes())) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
