"""One rank of the trainer: a process that holds Megatron and nothing else.

Ring-1T section 2.5: an SPMD worker of the single controller.  The controller calls the methods by
name, on every rank of the group at the same time, because most of them are collective.  Weights
leave through a shared-memory segment: each tensor-parallel rank writes its own shards, nothing is
gathered.
"""

from __future__ import annotations

import contextlib
import datetime
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from asystem_bridge.errors import BridgeError
from asystem_bridge.runtime.cpu_threads import threads_per_process
from asystem_bridge.trainer.checkpoint import load_checkpoint, save_checkpoint
from asystem_bridge.trainer.model import (
    build_model,
    destroy_parallel,
    initialize_parallel,
    load_weights,
    local_boxes,
)
from asystem_bridge.trainer.optimizer import build_optimizer, wrap_data_parallel
from asystem_bridge.trainer.options import TrainerOptions
from asystem_bridge.trainer.reference import check_against_transformers
from asystem_bridge.trainer.step import TrainMode, label_logprobs, train_step
from asystem_bridge.weights.architecture import Architecture
from asystem_bridge.weights.segment import SegmentLayout, WeightSegment
from megatron_c3po.compat import check_megatron_version
from megatron_c3po.cpu_megatron import cpu_megatron
from megatron_c3po.microbatch import build_microbatch
from megatron_c3po.packing import plan_rows
from megatron_c3po.rollout import Rollout


class MegatronTrainer:
    """Trains one model with data and tensor parallelism.  Tried on CPUs (gloo) only.

    Every method but ``setup`` needs ``setup`` to have returned.  A method that raises on one rank
    may leave the others waiting in a collective: the group is then of no more use.
    """

    def __init__(self) -> None:
        self._inside_megatron = contextlib.ExitStack()
        self._segment: WeightSegment | None = None
        self._steps = 0

    def setup(self, options: TrainerOptions, rank: int, init_method: str) -> dict[str, Any]:
        """Join the group, load the checkpoint and compare with transformers.

        Args:
            options: the same on every rank.
            rank: 0 to ``options.world_size`` - 1.
            init_method: where the ranks meet: ``file:///...`` (a name that does not exist yet) or
                ``tcp://127.0.0.1:PORT``.

        Returns:
            ``megatron`` (version), ``parameters`` (of this rank), ``logits_max_abs_diff``.

        Raises:
            ModelError: the model is not supported, or its logits differ from transformers' by
                more than ``options.logits_tolerance``.
        """
        torch.set_num_threads(threads_per_process(options.threads, options.world_size))
        self._options = options
        version = check_megatron_version()
        self._inside_megatron.enter_context(cpu_megatron())
        if torch.cuda.is_available():
            torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.distributed.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            init_method=init_method,
            rank=rank,
            world_size=options.world_size,
            timeout=datetime.timedelta(seconds=options.distributed_timeout_s),
        )
        initialize_parallel(tensor_parallel_size=options.tensor_parallel_size, seed=_MODEL_SEED)
        self._inside_megatron.callback(destroy_parallel)
        self._architecture = Architecture.from_checkpoint(options.checkpoint_dir)
        model = build_model(self._architecture, tensor_parallel_size=options.tensor_parallel_size)
        load_weights(model, self._architecture, options.checkpoint_dir)
        difference = check_against_transformers(
            model, options.checkpoint_dir, tolerance=options.logits_tolerance
        )
        self._model = wrap_data_parallel(model)
        self._optimizer = build_optimizer(self._model, options)
        # Sequence parallelism splits a row evenly over the tensor-parallel ranks.
        self._length_multiple = (
            options.tensor_parallel_size if model.config.sequence_parallel else 1
        )
        return {
            "megatron": version,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "logits_max_abs_diff": difference,
        }

    def train(
        self,
        rows: Sequence[Sequence[Rollout]],
        mode: TrainMode = "icepop",
        learning_rate: float | None = None,
    ) -> dict[str, Any]:
        """One optimizer step.

        Args:
            rows: of this rank's data-parallel rank, of ``megatron_c3po.packing.plan_rows``.
            mode: ``"icepop"`` or ``"supervised"``.
            learning_rate: ``None`` = the options'.

        Returns:
            Of all ranks: ``step`` (updates so far), ``loss``, ``grad_norm`` (before clipping),
            ``learning_rate``.  Of this data-parallel rank: ``tokens`` (trained) and
            ``discrepancy`` (sums for ``icepop_core.merge_discrepancy``; ``{}`` when supervised).
            Of this process: ``seconds``, ``peak_rss_bytes``.

        Raises:
            ValueError: a rollout is incomplete, or there is nothing to train.
        """
        started_s = time.perf_counter()
        rate = self._options.learning_rate if learning_rate is None else learning_rate
        result = train_step(
            self._model,
            self._optimizer,
            rows,
            mode=mode,
            loss_options=self._options.loss_options,
            learning_rate=rate,
            length_multiple=self._length_multiple,
        )
        self._steps += 1
        return {
            "step": self._steps,
            "learning_rate": rate,
            **result,
            "seconds": time.perf_counter() - started_s,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def reset_optimizer(self) -> None:
        """Forget AdamW's moments and the step count; the weights stay."""

        self._optimizer = build_optimizer(self._model, self._options)
        self._steps = 0

    def logprobs(
        self, sequences: Sequence[Sequence[int]], as_published: bool = False
    ) -> list[list[float]]:
        """log p of the tokens 1 to n - 1 of each sequence of n >= 2 tokens.

        Args:
            sequences: the same on every rank; every rank returns the same values.
            as_published: with the weights rounded as ``publish`` rounds them, so that only the
                arithmetic differs from an engine that holds them.

        Raises:
            ValueError: a sequence is shorter than 2 or longer than ``row_tokens``.
            BridgeError: ``as_published`` and no segment is attached.
        """
        if as_published:
            with self._weights_as_published():
                return self.logprobs(sequences)
        results: list[list[float]] = [[] for _ in sequences]
        [rows] = plan_rows(
            [len(sequence) for sequence in sequences],
            row_tokens=self._options.row_tokens,
            dp_size=1,
        )
        for row in rows:
            microbatch = build_microbatch(
                [_as_rollout(sequences[index]) for index in row],
                length_multiple=self._length_multiple,
                device=next(self._model.parameters()).device,
            )
            with torch.no_grad():
                logprobs = label_logprobs(self._model, microbatch)[0]
            for sequence_id, index in enumerate(row):
                own = (microbatch["sequence_ids"][0] == sequence_id) & (
                    microbatch["loss_mask"][0] > 0
                )
                results[index] = logprobs[own].tolist()
        return results

    @contextlib.contextmanager
    def _weights_as_published(self) -> Iterator[None]:
        segment = self._attached_segment()
        originals = []
        for parameter, boxes in local_boxes(self._model.module, self._architecture):
            tensor = parameter.detach()
            if all(segment.views[box.hf_name].dtype == tensor.dtype for box in boxes):
                continue
            originals.append((tensor, tensor.clone()))
            for box in boxes:
                part = tensor[box.local_slices]
                part.copy_(part.to(segment.views[box.hf_name].dtype))
        try:
            yield
        finally:
            for tensor, original in originals:
                tensor.copy_(original)

    def _attached_segment(self) -> WeightSegment:
        if self._segment is None:
            raise BridgeError("attach_segment() comes first: no weight segment is attached")
        return self._segment

    def attach_segment(self, path: str, layout_state: Mapping[str, Any]) -> None:
        """Open the shared segment that ``publish`` writes to.

        Args:
            path: ``WeightSegment.path`` of its creator, which is alive.
            layout_state: ``SegmentLayout.to_state()``; its tensors are those of the model, in the
                engine's dtype.

        Raises:
            BridgeError: the segment cannot be opened, or lacks a tensor of the model.
        """
        segment = WeightSegment.open(path, SegmentLayout.from_state(layout_state))
        needed = {
            box.hf_name
            for _, boxes in local_boxes(self._model.module, self._architecture)
            for box in boxes
        }
        missing = sorted(needed - set(segment.views))
        if missing:
            segment.close()
            raise BridgeError(
                f"the weight segment lacks {len(missing)} tensors of the model, such as "
                f"{missing[0]}: lay it out with weights.layout.hf_tensor_shapes"
            )
        self._segment = segment

    def publish(self) -> dict[str, Any]:
        """Write this rank's shards into the segment, cast to the engine's dtype.

        Only the first data-parallel rank writes: the others hold the same weights.  When the call
        has returned on every rank the segment holds one consistent version.

        Returns:
            ``bytes`` written by this rank and ``seconds``.

        Raises:
            BridgeError: no segment is attached.
        """
        segment = self._attached_segment()
        started_s = time.perf_counter()
        written_bytes = 0
        if parallel_state.get_data_parallel_rank() == 0:
            written_bytes = self._write_shards(segment)
        torch.distributed.barrier()
        return {"bytes": written_bytes, "seconds": time.perf_counter() - started_s}

    def _write_shards(self, segment: WeightSegment) -> int:
        written_bytes = 0
        first_of_its_group = parallel_state.get_tensor_model_parallel_rank() == 0
        for tensor, boxes in local_boxes(self._model.module, self._architecture):
            for box in boxes:
                whole = segment.views[box.hf_name]
                replicated = whole.shape == box.size
                if replicated and not first_of_its_group:
                    continue
                target = whole[box.hf_slices]
                target.copy_(tensor.detach()[box.local_slices])
                written_bytes += target.nbytes
        return written_bytes

    def save(self, directory: Path) -> dict[str, Any]:
        """Write model, optimizer state and step count into an existing empty folder.

        Returns:
            ``bytes`` of the folder and ``seconds``.

        Raises:
            CheckpointError: a rank could not write (a full disk, for example).
        """
        started_s = time.perf_counter()
        total_bytes = save_checkpoint(Path(directory), self._model, self._optimizer, self._steps)
        return {"bytes": total_bytes, "seconds": time.perf_counter() - started_s}

    def load(self, directory: Path) -> dict[str, Any]:
        """Restore what ``save`` wrote; the parallel sizes may differ from then.

        Returns:
            ``step``: updates made before it was saved.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete or of another model.
        """
        self._steps = load_checkpoint(Path(directory), self._model, self._optimizer)
        return {"step": self._steps}

    def close(self) -> None:
        """Leave the process group and put torch back as it was."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None
        self._inside_megatron.close()


_MODEL_SEED = 1
"""Of Megatron's random streams.  Nothing is drawn from them: weights are loaded, no dropout."""


def _as_rollout(sequence: Sequence[int]) -> Rollout:
    """A sequence whose first token is the prompt, for log-probs only."""
    if len(sequence) < 2:
        raise ValueError(f"sequence {list(sequence)}: a log-prob needs at least 2 tokens")
    sampled = list(sequence[1:])
    return Rollout(
        uid="logprobs",
        group_uid="logprobs",
        prompt_ids=list(sequence[:1]),
        max_new_tokens=len(sampled),
        token_ids=sampled,
        logprobs=[0.0] * len(sampled),
        versions=[0] * len(sampled),
        advantage=0.0,
    )
