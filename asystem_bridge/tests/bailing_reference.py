"""A naive forward pass of BailingMoeV2 from weights under their Hugging Face names.

transformers has no such model, so this is what the tests compare with.  It follows the published
modelling code of Ling-2.0 / Ring-2.0, without a cache, batched kernels or parallelism.

Shapes: B batch, T tokens, D hidden, H heads, K key-value heads, E experts, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]


def bailing_logits(
    weights: Weights, config: dict[str, Any], token_ids: torch.Tensor
) -> torch.Tensor:
    """Logits [B, T, V] of token ids [B, T]; every row begins at position 0."""
    hidden = weights["model.word_embeddings.weight"][token_ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        normed = _norm(hidden, weights[f"{prefix}.input_layernorm.weight"], config)
        hidden = hidden + _attention(weights, config, f"{prefix}.attention", normed)
        normed = _norm(hidden, weights[f"{prefix}.post_attention_layernorm.weight"], config)
        if layer < config["first_k_dense_replace"]:
            hidden = hidden + _mlp(weights, f"{prefix}.mlp", normed)
        else:
            hidden = hidden + _experts(weights, config, f"{prefix}.mlp", normed)
    return _norm(hidden, weights["model.norm.weight"], config) @ weights["lm_head.weight"].T


def _norm(x: torch.Tensor, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, config["rms_norm_eps"])


def _rotate(x_bthd: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Rotate the first part of each head; the second half of that part is the imaginary one."""
    size = int(config["head_dim"] * config["partial_rotary_factor"])
    rotated, rest = x_bthd[..., :size], x_bthd[..., size:]
    frequencies = config["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    angles = torch.arange(x_bthd.shape[1])[:, None] * frequencies
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    real, imaginary = rotated.chunk(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin, rest], dim=-1)


def _attention(
    weights: Weights, config: dict[str, Any], prefix: str, x: torch.Tensor
) -> torch.Tensor:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    batch, length, _ = x.shape
    fused = x @ weights[f"{prefix}.query_key_value.weight"].T
    fused = fused.view(batch, length, heads + 2 * kv_heads, config["head_dim"])
    query, key, value = fused.split([heads, kv_heads, kv_heads], dim=2)
    query = _rotate(_norm(query, weights[f"{prefix}.query_layernorm.weight"], config), config)
    key = _rotate(_norm(key, weights[f"{prefix}.key_layernorm.weight"], config), config)
    key, value = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (key, value))
    scores = torch.einsum("bthd,bshd->bhts", query, key) * config["head_dim"] ** -0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    attention = scores.masked_fill(future, float("-inf")).softmax(-1)
    context = torch.einsum("bhts,bshd->bthd", attention, value).reshape(batch, length, -1)
    return context @ weights[f"{prefix}.dense.weight"].T


def _mlp(weights: Weights, prefix: str, x: torch.Tensor) -> torch.Tensor:
    gate = F.silu(x @ weights[f"{prefix}.gate_proj.weight"].T)
    return (gate * (x @ weights[f"{prefix}.up_proj.weight"].T)) @ weights[
        f"{prefix}.down_proj.weight"
    ].T


def _experts(
    weights: Weights, config: dict[str, Any], prefix: str, x: torch.Tensor
) -> torch.Tensor:
    scores = (x @ weights[f"{prefix}.gate.weight"].T).sigmoid()
    biased = scores + weights[f"{prefix}.gate.expert_bias"]
    groups = biased.unflatten(-1, (config["n_group"], -1))
    best_groups = groups.topk(2, dim=-1).values.sum(-1).topk(config["topk_group"], dim=-1).indices
    allowed = torch.zeros_like(groups, dtype=torch.bool).scatter(
        -2, best_groups[..., None].expand(*best_groups.shape, groups.shape[-1]), True
    )
    chosen = biased.masked_fill(~allowed.flatten(-2), float("-inf"))
    chosen = chosen.topk(config["num_experts_per_tok"], dim=-1).indices
    # The bias decides who is chosen, not how much the chosen weigh.
    gates = scores.gather(-1, chosen)
    gates = gates / gates.sum(-1, keepdim=True) * config["routed_scaling_factor"]
    gate_per_expert = torch.zeros_like(scores).scatter(-1, chosen, gates)
    output = _mlp(weights, f"{prefix}.shared_experts", x)
    for expert in range(config["num_experts"]):
        output = output + gate_per_expert[..., expert, None] * _mlp(
            weights, f"{prefix}.experts.{expert}", x
        )
    return output
