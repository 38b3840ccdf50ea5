"""Options of the trainer processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from icepop_core import DEFAULT_ALPHA, DEFAULT_BETA
from megatron_c3po.loss import IcePopLossOptions, LossNormaliser


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """What every rank is given.

    Attributes:
        checkpoint_dir: Hugging Face checkpoint that the run starts from.
        tensor_parallel_size, data_parallel_size: their product is the number of processes; rank r
            is tensor-parallel rank r % tp of data-parallel rank r // tp.
        learning_rate: constant (2e-6 in the Ring-1T runs).
        adam_beta1, adam_beta2, adam_eps, weight_decay: of AdamW.  The paper names AdamW only;
            these are Megatron's defaults, but no weight decay: a few thousand small steps leave
            nothing to regularise, and the engine's weights should move for rewards alone.
        clip_grad: bound on the global gradient norm; ``math.inf`` does not clip.
        icepop_alpha, icepop_beta: IcePop's band (Ring-1T section 2.3.2).
        clip_low, clip_high, loss_normaliser: see ``megatron_c3po.loss.IcePopLossOptions``.
        row_tokens: cap on the tokens of one packed row, for the log-probs of fixed sequences; the
            rows of a training step come packed.
        threads: torch's intra-op threads per process; 0 = the cores divided by the processes.
        logits_tolerance: largest allowed |logit difference| from transformers at the start.
        distributed_timeout_s: a collective that waits longer for a peer raises.

    Raises:
        ValueError: a value is impossible; the message names it and what is allowed.
    """

    checkpoint_dir: Path
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    learning_rate: float = 2e-6
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    icepop_alpha: float = DEFAULT_ALPHA
    icepop_beta: float = DEFAULT_BETA
    clip_low: float = 0.2
    clip_high: float = 0.2
    loss_normaliser: LossNormaliser = "sequence"
    row_tokens: int = 2048
    threads: int = 0
    logits_tolerance: float = 1e-3
    distributed_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "data_parallel_size", "row_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.threads < 0:
            raise ValueError(f"threads = {self.threads}: must be at least 1, or 0 for a share")
        for name in (
            "learning_rate", "adam_eps", "clip_grad", "logits_tolerance", "distributed_timeout_s",
        ):  # fmt: skip
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be in [0, 1)")
        if self.weight_decay < 0.0:
            raise ValueError(f"weight_decay = {self.weight_decay}: must not be negative")
        _ = self.loss_options  # checks the band, the clip and the normaliser

    @property
    def world_size(self) -> int:
        """Number of trainer processes."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def loss_options(self) -> IcePopLossOptions:
        return IcePopLossOptions(
            alpha=self.icepop_alpha,
            beta=self.icepop_beta,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            normaliser=self.loss_normaliser,
        )
