"""The processes of one run and the memory they share.

Trainer ranks and the rollout engine start side by side; the weight segment lies between them.
Leaving the ``with`` block leaves no process and no segment behind, whatever happened inside.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from asystem_bridge.config import LoopConfig
from asystem_bridge.controller.trainer_group import TrainerGroup, rendezvous
from asystem_bridge.runtime.cpu_threads import threads_per_process
from asystem_bridge.runtime.worker_client import WorkerClient
from asystem_bridge.vllm_backend.client import WORKER_TARGET, VllmProcessEngine, vllm_environment
from asystem_bridge.weights.architecture import Architecture
from asystem_bridge.weights.layout import hf_tensor_shapes
from asystem_bridge.weights.segment import SegmentLayout, WeightSegment

FLOAT32_SUFFIXES = (".mlp.gate.weight", ".mlp.gate.expert_bias")
"""Router tensors of BailingMoeV2, which vLLM holds in float32 whatever the engine's dtype."""


def segment_layout(architecture: Architecture, dtype: torch.dtype) -> SegmentLayout:
    """Every tensor of the model as the engine wants it: Hugging Face names, the engine's dtype."""

    def dtype_of(name: str) -> torch.dtype:
        routed = architecture.family == "bailing_moe_v2" and name.endswith(FLOAT32_SUFFIXES)
        return torch.float32 if routed else dtype

    shapes = hf_tensor_shapes(architecture)
    return SegmentLayout.from_tensors({n: (shape, dtype_of(n)) for n, shape in shapes.items()})


class Fleet:
    """Started workers, the engine loaded from the checkpoint and attached to the segment.

    Args:
        config: with the checkpoint's folder in ``trainer`` and ``rollout``.
        run_path: for logs and the rendezvous file.

    Raises:
        WorkerError, WorkerDiedError: a process could not start; all others are ended.
        ModelError: Megatron and transformers disagree about the checkpoint.
    """

    def __init__(self, config: LoopConfig, *, run_path: Path) -> None:
        logs = run_path / "logs"
        architecture = Architecture.from_checkpoint(config.trainer.checkpoint_dir)
        init_method = rendezvous(run_path, config.run.rendezvous_port)
        with ExitStack() as cleanup:
            self.segment = WeightSegment.create(
                segment_layout(architecture, getattr(torch, config.rollout.dtype))
            )
            cleanup.callback(self.segment.close)
            cleanup.callback(_remove_rendezvous, init_method)
            self.trainer = cleanup.enter_context(
                TrainerGroup(config.trainer, logs=logs, init_method=init_method)
            )
            self.trainer.begin_setup()
            self._engine_worker = cleanup.enter_context(
                WorkerClient(
                    WORKER_TARGET,
                    name="rollout engine",
                    log_path=logs / "engine.log",
                    environment=vllm_environment(threads_per_process(config.run.engine_threads)),
                )
            )
            self._engine_worker.wait_started()
            self.engine = VllmProcessEngine(self._engine_worker)
            self.engine_facts = self.engine.setup(config.rollout)
            self.trainer_facts = self.trainer.finish_setup()
            self.engine.attach_weights(self.segment)
            self.trainer.attach_segment(self.segment.path, self.segment.layout.to_state())
            self._cleanup = cleanup.pop_all()

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in (*self.trainer.workers, self._engine_worker)]

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.__exit__(kind, error, trace)


def _remove_rendezvous(init_method: str) -> None:
    if init_method.startswith("file://"):
        Path(init_method.removeprefix("file://")).unlink(missing_ok=True)


def peak_memory_bytes(pids: Iterable[int]) -> int:
    """An upper bound on what the processes held at once: the sum of their own peaks.

    Shared pages count once for each process that maps them.
    """
    total = 0
    for pid in pids:
        fields: dict[str, Any] = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        total += int(fields["VmHWM"].split()[0]) * 1024
    return total
