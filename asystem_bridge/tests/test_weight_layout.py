"""The weight map against Megatron's layout rules written out with torch on whole tensors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import TINY_CONFIGS, random_tensors

from asystem_bridge.errors import ModelError
from asystem_bridge.weights.architecture import Architecture
from asystem_bridge.weights.layout import Shard, hf_tensor_shapes, parameter_boxes

FAMILIES = sorted(TINY_CONFIGS)


def megatron_parameters(
    arch: Architecture, hf: dict[str, torch.Tensor], rank: int, tp: int
) -> dict[str, torch.Tensor]:
    """Naive reference: what rank ``rank`` of ``tp`` holds, by cutting and joining whole tensors."""
    bailing = arch.family == "bailing_moe_v2"

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(tp, dim=0)[rank]

    def columns(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(tp, dim=1)[rank]

    def mlp(megatron: str, name: str) -> dict[str, torch.Tensor]:
        gate, up = hf[name + "gate_proj.weight"], hf[name + "up_proj.weight"]
        return {
            megatron + "linear_fc1.weight": torch.cat([rows(gate), rows(up)]),
            megatron + "linear_fc2.weight": columns(hf[name + "down_proj.weight"]),
        }

    embedding = "model.word_embeddings.weight" if bailing else "model.embed_tokens.weight"
    out = {
        "embedding.word_embeddings.weight": rows(hf[embedding]),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if not arch.tie_word_embeddings:
        out["output_layer.weight"] = rows(hf["lm_head.weight"])
    groups, head = arch.num_key_value_heads, arch.head_dim
    for i in range(arch.num_layers):
        m, p = f"decoder.layers.{i}.", f"model.layers.{i}."
        out[m + "input_layernorm.weight"] = hf[p + "input_layernorm.weight"]
        out[m + "pre_mlp_layernorm.weight"] = hf[p + "post_attention_layernorm.weight"]
        attention = p + ("attention." if bailing else "self_attn.")
        if bailing:
            key_rows = groups * head
            sizes = [arch.num_attention_heads * head, key_rows, key_rows]
            q, k, v = hf[attention + "query_key_value.weight"].split(sizes)
        else:
            q, k, v = (hf[f"{attention}{x}_proj.weight"] for x in "qkv")
        by_group = [x.reshape(groups, -1, arch.hidden_size) for x in (q, k, v)]
        interleaved = torch.cat(by_group, dim=1).reshape(-1, arch.hidden_size)
        out[m + "self_attention.linear_qkv.weight"] = rows(interleaved)
        out[m + "self_attention.linear_proj.weight"] = columns(
            hf[attention + ("dense.weight" if bailing else "o_proj.weight")]
        )
        if arch.qk_norm:
            for x, long in (("q", "query"), ("k", "key")):
                out[m + f"self_attention.{x}_layernorm.weight"] = hf[
                    attention + (f"{long}_layernorm.weight" if bailing else f"{x}_norm.weight")
                ]
        if arch.moe is None or i < arch.moe.num_dense_layers:
            out.update(mlp(m + "mlp.", p + "mlp."))
            continue
        out[m + "mlp.router.weight"] = hf[p + "mlp.gate.weight"]
        if bailing:
            out[m + "mlp.router.expert_bias"] = hf[p + "mlp.gate.expert_bias"]
            out.update(mlp(m + "mlp.shared_experts.", p + "mlp.shared_experts."))
        for e in range(arch.moe.num_experts):
            out.update(mlp(m + f"mlp.experts.local_experts.{e}.", p + f"mlp.experts.{e}."))
    return out


def check_map(arch: Architecture, tp: int) -> None:
    """Both directions for all ranks: loading gives the reference, publishing gives all back."""
    hf = random_tensors(arch, seed=0)
    published = {name: torch.full_like(tensor, torch.nan) for name, tensor in hf.items()}
    writes = {name: torch.zeros(tensor.shape) for name, tensor in hf.items()}
    for rank in range(tp):
        for name, expected in megatron_parameters(arch, hf, rank, tp).items():
            local = torch.full_like(expected, torch.nan)
            shard = Shard(tp_rank=rank, tp_size=tp)
            for box in parameter_boxes(arch, name, expected.shape, shard):
                local[box.local_slices] = hf[box.hf_name][box.hf_slices]
                published[box.hf_name][box.hf_slices] = expected[box.local_slices]
                writes[box.hf_name][box.hf_slices] += 1
            assert torch.equal(local, expected), f"{name} on rank {rank} of {tp}"
    replicated = ("norm.weight", "layernorm.weight", "mlp.gate.weight", "expert_bias")
    for name, tensor in hf.items():
        assert torch.equal(published[name], tensor), name
        times = tp if name.endswith(replicated) else 1
        assert bool((writes[name] == times).all()), f"{name} is not written {times} times"


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_map_equals_whole_tensor_reference(family: str, tp: int) -> None:
    check_map(Architecture.from_config(TINY_CONFIGS[family]), tp)


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    tp=st.sampled_from([1, 2, 4]),
    groups=st.integers(1, 3),
    queries_per_group=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8]),
    ffn=st.integers(1, 3),
    vocab=st.integers(1, 3),
    hidden=st.integers(1, 5),
    tied=st.booleans(),
)
def test_every_element_is_covered_once(
    family: str,
    tp: int,
    groups: int,
    queries_per_group: int,
    head_dim: int,
    ffn: int,
    vocab: int,
    hidden: int,
    tied: bool,
) -> None:
    config = dict(
        TINY_CONFIGS[family],
        num_hidden_layers=2,
        num_key_value_heads=groups * tp,
        num_attention_heads=groups * tp * queries_per_group,
        head_dim=head_dim,
        intermediate_size=ffn * tp,
        moe_intermediate_size=ffn * tp,
        moe_shared_expert_intermediate_size=ffn * tp,
        vocab_size=vocab * tp,
        hidden_size=hidden,
        tie_word_embeddings=tied,
    )
    if "num_experts" in config:
        config["num_experts"] = 4
    check_map(Architecture.from_config(config), tp)


def test_transformer_engine_names() -> None:
    """The GPU layer spec puts norms into the linear layers and experts into one grouped module."""
    arch = Architecture.from_config(TINY_CONFIGS["bailing_moe_v2"])
    shard = Shard(tp_rank=1, tp_size=2)
    layer = "decoder.layers.2."
    for grouped, local, shape in [
        (
            "mlp.experts.linear_fc1.weight5",
            "mlp.experts.local_experts.5.linear_fc1.weight",
            (32, 64),
        ),
        (
            "mlp.experts.linear_fc2.weight5",
            "mlp.experts.local_experts.5.linear_fc2.weight",
            (64, 16),
        ),
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", (64,)),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight", (64,)),
    ]:
        boxes = parameter_boxes(arch, layer + grouped, shape, shard)
        assert boxes == parameter_boxes(arch, layer + local, shape, shard)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_hf_tensors_are_those_of_transformers(family: str) -> None:
    """Names and shapes that transformers itself writes for the same sizes."""
    import transformers

    names = {"llama": "Llama", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}
    config = getattr(transformers, names[family] + "Config")(
        **{
            k: v
            for k, v in TINY_CONFIGS[family].items()
            if k not in ("architectures", "model_type")
        }
    )
    with torch.device("meta"):
        model = getattr(transformers, names[family] + "ForCausalLM")(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    ours = hf_tensor_shapes(Architecture.from_config(TINY_CONFIGS[family]))
    if family == "qwen3_moe":  # in memory transformers stacks the experts; on disk they are apart
        expected = {name: shape for name, shape in expected.items() if ".experts." not in name}
        ours = {name: shape for name, shape in ours.items() if ".experts." not in name}
    assert ours == expected


def test_unknown_parameter_and_wrong_shape() -> None:
    arch = Architecture.from_config(TINY_CONFIGS["qwen3"])
    with pytest.raises(ModelError, match=r"linear_qkv\.bias: has no counterpart"):
        parameter_boxes(arch, "decoder.layers.0.self_attention.linear_qkv.bias", (128,), Shard())
    with pytest.raises(
        ModelError, match=r"linear_qkv\.weight: the parameter has shape \(200, 64\)"
    ):
        parameter_boxes(
            arch, "decoder.layers.0.self_attention.linear_qkv.weight", (200, 64), Shard()
        )


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, r"architectures = \['GPT2LMHeadModel'\]"),
        ("llama", {"attention_bias": True}, r"attention_bias = True \(supported: False\)"),
        ("llama", {"mlp_bias": True}, r"mlp_bias = True"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act = 'gelu' \(supported: 'silu'\)"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, r"quantization_config"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, r"rope type 'llama3'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, r"rope type 'yarn'"),
        ("llama", {"rope_theta": None}, r"no rope_theta"),
        ("llama", {"num_key_value_heads": 3}, r"num_key_value_heads = 3: the second must divide"),
        ("llama", {"vocab_size": None}, r"config\.json has no vocab_size"),
        ("qwen3", {"use_sliding_window": True}, r"use_sliding_window = True"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"]},
            r"layer_types has \['sliding_attention'\]",
        ),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, r"decoder_sparse_step = 2"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, r"num_experts_per_tok = 1: must be at least 2"),
        ("bailing_moe_v2", {"score_function": "softmax"}, r"score_function = 'softmax'"),
        ("bailing_moe_v2", {"topk_group": 1}, r"topk_group = 1: the first must be twice"),
        ("bailing_moe_v2", {"num_nextn_predict_layers": 1}, r"num_nextn_predict_layers = 1"),
        ("bailing_moe_v2", {"partial_rotary_factor": 0.1}, r"partial_rotary_factor = 0\.1"),
    ],
)
def test_unsupported_settings_are_refused(
    family: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        Architecture.from_config({**TINY_CONFIGS[family], **change})


def test_rope_settings_of_both_transformers_versions() -> None:
    old = Architecture.from_config(TINY_CONFIGS["bailing_moe_v2"])
    config = dict(TINY_CONFIGS["bailing_moe_v2"])
    rope = {
        "rope_type": "default",
        "rope_theta": config.pop("rope_theta"),
        "partial_rotary_factor": config.pop("partial_rotary_factor"),
    }
    assert Architecture.from_config({**config, "rope_parameters": rope}) == old
    assert (old.rope_theta, old.rotary_fraction) == (10000.0, 0.5)


def test_tensor_parallel_sizes_that_do_not_divide() -> None:
    arch = Architecture.from_config(TINY_CONFIGS["qwen3_moe"])
    arch.check_tensor_parallel(2)
    with pytest.raises(ModelError, match=r"size 4: does not divide num_key_value_heads = 2"):
        arch.check_tensor_parallel(4)


def test_missing_and_broken_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        Architecture.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        Architecture.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIGS["llama"]))
    assert Architecture.from_checkpoint(tmp_path).head_dim == 16


def test_boxes_of_one_parameter_do_not_overlap() -> None:
    arch = Architecture.from_config(TINY_CONFIGS["bailing_moe_v2"])
    boxes = parameter_boxes(
        arch, "decoder.layers.1.self_attention.linear_qkv.weight", (256, 64), Shard()
    )
    assert sum(box.numel for box in boxes) == 256 * 64
    for one, other in itertools.combinations(boxes, 2):
        first = sorted([(one.local_start[0], one.size[0]), (other.local_start[0], other.size[0])])
        assert first[0][0] + first[0][1] <= first[1][0]
