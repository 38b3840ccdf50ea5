"""Which tensors of the segment does the engine not compute with?  Asked when the canary fails.

vLLM packs linear weights for its CPU kernels and frees the originals, so there is often nothing to
read.  Therefore a linear layer is fed unit vectors: column j of its weight comes out exactly, since
every other product is zero.  Embeddings, norms and biases are read; packed experts are compared
with the segment's experts packed in the same way.

What cannot be compared is reported as ``"not checkable"``, never as equal.  Tensor parallelism is
left out: nothing is checkable there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from asystem_bridge.vllm_backend.tensor_report import TensorReport

_UNIT_VECTORS_PER_CALL = 256
_EXPERT = re.compile(
    r"(?P<layer>.+\.experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight"
)

Found = tuple[torch.Tensor, str]
"""The engine's values in the shape of the Hugging Face tensor, and how they were obtained."""


class NotCheckableError(Exception):
    """The engine's values of a tensor cannot be had; the message says why."""


def diagnose_worker(worker: Any) -> list[TensorReport]:
    """Run inside vLLM's worker process, through ``collective_rpc``.

    Raises:
        ValueError: no segment is attached.
    """
    segment = getattr(worker.weight_transfer_engine, "segment", None)
    if segment is None:
        raise ValueError("no weight segment is attached; call attach_weights first")
    return compare(worker.get_model(), segment.views)


@torch.no_grad()
def compare(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[TensorReport]:
    """One report per Hugging Face tensor, in the order of ``tensors``."""
    engine = _EngineWeights(model, tensors)
    reports = []
    for name, expected in tensors.items():
        try:
            found = list(engine.find(name))
        except NotCheckableError as error:
            reports.append(
                TensorReport(
                    name=name, status="not checkable", max_relative_error=None, reason=str(error)
                )
            )
            continue
        errors = [_relative_error(values, expected) for values, _ in found]
        reports.append(
            TensorReport(
                name=name,
                status="equal" if max(errors) == 0.0 else "differs",
                max_relative_error=max(errors),
                reason=", ".join(how for _, how in found),
            )
        )
    return reports


def _relative_error(values: torch.Tensor, expected: torch.Tensor) -> float:
    """max |values - expected| / max |expected|, in the engine's dtype; inf when not finite."""
    target = expected.to(values.dtype).double()
    difference = (values.double() - target).abs().max()
    scale = target.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    error = float(difference / scale)
    return error if error == error else float("inf")


class _EngineWeights:
    """Finds the engine's values of a Hugging Face tensor."""

    def __init__(self, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        self._modules = dict(model.named_modules())
        self._tensors = tensors
        self._packed: dict[str, tuple[str, int]] = {  # q_proj -> (qkv_proj, 0)
            part: (fused, index)
            for fused, parts in getattr(model, "packed_modules_mapping", {}).items()
            for index, part in enumerate(parts)
        }
        self._experts: dict[tuple[str, int], dict[str, Found]] = {}

    def find(self, name: str) -> Iterator[Found]:
        """Everything that the engine derived from this tensor: an embedding may also be the head.

        Raises:
            NotCheckableError: with the reason.
        """
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            yield self._expert(expert["layer"], int(expert["expert"]), expert["part"])
            return
        path, _, kind = name.rpartition(".")
        module, part = self._module(path)
        yield self._parameter(module, part, kind)
        head = self._modules.get("lm_head")
        if kind == "weight" and head is not None and head is not module:
            tied = getattr(head, "weight", None) is getattr(module, "weight", object())
            if tied:
                values, how = self._parameter(head, None, kind)
                yield values, f"{how} of the tied head"

    def _module(self, path: str) -> tuple[Any, int | None]:
        if path in self._modules:
            return self._modules[path], None
        parent, _, leaf = path.rpartition(".")
        fused, index = self._packed.get(leaf, (None, None))
        module = self._modules.get(f"{parent}.{fused}")
        if module is None:
            raise NotCheckableError(f"the engine has no module {path}")
        return module, index

    def _parameter(self, module: Any, part: int | None, kind: str) -> Found:
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        if getattr(module, "tp_size", 1) != 1:
            raise NotCheckableError("the engine holds a tensor-parallel shard of it")
        if isinstance(module, VocabParallelEmbedding):
            stored = module.get_parameter(kind)
            if kind == "weight" and isinstance(module, ParallelLMHead):
                columns = _columns(module, module.embedding_dim, stored.dtype)
                return columns[: module.org_vocab_size], "unit vectors"
            return stored[: module.org_vocab_size], "read"
        if kind == "weight" and isinstance(module, LinearBase):
            values, how = _columns(module, module.input_size, module.params_dtype), "unit vectors"
        else:
            parameter = getattr(module, kind, None)
            if not isinstance(parameter, torch.Tensor):
                raise NotCheckableError(f"{type(module).__name__} has no parameter {kind}")
            values, how = parameter, "read"
        if part is not None:
            values = torch.split(values, module.output_sizes)[part]
        return values, how

    def _expert(self, layer: str, expert: int, part: str) -> Found:
        """An expert's matrix, from the packed experts of its layer."""
        if (layer, expert) not in self._experts:
            self._experts[layer, expert] = _unpacked_expert(
                self._routed_experts(layer), self._expert_tensors(layer, expert), expert
            )
        return self._experts[layer, expert][part]

    def _routed_experts(self, layer: str) -> Any:
        for path, module in self._modules.items():
            if path.startswith(layer) and hasattr(module, "w13_weight"):
                return module
        raise NotCheckableError(f"the engine has no experts at {layer}")

    def _expert_tensors(self, layer: str, expert: int) -> dict[str, torch.Tensor]:
        parts = ("gate_proj", "up_proj", "down_proj")
        return {part: self._tensors[f"{layer}.{expert}.{part}.weight"] for part in parts}


def _columns(module: Any, input_size: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight [output, input] that a linear layer multiplies with."""
    device = next(module.parameters()).device
    columns = []
    for begin in range(0, input_size, _UNIT_VECTORS_PER_CALL):
        count = min(_UNIT_VECTORS_PER_CALL, input_size - begin)
        units = torch.zeros(count, input_size, dtype=dtype, device=device)
        units[torch.arange(count), torch.arange(begin, begin + count)] = 1
        columns.append(module.quant_method.apply(module, units, None).T)
    return torch.cat(columns, dim=1)


def _unpacked_expert(
    experts: Any, tensors: Mapping[str, torch.Tensor], expert: int
) -> dict[str, Found]:
    """The engine's matrices of one expert, back in the Hugging Face shape.

    Packing only moves elements.  So packed element numbers tell where each one went.
    """
    if experts.moe_config.moe_parallel_config.tp_size != 1 or experts.expert_map is not None:
        raise NotCheckableError("the engine holds a parallel shard of the experts")
    pack = _packing(experts)
    found: dict[str, Found] = {}
    for parameter, parts in (
        (experts.w13_weight, ("gate_proj", "up_proj")),
        (experts.w2_weight, ("down_proj",)),
    ):
        shapes = [tuple(tensors[part].shape) for part in parts]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        packed = parameter[expert].flatten()
        if packed.numel() != rows * columns:
            raise NotCheckableError("the experts are padded in the engine")
        matrix = torch.empty(rows * columns, dtype=packed.dtype, device=packed.device)
        matrix[_packed_positions(pack, rows, columns, packed)] = packed
        pieces = torch.split(matrix.view(rows, columns), [shape[0] for shape in shapes])
        found |= {part: (piece, "unpacked") for part, piece in zip(parts, pieces, strict=True)}
    return found


def _packing(experts: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """How the engine lays out expert matrices [1, rows, columns]."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.platforms import current_platform

    method = experts.quant_method
    backend = getattr(method, "unquantized_backend", None)
    if backend == UnquantizedMoeBackend.TRITON:
        return lambda matrices: matrices
    kernel: Any = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    if current_platform.is_cpu() and not getattr(kernel, "_use_zentorch", True):
        from vllm._custom_ops import cpu_prepack_moe_weight

        return lambda matrices: cpu_prepack_moe_weight(matrices, kernel.isa)
    raise NotCheckableError(f"expert layout of the MoE backend {backend} is unknown")


def _packed_positions(
    pack: Callable[[torch.Tensor], torch.Tensor], rows: int, columns: int, like: torch.Tensor
) -> torch.Tensor:
    """For each packed element, its number in the unpacked matrix.

    Numbers travel as digits of base 128, which every floating dtype holds exactly.
    """
    numbers = torch.arange(rows * columns)
    positions = torch.zeros_like(numbers)
    scale = 1
    while scale < rows * columns:
        digits = (numbers // scale % 128).to(like.dtype).to(like.device)
        positions += pack(digits.view(1, rows, columns)).flatten().long().cpu() * scale
        scale *= 128
    return positions.to(like.device)
