"""The trainer's model: a Megatron-core GPTModel made from a Hugging Face checkpoint.

Everything here runs inside ``torch.distributed`` and, on a machine without CUDA, inside
``megatron_c3po.cpu_megatron.cpu_megatron()``.  Float32, data and tensor parallel.  Left out:
pipeline, expert and context parallelism, lower precisions.

Shapes: T tokens of a packed row, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from asystem_bridge.errors import ConfigError, ModelError
from asystem_bridge.weights.architecture import Architecture, MoeArchitecture
from asystem_bridge.weights.hf_checkpoint import HfCheckpoint
from asystem_bridge.weights.layout import Box, Shard, hf_tensor_shapes, parameter_boxes
from megatron_c3po.thd_attention import ThdSdpaAttention


def initialize_parallel(*, tensor_parallel_size: int, seed: int) -> None:
    """Make Megatron's process groups and seed its random streams.

    ``torch.distributed.init_process_group`` comes before.  The processes that tensor parallelism
    leaves over are data parallel.

    Raises:
        ConfigError: the world size is no multiple of the tensor-parallel size.
    """
    world_size = torch.distributed.get_world_size()
    if tensor_parallel_size < 1 or world_size % tensor_parallel_size:
        raise ConfigError(
            f"tensor parallel size {tensor_parallel_size} with {world_size} trainer processes: "
            "it must be at least 1 and divide their number"
        )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel_size)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def destroy_parallel() -> None:
    """Undo ``initialize_parallel`` and ``init_process_group``."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def build_model(architecture: Architecture, *, tensor_parallel_size: int = 1) -> GPTModel:
    """This process's part of the model, in float32.  ``load_weights`` gives it its values.

    With experts and tensor parallelism Megatron-core asks for sequence parallelism: the number of
    tokens of a row must then be a multiple of ``tensor_parallel_size``
    (``model.config.sequence_parallel`` tells).

    Raises:
        ModelError: the sizes cannot be split over ``tensor_parallel_size`` processes.
    """
    architecture.check_tensor_parallel(tensor_parallel_size)
    use_transformer_engine = (
        torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    )
    config = _transformer_config(architecture, tensor_parallel_size, use_transformer_engine)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine, normalization="RMSNorm")
    if not use_transformer_engine:
        _use_torch_modules(spec, architecture.qk_norm)
    return GPTModel(
        config,
        spec,
        vocab_size=architecture.vocab_size,
        max_sequence_length=architecture.max_position_embeddings,
        position_embedding_type="rope",
        rotary_percent=architecture.rotary_fraction,
        rotary_base=architecture.rope_theta,
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
    )


def local_boxes(
    model: GPTModel, architecture: Architecture
) -> Iterator[tuple[torch.Tensor, list[Box]]]:
    """Every parameter (and router bias) of this process with its boxes in the HF tensors.

    The tensors are the live ones: writing to them changes the model.

    Raises:
        ModelError: the model has a parameter that the map does not know.
    """
    for name, tensor in _named_weights(model):
        yield tensor, parameter_boxes(architecture, name, tensor.shape, _shard())


@torch.no_grad()
def load_weights(model: GPTModel, architecture: Architecture, checkpoint_dir: Path) -> None:
    """Copy this process's part of a checkpoint into the model, converted to float32.

    Raises:
        ModelError: tensors are missing, superfluous or of the wrong shape (all are named).
    """
    checkpoint = HfCheckpoint(checkpoint_dir)
    _check_tensors(checkpoint, architecture)
    for tensor, boxes in local_boxes(model, architecture):
        for box in boxes:
            piece = checkpoint.read(box.hf_name, box.hf_start, box.size)
            tensor[box.local_slices].copy_(piece)


def packed_sequences(lengths: Sequence[int]) -> PackedSeqParams:
    """Tell attention and rotary positions where the sequences of a packed row begin and end.

    Args:
        lengths: tokens of each sequence, in order; together they are the whole row (a padding
            tail is one more sequence).
    """
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if torch.cuda.is_available():
        bounds = bounds.cuda()
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


@torch.no_grad()
def packed_logits(model: GPTModel, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of all sequences from one packed forward pass, gathered over tensor parallelism.

    Every process of the tensor-parallel group must call it.

    Returns:
        (T, V) in float32, without padding.
    """
    lengths = [len(sequence) for sequence in sequences]
    num_tokens = sum(lengths)
    tokens = [token for sequence in sequences for token in sequence]
    if padding := -num_tokens % model.config.tensor_model_parallel_size:
        tokens += [0] * padding
        lengths.append(padding)
    device = next(model.parameters()).device
    positions = torch.cat([torch.arange(length) for length in lengths])
    was_training = model.training
    model.eval()
    logits: torch.Tensor = model(
        torch.tensor([tokens], device=device),
        positions[None].to(device),
        None,
        packed_seq_params=packed_sequences(lengths),
    )
    model.train(was_training)
    gathered: torch.Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
    return gathered[0, :num_tokens].float()


class RmsNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as a Megatron layer norm.

    Megatron-core 0.16's own wrapper refuses sequence parallelism.  The mark on the weight has its
    gradient summed over the tensor-parallel group, each process having seen its part of the row.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


def _use_torch_modules(spec: TransformerBlockSubmodules, qk_norm: bool) -> None:
    """Give the local layer spec packed attention and a norm that allows sequence parallelism."""
    spec.layer_norm = RmsNorm
    for layer in spec.layer_specs:
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = ThdSdpaAttention
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RmsNorm
        if qk_norm:
            attention.q_layernorm = attention.k_layernorm = RmsNorm


def _transformer_config(
    architecture: Architecture, tensor_parallel_size: int, use_transformer_engine: bool
) -> TransformerConfig:
    moe = architecture.moe
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn_size,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        # Needed here and in the layer spec (which reads it from here): without this one the norms'
        # gradients are not summed over the tensor-parallel group, and the ranks drift apart.
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor_parallel_size,
        sequence_parallel=moe is not None and tensor_parallel_size > 1,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # load_weights fills every parameter
        calculate_per_token_loss=True,
        # Fused kernels need CUDA, or compile for longer than a CPU run lasts.
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        **({} if moe is None else _moe_options(architecture, moe, use_transformer_engine)),
    )


def _moe_options(
    architecture: Architecture, moe: MoeArchitecture, use_transformer_engine: bool
) -> dict[str, object]:
    grouped = moe.num_groups > 1
    return {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [
            int(architecture.is_moe_layer(i)) for i in range(architecture.num_layers)
        ],
        "moe_ffn_hidden_size": moe.expert_ffn_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_size or None,
        "moe_router_topk": moe.experts_per_token,
        "moe_router_score_function": moe.score_function,
        # softmax over the chosen logits = softmax over all, chosen, made to sum to 1
        "moe_router_pre_softmax": moe.score_function == "softmax" and not moe.normalize_weights,
        "moe_router_num_groups": moe.num_groups if grouped else None,
        "moe_router_group_topk": moe.groups_per_token if grouped else None,
        "moe_router_topk_scaling_factor": moe.weight_scale,
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": moe.has_expert_bias,
        # The bias balances experts in pre-training; the loop trains by gradients alone.
        "moe_router_bias_update_rate": 0.0,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": use_transformer_engine,
    }


def _shard() -> Shard:
    return Shard(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
    )


def _named_weights(model: GPTModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and router biases under names with the whole model's layer numbers."""
    layer_numbers = [layer.layer_number - 1 for layer in model.decoder.layers]  # Megatron's: from 1
    weights = dict(model.named_parameters())
    weights.update(
        (name, buffer) for name, buffer in model.named_buffers() if name.endswith(".expert_bias")
    )
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(layer_numbers[int(parts[2])])
        yield ".".join(parts), tensor


def _check_tensors(checkpoint: HfCheckpoint, architecture: Architecture) -> None:
    expected = hf_tensor_shapes(architecture)
    found = {name: metadata.shape for name, metadata in checkpoint.tensors.items()}
    if architecture.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # some checkpoints keep the copy
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not part of the model" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {found[name]}, expected {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if problems:
        raise ModelError(
            f"{checkpoint.directory} does not fit its config.json: " + "; ".join(sorted(problems))
        )
