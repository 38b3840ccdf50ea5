"""Which tensors does ``model.load_weights`` really copy, and which does it skip in silence?

A model's loader drops a name that it does not know in some cases (biases, tied heads, buffers).
The trace watches torch's copies while the loader runs: a tensor is loaded when it, or a view of it,
is the source of a copy, or when a copy happens while it is the tensor in the loader's hand (a
loader may copy a transformed tensor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_COPIES = (torch.Tensor.copy_, torch.Tensor.__setitem__, torch.Tensor.fill_)


class LoadTrace(TorchFunctionMode):
    """Context manager around ``model.load_weights``.

    Attributes:
        current: set by the caller to the name that it hands out next.
        loaded: names that were copied somewhere.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.current: str | None = None
        self.loaded: set[str] = set()
        self._name_of_storage = {
            tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _COPIES:
            if self.current is not None:
                self.loaded.add(self.current)
            source = args[-1]
            if isinstance(source, torch.Tensor) and not source.is_meta:
                name = self._name_of_storage.get(source.untyped_storage().data_ptr())
                if name is not None:
                    self.loaded.add(name)
        return func(*args, **(kwargs or {}))
