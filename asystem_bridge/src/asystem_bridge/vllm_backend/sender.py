"""The trainer's end for those who drive vLLM's own clients (HTTP, Ray, ``LLM``).

    init = SegmentSenderInit(rank=0, dtype_name="bfloat16")
    sender = WeightTransferTrainerFactory.trainer_init(init, client=client, source=source)
    ...
    sender.send_weights()

The client reaches no scheduler, so around ``send_weights`` the caller pauses the engine and clears
its prefix cache: ``POST /pause?mode=abort&clear_cache=true`` and ``POST /resume`` over HTTP.
Trainer and engine share one host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from vllm.distributed.weight_transfer import (
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.base import TrainerInitInfo

from asystem_bridge import compat
from asystem_bridge.vllm_backend.plugin import BACKEND
from asystem_bridge.weights.segment import (
    SegmentLayout,
    WeightSegment,
    WeightSegmentError,
    dtype_of,
)


@dataclass
class SegmentSenderInit(TrainerInitInfo):
    """Options of the sender.

    Attributes:
        rank: of this trainer process; rank 0 sends, all ranks iterate the source.
        dtype_name: the engine's dtype, such as ``"bfloat16"``; floating tensors are cast to it
            while they are copied.  ``None`` sends each tensor as it is.
    """

    backend: ClassVar[str] = BACKEND

    dtype_name: str | None = None


class SegmentSender(TrainerWeightTransferEngine[SegmentSenderInit]):
    """Copies a ``WeightSource`` into a segment and has the engine load it.

    Attributes:
        version: of the last weights sent; 0 before the first.
    """

    init_info_cls = SegmentSenderInit

    @classmethod
    def trainer_init(
        cls,
        init_info: SegmentSenderInit,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        """Make the segment and have the engine map it.

        Raises:
            HostVersionError: the installed vLLM was not tested.
            WeightSegmentError: no source, or not enough memory for the segment.
        """
        compat.require_supported_vllm()
        if source is None:
            raise WeightSegmentError("the backend 'asystem' needs a WeightSource, got None")
        sender = cls(client=client, source=source, is_sender=init_info.is_sender)
        sender.version = 0
        sender._segment = None
        metadata = source.metadata()  # may be a collective: every rank asks
        if sender.is_sender:
            wire_dtype = None if init_info.dtype_name is None else dtype_of(init_info.dtype_name)
            layout = SegmentLayout.from_tensors(
                {
                    meta.name: (
                        meta.shape,
                        wire_dtype if wire_dtype and meta.dtype.is_floating_point else meta.dtype,
                    )
                    for meta in metadata
                }
            )
            sender._segment = WeightSegment.create(layout)
            client.init_weight_transfer_engine(
                {"path": sender._segment.path, "layout": layout.to_state()}
            )
        return sender

    version: int
    _segment: WeightSegment | None

    def send_weights(self) -> None:
        """Copy every tensor, then start, update and finish on the engine.

        Raises:
            WeightSegmentError: the source yields other tensors than its metadata names.
        """
        assert self.source is not None
        names = set()
        for name, tensor in self.source:
            names.add(name)
            if self._segment is None:
                continue
            if name not in self._segment.views:
                raise WeightSegmentError(f"the source yields {name!r}, absent in its metadata")
            self._segment.views[name].copy_(tensor.detach())
        self.version += 1
        if self._segment is None:
            return
        missing = sorted(set(self._segment.views) - names)
        if missing:
            raise WeightSegmentError(f"the source did not yield {missing}")
        self.client.start_weight_update()
        self.client.update_weights({"version": self.version})
        self.client.finish_weight_update(str(self.version))

    def shutdown(self) -> None:
        if self._segment is not None:
            self._segment.close()
            self._segment = None
