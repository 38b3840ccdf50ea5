"""Run a function on every rank of a small Megatron world, in processes of its own."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 240


def run_on_ranks(
    function: Callable[..., Any], *args: Any, world_size: int, tp_size: int, directory: Path
) -> list[Any]:
    """``function(*args)`` inside ``cpu_megatron()`` and a gloo world; results in rank order.

    Args:
        function: of an importable module; arguments and result travel by pickle (no tensors: their
            memory would go with the process).
        directory: an existing folder for the rendezvous file.

    Raises:
        AssertionError: a rank failed; the message carries its traceback.
    """
    context = multiprocessing.get_context("spawn")
    processes, connections = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        store = str(directory / f"rendezvous-{world_size}-{tp_size}")
        process = context.Process(
            target=_rank_main, args=(theirs, rank, world_size, tp_size, store, function, args)
        )
        process.start()
        theirs.close()
        processes.append(process)
        connections.append(ours)
    try:
        results = []
        for rank, connection in enumerate(connections):
            assert connection.poll(TIMEOUT_S), f"rank {rank} gave no result in {TIMEOUT_S} s"
            succeeded, value = connection.recv()
            assert succeeded, f"rank {rank} of {world_size}:\n{value}"
            results.append(value)
        return results
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def _rank_main(
    connection: Connection,
    rank: int,
    world_size: int,
    tp_size: int,
    store: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    try:
        import torch

        from megatron_c3po.cpu_megatron import cpu_megatron

        torch.set_num_threads(1)
        with cpu_megatron():
            from asystem_bridge.trainer.model import destroy_parallel, initialize_parallel

            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
            )
            initialize_parallel(tensor_parallel_size=tp_size, seed=1)
            result = function(*args)
            destroy_parallel()
        connection.send((True, result))
    except BaseException:  # noqa: BLE001  whatever it was, the parent reports it
        connection.send((False, traceback.format_exc()))
