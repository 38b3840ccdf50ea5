"""Trainer checkpoints in Megatron's distributed format: model, AdamW state and step count.

A checkpoint is independent of the number of processes: each rank writes its shards and reads the
shards that it needs.  The directory is made and renamed by the controller, so an unfinished one is
never found under its final name.

Megatron's default writer starts a manager process and forks writers for every save.  If the
trainer is killed these outlive it.  ``InProcessSaveStrategy`` hands the same state to
``torch.distributed.checkpoint`` with an ordinary file writer: the same files, no process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_with_torch

from asystem_bridge.errors import CheckpointError


class InProcessSaveStrategy(TorchDistSaveShardedStrategy):
    """Writes this rank's shards in this process; a failure of one rank is raised on all."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        sharded, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        save_with_torch(
            mcore_to_pyt_state_dict(sharded, False),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_checkpoint(directory: Path, model: Any, optimizer: Any, steps: int) -> int:
    """Write a checkpoint; called on every rank.

    Args:
        directory: an existing empty folder.
        model: wrapped by ``wrap_data_parallel``.
        optimizer: of ``build_optimizer``.
        steps: updates made so far.

    Returns:
        Bytes in the folder.

    Raises:
        CheckpointError: the folder is missing or not empty, or a rank could not write.
    """
    if not directory.is_dir() or any(directory.iterdir()):
        raise CheckpointError(f"{directory}: a checkpoint needs an existing empty folder")
    torch.distributed.barrier()  # no rank may write before every rank has looked
    state = _sharded_state(model, optimizer, loading=False)
    state["steps"] = steps
    try:
        dist_checkpointing.save(state, str(directory), sharded_strategy=InProcessSaveStrategy())
    except (OSError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(
            f"cannot write the checkpoint {directory}: {_cause(error)}"
        ) from error
    return sum(path.stat().st_size for path in directory.iterdir())


def load_checkpoint(directory: Path, model: Any, optimizer: Any) -> int:
    """Restore what ``save_checkpoint`` wrote, at the same or another parallel size.

    Returns:
        The number of updates made before it was written.

    Raises:
        CheckpointError: it is missing, incomplete, damaged or of another model.
    """
    state = _sharded_state(model, optimizer, loading=True)
    try:
        loaded = dist_checkpointing.load(state, str(directory))
        steps = int(loaded["steps"])
        model.module.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
    except (
        OSError,
        RuntimeError,
        KeyError,
        dist_checkpointing.core.CheckpointingException,
        CheckpointException,
    ) as error:
        raise CheckpointError(f"cannot read the checkpoint {directory}: {_cause(error)}") from error
    return steps


def _sharded_state(model: Any, optimizer: Any, *, loading: bool) -> dict[str, Any]:
    model_state = model.module.sharded_state_dict()
    return {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict({"model": model_state}, is_loading=loading),
    }


def _cause(error: BaseException) -> str:
    """The ranks' own errors of a collective one, which by itself only says that some failed."""
    if isinstance(error, CheckpointException):
        causes = {f"{cause[0]}" for cause in error.failures.values()}
        return f"{'; '.join(sorted(causes))} (ranks {sorted(error.failures)})"
    return f"{type(error).__name__}: {error}"
