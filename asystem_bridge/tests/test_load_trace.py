"""Which tensors a loader copied, told apart from those it dropped."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from asystem_bridge.vllm_backend.load_trace import LoadTrace


def traced(trace: LoadTrace, tensors: dict[str, torch.Tensor]) -> Iterable:
    for name, tensor in tensors.items():
        trace.current = name
        yield name, tensor


def test_every_way_of_copying_counts_and_a_skipped_tensor_does_not():
    tensors = {
        name: torch.full((2, 3), float(number))
        for number, name in enumerate(("whole", "view", "cast", "scaled", "skipped", "assigned"))
    }
    target = torch.zeros(6, 2, 3)

    def loader(weights: Iterable) -> None:
        for name, tensor in weights:
            if name == "whole":
                target[0].copy_(tensor)
            elif name == "view":
                target[1, :1].copy_(tensor.narrow(0, 1, 1))
            elif name == "cast":
                target[2].copy_(tensor.to(torch.bfloat16))
            elif name == "scaled":
                target[3].data.copy_(tensor / tensor.norm())
            elif name == "assigned":
                target[5] = tensor

    trace = LoadTrace(tensors)
    with trace:
        loader(traced(trace, tensors))
    assert trace.loaded == tensors.keys() - {"skipped"}
    assert (target[5] == 5.0).all()


def test_a_loader_that_collects_first_and_copies_later_is_understood():
    tensors = {name: torch.ones(4) for name in ("first", "dropped", "last", "end")}
    target = torch.zeros(2, 4)
    trace = LoadTrace(tensors)
    with trace:
        collected = dict(traced(trace, tensors))
        trace.current = None
        target[0].copy_(collected["first"])
        target[1].copy_(collected["last"])
    assert trace.loaded == {"first", "last"}
