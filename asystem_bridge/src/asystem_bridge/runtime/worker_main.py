"""The worker's side of the channel, run as ``python -m ... FD PARENT_PID module:Class``.

A worker is a plain class.  Its public methods are what the controller may call, one at a time.
Its first answer says that it has been made.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from asystem_bridge.errors import BridgeError

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the controller is gone, however it went."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it went before the call above
        os._exit(1)


def serve(connection: Connection, worker: Any) -> None:
    """Answer ``(method, args, kwargs)`` with ``(True, result)`` or ``(False, description)``."""
    while True:
        try:
            method, args, kwargs = connection.recv()
        except EOFError:  # the controller closed its end
            return
        if method == "close":
            worker.close()
            connection.send((True, None))
            return
        try:
            reply = (True, getattr(worker, method)(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  the controller decides what an error means
            reply = (False, describe(error))
        connection.send(reply)


def describe(error: Exception) -> str:
    """An error that explains itself is its message; any other comes with its traceback."""
    if isinstance(error, BridgeError):
        return str(error)
    return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"


def main() -> None:
    descriptor, parent_pid, target = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's to handle
    connection = Connection(descriptor)
    module, _, name = target.partition(":")
    try:
        worker = getattr(importlib.import_module(module), name)()
    except Exception as error:  # noqa: BLE001  reported to the controller, which stops
        connection.send((False, describe(error)))
        return
    connection.send((True, None))
    serve(connection, worker)


if __name__ == "__main__":
    main()
