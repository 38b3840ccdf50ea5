"""What this distribution needs to know about its host, megatron-core: versions and upstream bugs.

Every fix here is a context manager that patches on entry and restores on exit.  Each says which
version has the bug, where, and when the fix can go.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

OLDEST_MEGATRON = (0, 16)
FIRST_UNTESTED_MEGATRON = (0, 17)
SUPPORTED_MEGATRON = "megatron-core>=0.16.1,<0.17"


class UnsupportedHostError(RuntimeError):
    """Megatron-core is missing or of a version that was not tested with this package."""


def check_megatron_version() -> str:
    """The version of megatron-core that is installed.

    Raises:
        UnsupportedHostError: it is missing or untested; the message says what to install.
    """
    advice = f'install a tested one: pip install "{SUPPORTED_MEGATRON}"'
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedHostError(f"megatron-core is not installed; {advice}") from None
    major_minor = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST_MEGATRON <= major_minor < FIRST_UNTESTED_MEGATRON:
        raise UnsupportedHostError(f"megatron-core {version} was not tested; {advice}")
    return version


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute for the time of the ``with`` block; one that was absent is absent again."""
    absent = object()
    before = owner.__dict__.get(name, absent)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is absent:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextlib.contextmanager
def router_without_transformer_engine() -> Iterator[None]:
    """Define the name ``te_general_gemm`` in ``moe_utils``.

    megatron-core 0.16.1, ``core/transformer/moe/moe_utils.py``, ``RouterGatingLinearFunction``:
    the name is imported in a ``try`` and read later without it, so the forward pass of a router in
    float32 raises NameError where TransformerEngine is not installed.
    Remove when ``moe_utils`` sets ``te_general_gemm = None`` in its ``except ImportError``.
    """
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "te_general_gemm"):
        yield
        return
    with replaced(moe_utils, "te_general_gemm", None):
        yield


@contextlib.contextmanager
def split_sizes_as_numpy() -> Iterator[None]:
    """Honour ``as_numpy`` for a tensor that is on the CPU already.

    megatron-core 0.16.1, ``core/transformer/moe/moe_utils.py``, ``maybe_move_tensor_to_cpu``: the
    conversion is inside ``if tensor.is_cuda``, and the all-to-all of the token dispatcher is then
    given split sizes as tensors, which it cannot take.
    Remove when the conversion no longer depends on ``is_cuda``.
    """
    from megatron.core.transformer.moe import token_dispatcher

    upstream = token_dispatcher.maybe_move_tensor_to_cpu

    def fixed(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = upstream(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.numpy() if as_numpy and hasattr(moved, "numpy") else moved

    with replaced(token_dispatcher, "maybe_move_tensor_to_cpu", fixed):
        yield


UPSTREAM_FIXES: tuple[Callable[[], contextlib.AbstractContextManager[None]], ...] = (
    router_without_transformer_engine,
    split_sizes_as_numpy,
)
"""What ``cpu_megatron()`` enters."""
