"""Impossible trainer options are refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from asystem_bridge.trainer.options import TrainerOptions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size = 0"),
        ({"data_parallel_size": -1}, "data_parallel_size = -1"),
        ({"row_tokens": 0}, "row_tokens = 0"),
        ({"threads": -1}, "threads = -1"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0"),
        ({"learning_rate": math.nan}, "learning_rate = nan"),
        ({"clip_grad": 0.0}, "clip_grad = 0.0"),
        ({"adam_beta2": 1.0}, "adam_beta2 = 1.0"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"icepop_alpha": 2.0}, "alpha"),
        ({"clip_low": 1.0}, "clip_low = 1.0"),
        ({"loss_normaliser": "batch"}, "'batch'"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerOptions(checkpoint_dir=Path("model"), **changes)


def test_the_papers_values_are_the_defaults() -> None:
    options = TrainerOptions(checkpoint_dir=Path("model"))
    assert options.learning_rate == 2e-6
    assert (options.loss_options.alpha, options.loss_options.beta) == (0.5, 5.0)
    assert options.loss_options.normaliser == "sequence"


def test_world_size_is_the_product() -> None:
    options = TrainerOptions(
        checkpoint_dir=Path("model"), tensor_parallel_size=2, data_parallel_size=3
    )
    assert options.world_size == 6


def test_clipping_can_be_off() -> None:
    assert TrainerOptions(checkpoint_dir=Path("model"), clip_grad=math.inf).clip_grad == math.inf
