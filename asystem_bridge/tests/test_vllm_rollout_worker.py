"""The rollout worker on a real vLLM engine, compared with transformers on the same weights.

One engine for the module: a tiny Qwen3 whose output head is its embedding (a weight update must
reach both).  Each test begins with an update to the weights that it wants.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

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
from megatron_c3po.engine import Delta, Submission

pytest.importorskip("vllm")
pytestmark = pytest.mark.engine

EOS = 1
VOCAB = 100  # vLLM pads it to 128
BATCHED_TOKENS = 256
LOGPROB_TOLERANCE = 1e-4  # float32; 1e-6 was seen
MODELS = ("first", "second")


@dataclasses.dataclass
class Setting:
    engine: VllmProcessEngine
    segment: WeightSegment
    weights: dict[str, dict[str, torch.Tensor]]
    references: dict[str, torch.nn.Module]
    info: dict[str, object]
    version: int = 0

    def load(self, model: str) -> None:
        """Put a model's weights into the engine."""
        for name, tensor in self.weights[model].items():
            self.segment.views[name].copy_(tensor)
        self.version += 1
        self.engine.update_weights(self.version)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("rollout_worker")
    checkpoints = {
        model: write_tiny_checkpoint(
            folder / model, "qwen3", seed=seed, vocab_size=VOCAB, tie_word_embeddings=True
        )
        for seed, model in enumerate(MODELS)
    }
    weights = {
        model: load_file(checkpoint / "model.safetensors")
        for model, checkpoint in checkpoints.items()
    }
    layout = SegmentLayout.from_tensors(
        {name: (tensor.shape, torch.float32) for name, tensor in weights["first"].items()}
    )
    segment = WeightSegment.create(layout)
    worker = WorkerClient(
        WORKER_TARGET,
        name="vllm",
        log_path=folder / "vllm.log",
        environment=vllm_environment(),
    )
    try:
        worker.wait_started()
        engine = VllmProcessEngine(worker)
        info = engine.setup(
            RolloutOptions(
                checkpoint_dir=checkpoints["first"],
                dtype="float32",
                max_model_len=256,
                max_num_seqs=8,
                max_num_batched_tokens=BATCHED_TOKENS,
                kv_cache_gib=0.125,
                enforce_eager=True,
            )
        )
        engine.attach_weights(segment)
        references = {
            model: transformers_reference(checkpoint) for model, checkpoint in checkpoints.items()
        }
        yield Setting(engine, segment, weights, references, info)
    finally:
        worker.close()
        segment.close()


def some_tokens(count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(4, VOCAB) for _ in range(count)]


@torch.no_grad()
def reference_logprobs(model: torch.nn.Module, tokens: list[int]) -> list[float]:
    """Log-prob of tokens 1 .. n-1, from transformers."""
    logits = model(torch.tensor([tokens])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


@torch.no_grad()
def reference_greedy(model: torch.nn.Module, prompt: list[int], max_new_tokens: int) -> list[int]:
    """One argmax after the other, without a cache."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def finish(engine: VllmProcessEngine, steps: int = 200) -> dict[str, list[Delta]]:
    """Poll until nothing is under way."""
    deltas: dict[str, list[Delta]] = {}
    for _ in range(steps):
        new = engine.poll()
        if not new:
            return deltas
        for delta in new:
            deltas.setdefault(delta.uid, []).append(delta)
    raise AssertionError(f"still generating after {steps} steps")


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def logprobs_of(deltas: list[Delta]) -> list[float]:
    return [logprob for delta in deltas for logprob in delta.logprobs]


def test_setup_reports_the_engine(setting):
    assert setting.info["dtype"] == "float32"
    assert setting.info["eos_token_ids"] == [EOS]
    assert setting.info["num_kv_blocks"] * setting.info["block_size"] >= 8 * 256


def test_greedy_equals_transformers_after_every_update(setting):
    prompts = [some_tokens(count, seed=count) for count in (3, 17, 40)]
    for model in ("second", "first", "second"):
        setting.load(model)
        expected = [reference_greedy(setting.references[model], prompt, 24) for prompt in prompts]
        assert setting.engine.greedy(prompts, 24) == expected


@pytest.mark.parametrize("model", MODELS)
def test_prompt_logprobs_equal_transformers(setting, model):
    setting.load(model)
    sequences = [some_tokens(count, seed=100 + count) for count in (2, 30, 130)]
    for _ in range(2):  # the second time the prefix cache could answer
        for found, sequence in zip(
            setting.engine.prompt_logprobs(sequences), sequences, strict=True
        ):
            expected = reference_logprobs(setting.references[model], sequence)
            assert found == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


def test_behaviour_logprobs_are_those_of_the_sampling_distribution(setting):
    setting.load("second")
    prompts = {f"p{i}/0": some_tokens(5 + i, seed=200 + i) for i in range(8)}
    setting.engine.submit(
        Submission(uid=uid, token_ids=prompt, max_new_tokens=30, seed=i)
        for i, (uid, prompt) in enumerate(prompts.items())
    )
    deltas = finish(setting.engine)
    assert deltas.keys() == prompts.keys()
    for uid, prompt in prompts.items():
        tokens = tokens_of(deltas[uid])
        assert all(len(delta.token_ids) == 1 for delta in deltas[uid])  # one poll, one token
        assert [delta.finish_reason for delta in deltas[uid][:-1]] == [None] * (len(tokens) - 1)
        reason = deltas[uid][-1].finish_reason
        assert reason == ("stop" if tokens[-1] == EOS else "length")
        assert len(tokens) == 30 or reason == "stop"
        expected = reference_logprobs(setting.references["second"], prompt + tokens)
        assert logprobs_of(deltas[uid]) == pytest.approx(
            expected[len(prompt) - 1 :], abs=LOGPROB_TOLERANCE
        )


def test_seeded_prompts_that_do_not_fit_into_one_step(setting):
    """vLLM would split a prompt between two steps, which a seeded request does not survive."""
    setting.load("first")
    prompts = {f"q{i}": some_tokens(100, seed=700 + i) for i in range(12)}
    assert sum(map(len, prompts.values())) > 2 * BATCHED_TOKENS
    setting.engine.submit(
        Submission(uid=uid, token_ids=prompt, max_new_tokens=3, seed=i)
        for i, (uid, prompt) in enumerate(prompts.items())
    )
    deltas: dict[str, list[Delta]] = {}
    while len(deltas) < 12 or any(each[-1].finish_reason is None for each in deltas.values()):
        for delta in setting.engine.poll():
            deltas.setdefault(delta.uid, []).append(delta)
    for uid, prompt in prompts.items():
        expected = reference_logprobs(setting.references["first"], prompt + tokens_of(deltas[uid]))
        assert logprobs_of(deltas[uid]) == pytest.approx(
            expected[len(prompt) - 1 :], abs=LOGPROB_TOLERANCE
        )


def test_samples_follow_the_distribution_and_the_seed(setting):
    setting.load("first")
    prompt = some_tokens(9, seed=300)

    def first_tokens(seeds: range) -> list[int]:
        setting.engine.submit(
            Submission(uid=f"s{seed}", token_ids=prompt, max_new_tokens=1, seed=seed)
            for seed in seeds
        )
        deltas = finish(setting.engine)
        return [tokens_of(deltas[f"s{seed}"])[0] for seed in seeds]

    tokens = first_tokens(range(600))
    assert first_tokens(range(20)) == tokens[:20]
    with torch.no_grad():
        logits = setting.references["first"](torch.tensor([prompt])).logits[0, -1]
    expected = logits.softmax(-1)
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB)
    # Half the total variation; 600 draws from 100 near-uniform tokens give about 0.16.
    assert (counts / 600 - expected).abs().sum() / 2 < 0.25
    assert (expected**2).sum() < 0.1  # so a sampler that repeats itself could not pass


def test_an_aborted_rollout_goes_on_as_if_never_stopped(setting):
    """Prefill and decode agree: the distribution after a resume is that of the whole text."""
    setting.load("second")
    engine, reference = setting.engine, setting.references["second"]
    prompt = some_tokens(20, seed=400)
    engine.submit([Submission(uid="r/0", token_ids=prompt, max_new_tokens=40, seed=1)])
    tokens: list[int] = []
    logprobs: list[float] = []
    for cut in (7, 11):
        for _ in range(cut):
            (delta,) = engine.poll()
            tokens += delta.token_ids
            logprobs += delta.logprobs
        engine.abort(["r/0", "never submitted"])
        engine.submit(
            [
                Submission(
                    uid="r/0",
                    token_ids=prompt + tokens,
                    max_new_tokens=40 - len(tokens),
                    seed=len(tokens),
                )
            ]
        )
    rest = finish(engine)["r/0"]
    tokens += tokens_of(rest)
    logprobs += logprobs_of(rest)
    assert len(tokens) == 40 or tokens[-1] == EOS
    expected = reference_logprobs(reference, prompt + tokens)[len(prompt) - 1 :]
    assert logprobs == pytest.approx(expected, abs=LOGPROB_TOLERANCE)
    whole = reference_greedy(reference, prompt, 24)
    assert engine.greedy([prompt], 10) == [whole[:10]]
    assert engine.greedy([prompt + whole[:10]], 14) == [whole[10:]]


def test_no_output_of_an_aborted_rollout_leaks_into_its_successor(setting):
    setting.load("first")
    engine = setting.engine
    old, new = some_tokens(10, seed=500), some_tokens(10, seed=501)
    engine.submit([Submission(uid="x/0", token_ids=old, max_new_tokens=20, seed=0)])
    engine.poll()
    engine.abort(["x/0"])
    engine.submit([Submission(uid="x/0", token_ids=new, max_new_tokens=12, seed=0)])
    deltas = finish(engine)["x/0"]
    tokens = tokens_of(deltas)
    assert len(tokens) == 12 or tokens[-1] == EOS
    expected = reference_logprobs(setting.references["first"], new + tokens)[len(new) - 1 :]
    assert logprobs_of(deltas) == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


def test_a_submission_aborted_before_the_next_poll_never_runs(setting):
    setting.load("first")
    setting.engine.submit(
        [Submission(uid="gone", token_ids=some_tokens(4, seed=1), max_new_tokens=4, seed=0)]
    )
    setting.engine.abort(["gone"])
    assert setting.engine.poll() == []


def test_nothing_computed_with_old_weights_is_reused(setting):
    """The long prompt fills whole blocks of the prefix cache before the update."""
    prompt = some_tokens(200, seed=600)
    for model in ("first", "second"):
        setting.load(model)
        expected = reference_greedy(setting.references[model], prompt, 8)
        assert setting.engine.greedy([prompt], 8) == [expected]
        assert setting.engine.greedy([prompt], 8) == [expected]  # now from the cache


def test_an_update_waits_for_nobody(setting):
    """It is refused while a rollout is under way, and works once that is aborted."""
    setting.load("first")
    engine = setting.engine
    engine.submit([Submission(uid="u", token_ids=some_tokens(5, 7), max_new_tokens=50, seed=0)])
    engine.poll()
    for refused in (
        lambda: engine.update_weights(99),
        lambda: engine.greedy([[5, 6]], 1),
        lambda: engine.prompt_logprobs([[5, 6]]),
        engine.diagnose,
    ):
        with pytest.raises(WorkerError, match="1 rollouts are under way; abort them first"):
            refused()
    engine.abort(["u"])
    setting.load("second")
    assert setting.engine.poll() == []


def test_a_rollout_cannot_be_submitted_twice(setting):
    setting.load("first")
    engine = setting.engine
    submission = Submission(uid="twice", token_ids=[5, 6], max_new_tokens=50, seed=0)
    engine.submit([submission])
    engine.poll()
    engine.submit([submission])
    with pytest.raises(WorkerError, match="twice was submitted twice"):
        engine.poll()
    engine.abort(["twice"])
    assert engine.poll() == []


def test_diagnose_finds_every_tensor_equal_after_an_update(setting):
    setting.load("second")
    reports = setting.engine.diagnose()
    assert [report.name for report in reports] == setting.segment.layout.names
    assert {report.status for report in reports} == {"equal"}
    assert {report.max_relative_error for report in reports} == {0.0}


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
    ],
)
def test_diagnose_names_exactly_the_tensor_that_differs(setting, name):
    setting.load("first")
    damaged = setting.segment.views[name]
    damaged.view(-1)[-1] += 0.01 * damaged.abs().max()
    (report,) = (report for report in setting.engine.diagnose() if report.status != "equal")
    assert (report.name, report.status) == (name, "differs")
    assert report.max_relative_error == pytest.approx(0.01, rel=0.02)
