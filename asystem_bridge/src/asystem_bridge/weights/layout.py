"""Where each element of a Megatron parameter lies in the Hugging Face tensors.

One map for both directions: loading reads these boxes, publishing writes them.  It is pure: names,
shapes and integers only.

A parameter is named as in Megatron-core's GPTModel with the layer and expert numbers of the whole
model; whoever splits layers or experts over processes translates its local numbers first.  What a
process holds of it is given by ``Shard``.  Both of Megatron-core's layer specs are covered: the
local one, and TransformerEngine's with its norms inside the linear layers and grouped experts.

How Megatron-core lays out what Hugging Face keeps apart, rows first:

* ``linear_qkv``: for each key-value head its query heads, its key head, its value head;
* ``linear_fc1``: this rank's rows of the gate, then this rank's rows of the up projection;
* column-parallel layers and the vocabulary are split by rows, row-parallel layers by columns;
  norms, the router and its bias are replicated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from asystem_bridge.errors import ModelError
from asystem_bridge.weights.architecture import Architecture

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """``hf[hf_start : hf_start + size] == local[local_start : local_start + size]``, per axis."""

    hf_name: str
    hf_start: Shape
    local_start: Shape
    size: Shape

    @property
    def hf_slices(self) -> tuple[slice, ...]:
        return _slices(self.hf_start, self.size)

    @property
    def local_slices(self) -> tuple[slice, ...]:
        return _slices(self.local_start, self.size)

    @property
    def numel(self) -> int:
        return math.prod(self.size)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Which part of a tensor-parallel group this process is (experts are split the same way)."""

    tp_rank: int = 0
    tp_size: int = 1


def _slices(start: Shape, size: Shape) -> tuple[slice, ...]:
    return tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))


def parameter_boxes(
    architecture: Architecture, name: str, local_shape: Sequence[int], shard: Shard
) -> list[Box]:
    """The boxes that together make up one local parameter.

    Args:
        architecture: of the checkpoint.
        name: Megatron's name with global layer and expert numbers, e.g.
            ``decoder.layers.3.self_attention.linear_qkv.weight``.
        local_shape: of the parameter in this process.
        shard: which part that is.

    Raises:
        ModelError: the name is unknown, or the boxes do not fill ``local_shape`` exactly.
    """
    shape = tuple(local_shape)
    boxes = _Map(architecture, shard).boxes(name, shape)
    if sum(box.numel for box in boxes) != math.prod(shape) or any(
        start + n > extent
        for box in boxes
        for start, n, extent in zip(box.local_start, box.size, shape, strict=True)
    ):
        raise ModelError(
            f"{name}: the parameter has shape {shape}, the checkpoint's architecture gives it "
            f"{[box.size for box in boxes]} with tensor parallel size {shard.tp_size}"
        )
    return boxes


def hf_tensor_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Name and shape of every Hugging Face tensor of the model, in a fixed order."""
    arch = architecture
    names = _Names(arch)
    hidden = arch.hidden_size
    shapes: dict[str, Shape] = {names.embedding: (arch.vocab_size, hidden)}

    def mlp(prefix: str, ffn_size: int) -> None:
        shapes[prefix + "gate_proj.weight"] = (ffn_size, hidden)
        shapes[prefix + "up_proj.weight"] = (ffn_size, hidden)
        shapes[prefix + "down_proj.weight"] = (hidden, ffn_size)

    query_size = arch.num_attention_heads * arch.head_dim
    key_size = arch.num_key_value_heads * arch.head_dim
    for layer in range(arch.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        if arch.family == "bailing_moe_v2":
            shapes[prefix + names.qkv[0]] = (query_size + 2 * key_size, hidden)
        else:
            for part, size in zip(names.qkv, (query_size, key_size, key_size), strict=True):
                shapes[prefix + part] = (size, hidden)
        shapes[prefix + names.attention_output] = (hidden, query_size)
        if arch.qk_norm:
            shapes[prefix + names.query_norm] = (arch.head_dim,)
            shapes[prefix + names.key_norm] = (arch.head_dim,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if arch.moe is None or not arch.is_moe_layer(layer):
            mlp(prefix + "mlp.", arch.ffn_size)
            continue
        shapes[prefix + "mlp.gate.weight"] = (arch.moe.num_experts, hidden)
        if arch.moe.has_expert_bias:
            shapes[prefix + "mlp.gate.expert_bias"] = (arch.moe.num_experts,)
        for expert in range(arch.moe.num_experts):
            mlp(f"{prefix}mlp.experts.{expert}.", arch.moe.expert_ffn_size)
        if arch.moe.shared_ffn_size:
            mlp(prefix + "mlp.shared_experts.", arch.moe.shared_ffn_size)
    shapes["model.norm.weight"] = (hidden,)
    if not arch.tie_word_embeddings:
        shapes["lm_head.weight"] = (arch.vocab_size, hidden)
    return shapes


class _Names:
    """The Hugging Face names that differ between families."""

    def __init__(self, architecture: Architecture) -> None:
        bailing = architecture.family == "bailing_moe_v2"
        self.embedding = f"model.{'word_embeddings' if bailing else 'embed_tokens'}.weight"
        self.qkv = (
            ("attention.query_key_value.weight",)
            if bailing
            else tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
        )
        self.attention_output = "attention.dense.weight" if bailing else "self_attn.o_proj.weight"
        self.query_norm = (
            "attention.query_layernorm.weight" if bailing else "self_attn.q_norm.weight"
        )
        self.key_norm = "attention.key_layernorm.weight" if bailing else "self_attn.k_norm.weight"


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Local spec: mlp.experts.local_experts.7.linear_fc1.weight; TransformerEngine's grouped experts:
# mlp.experts.linear_fc1.weight7.
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")


class _Map:
    """The map for one architecture and one shard."""

    def __init__(self, architecture: Architecture, shard: Shard) -> None:
        self.arch = architecture
        self.names = _Names(architecture)
        self.rank = shard.tp_rank

    def boxes(self, name: str, shape: Shape) -> list[Box]:
        if name == "embedding.word_embeddings.weight":
            return [self._rows(self.names.embedding, shape)]
        if name == "output_layer.weight":
            return [self._rows("lm_head.weight", shape)]
        if name == "decoder.final_layernorm.weight":
            return [self._whole("model.norm.weight", shape)]
        match = _LAYER.fullmatch(name)
        boxes = self._in_layer(f"model.layers.{match[1]}.", match[2], shape) if match else None
        if boxes is None:
            raise ModelError(
                f"Megatron parameter {name}: has no counterpart in a {self.arch.family} checkpoint"
            )
        return boxes

    def _in_layer(self, layer: str, name: str, shape: Shape) -> list[Box] | None:
        replicated = {
            "input_layernorm.weight": "input_layernorm.weight",
            "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
            "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
            "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
            "self_attention.q_layernorm.weight": self.names.query_norm,
            "self_attention.k_layernorm.weight": self.names.key_norm,
            "mlp.router.weight": "mlp.gate.weight",
            "mlp.router.expert_bias": "mlp.gate.expert_bias",
        }
        if name in replicated:
            return [self._whole(layer + replicated[name], shape)]
        if name == "self_attention.linear_qkv.weight":
            return self._qkv(layer, shape)
        if name == "self_attention.linear_proj.weight":
            return [self._columns(layer + self.names.attention_output, shape)]
        if match := _EXPERT.fullmatch(name):
            return self._mlp(f"{layer}mlp.experts.{match[1]}.", match[2], shape)
        if match := _GROUPED_EXPERT.fullmatch(name):
            return self._mlp(f"{layer}mlp.experts.{match[2]}.", match[1], shape)
        for prefix in ("mlp.", "mlp.shared_experts."):
            for linear in ("linear_fc1", "linear_fc2"):
                if name == f"{prefix}{linear}.weight":
                    return self._mlp(layer + prefix, linear, shape)
        return None

    def _whole(self, hf_name: str, shape: Shape) -> Box:
        origin = (0,) * len(shape)
        return Box(hf_name, origin, origin, shape)

    def _rows(self, hf_name: str, shape: Shape) -> Box:
        return Box(hf_name, (self.rank * shape[0], 0), (0, 0), shape)

    def _columns(self, hf_name: str, shape: Shape) -> Box:
        return Box(hf_name, (0, self.rank * shape[1]), (0, 0), shape)

    def _mlp(self, prefix: str, linear: str, shape: Shape) -> list[Box]:
        if linear == "linear_fc2":
            return [self._columns(prefix + "down_proj.weight", shape)]
        half = (shape[0] // 2, shape[1])
        gate = self._rows(prefix + "gate_proj.weight", half)
        up = self._rows(prefix + "up_proj.weight", half)
        return [gate, Box(up.hf_name, up.hf_start, (half[0], 0), half)]

    def _qkv(self, layer: str, shape: Shape) -> list[Box]:
        arch = self.arch
        head, hidden = arch.head_dim, shape[1]
        queries = arch.num_attention_heads // arch.num_key_value_heads * head  # rows per group
        group_rows = queries + 2 * head
        # First rows of queries, keys and values in their Hugging Face tensors.
        if len(self.names.qkv) == 1:
            query_name = key_name = value_name = layer + self.names.qkv[0]
            key_base = arch.num_attention_heads * head
            value_base = key_base + arch.num_key_value_heads * head
        else:
            query_name, key_name, value_name = (layer + name for name in self.names.qkv)
            key_base = value_base = 0
        local_groups = shape[0] // group_rows
        boxes = []
        for local_group in range(local_groups):
            group = self.rank * local_groups + local_group
            row = local_group * group_rows
            boxes += [
                Box(query_name, (group * queries, 0), (row, 0), (queries, hidden)),
                Box(key_name, (key_base + group * head, 0), (row + queries, 0), (head, hidden)),
                Box(
                    value_name,
                    (value_base + group * head, 0),
                    (row + queries + head, 0),
                    (head, hidden),
                ),
            ]
        return boxes
