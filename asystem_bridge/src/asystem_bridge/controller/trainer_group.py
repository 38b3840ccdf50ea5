"""The trainer's ranks as one object: SPMD calls out, one merged result back."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from asystem_bridge.errors import ConfigError
from asystem_bridge.runtime.cpu_threads import threads_per_process
from asystem_bridge.runtime.worker_client import WorkerClient, call_all, call_each
from asystem_bridge.trainer.options import TrainerOptions
from icepop_core import merge_discrepancy
from megatron_c3po.packing import plan_rows
from megatron_c3po.rollout import Rollout

WORKER = "asystem_bridge.trainer.worker:MegatronTrainer"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """One optimizer step.

    Attributes:
        loss: the objective's negative, under the normaliser of the options.
        grad_norm: before clipping.
        learning_rate: of this step.
        trained_tokens: sampled tokens in the batch.
        discrepancy: sums of ``icepop_core.discrepancy_sums`` over all ranks.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    trained_tokens: int
    discrepancy: dict[str, float]


class TrainerGroup:
    """``tensor_parallel_size * data_parallel_size`` Megatron processes.

    Args:
        options: the same on every rank.
        logs: folder for the ranks' logs.
        init_method: where the ranks meet, see ``rendezvous``.
    """

    def __init__(self, options: TrainerOptions, *, logs: Path, init_method: str) -> None:
        self.options = options
        self._init_method = init_method
        self.workers = [
            WorkerClient(
                WORKER,
                name=f"trainer rank {rank}",
                log_path=logs / f"trainer_{rank}.log",
                environment={
                    "OMP_NUM_THREADS": str(
                        threads_per_process(options.threads, options.world_size)
                    ),
                    "HF_HUB_OFFLINE": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                },
            )
            for rank in range(options.world_size)
        ]

    def begin_setup(self) -> None:
        """Start to build the model on every rank; ``finish_setup`` waits for it."""
        for rank, worker in enumerate(self.workers):
            worker.send("setup", self.options, rank, self._init_method)

    def finish_setup(self) -> dict[str, Any]:
        """Returns rank 0's facts: Megatron's version, parameters, difference to transformers."""
        for worker in self.workers:
            worker.wait_started()
        facts: list[dict[str, Any]] = [worker.receive() for worker in self.workers]
        return facts[0]

    def train(
        self,
        rollouts: Sequence[Rollout],
        mode: Literal["icepop", "supervised"] = "icepop",
        learning_rate: float | None = None,
    ) -> TrainResult:
        """One optimizer step on the rollouts, packed and balanced over the data-parallel ranks."""
        plan = plan_rows(
            [rollout.total_tokens for rollout in rollouts],
            row_tokens=self.options.row_tokens,
            dp_size=self.options.data_parallel_size,
        )
        rows = [[[rollouts[i] for i in row] for row in rank_rows] for rank_rows in plan]
        tp = self.options.tensor_parallel_size
        replies = call_each(
            self.workers,
            "train",
            [(rows[rank // tp], mode, learning_rate) for rank in range(len(self.workers))],
        )
        per_dp_rank = replies[::tp]  # tensor-parallel ranks hold the same numbers
        return TrainResult(
            loss=replies[0]["loss"],
            grad_norm=replies[0]["grad_norm"],
            learning_rate=replies[0]["learning_rate"],
            trained_tokens=sum(reply["tokens"] for reply in per_dp_rank),
            discrepancy=merge_discrepancy(reply["discrepancy"] for reply in per_dp_rank),
        )

    def logprobs(
        self, sequences: list[list[int]], *, as_published: bool = False
    ) -> list[list[float]]:
        """Log-prob of tokens 1..n-1 of each sequence; see ``MegatronTrainer.logprobs``."""
        result: list[list[float]] = call_all(self.workers, "logprobs", sequences, as_published)[0]
        return result

    def attach_segment(self, path: str, layout_state: dict[str, Any]) -> None:
        call_all(self.workers, "attach_segment", path, layout_state)

    def publish(self) -> int:
        """Write the current weights into the segment; returns the bytes written."""
        return sum(reply["bytes"] for reply in call_all(self.workers, "publish"))

    def reset_optimizer(self) -> None:
        call_all(self.workers, "reset_optimizer")

    def save(self, directory: Path) -> None:
        call_all(self.workers, "save", directory)

    def load(self, directory: Path) -> None:
        call_all(self.workers, "load", directory)

    def __enter__(self) -> TrainerGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """End every rank, at the same time; see ``WorkerClient.__exit__``."""
        if kind is None:
            for worker in self.workers:
                worker.begin_close()
        for worker in self.workers:
            worker.__exit__(kind, *error)


def rendezvous(run_path: Path, port: int) -> str:
    """A ``torch.distributed`` init method for one host.

    Args:
        run_path: a file in it is used when no port is given.
        port: 0, or a TCP port on the loopback interface.

    Raises:
        ConfigError: the port is taken.
    """
    if port == 0:
        path = run_path / f".rendezvous-{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        return f"file://{path.resolve()}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"run.rendezvous_port = {port}: {error.strerror}; choose a free port, or 0 to meet "
                "in a file"
            ) from None
    return f"tcp://127.0.0.1:{port}"
