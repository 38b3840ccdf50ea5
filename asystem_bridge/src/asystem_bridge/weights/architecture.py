"""What a checkpoint's ``config.json`` says about the model, in one form for all families.

Families: Llama, Qwen3, Qwen3-MoE and BailingMoeV2 (Ring and Ling).  What the trainer would not
compute exactly as the engine does (position scaling, sliding windows, biases, ...) is refused here,
before anything is loaded.  Left out: quantized checkpoints, multi-token-prediction layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from asystem_bridge.errors import ModelError

Family = Literal["llama", "qwen3", "qwen3_moe", "bailing_moe_v2"]
FAMILY_OF_ARCHITECTURE: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "BailingMoeV2ForCausalLM": "bailing_moe_v2",
}


@dataclass(frozen=True, kw_only=True)
class MoeArchitecture:
    """The mixture-of-experts part.

    Attributes:
        num_experts, experts_per_token: routed experts, and how many each token goes to.
        expert_ffn_size: inner size of one routed expert.
        shared_ffn_size: inner size of the experts that every token goes to, together; 0 = none.
        num_dense_layers: layers at the start that have an ordinary MLP.
        score_function: of the router's logits.
        normalize_weights: the weights of a token's experts are made to sum to 1.
        has_expert_bias: a per-expert bias takes part in the choice, not in the weight.
        num_groups, groups_per_token: experts are chosen within the best groups; 1, 1 = no groups.
        weight_scale: factor on the weights.
    """

    num_experts: int
    experts_per_token: int
    expert_ffn_size: int
    shared_ffn_size: int = 0
    num_dense_layers: int = 0
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalize_weights: bool = True
    has_expert_bias: bool = False
    num_groups: int = 1
    groups_per_token: int = 1
    weight_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes and switches of a decoder-only model with rotary positions, RMSNorm and SwiGLU.

    Attributes:
        num_key_value_heads: divides ``num_attention_heads`` (grouped-query attention).
        ffn_size: inner size of the dense MLP.
        rotary_fraction: share of ``head_dim`` that is rotated.
        qk_norm: an RMSNorm on every query and key head.
        moe: ``None`` for a dense model.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    ffn_size: int
    rms_norm_eps: float
    rope_theta: float
    rotary_fraction: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qk_norm: bool
    moe: MoeArchitecture | None = None

    @classmethod
    def from_checkpoint(cls, directory: Path) -> Architecture:
        """Read ``config.json`` of a checkpoint folder.

        Raises:
            ModelError: the file is missing or the model is not supported exactly.
        """
        path = directory / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise ModelError(
                f"{path} does not exist: a checkpoint folder holds config.json, the tokenizer and "
                "safetensors files"
            ) from None
        except json.JSONDecodeError as error:
            raise ModelError(f"{path} is not JSON: {error}") from None
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Architecture:
        """The same from the parsed ``config.json``."""
        names = config.get("architectures") or []
        if len(names) != 1 or names[0] not in FAMILY_OF_ARCHITECTURE:
            raise ModelError(
                f"architectures = {names}: supported is one of {sorted(FAMILY_OF_ARCHITECTURE)}"
            )
        family = FAMILY_OF_ARCHITECTURE[names[0]]
        _refuse_what_differs(config)
        rope = _rope(config)
        heads = _required(config, "num_attention_heads")
        hidden_size = _required(config, "hidden_size")
        moe: MoeArchitecture | None = None
        if family == "qwen3_moe":
            moe = _qwen3_moe(config)
        elif family == "bailing_moe_v2":
            moe = _bailing_moe(config)
        architecture = cls(
            family=family,
            vocab_size=_required(config, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=_required(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden_size // heads,
            ffn_size=_required(config, "intermediate_size"),
            rms_norm_eps=_required(config, "rms_norm_eps"),
            rope_theta=float(rope["rope_theta"]),
            rotary_fraction=float(rope.get("partial_rotary_factor", 1.0)),
            max_position_embeddings=_required(config, "max_position_embeddings"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qk_norm=family != "llama",
            moe=moe,
        )
        architecture._check()
        return architecture

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number ``layer`` (from 0) has experts."""
        return self.moe is not None and layer >= self.moe.num_dense_layers

    def check_tensor_parallel(self, tp_size: int) -> None:
        """Refuse a tensor-parallel size that does not divide what it has to.

        Raises:
            ModelError: names the sizes.
        """
        divided = {
            "vocab_size": self.vocab_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "intermediate_size": self.ffn_size,
        }
        if self.moe is not None:
            divided["moe_intermediate_size"] = self.moe.expert_ffn_size
            divided["the shared experts' intermediate size"] = self.moe.shared_ffn_size
        wrong = {name: size for name, size in divided.items() if size % tp_size}
        if wrong:
            raise ModelError(
                f"tensor parallel size {tp_size}: does not divide "
                + ", ".join(f"{name} = {size}" for name, size in wrong.items())
            )

    def _check(self) -> None:
        if self.moe is not None and self.moe.experts_per_token < 2:
            raise ModelError(
                f"num_experts_per_tok = {self.moe.experts_per_token}: must be at least 2, since "
                "Megatron-core and the engines weight a single expert differently"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"num_attention_heads = {self.num_attention_heads}, num_key_value_heads = "
                f"{self.num_key_value_heads}: the second must divide the first"
            )
        rotated = self.head_dim * self.rotary_fraction
        if rotated != int(rotated) or int(rotated) % 2:
            raise ModelError(
                f"head_dim = {self.head_dim}, partial_rotary_factor = {self.rotary_fraction}: "
                f"{rotated} dimensions would be rotated, it must be an even number"
            )


def _required(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise ModelError(f"config.json has no {name}")
    return config[name]


def _refuse_what_differs(config: Mapping[str, Any]) -> None:
    """Refuse every setting whose mathematics the trainer does not have."""
    allowed: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "use_bias": (False, None),
        "use_qkv_bias": (False, None),
        "use_sliding_window": (False, None),
        "pretraining_tp": (1, None),
        "quantization_config": (None,),
        "num_nextn_predict_layers": (0, None),
        "norm_head": (False, None),
        "use_rmsnorm": (True, None),
        "attention_dropout": (0, 0.0, None),
    }
    wrong = [
        f"{name} = {config[name]!r} (supported: {values[0]!r})"
        for name, values in allowed.items()
        if name in config and config[name] not in values
    ]
    unusual_layers = set(config.get("layer_types") or ()) - {"full_attention"}
    if unusual_layers:
        wrong.append(f"layer_types has {sorted(unusual_layers)} (supported: full_attention)")
    if wrong:
        raise ModelError("the trainer would not compute this model exactly: " + "; ".join(wrong))


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``partial_rotary_factor``, wherever this config keeps them."""
    rope = dict(config.get("rope_parameters") or {})
    rope_type = rope.get("rope_type") or "default"
    scaling = config.get("rope_scaling") or {}
    scaling_type = scaling.get("rope_type") or scaling.get("type") or "default"
    for kind in (rope_type, scaling_type):
        if kind != "default":
            raise ModelError(f"rope type {kind!r}: supported is 'default' (no position scaling)")
    for name in ("rope_theta", "partial_rotary_factor"):
        if name not in rope and config.get(name) is not None:
            rope[name] = config[name]
    if "rope_theta" not in rope:
        raise ModelError("config.json has no rope_theta, neither at the top nor in rope_parameters")
    rotary_dim = config.get("rotary_dim")
    if rotary_dim is not None:
        rope["partial_rotary_factor"] = rotary_dim / _required(config, "head_dim")
    return rope


def _qwen3_moe(config: Mapping[str, Any]) -> MoeArchitecture:
    for name, values in {"decoder_sparse_step": (1, None), "mlp_only_layers": ([], None)}.items():
        if config.get(name) not in values:
            raise ModelError(f"{name} = {config[name]!r}: supported is {values[0]!r}")
    return MoeArchitecture(
        num_experts=config.get("num_experts") or _required(config, "num_local_experts"),
        experts_per_token=_required(config, "num_experts_per_tok"),
        expert_ffn_size=_required(config, "moe_intermediate_size"),
        normalize_weights=bool(config.get("norm_topk_prob", False)),
    )


def _bailing_moe(config: Mapping[str, Any]) -> MoeArchitecture:
    for name, value in {
        "score_function": "sigmoid",
        "norm_topk_prob": True,
        "moe_router_enable_expert_bias": True,
        "use_qk_norm": True,
        "router_dtype": "fp32",
    }.items():
        if config.get(name) != value:
            raise ModelError(f"{name} = {config.get(name)!r}: supported is {value!r}")
    expert_ffn_size = _required(config, "moe_intermediate_size")
    shared_size = config.get("moe_shared_expert_intermediate_size") or expert_ffn_size
    experts_per_token = _required(config, "num_experts_per_tok")
    num_groups = config.get("n_group") or 1
    groups_per_token = config.get("topk_group") or 1
    # A group's score is the sum of its best topk / topk_group experts in Megatron-core and of its
    # best two in the engines.
    if num_groups > 1 and experts_per_token != 2 * groups_per_token:
        raise ModelError(
            f"num_experts_per_tok = {experts_per_token}, topk_group = {groups_per_token}: the "
            "first must be twice the second, or trainer and engine choose different groups"
        )
    return MoeArchitecture(
        num_experts=_required(config, "num_experts"),
        experts_per_token=experts_per_token,
        expert_ffn_size=expert_ffn_size,
        shared_ffn_size=shared_size * (config.get("num_shared_experts") or 0),
        num_dense_layers=config.get("first_k_dense_replace") or 0,
        score_function="sigmoid",
        has_expert_bias=True,
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        weight_scale=float(config.get("routed_scaling_factor") or 1.0),
    )
