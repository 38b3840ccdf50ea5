"""A packed row holds each token's data at the position that predicts it."""

from __future__ import annotations

import pytest
import torch

from megatron_c3po.microbatch import NO_SEQUENCE, NO_VERSION, build_microbatch
from megatron_c3po.rollout import Rollout


def make_rollout(uid: str, prompt: list[int], sampled: list[int], **changes: object) -> Rollout:
    fields: dict = {
        "uid": uid,
        "group_uid": uid.split("/")[0],
        "prompt_ids": prompt,
        "max_new_tokens": 8,
        "token_ids": sampled,
        "logprobs": [-0.5 * (i + 1) for i in range(len(sampled))],
        "versions": list(range(3, 3 + len(sampled))),
        "finish_reason": "stop",
        "advantage": 1.5,
    }
    return Rollout(**{**fields, **changes})


FIRST = make_rollout("a/0", [11, 12], [13, 14, 15])
SECOND = make_rollout("a/1", [11, 12], [16], advantage=-2.0)


def test_two_rollouts_position_by_position() -> None:
    row = build_microbatch([FIRST, SECOND])

    assert row["tokens"].tolist() == [[11, 12, 13, 14, 15, 11, 12, 16]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert row["loss_mask"].tolist() == [[0, 1, 1, 1, 0, 0, 1, 0]]
    assert row["labels"][row["loss_mask"] > 0].tolist() == [13, 14, 15, 16]
    assert row["advantages"].tolist() == [[0, 1.5, 1.5, 1.5, 0, 0, -2.0, 0]]
    assert row["behaviour_logprobs"].tolist() == [[0, -0.5, -1.0, -1.5, 0, 0, -0.5, 0]]
    assert row["policy_versions"].tolist() == [[-1, 3, 4, 5, -1, -1, 3, -1]]
    assert row["sequence_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    assert row["cu_seqlens"].tolist() == [0, 5, 8]
    assert row["cu_seqlens"].dtype == torch.int32
    assert row["max_seqlen"] == 5


def test_every_tensor_but_the_boundaries_has_the_rows_shape() -> None:
    row = build_microbatch([FIRST, SECOND], length_multiple=16)
    tensors = {k: v for k, v in row.items() if torch.is_tensor(v) and k != "cu_seqlens"}
    assert len(tensors) == 8
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(1, 16)}


def test_padding_is_a_segment_of_its_own() -> None:
    row = build_microbatch([FIRST, SECOND], length_multiple=3)
    assert row["tokens"].shape == (1, 9)
    assert row["cu_seqlens"].tolist() == [0, 5, 8, 9]
    assert row["loss_mask"][0, 8] == 0
    assert row["policy_versions"][0, 8] == NO_VERSION
    assert row["sequence_ids"][0, 8] == NO_SEQUENCE


def test_an_empty_row_is_padding_only() -> None:
    row = build_microbatch([], length_multiple=2)
    assert row["tokens"].shape == (1, 2)
    assert row["cu_seqlens"].tolist() == [0, 2]
    assert row["loss_mask"].sum() == 0
    assert (row["sequence_ids"] == NO_SEQUENCE).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": []}, "b/0: no prompt"),
        ({"token_ids": [], "logprobs": [], "versions": []}, "b/0: no sampled token"),
        ({"advantage": None}, "b/0: no advantage"),
        ({"logprobs": [-1.0]}, "b/0: 2 tokens, 1 log-probs, 2 versions"),
        ({"versions": [0]}, "b/0: 2 tokens, 2 log-probs, 1 versions"),
    ],
)
def test_refuses_incomplete_rollouts(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_microbatch([make_rollout("b/0", [1], [2, 3], **changes)])
