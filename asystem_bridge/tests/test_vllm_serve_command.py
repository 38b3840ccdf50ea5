"""The documented command serves new weights that a trainer sends through vLLM's own HTTP client.

``vllm serve MODEL --weight-transfer-config '{"backend":"asystem"}'`` with VLLM_SERVER_DEV_MODE=1,
which vLLM asks for to offer its weight-update routes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import write_tiny_checkpoint

from asystem_bridge.models.char_tokenizer import char_tokenizer
from asystem_bridge.vllm_backend.client import vllm_environment
from asystem_bridge.weights.transformers_reference import transformers_reference

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.slow]

START_TIMEOUT_S = 400
PROMPTS = [[5, 6, 7, 8], [20, 21, 9, 40, 41, 42, 43]]
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("serve")
    made = []
    for seed in range(2):
        directory = write_tiny_checkpoint(folder / str(seed), "qwen3", seed=seed, vocab_size=64)
        char_tokenizer(model_max_length=256).save_pretrained(directory)
        made.append(directory)
    return made


@pytest.fixture(scope="module")
def url(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import requests

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, **vllm_environment(), "VLLM_SERVER_DEV_MODE": "1"}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # the server's engine has its own process
    log_path = tmp_path_factory.mktemp("log") / "serve.log"
    with log_path.open("wb") as log:
        server = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("vllm")), "serve", str(checkpoints[0]),
                "--weight-transfer-config", '{"backend":"asystem"}',
                "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4",
                "--kv-cache-memory-bytes", str(2**27), "--enforce-eager",
                "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        base_url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert server.poll() is None, log_path.read_text()[-5000:]
            assert time.monotonic() < deadline, log_path.read_text()[-5000:]
            try:
                if requests.get(f"{base_url}/health", timeout=5).status_code == 200:
                    break
            except requests.ConnectionError:
                time.sleep(1)
        yield base_url
    finally:
        server.terminate()  # killed outright, vLLM's own message queues stay in /dev/shm
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def post(url: str, **kwargs: Any) -> Any:
    import requests

    response = requests.post(url, timeout=120, **kwargs)
    assert response.status_code == 200, response.text
    return response.json()


def completions(url: str) -> list[list[int]]:
    reply = post(
        f"{url}/v1/completions",
        json={
            "model": "tiny",
            "prompt": PROMPTS,
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    return [choice["token_ids"] for choice in reply["choices"]]


@torch.no_grad()
def greedy(model: torch.nn.Module) -> list[list[int]]:
    results = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(NEW_TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        results.append(tokens[len(prompt) :])
    return results


def test_completions_are_those_of_the_weights_that_were_sent(url, checkpoints):
    import requests
    from vllm.distributed.weight_transfer import (
        HTTPVLLMWeightSyncClient,
        ModuleSource,
        WeightTransferTrainerFactory,
    )

    from asystem_bridge.vllm_backend.plugin import register
    from asystem_bridge.vllm_backend.sender import SegmentSenderInit

    first, second = (transformers_reference(checkpoint) for checkpoint in checkpoints)
    old, new = greedy(first), greedy(second)
    assert old != new
    assert completions(url) == old

    register()  # vLLM does this in its own processes; this one is a trainer's
    model = second.to(torch.float64)  # the sender casts to the engine's dtype
    sender = WeightTransferTrainerFactory.trainer_init(
        SegmentSenderInit(rank=0, dtype_name="float32"),
        client=HTTPVLLMWeightSyncClient(url),
        source=ModuleSource(model),
    )
    try:
        for version, weights, expected in (("1", None, new), ("2", first.state_dict(), old)):
            if weights is not None:
                model.load_state_dict(weights)
            post(f"{url}/pause", params={"mode": "abort"})
            sender.send_weights()
            post(f"{url}/resume")
            assert completions(url) == expected
            info = requests.get(f"{url}/weight_info", timeout=60).json()
            assert info == {"weight_version": version}
    finally:
        sender.shutdown()
