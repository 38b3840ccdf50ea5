"""A group of trainer processes, driven as the controller drives them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from naive_trainer import ADAM_EPS, CLIP_GRAD, LEARNING_RATE
from torch import Tensor

from asystem_bridge.runtime.worker_client import WorkerClient, call_all, call_each
from asystem_bridge.trainer.options import TrainerOptions
from asystem_bridge.weights.architecture import Architecture
from asystem_bridge.weights.layout import hf_tensor_shapes
from asystem_bridge.weights.segment import SegmentLayout, WeightSegment
from megatron_c3po.packing import plan_rows
from megatron_c3po.rollout import Rollout

ROW_TOKENS = 48
OPTIONS = {
    "learning_rate": LEARNING_RATE,
    "adam_eps": ADAM_EPS,
    "clip_grad": CLIP_GRAD,
    "row_tokens": ROW_TOKENS,
    "threads": 1,
    "distributed_timeout_s": 60.0,
}
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class TrainerGroup:
    """The trainer processes of one test run and a segment for their weights."""

    def __init__(self, directory: Path, checkpoint_dir: Path, tp: int, dp: int) -> None:
        directory.mkdir()
        self.dp, self.tp = dp, tp
        self.options = TrainerOptions(
            checkpoint_dir=checkpoint_dir,
            tensor_parallel_size=tp,
            data_parallel_size=dp,
            **OPTIONS,
        )
        self.workers = [
            WorkerClient(
                "asystem_bridge.trainer.worker:MegatronTrainer",
                name=f"trainer {rank}",
                log_path=directory / f"trainer{rank}.log",
                environment=WORKER_ENVIRONMENT,
            )
            for rank in range(self.options.world_size)
        ]
        self.segment: WeightSegment | None = None
        self._rendezvous = f"file://{directory}/rendezvous"

    def setup(self) -> list[dict[str, Any]]:
        """Wait for the processes, which start while others are at work, and set them up."""
        for worker in self.workers:
            worker.wait_started()
        return call_each(
            self.workers,
            "setup",
            [(self.options, rank, self._rendezvous) for rank in range(len(self.workers))],
        )

    def train(self, rollouts: Sequence[Rollout], *mode: Any) -> list[dict[str, Any]]:
        lengths = [rollout.total_tokens for rollout in rollouts]
        plan = plan_rows(lengths, row_tokens=ROW_TOKENS, dp_size=self.dp)
        rows = [[[rollouts[i] for i in row] for row in rank] for rank in plan]
        return call_each(
            self.workers,
            "train",
            [(rows[rank // self.tp], *mode) for rank in range(len(self.workers))],
        )

    def published(self, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], int]:
        """The weights as an engine would read them, and the bytes that were written."""
        architecture = Architecture.from_checkpoint(self.options.checkpoint_dir)
        if self.segment is None or self.segment.layout.entries[0].dtype_name not in str(dtype):
            shapes = hf_tensor_shapes(architecture)
            layout = SegmentLayout.from_tensors({n: (s, dtype) for n, s in shapes.items()})
            if self.segment is not None:
                self.segment.close()
            self.segment = WeightSegment.create(layout)
            call_all(self.workers, "attach_segment", self.segment.path, layout.to_state())
        written = sum(result["bytes"] for result in call_all(self.workers, "publish"))
        return {name: view.clone() for name, view in self.segment.views.items()}, written

    def kill(self) -> None:
        """At once: a kind end costs each process a second or two of tidying up."""
        for worker in self.workers:
            worker.kill()
        if self.segment is not None:
            self.segment.close()
