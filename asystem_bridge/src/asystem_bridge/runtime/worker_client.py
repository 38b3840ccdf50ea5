"""The controller's side: start a worker process, call its methods, notice its death.

Control flow only: small pickled messages over a socket pair.  Weights never pass here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from asystem_bridge.errors import WorkerDiedError, WorkerError

LOG_TAIL_LINES = 25


class WorkerClient:
    """A worker in its own process and session.

    Args:
        target: ``"module:Class"``; the class is made without arguments in the child.
        name: how messages name it.
        log_path: where its stdout and stderr go.
        environment: added to this process's.
    """

    def __init__(
        self, target: str, *, name: str, log_path: Path, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with theirs, log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "asystem_bridge.runtime.worker_main",
                    str(theirs.fileno()), str(os.getpid()), target,
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the controller only
                env={**os.environ, **environment},
            )  # fmt: skip
        self._connection = Connection(ours.detach())
        self._asked_to_close = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Begin a call.  Its result is fetched with ``receive``, in order."""
        try:
            self._connection.send((method, args, kwargs))
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None

    def receive(self) -> Any:
        """The result of the oldest call under way.

        Raises:
            WorkerError: the method raised.
            WorkerDiedError: the process is gone.
        """
        try:
            succeeded, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if not succeeded:
            raise WorkerError(f"{self.name}: {value}")
        return value

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call and wait for the result."""
        self.send(method, *args, **kwargs)
        return self.receive()

    def wait_started(self) -> None:
        """Wait until the worker's class is made; its first answer says so."""
        self.receive()

    def begin_close(self) -> None:
        """Ask the worker to end; ``close`` waits for it."""
        if not self._asked_to_close:
            self._asked_to_close = True
            with contextlib.suppress(OSError):  # it has already gone
                self._connection.send(("close", (), {}))

    def close(self, timeout_s: float = 10.0) -> None:
        """Ask the worker to end, wait, then end whatever is left of its session by signal."""
        self.begin_close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        self._connection.close()
        self.kill()  # whatever the worker itself started

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close it; at once when an error is on its way, since the worker may never answer."""
        if kind is None:
            self.close()
        else:
            self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has already gone
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def _died(self) -> WorkerDiedError:
        code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return WorkerDiedError(
            f"{self.name} (pid {self.pid}) died with {how}. "
            f"The end of {self.log_path}:\n{self.log_tail()}"
        )


def call_each(
    workers: Sequence[WorkerClient], method: str, arguments: Sequence[tuple[Any, ...]]
) -> list[Any]:
    """One call on every worker of an SPMD group, each with its own arguments; results in order.

    Raises:
        WorkerError, WorkerDiedError: of the first worker that fails.  Its peers may then wait in
            a collective for ever: the group is of no more use and must be closed.
    """
    for worker, values in zip(workers, arguments, strict=True):
        worker.send(method, *values)
    results: list[Any] = [None] * len(workers)
    waiting = {worker._connection.fileno(): rank for rank, worker in enumerate(workers)}
    while waiting:
        for descriptor in wait(list(waiting)):
            assert isinstance(descriptor, int)
            rank = waiting.pop(descriptor)
            results[rank] = workers[rank].receive()
    return results


def call_all(workers: Sequence[WorkerClient], method: str, *args: Any) -> list[Any]:
    """The same call on every worker of an SPMD group; see ``call_each``."""
    return call_each(workers, method, [args] * len(workers))
