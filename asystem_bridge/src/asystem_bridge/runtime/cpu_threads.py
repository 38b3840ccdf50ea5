"""How many threads a process may use, so that processes that compute together share the cores."""

from __future__ import annotations

import os


def threads_per_process(requested: int, processes: int = 1) -> int:
    """``requested``, or for 0 an equal share of the cores that this process may run on.

    Two processes with as many threads each as there are cores are several times slower than with
    half as many: their threads wait for each other.
    """
    return requested or max(1, len(os.sched_getaffinity(0)) // processes)
