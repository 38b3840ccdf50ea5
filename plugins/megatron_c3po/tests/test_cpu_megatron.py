"""cpu_megatron(): patched inside, as before outside; packed attention against a naive reference."""

from __future__ import annotations

import importlib.metadata
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_c3po import compat
from megatron_c3po.cpu_megatron import cpu_megatron

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="cpu_megatron() changes nothing where CUDA is available"
)

REPLACED_CUDA_NAMES = [
    "Stream", "Event", "current_stream", "default_stream", "stream", "current_device",
    "device_count", "set_device", "synchronize", "empty_cache", "manual_seed", "get_rng_state",
    "set_rng_state",
]  # fmt: skip


def megatron_state() -> dict[str, Any]:
    """Everything outside torch.cuda that cpu_megatron() may replace."""
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    names = (
        "_CUDA_RNG_STATE_TRACKER", "_CUDA_RNG_STATE_TRACKER_INITIALIZED",
        "_get_cuda_rng_state", "_set_cuda_rng_state",
    )  # fmt: skip
    return {
        **{name: getattr(megatron_random, name) for name in names},
        "te_general_gemm": getattr(moe_utils, "te_general_gemm", "absent"),
        "maybe_move_tensor_to_cpu": token_dispatcher.maybe_move_tensor_to_cpu,
    }


def cuda_state() -> dict[str, Any]:
    return {name: getattr(torch.cuda, name) for name in REPLACED_CUDA_NAMES}


def test_patched_inside_and_restored_outside() -> None:
    before = {**cuda_state(), **megatron_state()}

    def leave_by_an_error() -> None:
        with cpu_megatron():
            inside = {**cuda_state(), **megatron_state()}
            assert [name for name in before if inside[name] is before[name]] == []
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        leave_by_an_error()
    assert {**cuda_state(), **megatron_state()} == before


def test_compiled_functions_run_eagerly_inside_only() -> None:
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=count)
    def double(x: torch.Tensor) -> torch.Tensor:
        return x + x

    with cpu_megatron():
        assert double(torch.ones(1)).item() == 2
        assert graphs == []
    assert double(torch.ones(1)).item() == 2
    assert len(graphs) == 1


def test_cuda_tensors_land_on_the_cpu_inside_only() -> None:
    x = torch.ones(3)
    with cpu_megatron():
        made = [
            torch.zeros(2, device="cuda"),
            torch.tensor([1], device=torch.device("cuda", 0)),
            torch.empty(2, device=torch.cuda.current_device()),
            torch.zeros(2, pin_memory=True),
            x.cuda(),
            x.to("cuda"),
            x.to(device="cuda:0"),
        ]
        assert {tensor.device.type for tensor in made} == {"cpu"}
        with torch.cuda.stream(torch.cuda.Stream()):
            event = torch.cuda.current_stream().record_event()
        event.synchronize()
        assert event.query()
        assert not torch.cuda.is_available()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")


def test_optimizers_alone_see_cuda_tensor_types() -> None:
    names = {"p": torch.zeros(1)}
    ask = "p.type()"
    with cpu_megatron():
        optimizer = {"__name__": "megatron.core.optimizer.optimizer", **names}
        assert eval(ask, optimizer) == "torch.cuda.FloatTensor"
        assert eval(ask, {"__name__": "somewhere.else", **names}) == "torch.FloatTensor"
        assert torch.zeros(1).type(torch.float64).dtype is torch.float64


def test_nothing_changes_where_cuda_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = {**cuda_state(), **megatron_state()}
    with cpu_megatron():
        assert {**cuda_state(), **megatron_state()} == before


def test_entering_twice_is_refused() -> None:
    before = cuda_state()
    with cpu_megatron(), pytest.raises(RuntimeError, match="already entered"), cpu_megatron():
        pass
    assert cuda_state() == before


def test_random_streams_are_apart_and_reproducible() -> None:
    def expected(seed: int, count: int) -> list[float]:
        return torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()

    with cpu_megatron():
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        tracker = get_cuda_rng_tracker()
        tracker.add("one", 11)
        tracker.add("two", 22)
        torch.manual_seed(33)
        drawn: dict[str, list[float]] = {"one": [], "two": [], "outside": []}

        def draw(name: str) -> None:
            drawn[name].append(torch.rand(1).item())

        draw("outside")
        with tracker.fork("one"):
            draw("one")
            with tracker.fork("two"):
                draw("two")
            draw("one")
            with tracker.fork("one"):
                draw("one")
        draw("outside")
        with tracker.fork("two"):
            draw("two")
        with tracker.fork("one"):
            draw("one")
        with pytest.raises(ValueError, match="'two' with seed 5 exists already"):
            tracker.add("two", 5)
        with pytest.raises(KeyError, match="known are"), tracker.fork("three"):
            pass
    assert drawn == {"one": expected(11, 4), "two": expected(22, 2), "outside": expected(33, 2)}


@pytest.mark.parametrize("version", ["0.15.3", "0.17.0", "0.19.2"])
def test_untested_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(compat.UnsupportedHostError, match=rf"{version} was not tested.*0\.16\.1"):
        compat.check_megatron_version()
    with pytest.raises(compat.UnsupportedHostError), cpu_megatron():
        pass


def test_missing_megatron_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(compat.UnsupportedHostError, match=r"not installed; .*pip install"):
        compat.check_megatron_version()


# Packed attention.  T tokens, H query heads, G key-value heads, D head size.
LENGTHS = [5, 1, 17, 2]
H, G, D = 6, 2, 8


def make_attention(**config: Any) -> Any:
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_c3po.thd_attention import ThdSdpaAttention

    options = {
        "num_layers": 1, "hidden_size": H * D, "num_attention_heads": H, "num_query_groups": G,
        "kv_channels": D, "attention_dropout": 0.0, "use_cpu_initialization": True,
    }  # fmt: skip
    return ThdSdpaAttention(
        TransformerConfig(**{**options, **config}), 1, AttnMaskType.causal, "self"
    )


def packing(lengths: list[int]) -> Any:
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return SimpleNamespace(cu_seqlens_q=bounds)


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One sequence, token by token and head by head, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for t in range(q.shape[0]):
        for h in range(H):
            g = h // (H // G)
            scores = k[: t + 1, g].double() @ q[t, h].double() / D**0.5
            out[t, h] = scores.softmax(0) @ v[: t + 1, g].double()
    return out.flatten(1)


def random_qkv(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tokens, heads, D, generator=generator, requires_grad=True)
        for heads in (H, G, G)
    ]


def test_packed_attention_equals_unpacked() -> None:
    with cpu_megatron():
        attention = make_attention()
        q, k, v = random_qkv(sum(LENGTHS))
        packed = attention(q, k, v, None, packed_seq_params=packing(LENGTHS))
        packed.square().sum().backward()
        packed_gradients = [x.grad.clone() for x in (q, k, v)]
        outputs, start = [], 0
        for x in (q, k, v):
            x.grad = None
        for length in LENGTHS:
            part = [x[start : start + length] for x in (q, k, v)]
            one = attention(*(x[:, None] for x in part), None)[:, 0]  # (S, 1, H, D) -> (S, H * D)
            expected = naive_attention(*(x.detach() for x in part))
            torch.testing.assert_close(one.double(), expected, atol=1e-6, rtol=0)
            outputs.append(one)
            start += length
        unpacked = torch.cat(outputs)
        unpacked.square().sum().backward()
        torch.testing.assert_close(packed, unpacked, atol=1e-6, rtol=0)
        for packed_gradient, x in zip(packed_gradients, (q, k, v), strict=True):
            torch.testing.assert_close(packed_gradient, x.grad, atol=1e-5, rtol=0)


def test_sequences_do_not_see_each_other() -> None:
    with cpu_megatron(), torch.no_grad():
        attention = make_attention()
        q, k, v = random_qkv(sum(LENGTHS))
        before = attention(q, k, v, None, packed_seq_params=packing(LENGTHS))
        for x in (q, k, v):
            x[6:23] += 1.0  # the third sequence
        after = attention(q, k, v, None, packed_seq_params=packing(LENGTHS))
    changed = (before != after).any(dim=1)
    assert changed.tolist() == [False] * 6 + [True] * 17 + [False] * 2


def test_what_packed_attention_refuses() -> None:
    with cpu_megatron():
        q, k, v = random_qkv(10)
        with pytest.raises(ValueError, match="from 0 to 9, the row has 10 tokens"):
            make_attention()(q, k, v, None, packed_seq_params=packing([4, 5]))
        with pytest.raises(ValueError, match="attention_bias"):
            make_attention()(q, k, v, None, attention_bias=torch.zeros(1))
        with pytest.raises(ValueError, match=r"attention_dropout = 0\.1"):
            make_attention(attention_dropout=0.1)
