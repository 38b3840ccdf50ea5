"""A tiny, randomly initialised model of the Ring-1T architecture (BailingMoeV2), as a checkpoint.

The files look like those of Ring-mini-2.0: the same tensor names, the same configuration keys, a
configuration class in the folder.  So vLLM's own BailingMoeV2 loads it (with
``trust_remote_code=True``) and so does the Megatron converter.  The model is small enough to be
taught a small task within a minute on a CPU.

What it keeps of the architecture: fused query_key_value, query/key norms, rotation of half of each
head, dense layers first, a sigmoid router with group-limited top-k and an expert bias, one shared
expert.  What it leaves out: the modelling file (transformers cannot run it) and next-token heads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asystem_bridge.models.cache import safetensors_os_errors
from asystem_bridge.models.char_tokenizer import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    VOCAB_SIZE,
    char_tokenizer,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class TinyRingSize:
    """The model's shape; the defaults have 0.8 million parameters.

    Attributes:
        num_layers: the first ``num_dense_layers`` have a dense MLP, the others experts.
        num_heads, num_kv_heads: of ``head_dim`` each; kv heads are shared by equal groups of heads.
        head_dim: a multiple of 32 (vLLM's CPU attention).
        dense_intermediate_size, expert_intermediate_size: widths of the MLPs.  The shared expert is
            as wide as a routed one.
        num_experts, num_groups: experts form equal groups.
        experts_per_token, groups_per_token: the router takes the best groups, then the best
            experts in them.  A group's score is the sum of its two best experts in vLLM, and of its
            ``experts_per_token / groups_per_token`` best in Megatron: the ratio must be 2.

    Raises:
        ValueError: a size is impossible; the message says what is allowed.
    """

    hidden_size: int = 128
    num_layers: int = 3
    num_dense_layers: int = 1
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    dense_intermediate_size: int = 384
    expert_intermediate_size: int = 64
    num_experts: int = 8
    num_groups: int = 2
    experts_per_token: int = 2
    groups_per_token: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if self.num_dense_layers >= self.num_layers:
            raise ValueError(
                f"num_dense_layers = {self.num_dense_layers} with num_layers = {self.num_layers}: "
                "at least one layer must have experts"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} with num_kv_heads = {self.num_kv_heads}: "
                "the heads must divide evenly among the kv heads"
            )
        if self.head_dim % 32:
            raise ValueError(f"head_dim = {self.head_dim}: must be a multiple of 32")
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"num_experts = {self.num_experts} with num_groups = {self.num_groups}: "
                "the experts must divide evenly among the groups"
            )
        if self.experts_per_token != 2 * self.groups_per_token:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token} with groups_per_token = "
                f"{self.groups_per_token}: must be twice as many, or vLLM and Megatron route "
                "differently"
            )
        if not self.groups_per_token <= self.num_groups <= self.num_experts // 2:
            raise ValueError(
                f"num_groups = {self.num_groups}: must be at least groups_per_token = "
                f"{self.groups_per_token}, with two experts or more in each group"
            )


def tiny_ring_checkpoint(
    directory: Path, seed: int = 0, size: TinyRingSize | None = None, max_positions: int = 256
) -> Path:
    """Write the checkpoint into ``directory`` (made if missing) and return it.

    The same seed and size give the same bytes.

    Args:
        directory: must be empty or missing.
        seed: of the random weights.
        size: shape of the model, the defaults of ``TinyRingSize`` if not given.
        max_positions: longest sequence, prompt and completion together, in tokens.

    Raises:
        ValueError: the directory holds something.
        OSError: it cannot be written, for example because the disk is full.
    """
    from safetensors.torch import save_file

    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty: a checkpoint is written to an empty folder")
    size = size or TinyRingSize()
    directory.mkdir(parents=True, exist_ok=True)
    weights = tiny_ring_weights(size, seed)
    with safetensors_os_errors():
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = tiny_ring_config(size, max_positions)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / f"{_CONFIG_MODULE}.py").write_text(_CONFIG_SOURCE)
    special_ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    (directory / "generation_config.json").write_text(json.dumps(special_ids, indent=2) + "\n")
    char_tokenizer(model_max_length=max_positions).save_pretrained(directory)
    return directory


_CONFIG_MODULE = "configuration_bailing_moe_v2"
_CONFIG_SOURCE = """\
from transformers.configuration_utils import PretrainedConfig


class BailingMoeV2Config(PretrainedConfig):
    model_type = "bailing_moe"
"""


def tiny_ring_config(size: TinyRingSize, max_positions: int) -> dict[str, Any]:
    """The content of ``config.json``, with the keys that Ring-mini-2.0 has."""
    return {
        "architectures": ["BailingMoeV2ForCausalLM"],
        "auto_map": {"AutoConfig": f"{_CONFIG_MODULE}.BailingMoeV2Config"},
        "model_type": "bailing_moe",
        "torch_dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_layers,
        "first_k_dense_replace": size.num_dense_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "head_dim": size.head_dim,
        "intermediate_size": size.dense_intermediate_size,
        "moe_intermediate_size": size.expert_intermediate_size,
        "moe_shared_expert_intermediate_size": size.expert_intermediate_size,
        "num_experts": size.num_experts,
        "num_shared_experts": 1,
        "num_experts_per_tok": size.experts_per_token,
        "n_group": size.num_groups,
        "topk_group": size.groups_per_token,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "router_dtype": "fp32",
        "hidden_act": "silu",
        "use_qk_norm": True,
        "use_rmsnorm": True,
        "rms_norm_eps": 1e-6,
        "use_bias": False,
        "use_qkv_bias": False,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": False,
        "norm_head": False,
        "num_nextn_predict_layers": 0,
        "embedding_dropout": 0.0,
        "attention_dropout": 0.0,
        "output_dropout": 0.0,
        "initializer_range": _INIT_STD,
        "use_cache": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }


_INIT_STD = 0.06


def tiny_ring_weights(size: TinyRingSize, seed: int) -> dict[str, torch.Tensor]:
    """Random float32 weights by Hugging Face name.

    Normal with a standard deviation of 0.06, which suits widths near 128; what writes into the
    residual stream is scaled down by sqrt(2 x layers), as in GPT-2.  Norms are ones.  The expert
    bias is small but not zero, so that a loader which drops it gives different logits.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}

    def normal(name: str, *shape: int, std: float = _INIT_STD) -> None:
        weights[name] = torch.randn(*shape, generator=generator) * std

    residual_std = _INIT_STD / (2 * size.num_layers) ** 0.5

    def mlp(prefix: str, width: int) -> None:
        normal(f"{prefix}.gate_proj.weight", width, size.hidden_size)
        normal(f"{prefix}.up_proj.weight", width, size.hidden_size)
        normal(f"{prefix}.down_proj.weight", size.hidden_size, width, std=residual_std)

    query_size = size.num_heads * size.head_dim
    key_value_size = size.num_kv_heads * size.head_dim
    normal("model.word_embeddings.weight", VOCAB_SIZE, size.hidden_size)
    for layer in range(size.num_layers):
        prefix = f"model.layers.{layer}"
        weights[f"{prefix}.input_layernorm.weight"] = torch.ones(size.hidden_size)
        normal(
            f"{prefix}.attention.query_key_value.weight",
            query_size + 2 * key_value_size,
            size.hidden_size,
        )
        weights[f"{prefix}.attention.query_layernorm.weight"] = torch.ones(size.head_dim)
        weights[f"{prefix}.attention.key_layernorm.weight"] = torch.ones(size.head_dim)
        normal(f"{prefix}.attention.dense.weight", size.hidden_size, query_size, std=residual_std)
        weights[f"{prefix}.post_attention_layernorm.weight"] = torch.ones(size.hidden_size)
        if layer < size.num_dense_layers:
            mlp(f"{prefix}.mlp", size.dense_intermediate_size)
            continue
        normal(f"{prefix}.mlp.gate.weight", size.num_experts, size.hidden_size)
        normal(f"{prefix}.mlp.gate.expert_bias", size.num_experts, std=0.01)
        for expert in range(size.num_experts):
            mlp(f"{prefix}.mlp.experts.{expert}", size.expert_intermediate_size)
        mlp(f"{prefix}.mlp.shared_experts", size.expert_intermediate_size)
    weights["model.norm.weight"] = torch.ones(size.hidden_size)
    normal("lm_head.weight", VOCAB_SIZE, size.hidden_size)
    return weights
