"""Random tiny checkpoints of the four families, written as Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from asystem_bridge.weights.architecture import Architecture
from asystem_bridge.weights.layout import hf_tensor_shapes

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 3,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "float32",
}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    # Llama with tied embeddings and a key-value head for every query head; head_dim left out.
    "llama": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "head_dim": None,
    },
    "qwen3": {**_COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3_moe": {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "bailing_moe_v2": {
        **_COMMON,
        "architectures": ["BailingMoeV2ForCausalLM"],
        "model_type": "bailing_moe",
        "num_hidden_layers": 3,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "num_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "norm_topk_prob": True,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": True,
        "use_rmsnorm": True,
        "use_bias": False,
        "use_qkv_bias": False,
        "router_dtype": "fp32",
        "norm_head": False,
        "num_nextn_predict_layers": 0,
        "embedding_dropout": 0.0,
        "attention_dropout": 0.0,
        "output_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "rope_scaling": None,
        "auto_map": {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"},
    },
}

_BAILING_CONFIG_CODE = """\
from transformers.configuration_utils import PretrainedConfig


class BailingMoeV2Config(PretrainedConfig):
    model_type = "bailing_moe"
"""


def random_tensors(architecture: Architecture, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor at a scale where all parts of the model show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in hf_tensor_shapes(architecture).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("expert_bias"):
            tensors[name] = noise * 0.1
        elif len(shape) == 1:
            tensors[name] = 1 + noise * 0.1
        else:
            tensors[name] = noise * 0.08
    return tensors


def write_tiny_checkpoint(directory: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Write ``config.json`` (with ``changes``) and random weights; no tokenizer."""
    config = {**TINY_CONFIGS[family], **changes}
    architecture = Architecture.from_config(config)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if family == "bailing_moe_v2":
        (directory / "configuration_bailing_moe_v2.py").write_text(_BAILING_CONFIG_CODE)
    tensors = random_tensors(architecture, seed)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
