"""Run megatron-core on a torch that has no CUDA.

Megatron-core names "cuda" in many places that no option reaches: tensors made with
``device="cuda"``, streams and events, the random-number tracker, the string type of a parameter in
the optimizers.  ``cpu_megatron()`` redirects them while it is entered and puts everything back when
it is left.  Where CUDA is available it changes nothing at all.

Left out: tensors that come in through threads other than the one that entered (a
``TorchFunctionMode`` belongs to its thread), fp8, CUDA graphs, and speed: a CPU is for tests.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_c3po import compat

_CPU = torch.device("cpu")


@contextlib.contextmanager
def cpu_megatron() -> Iterator[None]:
    """Inside, megatron-core's CUDA calls act on the CPU; outside, torch is as it was.

    Enter it once in a process that does nothing but Megatron, before any Megatron object is made,
    and stay inside: vLLM and other libraries must not see a patched torch.  Not reentrant.

    Raises:
        UnsupportedHostError: megatron-core is missing or of an untested version.
        RuntimeError: already entered.
    """
    compat.check_megatron_version()
    if torch.cuda.is_available():
        yield
        return
    if isinstance(torch.cuda.Stream, type) and issubclass(torch.cuda.Stream, _NullStream):
        raise RuntimeError("cpu_megatron() is already entered in this process: enter it once")
    with contextlib.ExitStack() as patches:
        # These import Megatron, and with it torch._dynamo, whose tables of torch's functions must
        # be made from an unpatched torch.cuda.
        patches.enter_context(_cpu_random_tracker())
        for upstream_fix in compat.UPSTREAM_FIXES:
            patches.enter_context(upstream_fix())
        for name, replacement in _cuda_replacements().items():
            patches.enter_context(compat.replaced(torch.cuda, name, replacement))
        # Megatron compiles small functions at their first call: longer than a CPU run lasts, and
        # impossible with the functions above replaced.
        patches.enter_context(torch.compiler.set_stance("force_eager"))
        patches.enter_context(_RedirectToCpu())
        yield


def _is_cuda(device: object) -> bool:
    return (isinstance(device, torch.device) and device.type == "cuda") or (
        isinstance(device, str) and device.startswith("cuda")
    )


class _RedirectToCpu(TorchFunctionMode):
    """Send every tensor that is asked for on a CUDA device to the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):  # pinning needs a CUDA driver
            kwargs["pin_memory"] = False
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            # The optimizers recognise a parameter by the string "torch.cuda.FloatTensor".
            asked_by = sys._getframe(1).f_globals.get("__name__", "")
            if asked_by.startswith("megatron.core.optimizer"):
                return name.replace("torch.", "torch.cuda.", 1)
            return name
        return func(*args, **kwargs)


class _NullEvent:
    """Work on a CPU is done when the call returns: there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _NullStream:
    """A stays-a-class stand-in: other libraries annotate with ``torch.cuda.Stream | None``."""

    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _NullEvent:
        return event or _NullEvent()

    def synchronize(self) -> None: ...


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _cuda_replacements() -> dict[str, Any]:
    return {
        "Stream": _NullStream,
        "Event": _NullEvent,
        "current_stream": lambda device=None: _NullStream(),
        "default_stream": lambda device=None: _NullStream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "current_device": lambda: _CPU,  # Megatron passes it on as ``device=``
        "device_count": lambda: 1,
        "set_device": _nothing,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        # torch.manual_seed has been called with the same seed by whoever seeds Megatron, and the
        # CPU generator's state is saved and restored beside the (absent) CUDA one.
        "manual_seed": _nothing,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": _nothing,
    }


@contextlib.contextmanager
def _cpu_random_tracker() -> Iterator[None]:
    """Give Megatron's tracker of named random streams the CPU's generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
        _current_state_name: str

        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random stream {name!r} with seed {seed} exists already")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator(device="cpu").manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            if name not in self.states_:
                raise KeyError(f"random stream {name!r}: known are {sorted(self.states_)}")
            outer_name = self._current_state_name
            outer_state = torch.get_rng_state()
            if outer_name in self.states_:  # nested: the outer stream goes on from here
                self.states_[outer_name] = outer_state
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(self.states_.get(outer_name, outer_state))
                self._current_state_name = outer_name

    with (
        compat.replaced(megatron_random, "_CUDA_RNG_STATE_TRACKER", CpuRNGStatesTracker()),
        compat.replaced(megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True),
        compat.replaced(
            megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()
        ),
        compat.replaced(megatron_random, "_set_cuda_rng_state", _nothing),
    ):
        yield
