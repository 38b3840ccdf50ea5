"""Weight updates of a tiny BailingMoeV2 (Ring, Ling) on a real vLLM engine.

Its experts are packed by vLLM's CPU kernels, and a plain reload would leave them wrong in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import write_tiny_checkpoint

from asystem_bridge.errors import WorkerError
from asystem_bridge.runtime.worker_client import WorkerClient
from asystem_bridge.vllm_backend.client import WORKER_TARGET, VllmProcessEngine, vllm_environment
from asystem_bridge.vllm_backend.options import RolloutOptions
from asystem_bridge.weights.segment import SegmentLayout, WeightSegment
from asystem_bridge.weights.transformers_reference import transformers_reference

pytest.importorskip("vllm")
pytestmark = pytest.mark.engine

SEQUENCES = [[5, 6, 7, 8, 9, 10], [100, 3, 50, 51, 52, 4, 90, 17, 17, 60], [64, 65]]
SEEDS = (1, 2)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("moe_sync")
    return {
        seed: write_tiny_checkpoint(folder / str(seed), "bailing_moe_v2", seed=seed)
        for seed in (0, *SEEDS)
    }


@pytest.fixture(scope="module")
def engine(
    checkpoints: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmProcessEngine]:
    worker = WorkerClient(
        WORKER_TARGET,
        name="vllm",
        log_path=tmp_path_factory.mktemp("log") / "vllm.log",
        environment=vllm_environment(),
    )
    try:
        worker.wait_started()
        engine = VllmProcessEngine(worker)
        engine.setup(
            RolloutOptions(
                checkpoint_dir=checkpoints[0],
                dtype="float32",
                max_model_len=128,
                max_num_seqs=4,
                kv_cache_gib=0.125,
                enforce_eager=True,
                trust_remote_code=True,
            )
        )
        yield engine
    finally:
        worker.close()


def segment_with(tensors: dict[str, torch.Tensor]) -> WeightSegment:
    layout = SegmentLayout.from_tensors(
        {name: (tensor.shape, torch.float32) for name, tensor in tensors.items()}
    )
    segment = WeightSegment.create(layout)
    for name, tensor in tensors.items():
        segment.views[name].copy_(tensor)
    return segment


@torch.no_grad()
def largest_difference(engine: VllmProcessEngine, checkpoint: Path) -> float:
    """max |log-prob of the engine - log-prob of transformers| on fixed tokens."""
    model = transformers_reference(checkpoint)
    differences = []
    for found, tokens in zip(engine.prompt_logprobs(SEQUENCES), SEQUENCES, strict=True):
        logprobs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        expected = logprobs.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
        differences.append((expected - torch.tensor(found)).abs().max().item())
    return max(differences)


def test_experts_follow_every_update(engine, checkpoints):
    assert largest_difference(engine, checkpoints[0]) < 1e-4
    for version, seed in enumerate(SEEDS, start=1):
        assert largest_difference(engine, checkpoints[seed]) > 0.1  # they are other models
        segment = segment_with(load_file(checkpoints[seed] / "model.safetensors"))
        engine.attach_weights(segment)
        engine.update_weights(version)
        assert largest_difference(engine, checkpoints[seed]) < 1e-4
        assert {report.status for report in engine.diagnose()} == {"equal"}
        segment.close()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.3.gate_proj.weight",
        "model.layers.1.mlp.experts.15.up_proj.weight",
        "model.layers.2.mlp.experts.0.down_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.2.mlp.gate.expert_bias",
        "model.layers.2.mlp.shared_experts.up_proj.weight",
        "model.layers.0.attention.query_key_value.weight",
        "model.word_embeddings.weight",
        "lm_head.weight",
    ],
)
def test_diagnose_names_exactly_the_tensor_that_differs(engine, checkpoints, name):
    segment = segment_with(load_file(checkpoints[0] / "model.safetensors"))
    engine.attach_weights(segment)
    engine.update_weights(10)
    segment.views[name].view(-1)[0] += 1.0
    unequal = {
        report.name: report.status for report in engine.diagnose() if report.status != "equal"
    }
    assert unequal == {name: "differs"}
    segment.close()


# The last tests: a refused update leaves the engine without usable weights.
def test_an_update_that_lacks_an_expert_is_refused(engine, checkpoints):
    tensors = load_file(checkpoints[0] / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.7.down_proj.weight"]
    segment = segment_with(tensors)
    engine.attach_weights(segment)
    with pytest.raises(WorkerError, match=r"modules of the engine lack weights: \['model.layers.2"):
        engine.update_weights(11)
    segment.close()


def test_a_tensor_that_the_model_would_skip_in_silence_is_refused(engine, checkpoints):
    tensors = load_file(checkpoints[0] / "model.safetensors")
    tensors["model.norm.bias"] = torch.zeros(64)
    segment = segment_with(tensors)
    engine.attach_weights(segment)
    with pytest.raises(WorkerError, match=r"ignored these tensors .*: \['model.norm.bias'\]"):
        engine.update_weights(12)
    segment.close()
