"""The tiny Ring-architecture checkpoint: its files, and that vLLM computes what they mean."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from bailing_reference import bailing_logits
from safetensors.torch import load_file

from asystem_bridge.errors import ModelError
from asystem_bridge.models.cache import cached_folder
from asystem_bridge.models.tiny_ring import TinyRingSize, tiny_ring_checkpoint, tiny_ring_weights
from asystem_bridge.runtime.worker_client import WorkerClient
from asystem_bridge.tasks.digit_sort import DigitSort, DigitSortOptions
from asystem_bridge.vllm_backend.client import WORKER_TARGET, VllmProcessEngine, vllm_environment
from asystem_bridge.vllm_backend.options import RolloutOptions

# Of Ring-mini-2.0 with 2 layers: one dense, one with (here) 4 experts.
NAMES_OF_TWO_LAYERS = [
    "model.word_embeddings.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.attention.query_key_value.weight",
    "model.layers.0.attention.query_layernorm.weight",
    "model.layers.0.attention.key_layernorm.weight",
    "model.layers.0.attention.dense.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.attention.query_key_value.weight",
    "model.layers.1.attention.query_layernorm.weight",
    "model.layers.1.attention.key_layernorm.weight",
    "model.layers.1.attention.dense.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.gate.expert_bias",
    "model.layers.1.mlp.shared_experts.gate_proj.weight",
    "model.layers.1.mlp.shared_experts.up_proj.weight",
    "model.layers.1.mlp.shared_experts.down_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]
NAMES_OF_TWO_LAYERS += [
    f"model.layers.1.mlp.experts.{expert}.{projection}_proj.weight"
    for expert in range(4)
    for projection in ("gate", "up", "down")
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ring_checkpoint(tmp_path_factory.mktemp("tiny") / "ring", seed=1)


@pytest.fixture(scope="module")
def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "config.json").read_text())


def test_names_are_those_of_ring_mini():
    size = TinyRingSize(num_layers=2, num_experts=4)
    assert sorted(tiny_ring_weights(size, seed=0)) == sorted(NAMES_OF_TWO_LAYERS)


def test_shapes_fit_the_configuration(weights: dict[str, torch.Tensor], config: dict[str, Any]):
    heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    hidden = config["hidden_size"]
    layer = "model.layers.2"
    assert {
        name: tuple(weights[name].shape)
        for name in (
            "model.word_embeddings.weight",
            f"{layer}.attention.query_key_value.weight",
            f"{layer}.attention.dense.weight",
            f"{layer}.attention.key_layernorm.weight",
            f"{layer}.mlp.gate.weight",
            f"{layer}.mlp.gate.expert_bias",
            f"{layer}.mlp.experts.7.down_proj.weight",
        )
    } == {
        "model.word_embeddings.weight": (config["vocab_size"], hidden),
        f"{layer}.attention.query_key_value.weight": (heads * config["head_dim"], hidden),
        f"{layer}.attention.dense.weight": (
            hidden,
            config["num_attention_heads"] * config["head_dim"],
        ),
        f"{layer}.attention.key_layernorm.weight": (config["head_dim"],),
        f"{layer}.mlp.gate.weight": (config["num_experts"], hidden),
        f"{layer}.mlp.gate.expert_bias": (config["num_experts"],),
        f"{layer}.mlp.experts.7.down_proj.weight": (hidden, config["moe_intermediate_size"]),
    }
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert 500_000 < sum(weight.numel() for weight in weights.values()) < 1_000_000
    assert config["vocab_size"] % 64 == 0
    assert config["num_experts_per_tok"] == 2 * config["topk_group"]


def test_seed_decides_every_byte(checkpoint: Path, tmp_path: Path):
    same = tiny_ring_checkpoint(tmp_path / "same", seed=1)
    other = tiny_ring_checkpoint(tmp_path / "other", seed=2)
    assert {path.name for path in same.iterdir()} == {path.name for path in checkpoint.iterdir()}
    for path in checkpoint.iterdir():
        assert path.read_bytes() == (same / path.name).read_bytes()
    differs = {
        p.name for p in checkpoint.iterdir() if p.read_bytes() != (other / p.name).read_bytes()
    }
    assert differs == {"model.safetensors"}


def test_initial_loss_is_that_of_knowing_nothing(
    weights: dict[str, torch.Tensor], config: dict[str, Any]
):
    token_ids = torch.randint(4, 53, (8, 32), generator=torch.Generator().manual_seed(0))
    logits = bailing_logits(weights, config, token_ids)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten()
    )
    uniform = torch.tensor(float(config["vocab_size"])).log()
    assert abs(loss - uniform) < 0.5


def test_every_expert_is_used(weights: dict[str, torch.Tensor], config: dict[str, Any]):
    """A dead expert at the start would make the mixture smaller than it says."""
    token_ids = torch.randint(4, 53, (8, 32), generator=torch.Generator().manual_seed(0))
    trained = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    bailing_logits(trained, config, token_ids).square().sum().backward()
    for layer in (1, 2):
        for expert in range(config["num_experts"]):
            grad = trained[f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"].grad
            assert grad.abs().max() > 0, (layer, expert)


def test_tokenizer_and_configuration_load(checkpoint: Path):
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    assert config.model_type == "bailing_moe"
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.pad_token_id == config.pad_token_id
    assert tokenizer.eos_token_id == config.eos_token_id
    assert tokenizer.padding_side == "left"
    assert tokenizer.decode([*tokenizer("sort:10=01").input_ids, 1], skip_special_tokens=True) == (
        "sort:10=01"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers = 0"),
        ({"num_layers": 1}, "at least one layer must have experts"),
        ({"num_kv_heads": 3}, "num_heads = 4 with num_kv_heads = 3"),
        ({"head_dim": 48}, "head_dim = 48: must be a multiple of 32"),
        ({"num_experts": 9}, "num_experts = 9 with num_groups = 2"),
        ({"experts_per_token": 4}, "must be twice as many"),
        ({"num_groups": 8}, "two experts or more in each group"),
        ({"groups_per_token": 4, "experts_per_token": 8}, "at least groups_per_token = 4"),
    ],
)
def test_impossible_sizes(changes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        TinyRingSize(**changes)


def test_refuses_a_folder_with_something_in_it(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        tiny_ring_checkpoint(tmp_path, seed=0)


def test_failed_write_of_the_weights_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RING1T_CACHE", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(ModelError, match=r"cannot be written.*File too large"):
            cached_folder("x", lambda folder: tiny_ring_checkpoint(folder) and None, needed_bytes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [".x.lock"]


@pytest.mark.slow
def test_learns_to_sort_digits(weights: dict[str, torch.Tensor], config: dict[str, Any]):
    """120 supervised steps: most digits right, where an untrained model has one in sixty."""
    from asystem_bridge.models.char_tokenizer import EOS_ID, char_tokenizer

    torch.set_num_threads(1)
    tokenizer = char_tokenizer(model_max_length=64)
    task = DigitSort(DigitSortOptions())
    trained = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-3)
    for step in range(120):
        questions = [task.question(step * 64 + i) for i in range(64)]
        texts = [(q.text, q.record["answer"]) for q in questions]
        token_ids = torch.full((64, 25), EOS_ID)
        answered = torch.zeros(64, 25, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(texts):
            ids = tokenizer(prompt + answer)["input_ids"]
            token_ids[row, : len(ids)] = torch.tensor(ids)
            answered[row, len(prompt) : len(ids) + 1] = True
        logits = bailing_logits(trained, config, token_ids)[:, :-1][answered[:, 1:]]
        targets = token_ids[:, 1:][answered[:, 1:]]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    assert (logits.argmax(-1) == targets).float().mean() > 0.75


@pytest.mark.engine
def test_vllm_agrees_with_the_reference(
    checkpoint: Path, weights: dict[str, torch.Tensor], config: dict[str, Any], tmp_path: Path
):
    pytest.importorskip("vllm")
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(4, 53, (n,), generator=generator).tolist() for n in (5, 17, 60)]
    worker = WorkerClient(
        WORKER_TARGET,
        name="vllm",
        log_path=tmp_path / "vllm.log",
        environment=vllm_environment(threads=1),
    )
    try:
        worker.wait_started()
        engine = VllmProcessEngine(worker)
        engine.setup(
            RolloutOptions(
                checkpoint_dir=checkpoint,
                dtype="float32",
                max_model_len=64,
                max_num_seqs=4,
                kv_cache_gib=0.125,
                enforce_eager=True,
                trust_remote_code=True,
            )
        )
        of_engine = engine.prompt_logprobs(sequences)
    finally:
        worker.close()
    for token_ids, logprobs in zip(sequences, of_engine, strict=True):
        logits = bailing_logits(weights, config, torch.tensor([token_ids]))[0]
        reference = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(token_ids[1:])[:, None])
        torch.testing.assert_close(torch.tensor(logprobs), reference[:, 0], atol=1e-5, rtol=0)
