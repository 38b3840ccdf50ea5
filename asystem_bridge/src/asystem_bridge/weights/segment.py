"""One shared-memory segment that holds every tensor of a model, by its Hugging Face name.

Ring-1T section 2.5 (AState): the data plane.  Trainer processes write their shards into the
segment, the engine reads it; control messages only carry its path.  The memory is a ``memfd``: it
has no name in any file system, so it is gone with the last process that maps it, however that
process ended.

Limits: one host, processes of the same user in the same pid namespace (the path is
``/proc/<pid>/fd/<fd>``), and the creator must be alive when another process opens the path.
Readers and writers are not synchronised: the controller orders them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from asystem_bridge.errors import BridgeError

ALIGNMENT_BYTES = 64  # a cache line, and the widest vector load
_MEMFD_NAME = "asystem_weights"


class WeightSegmentError(BridgeError):
    """A weight segment cannot be made, opened or understood."""


def dtype_name_of(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(dtype_name: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``.

    Raises:
        WeightSegmentError: torch has no such dtype.
    """
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightSegmentError(
            f"dtype {dtype_name!r} is not a torch dtype; examples: 'bfloat16', 'float32'"
        )
    return dtype


@dataclass(frozen=True)
class SegmentEntry:
    """Where one tensor lies.

    Attributes:
        name: Hugging Face name.
        shape: full (unsharded) shape.
        dtype_name: such as ``"bfloat16"``.
        offset_bytes: from the start of the segment; a multiple of ``ALIGNMENT_BYTES``.
    """

    name: str
    shape: tuple[int, ...]
    dtype_name: str
    offset_bytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * dtype_of(self.dtype_name).itemsize


@dataclass(frozen=True)
class SegmentLayout:
    """Every tensor of a segment, in the order in which the engine loads them."""

    entries: tuple[SegmentEntry, ...]

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, tuple[Sequence[int], torch.dtype]]
    ) -> SegmentLayout:
        """Lay tensors out one after another.

        Args:
            tensors: name -> (full shape, dtype), in load order.

        Raises:
            WeightSegmentError: there is none, or one has no elements.
        """
        if not tensors:
            raise WeightSegmentError("a weight segment needs at least one tensor, got none")
        entries = []
        offset_bytes = 0
        for name, (shape, dtype) in tensors.items():
            entry = SegmentEntry(name, tuple(shape), dtype_name_of(dtype), offset_bytes)
            if entry.numel < 1:
                raise WeightSegmentError(f"{name}: shape {entry.shape} has no elements")
            entries.append(entry)
            padding_bytes = -entry.num_bytes % ALIGNMENT_BYTES
            offset_bytes += entry.num_bytes + padding_bytes
        return cls(tuple(entries))

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.entries]

    @property
    def total_bytes(self) -> int:
        last = self.entries[-1]
        return last.offset_bytes + last.num_bytes

    def to_state(self) -> dict[str, Any]:
        """JSON-serialisable: it travels in vLLM's ``init_info``."""
        return {
            "entries": [
                [entry.name, list(entry.shape), entry.dtype_name, entry.offset_bytes]
                for entry in self.entries
            ]
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SegmentLayout:
        """Undo ``to_state``.

        Raises:
            WeightSegmentError: the state is not one that ``to_state`` gave.
        """
        try:
            entries = tuple(
                SegmentEntry(name, tuple(shape), dtype_name, offset_bytes)
                for name, shape, dtype_name, offset_bytes in state["entries"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WeightSegmentError(
                f"not the state of a SegmentLayout ({type(error).__name__}: {error}); "
                "expected {'entries': [[name, shape, dtype_name, offset_bytes], ...]}"
            ) from error
        if not entries:
            raise WeightSegmentError("the state of a SegmentLayout names no tensor")
        return cls(entries)


class WeightSegment:
    """A mapping of the shared memory.  Make one with ``create`` or ``open``.

    Attributes:
        layout: what lies where.
        path: what other processes pass to ``open``.
        views: name -> tensor of the full shape over the shared memory, writable.
    """

    def __init__(self, fd: int, layout: SegmentLayout, path: str) -> None:
        self.layout = layout
        self.path = path
        self._fd: int | None = fd
        shared = mmap.mmap(fd, layout.total_bytes)
        # Each view keeps the mapping alive, so no tensor can outlive its memory.
        self.views: dict[str, torch.Tensor] = {
            entry.name: torch.frombuffer(
                shared,
                dtype=dtype_of(entry.dtype_name),
                count=entry.numel,
                offset=entry.offset_bytes,
            ).view(entry.shape)
            for entry in layout.entries
        }

    @classmethod
    def create(cls, layout: SegmentLayout) -> WeightSegment:
        """Make a segment, zero-filled, its memory already reserved.

        Raises:
            WeightSegmentError: there is not enough memory.
        """
        fd = os.memfd_create(_MEMFD_NAME)
        try:
            # Without this, a page that the kernel cannot provide later is a SIGBUS in a writer.
            os.posix_fallocate(fd, 0, layout.total_bytes)
        except OSError as error:
            os.close(fd)
            raise WeightSegmentError(
                f"cannot reserve {layout.total_bytes / 2**20:.0f} MiB of shared memory for the "
                f"weights ({error.strerror}); free memory or use a smaller dtype or model"
            ) from error
        return cls(fd, layout, f"/proc/{os.getpid()}/fd/{fd}")

    @classmethod
    def open(cls, path: str, layout: SegmentLayout) -> WeightSegment:
        """Map a segment of another process (or of this one).

        Raises:
            WeightSegmentError: the path is gone, not permitted, not a weight segment, or its size
                is not the layout's.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise WeightSegmentError(
                f"cannot open the weight segment {path} ({error.strerror}): its creator must be "
                "alive, on this host, of the same user and in the same pid namespace"
            ) from error
        target = os.readlink(f"/proc/self/fd/{fd}")
        if not target.startswith(f"/memfd:{_MEMFD_NAME}"):
            os.close(fd)
            raise WeightSegmentError(f"{path} is {target}, not a weight segment")
        size_bytes = os.fstat(fd).st_size
        if size_bytes != layout.total_bytes:
            os.close(fd)
            raise WeightSegmentError(
                f"{path} holds {size_bytes} bytes but the layout needs {layout.total_bytes}: "
                "the layout belongs to another segment"
            )
        return cls(fd, layout, path)

    def close(self) -> None:
        """Let go of the memory.  Views that a caller still holds stay valid until dropped."""
        self.views.clear()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
