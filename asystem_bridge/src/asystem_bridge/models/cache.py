"""The cache folder for converted models, and how a folder appears in it: whole or not at all.

A folder is filled under a temporary name beside its final one and then renamed, so a reader never
sees half of it, whatever kills the writer.  A lock file makes concurrent callers wait for one
writer instead of doing the same work twice; the lock falls with the process that holds it.
Left out: nothing is evicted, and nothing is fetched from a network.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from asystem_bridge.errors import ModelError

MIB = 2**20


def cache_dir() -> Path:
    """``$RING1T_CACHE``, else ``$XDG_CACHE_HOME/ring1t``, else ``~/.cache/ring1t``.

    Read at every call, so that a test or a child process may set it.  The folder need not exist.
    """
    if chosen := os.environ.get("RING1T_CACHE"):
        return Path(chosen).expanduser().absolute()
    # The XDG base directory specification: a relative path is invalid and must be ignored.
    user_cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (user_cache if user_cache.is_absolute() else Path.home() / ".cache") / "ring1t"


def cached_folder(name: str, fill: Callable[[Path], None], *, needed_bytes: int) -> Path:
    """The folder ``name`` of the cache; made by ``fill(empty_folder)`` if it is not there yet.

    Args:
        name: one path component.  Put into it whatever the content depends on.
        fill: writes the files.  When it raises, nothing stays behind.
        needed_bytes: about what ``fill`` writes; checked against the free space before it starts.

    Raises:
        ModelError: the disk is full, or the cache folder cannot be written.
    """
    folder = cache_dir() / name
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive_lock(folder.with_name(f".{name}.lock")):
            if folder.is_dir():  # another process made it while this one waited
                return folder
            # Whoever wrote it was killed: its lock is ours now.
            shutil.rmtree(partial, ignore_errors=True)
            free_bytes = shutil.disk_usage(folder.parent).free
            if free_bytes < needed_bytes:
                raise ModelError(
                    f"{folder.parent} has {free_bytes // MIB} MiB free; {name} needs "
                    f"{-(-needed_bytes // MIB)} MiB. {_ADVICE}"
                )
            partial.mkdir()
            try:
                fill(partial)
                partial.rename(folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(
                f"the disk ran full while {name} was written to {folder.parent}; nothing was kept. "
                f"{_ADVICE}"
            ) from error
        raise ModelError(f"{name} cannot be written to the cache: {error}. {_ADVICE}") from error
    return folder


@contextmanager
def safetensors_os_errors() -> Iterator[None]:
    """Around ``save_file``: a failed write becomes the ``OSError`` it was.

    safetensors 0.8 raises its own error, with the operating system's number only in its text.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found.group(1))
        raise OSError(number, os.strerror(number)) from error


_ADVICE = "Free some space, or name another folder in RING1T_CACHE."


@contextmanager
def _exclusive_lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
