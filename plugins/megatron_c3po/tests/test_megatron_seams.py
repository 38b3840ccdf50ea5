"""The parts of megatron-core that this suite stands on, and the upstream bugs it works around.

When a test here fails after an upgrade, the host has changed: read its new source before adapting.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_c3po.compat import check_megatron_version
from megatron_c3po.cpu_megatron import cpu_megatron


@pytest.fixture(scope="module")
def version() -> str:
    return f"megatron-core {check_megatron_version()}"


def check_parameters(function: Callable[..., Any], names: set[str], version: str) -> None:
    missing = names - inspect.signature(function).parameters.keys()
    assert not missing, f"{version}: {function.__qualname__} no longer takes {sorted(missing)}"


def check_fields(cls: Any, names: set[str], version: str) -> None:
    missing = names - {field.name for field in dataclasses.fields(cls)}
    assert not missing, f"{version}: {cls.__name__} no longer has {sorted(missing)}"


def test_parallel_state(version: str) -> None:
    from megatron.core import parallel_state, tensor_parallel

    check_parameters(
        parallel_state.initialize_model_parallel, {"tensor_model_parallel_size"}, version
    )
    for name in (
        "destroy_model_parallel", "get_tensor_model_parallel_rank",
        "get_tensor_model_parallel_world_size", "get_tensor_model_parallel_group",
        "get_data_parallel_rank", "get_data_parallel_world_size", "get_data_parallel_group",
    ):  # fmt: skip
        assert callable(getattr(parallel_state, name)), f"{version}: parallel_state.{name}"
    for name in (
        "model_parallel_cuda_manual_seed", "gather_from_tensor_model_parallel_region",
        "get_cuda_rng_tracker",
    ):  # fmt: skip
        assert callable(getattr(tensor_parallel, name)), f"{version}: tensor_parallel.{name}"


def test_random_tracker(version: str) -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    for name in (
        "_CUDA_RNG_STATE_TRACKER", "_CUDA_RNG_STATE_TRACKER_INITIALIZED",
        "_get_cuda_rng_state", "_set_cuda_rng_state",
    ):  # fmt: skip
        assert hasattr(megatron_random, name), f"{version}: tensor_parallel.random.{name}"
    tracker = megatron_random.CudaRNGStatesTracker()
    assert {"_is_initialized", "states_", "seeds_", "_current_state_name"} <= vars(tracker).keys()
    check_parameters(tracker.add, {"name", "seed"}, version)
    assert inspect.signature(tracker.fork).parameters["name"].default == "model-parallel-rng"


def test_model_and_layer_spec(version: str) -> None:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.attention import SelfAttentionSubmodules
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    check_parameters(
        GPTModel,
        {
            "config", "transformer_layer_spec", "vocab_size", "max_sequence_length",
            "position_embedding_type", "rotary_percent", "rotary_base",
            "share_embeddings_and_output_weights",
        },
        version,
    )  # fmt: skip
    check_parameters(
        GPTModel.forward,
        {"input_ids", "position_ids", "attention_mask", "labels", "packed_seq_params"},
        version,
    )
    check_parameters(
        get_gpt_decoder_block_spec, {"config", "use_transformer_engine", "normalization"}, version
    )
    check_fields(TransformerBlockSubmodules, {"layer_specs", "layer_norm"}, version)
    check_fields(
        TransformerLayerSubmodules,
        {"input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp"},
        version,
    )
    check_fields(SelfAttentionSubmodules, {"core_attention", "q_layernorm", "k_layernorm"}, version)
    check_fields(
        PackedSeqParams,
        {"qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"},
        version,
    )


def test_configuration_fields(version: str) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    check_fields(
        TransformerConfig,
        {
            "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
            "ffn_hidden_size", "gated_linear_unit", "activation_func", "add_bias_linear",
            "normalization", "layernorm_epsilon", "qk_layernorm", "hidden_dropout",
            "attention_dropout", "tensor_model_parallel_size", "sequence_parallel",
            "use_cpu_initialization", "perform_initialization", "calculate_per_token_loss",
            "persist_layer_norm", "masked_softmax_fusion", "bias_activation_fusion",
            "bias_dropout_fusion", "apply_rope_fusion", "num_moe_experts", "moe_layer_freq",
            "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_topk",
            "moe_router_score_function", "moe_router_pre_softmax", "moe_router_num_groups",
            "moe_router_group_topk", "moe_router_topk_scaling_factor", "moe_router_dtype",
            "moe_router_enable_expert_bias", "moe_router_bias_update_rate",
            "moe_router_load_balancing_type", "moe_token_dispatcher_type", "moe_grouped_gemm",
        },
        version,
    )  # fmt: skip


def test_core_attention_is_called_as_ours_expects(version: str) -> None:
    from megatron.core.transformer.attention import Attention

    from megatron_c3po.thd_attention import ThdSdpaAttention

    source = inspect.getsource(Attention.forward)
    call = source[source.index("apply_module(self.core_attention)(") :].split(")", 2)[1]
    given = {part.split("=")[0].strip() for part in call.lstrip("(").split(",") if part.strip()}
    ours = inspect.signature(ThdSdpaAttention.forward).parameters.keys()
    assert "packed_seq_params" in given, f"{version}: core_attention is given {sorted(given)}"
    assert given <= ours, f"{version}: core_attention is given {sorted(given - ours)} as well"


def test_gradients_of_marked_norms_are_summed_over_tensor_parallelism(version: str) -> None:
    """``sequence_parallel`` on a weight, ``q_layernorm`` in a name: both are upstream's words."""
    from megatron.core.distributed import finalize_model_grads

    source = inspect.getsource(inspect.getmodule(finalize_model_grads))  # type: ignore[arg-type]
    for words in ('getattr(param, "sequence_parallel", False)', '"q_layernorm" in name'):
        assert words in source, f"{version}: finalize_model_grads no longer reads {words}"


def test_group_score_is_the_sum_of_topk_over_group_topk_experts(version: str) -> None:
    """Why Architecture asks for topk = 2 * topk_group: the engines sum a group's best two."""
    from megatron.core.transformer.moe.moe_utils import group_limited_topk

    # Two groups of three experts: the first has the best three, the second the best two.
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.6, 0.6, 0.0]])
    chosen = {
        topk: sorted(group_limited_topk(scores, topk, 1, 6, 2, 1)[1][0].tolist()) for topk in (2, 3)
    }
    assert chosen == {2: [3, 4], 3: [0, 1, 2]}, f"{version}: group_limited_topk chose {chosen}"


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="TransformerEngine is there"
)
def test_router_fix_is_still_needed(version: str) -> None:
    from megatron.core.transformer.moe import moe_utils

    fixed_upstream = hasattr(moe_utils, "te_general_gemm")
    assert not fixed_upstream, f"{version}: remove compat.router_without_transformer_engine"
    arguments = torch.ones(1, 2), torch.ones(3, 2), None, torch.float32
    with pytest.raises(NameError, match="te_general_gemm"):
        moe_utils.RouterGatingLinearFunction.apply(*arguments)
    with cpu_megatron():
        gated = moe_utils.RouterGatingLinearFunction.apply(*arguments)
    assert gated.tolist() == [[2.0, 2.0, 2.0]]


def test_split_size_fix_is_still_needed(version: str) -> None:
    from megatron.core.transformer.moe import token_dispatcher

    sizes = torch.tensor([1, 2])
    upstream = token_dispatcher.maybe_move_tensor_to_cpu(sizes, as_numpy=True)
    assert torch.is_tensor(upstream), f"{version}: remove compat.split_sizes_as_numpy"
    if torch.cuda.is_available():
        return
    with cpu_megatron():
        fixed = token_dispatcher.maybe_move_tensor_to_cpu(sizes, as_numpy=True)
        assert not torch.is_tensor(fixed)
        assert fixed.tolist() == [1, 2]
        assert token_dispatcher.maybe_move_tensor_to_cpu(None, as_numpy=True) is None


def test_checkpoint_writer_parts(version: str) -> None:
    """The trainer's checkpoint writes without helper processes from these; two are not public."""
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    check_parameters(
        strategies._replace_state_dict_keys_with_sharded_keys,
        {"sharded_state_dict", "keep_only_main_replica"},
        version,
    )
    check_parameters(strategies.mcore_to_pyt_state_dict, {"state_dict", "is_loading"}, version)
    check_parameters(strategies.MCoreSavePlanner.__init__, {"dedup_replicated_tensors"}, version)
    writer = strategies.TorchDistSaveShardedStrategy("torch_dist", 1)
    assert hasattr(writer, "keep_only_main_replica"), version
