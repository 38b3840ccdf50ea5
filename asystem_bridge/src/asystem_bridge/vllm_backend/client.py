"""The controller's view of the rollout engine's process.

``VllmProcessEngine`` is the ``RolloutEngine`` that the C3PO++ pool drives.  It keeps submissions
and aborts until the next ``poll``, so a scheduler step costs one message each way.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from asystem_bridge.runtime.worker_client import WorkerClient
from asystem_bridge.vllm_backend.options import RolloutOptions
from asystem_bridge.vllm_backend.tensor_report import TensorReport
from asystem_bridge.weights.segment import WeightSegment
from megatron_c3po.engine import Delta, Submission

WORKER_TARGET = "asystem_bridge.vllm_backend.worker:VllmRolloutWorker"


def vllm_environment(threads: int = 1) -> dict[str, str]:
    """Environment of the worker's process: in-process engine, loopback only, nothing fetched.

    Without a GPU also what keeps vLLM's OpenMP threads from spinning against the trainer's and from
    binding to cores; ``threads`` of them.
    """
    import torch

    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one poll = one step needs the engine in process
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0"),  # block hashes of the prefix cache
    }
    if not torch.cuda.is_available():
        environment |= {
            "OMP_NUM_THREADS": str(threads),
            "KMP_BLOCKTIME": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    return environment


class VllmProcessEngine:
    """Implements ``megatron_c3po.engine.RolloutEngine`` over a worker process.

    Args:
        worker: a started ``WORKER_TARGET``; the caller closes it.
    """

    def __init__(self, worker: WorkerClient) -> None:
        self._worker = worker
        self._submissions: dict[str, Submission] = {}
        self._aborts: dict[str, None] = {}

    def setup(self, options: RolloutOptions) -> dict[str, Any]:
        """Start the engine; see ``VllmRolloutWorker.setup``."""
        result: dict[str, Any] = self._worker.call("setup", options)
        return result

    def submit(self, submissions: Iterable[Submission]) -> None:
        for submission in submissions:
            self._submissions[submission.uid] = submission

    def abort(self, uids: Iterable[str]) -> None:
        for uid in uids:
            self._submissions.pop(uid, None)
            self._aborts[uid] = None

    def poll(self) -> list[Delta]:
        submissions, aborts = list(self._submissions.values()), list(self._aborts)
        self._submissions.clear()
        self._aborts.clear()
        deltas: list[Delta] = self._worker.call("step", submissions, aborts)
        return deltas

    def attach_weights(self, segment: WeightSegment) -> None:
        """Have the engine map the segment."""
        self._worker.call("attach_weights", segment.path, segment.layout.to_state())

    def update_weights(self, version: int) -> dict[str, float]:
        """Have the engine load the segment; no rollout may be under way."""
        self._send_aborts()
        seconds: dict[str, float] = self._worker.call("update_weights", version)
        return seconds

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-prob of tokens 1 .. n-1 of each sequence; no rollout may be under way."""
        self._send_aborts()
        logprobs: list[list[float]] = self._worker.call(
            "prompt_logprobs", [list(sequence) for sequence in sequences]
        )
        return logprobs

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """The most likely completions; no rollout may be under way."""
        self._send_aborts()
        completions: list[list[int]] = self._worker.call(
            "greedy", [list(prompt) for prompt in prompts], max_new_tokens
        )
        return completions

    def diagnose(self) -> list[TensorReport]:
        """Which tensors of the segment the engine does not hold."""
        self._send_aborts()
        reports: list[TensorReport] = self._worker.call("diagnose")
        return reports

    def _send_aborts(self) -> None:
        if self._aborts:
            self._worker.call("abort", list(self._aborts))
            self._aborts.clear()
