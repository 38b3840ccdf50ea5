"""The engine's end of a weight update: every tensor of the segment through vLLM's own loader.

Ring-1T section 2.5.  vLLM calls, in each of its worker processes: ``init_transfer_engine`` once,
then per update ``start_weight_update``, ``update_weights``, ``finish_weight_update``.  Requests
must be paused meanwhile and the prefix cache cleared afterwards; that is the caller's part.

Left out here: reading only what this worker needs, and an update that can be taken back.  An
update that fails leaves the engine without usable weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from asystem_bridge import compat
from asystem_bridge.vllm_backend.load_trace import LoadTrace
from asystem_bridge.weights.segment import SegmentLayout, WeightSegment, WeightSegmentError

logger = logging.getLogger("vllm.asystem")


@dataclass
class SegmentInitInfo(WeightTransferInitInfo):
    """Where the segment is.

    Attributes:
        path: ``WeightSegment.path``.
        layout: ``SegmentLayout.to_state()``.
    """

    path: str
    layout: dict[str, Any] = field(default_factory=dict)


@dataclass
class SegmentUpdateInfo(WeightTransferUpdateInfo):
    """Which version of the weights the segment holds now."""

    version: int


class SegmentReceiver(WeightTransferEngine[SegmentInitInfo, SegmentUpdateInfo]):
    """Loads the tensors of a ``WeightSegment`` into the model.

    Attributes:
        segment: ``None`` until ``init_transfer_engine``.
        version: of the last finished update, ``None`` before the first.

    Raises:
        HostVersionError: the installed vLLM was not tested.
    """

    init_info_cls = SegmentInitInfo
    update_info_cls = SegmentUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        logger.info("weight transfer through shared memory on %s", compat.require_supported_vllm())
        super().__init__(*args, **kwargs)
        self.segment: WeightSegment | None = None
        self.version: int | None = None
        self._pending_version: int | None = None
        self._every_tensor_loads = False

    def init_transfer_engine(self, init_info: SegmentInitInfo) -> None:
        """Map the segment; a second call maps another one."""
        segment = WeightSegment.open(init_info.path, SegmentLayout.from_state(init_info.layout))
        self.shutdown()
        self.segment = segment
        self._every_tensor_loads = False

    def start_weight_update(self) -> None:
        if self.segment is None:
            raise WeightSegmentError(
                "start_weight_update before init_weight_transfer_engine: no segment is attached"
            )
        compat.reset_moe_kernels(self.model)
        compat.begin_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        compat.synchronize(self.device)

    def receive_weights(self, update_info: SegmentUpdateInfo) -> None:
        """Load every tensor of the segment.

        Raises:
            WeightSegmentError: a tensor was ignored, or a module got only a part of its weights.
        """
        assert self.segment is not None
        if self._every_tensor_loads:  # the same names and shapes take the same way every time
            self._load(self.segment.views.items())
        else:
            self._load_and_check(self.segment)
        self._pending_version = update_info.version

    def finish_weight_update(self) -> None:
        compat.end_layerwise_reload(self.model, self.model_config)
        self.version, self._pending_version = self._pending_version, None

    def shutdown(self) -> None:
        if self.segment is not None:
            self.segment.close()
            self.segment = None

    def _load_and_check(self, segment: WeightSegment) -> None:
        trace = LoadTrace(segment.views)

        def traced() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in segment.views.items():
                trace.current = name
                yield name, tensor
            trace.current = None

        with trace:
            self._load(traced())
        problems = []
        ignored = sorted(set(segment.views) - trace.loaded - self._tied_names())
        if ignored:
            problems.append(f"the model ignored these tensors of the segment: {ignored}")
        incomplete = compat.incomplete_modules(self.model)
        if incomplete:
            problems.append(f"these modules of the engine lack weights: {incomplete}")
        if problems:
            raise WeightSegmentError(
                f"{type(self.model).__name__}: {'; '.join(problems)}. The segment must hold "
                "exactly the tensors of the Hugging Face checkpoint that the engine was made from"
            )
        self._every_tensor_loads = True

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        load_weights: Any = self.model.load_weights  # vLLM's models have it, torch's Module not
        load_weights(tensors)

    def _tied_names(self) -> set[str]:
        """vLLM skips the output head where it is the embedding."""
        config = self.model_config.hf_text_config
        return {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set()
