"""The same checkpoint as a transformers model: the oracle that trainer and engine agree with.

transformers has no BailingMoeV2 (Ring, Ling).  Its GLM-4-MoE is the same function: sigmoid router
with groups and a correction bias, shared experts, dense first layers, norms on queries and keys,
partly rotated heads.  A Bailing checkpoint is loaded into it under GLM's names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from asystem_bridge.errors import ModelError
from asystem_bridge.weights.architecture import Architecture, MoeArchitecture
from asystem_bridge.weights.hf_checkpoint import HfCheckpoint


def transformers_reference(checkpoint_dir: Path) -> transformers.PreTrainedModel:
    """The checkpoint as a transformers model in float32, ready for ``forward`` and ``generate``.

    Raises:
        ModelError: the checkpoint is not supported, or has no exact counterpart in transformers.
    """
    architecture = Architecture.from_checkpoint(checkpoint_dir)
    if architecture.family == "bailing_moe_v2":
        return _bailing_as_glm(architecture, checkpoint_dir)
    factory: Any = transformers.AutoModelForCausalLM
    model: transformers.PreTrainedModel = factory.from_pretrained(
        checkpoint_dir, dtype=torch.float32
    )
    model.train(False)
    return model


def _bailing_as_glm(
    architecture: Architecture, checkpoint_dir: Path
) -> transformers.PreTrainedModel:
    moe = architecture.moe
    assert moe is not None  # from_checkpoint gives every Bailing model its experts
    if not moe.shared_ffn_size or moe.shared_ffn_size % moe.expert_ffn_size:
        raise ModelError(
            f"shared experts of size {moe.shared_ffn_size} beside experts of size "
            f"{moe.expert_ffn_size}: transformers' counterpart needs a multiple of at least 1"
        )
    tokens = json.loads((checkpoint_dir / "config.json").read_text())
    make_config: Any = transformers.Glm4MoeConfig
    config = make_config(
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.ffn_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_attention_heads,
        num_key_value_heads=architecture.num_key_value_heads,
        head_dim=architecture.head_dim,
        max_position_embeddings=architecture.max_position_embeddings,
        rms_norm_eps=architecture.rms_norm_eps,
        tie_word_embeddings=architecture.tie_word_embeddings,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": architecture.rope_theta,
            "partial_rotary_factor": architecture.rotary_fraction,
        },
        use_qk_norm=architecture.qk_norm,
        moe_intermediate_size=moe.expert_ffn_size,
        n_routed_experts=moe.num_experts,
        n_shared_experts=moe.shared_ffn_size // moe.expert_ffn_size,
        num_experts_per_tok=moe.experts_per_token,
        n_group=moe.num_groups,
        topk_group=moe.groups_per_token,
        routed_scaling_factor=moe.weight_scale,
        norm_topk_prob=moe.normalize_weights,
        first_k_dense_replace=moe.num_dense_layers,
        num_mtp_layers=0,
        **{name: tokens.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    make_model: Any = transformers.Glm4MoeForCausalLM
    model: transformers.PreTrainedModel = make_model(config)
    model.train(False)
    model.load_state_dict(_glm_tensors(architecture, moe, HfCheckpoint(checkpoint_dir)))
    return model


def _glm_tensors(
    architecture: Architecture, moe: MoeArchitecture, checkpoint: HfCheckpoint
) -> dict[str, torch.Tensor]:
    """Bailing's tensors under GLM's names: queries, keys, values apart; experts stacked."""

    def read(name: str) -> torch.Tensor:
        return checkpoint.read(name).float()

    tensors = {
        "model.embed_tokens.weight": read("model.word_embeddings.weight"),
        "model.norm.weight": read("model.norm.weight"),
        "lm_head.weight": read(
            "model.word_embeddings.weight" if architecture.tie_word_embeddings else "lm_head.weight"
        ),
    }
    query_size = architecture.num_attention_heads * architecture.head_dim
    key_size = architecture.num_key_value_heads * architecture.head_dim
    part_sizes = [query_size, key_size, key_size]
    for layer in range(architecture.num_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            tensors[prefix + norm] = read(prefix + norm)
        fused = read(prefix + "attention.query_key_value.weight")
        for part, rows in zip("qkv", torch.split(fused, part_sizes), strict=True):
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = rows
        for glm, bailing in {
            "o_proj": "dense",
            "q_norm": "query_layernorm",
            "k_norm": "key_layernorm",
        }.items():
            tensors[f"{prefix}self_attn.{glm}.weight"] = read(f"{prefix}attention.{bailing}.weight")
        mlps = ["mlp."]
        if architecture.is_moe_layer(layer):
            mlps = ["mlp.shared_experts."]
            tensors[prefix + "mlp.gate.weight"] = read(prefix + "mlp.gate.weight")
            tensors[prefix + "mlp.gate.e_score_correction_bias"] = read(
                prefix + "mlp.gate.expert_bias"
            )
            experts = [f"{prefix}mlp.experts.{expert}." for expert in range(moe.num_experts)]
            tensors[prefix + "mlp.experts.gate_up_proj"] = torch.stack(
                [
                    torch.cat([read(e + "gate_proj.weight"), read(e + "up_proj.weight")])
                    for e in experts
                ]
            )
            tensors[prefix + "mlp.experts.down_proj"] = torch.stack(
                [read(e + "down_proj.weight") for e in experts]
            )
        for mlp in mlps:
            for part in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
                tensors[prefix + mlp + part] = read(prefix + mlp + part)
    return tensors
