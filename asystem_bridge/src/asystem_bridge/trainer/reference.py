"""Compare the trainer's model with transformers' for the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel

from asystem_bridge.errors import ModelError
from asystem_bridge.trainer.model import packed_logits
from asystem_bridge.weights.transformers_reference import transformers_reference

__all__ = ["check_against_transformers", "transformers_reference"]

# Float32 rounding alone moves the logits of SmolLM2-135M (up to 31) by 3e-4, transformers' own
# float64 being the measure; the trainer was seen at 6e-5 (one process) and 4e-4 (TP3), tiny models
# at 1e-6.
LOGIT_TOLERANCE = 2e-3
SEQUENCE_LENGTHS = (24, 3, 11)


@torch.no_grad()
def check_against_transformers(
    model: GPTModel, checkpoint_dir: Path, *, tolerance: float = LOGIT_TOLERANCE
) -> float:
    """Compare the trainer's logits on fixed tokens with transformers'.

    Called on every rank; global rank 0 holds the reference and every rank gets the result.

    Args:
        model: with the checkpoint's weights.
        tolerance: largest difference of two logits that float32 rounding explains.

    Returns:
        The largest absolute difference.

    Raises:
        ModelError: it is above the tolerance, or not a number.
    """
    sequences = _fixed_sequences(model.vocab_size)
    logits = packed_logits(model, sequences)  # (T, V)
    difference = torch.zeros(1, device=logits.device)
    if torch.distributed.get_rank() == 0:
        reference = transformers_reference(checkpoint_dir)
        expected = torch.cat([reference(torch.tensor([tokens])).logits[0] for tokens in sequences])
        difference[0] = (logits - expected.to(logits.device)).abs().max()
    torch.distributed.broadcast(difference, src=0)
    largest = float(difference)
    if not largest <= tolerance:
        raise ModelError(
            f"{checkpoint_dir}: the trainer's logits differ from transformers' by {largest:.3g}, "
            f"allowed is {tolerance:.3g}: the checkpoint or its config.json is not what the "
            "trainer takes it for"
        )
    return largest


def _fixed_sequences(vocab_size: int) -> list[list[int]]:
    """Token ids spread over the vocabulary, the same in every run."""
    sequences: list[list[int]] = []
    for length in SEQUENCE_LENGTHS:
        first = sum(len(sequence) for sequence in sequences)
        sequences.append([(7919 * (first + i) + 13) % vocab_size for i in range(length)])
    return sequences
