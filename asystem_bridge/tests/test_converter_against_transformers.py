"""Checkpoints of all families in Megatron-core, compared with transformers and with themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bailing_reference import bailing_logits
from megatron_ranks import run_on_ranks
from safetensors.torch import load_file
from tiny_checkpoints import write_tiny_checkpoint

from asystem_bridge.weights.layout import Box
from asystem_bridge.weights.transformers_reference import transformers_reference

pytestmark = pytest.mark.megatron

# name -> family and what differs from its tiny config
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_untied_gqa": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 2}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe_unnormalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "bailing_moe_v2": ("bailing_moe_v2", {}),
    "bailing_moe_v2_one_group": ("bailing_moe_v2", {"n_group": 1, "topk_group": 1}),
}
# 35 tokens: an odd number, so that sequence parallelism has to pad the row.
SEQUENCES = [list(range(5, 28)), [100, 3, 77], [9, 9, 9, 120, 1, 0, 64, 31, 2]]
# Float32 sums in another order: 1e-6 was seen.
ROUNDING = 1e-5

Pieces = list[tuple[Box, np.ndarray]]


@dataclass(frozen=True)
class Converted:
    """What one rank says about one checkpoint."""

    logits: np.ndarray  # (T, V) of the packed row
    checked: float
    pieces: Pieces


def convert_all(
    directories: dict[str, Path], to_spoil: Path
) -> tuple[dict[int, dict[str, Converted]], list[str]]:
    """One world of two ranks, used as TP2 and then as two times TP1: imports are what costs."""
    from megatron.core import parallel_state

    from asystem_bridge.trainer.model import initialize_parallel

    by_tp_size = {2: convert(directories)}
    parallel_state.destroy_model_parallel()
    initialize_parallel(tensor_parallel_size=1, seed=1)
    by_tp_size[1] = convert(directories)
    return by_tp_size, spoil_and_check(to_spoil)


def convert(directories: dict[str, Path]) -> dict[str, Converted]:
    from megatron.core import parallel_state

    from asystem_bridge.trainer.model import build_model, load_weights, local_boxes, packed_logits
    from asystem_bridge.trainer.reference import check_against_transformers
    from asystem_bridge.weights.architecture import Architecture

    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    results = {}
    for name, directory in directories.items():
        architecture = Architecture.from_checkpoint(directory)
        model = build_model(architecture, tensor_parallel_size=tp_size)
        load_weights(model, architecture, directory)
        pieces = [
            (box, tensor[box.local_slices].detach().numpy().copy())
            for tensor, boxes in local_boxes(model, architecture)
            for box in boxes
        ]
        difference = check_against_transformers(model, directory, tolerance=ROUNDING)
        results[name] = Converted(packed_logits(model, SEQUENCES).numpy(), difference, pieces)
    return results


def spoil_and_check(directory: Path) -> list[str]:
    """What the check says when a single tensor of the Megatron model is wrong."""
    from asystem_bridge.errors import ModelError
    from asystem_bridge.trainer.model import build_model, load_weights
    from asystem_bridge.trainer.reference import check_against_transformers
    from asystem_bridge.weights.architecture import Architecture

    architecture = Architecture.from_checkpoint(directory)
    model = build_model(architecture)
    spoilt = {
        "the bias of a router": model.decoder.layers[2].mlp.router.expert_bias,
        "a norm of the keys": model.decoder.layers[0].self_attention.k_layernorm.weight,
        "not a number": model.output_layer.weight,
    }
    messages = []
    for name, tensor in spoilt.items():
        load_weights(model, architecture, directory)
        with torch.no_grad():
            tensor[0] = float("nan") if name == "not a number" else tensor[0] + 1
        try:
            check_against_transformers(model, directory)
        except ModelError as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: write_tiny_checkpoint(root / name, family, seed=1, **changes)
        for name, (family, changes) in CASES.items()
    }


@pytest.fixture(scope="module")
def ranks(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_on_ranks(
        convert_all,
        checkpoints,
        checkpoints["bailing_moe_v2"],
        world_size=2,
        tp_size=2,
        directory=tmp_path_factory.mktemp("ranks"),
    )


@pytest.fixture(scope="module")
def tp1(ranks: list[Any]) -> dict[str, Converted]:
    return ranks[0][0][1]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tp2(ranks: list[Any]) -> list[dict[str, Converted]]:
    return [by_tp_size[2] for by_tp_size, _ in ranks]


@torch.no_grad()
def transformers_logits(directory: Path) -> np.ndarray:
    """Each sequence alone, unpacked."""
    model = transformers_reference(directory)
    logits = [model(torch.tensor([tokens])).logits[0] for tokens in SEQUENCES]
    return torch.cat(logits).numpy()


def assembled(parts: Sequence[Converted], directory: Path) -> dict[str, np.ndarray]:
    """Full Hugging Face tensors from every rank's boxes; NaN where no rank wrote."""
    full = {
        name: np.full(tensor.shape, np.nan, dtype=np.float32)
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    for part in parts:
        for box, values in part.pieces:
            full[box.hf_name][box.hf_slices] = values
    return full


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(
    case: str, checkpoints: dict[str, Path], tp1: dict[str, Converted]
) -> None:
    expected = transformers_logits(checkpoints[case])
    assert np.abs(expected).max() > 1  # the comparison would see a wrong model
    np.testing.assert_allclose(tp1[case].logits, expected, atol=ROUNDING, rtol=0)
    assert 0 < tp1[case].checked < ROUNDING


@pytest.mark.parametrize("case", CASES)
def test_tensor_parallel_logits_equal_one_process(
    case: str, tp1: dict[str, Converted], tp2: list[dict[str, Converted]]
) -> None:
    for rank in tp2:
        np.testing.assert_allclose(rank[case].logits, tp1[case].logits, atol=ROUNDING, rtol=0)
    assert tp2[0][case].checked == tp2[1][case].checked < ROUNDING


@pytest.mark.parametrize("case", CASES)
def test_what_ranks_hold_is_the_checkpoint(
    case: str,
    checkpoints: dict[str, Path],
    tp1: dict[str, Converted],
    tp2: list[dict[str, Converted]],
) -> None:
    expected = load_file(checkpoints[case] / "model.safetensors")
    for parts in ([tp1[case]], [rank[case] for rank in tp2]):
        full = assembled(parts, checkpoints[case])
        assert full.keys() == expected.keys()
        for name, tensor in expected.items():
            assert np.array_equal(full[name], tensor.numpy()), name
    held = [sum(box.numel for box, _ in rank[case].pieces) for rank in (*tp2, tp1)]
    assert held[0] == held[1] < 0.6 * held[2]


@pytest.mark.parametrize("case", ["bailing_moe_v2", "bailing_moe_v2_one_group"])
def test_bailing_through_glm_equals_its_naive_forward(
    case: str, checkpoints: dict[str, Path]
) -> None:
    """transformers' counterpart under other names is really the same function."""
    directory = checkpoints[case]
    config = json.loads((directory / "config.json").read_text())
    weights = load_file(directory / "model.safetensors")
    naive = [bailing_logits(weights, config, torch.tensor([tokens]))[0] for tokens in SEQUENCES]
    np.testing.assert_allclose(
        transformers_logits(directory), torch.cat(naive).numpy(), atol=ROUNDING, rtol=0
    )


def test_one_wrong_tensor_is_noticed(ranks: list[Any]) -> None:
    for _, messages in ranks:
        assert len(messages) == 3
        assert all("differ from transformers' by" in message for message in messages)
        assert "by nan" in messages[2]
