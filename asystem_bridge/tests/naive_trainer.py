"""One training step by plain torch in float64: a token, a sequence, a weight at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bailing_reference import bailing_logits
from safetensors.torch import load_file
from torch import Tensor

from megatron_c3po.rollout import Rollout

# AdamW's first update is g / (|g| + eps): a large eps keeps it a smooth function of the gradient,
# so that rounding in tiny gradients does not decide about whole steps.
ADAM_EPS = 1e-2
LEARNING_RATE = 1e-2
CLIP_GRAD = 0.05


def naive_logits(checkpoint_dir: Path) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """float64 weights under their HF names, and a differentiable model [B, T] -> [B, T, V]."""
    stored = load_file(checkpoint_dir / "model.safetensors")
    weights = {name: tensor.double().requires_grad_() for name, tensor in stored.items()}
    config = json.loads((checkpoint_dir / "config.json").read_text())
    if config["architectures"] == ["BailingMoeV2ForCausalLM"]:
        return weights, lambda ids: bailing_logits(weights, config, ids)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float64)

    def logits(ids: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (ids,)).logits

    return weights, logits


def naive_logprobs(logits: Callable[[Tensor], Tensor], sequence: list[int]) -> Tensor:
    """log p of tokens 1..n-1, float64."""
    ids = torch.tensor([sequence])
    return logits(ids)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def naive_loss(logits: Callable[[Tensor], Tensor], rollouts: list[Rollout]) -> Tensor:
    """Eq. 1 negated, one sequence and one token at a time."""
    loss = torch.zeros((), dtype=torch.float64)
    for rollout in rollouts:
        logprobs = naive_logprobs(logits, rollout.prompt_ids + rollout.token_ids)
        sampled = logprobs[len(rollout.prompt_ids) - 1 :]
        for logprob, infer in zip(sampled, rollout.logprobs, strict=True):
            k = math.exp(float(logprob.detach()) - infer)
            weight = k if 0.5 <= k <= 5.0 else 0.0
            ratio = torch.exp(logprob - logprob.detach())
            term = weight * ratio * rollout.advantage
            loss = loss - term / len(rollout.token_ids) / len(rollouts)
    return loss


@dataclass(frozen=True, kw_only=True)
class Naive:
    """The naive model's first step."""

    logprobs: list[Tensor]
    loss: float
    grad_norm: float
    after_first: dict[str, Tensor]


def naive_step(checkpoint_dir: Path, rollouts: list[Rollout]) -> Naive:
    weights, logits = naive_logits(checkpoint_dir)
    trained = {n: w for n, w in weights.items() if not n.endswith("expert_bias")}
    logprobs = [naive_logprobs(logits, r.prompt_ids + r.token_ids).detach() for r in rollouts]
    loss = naive_loss(logits, rollouts)
    loss.backward()
    # Megatron counts an expert that got no token as a gradient of zeros: AdamW sees it too.
    for weight in trained.values():
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    grad_norm = math.sqrt(sum(float(w.grad.pow(2).sum()) for w in trained.values()))
    for weight in trained.values():
        weight.grad.mul_(min(1.0, CLIP_GRAD / (grad_norm + 1e-6)))
    torch.optim.AdamW(
        list(trained.values()), lr=LEARNING_RATE, betas=(0.9, 0.999), eps=ADAM_EPS, weight_decay=0.0
    ).step()
    after_first = {name: weight.detach() for name, weight in weights.items()}
    return Naive(
        logprobs=logprobs, loss=float(loss.detach()), grad_norm=grad_norm, after_first=after_first
    )
