"""vLLM's entry point (group ``vllm.general_plugins``): makes the backend ``asystem`` selectable.

vLLM calls ``register`` in every one of its processes, so it is idempotent, imports no more than
vLLM's own registry and never raises: an exception here would end an engine that does not even use
the backend.  Nothing changes until ``--weight-transfer-config '{"backend": "asystem"}'``.  An
unsupported vLLM is refused there, when the receiver is made.
"""

from __future__ import annotations

import logging

BACKEND = "asystem"

logger = logging.getLogger("vllm.asystem")  # a child of "vllm" inherits vLLM's handler


def register() -> None:
    """Tell vLLM's factories where the two engines are; they are imported when selected."""
    try:
        from vllm.distributed.weight_transfer import (
            WeightTransferEngineFactory,
            WeightTransferTrainerFactory,
        )
    except ImportError as error:
        logger.warning(
            "this vLLM has no weight-transfer factories (%s): the backend %r is not available",
            error,
            BACKEND,
        )
        return
    for factory, module, name in (
        (WeightTransferEngineFactory, "receiver", "SegmentReceiver"),
        (WeightTransferTrainerFactory, "sender", "SegmentSender"),
    ):
        try:
            factory.register_engine(BACKEND, f"asystem_bridge.vllm_backend.{module}", name)
        except ValueError as error:  # this process has registered it before
            logger.debug("%s", error)
