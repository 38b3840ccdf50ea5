"""Checkpoint folders: metadata without loading, boxes, atomic writing."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_tiny_checkpoint

from asystem_bridge.errors import CheckpointError, ModelError
from asystem_bridge.weights.architecture import Architecture
from asystem_bridge.weights.hf_checkpoint import HfCheckpoint, TensorMetadata, write_hf_checkpoint
from asystem_bridge.weights.layout import hf_tensor_shapes

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = write_tiny_checkpoint(tmp_path / "source", "qwen3")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("hello")
    return directory


def test_metadata_and_boxes(source: Path) -> None:
    checkpoint = HfCheckpoint(source)
    shapes = {name: metadata.shape for name, metadata in checkpoint.tensors.items()}
    assert shapes == hf_tensor_shapes(Architecture.from_checkpoint(source))
    assert checkpoint.tensors[NAME] == TensorMetadata((64, 96), torch.float32)
    whole = load_file(source / "model.safetensors")[NAME]
    assert torch.equal(checkpoint.read(NAME), whole)
    assert torch.equal(checkpoint.read(NAME, (3, 10), (5, 20)), whole[3:8, 10:30])


def test_reading_what_is_not_there(source: Path, tmp_path: Path) -> None:
    checkpoint = HfCheckpoint(source)
    with pytest.raises(ModelError, match=r"has no tensor nonsense"):
        checkpoint.read("nonsense")
    with pytest.raises(
        ModelError, match=r"has shape \(64, 96\), asked for \(5, 90\) from \(3, 10\)"
    ):
        checkpoint.read(NAME, (3, 10), (5, 90))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="convert the checkpoint to safetensors"):
        HfCheckpoint(empty)


def test_damaged_file_and_unknown_dtype(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json")
    with pytest.raises(ModelError, match="cannot be read"):
        HfCheckpoint(tmp_path)
    save_file({"x": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"x is I8, supported are"):
        HfCheckpoint(tmp_path)


@pytest.mark.parametrize("max_file_bytes", [2**30, 40_000])
def test_what_is_written_loads_in_transformers(
    source: Path, tmp_path: Path, max_file_bytes: int
) -> None:
    from transformers import AutoModelForCausalLM

    tensors = load_file(source / "model.safetensors")
    target = tmp_path / "out" / "checkpoint"
    write_hf_checkpoint(target, tensors, source_directory=source, max_file_bytes=max_file_bytes)
    files = sorted(path.name for path in target.iterdir())
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} < set(files)
    assert ("model.safetensors" in files) == (max_file_bytes > 40_000)
    assert [path.name for path in target.parent.iterdir()] == ["checkpoint"]
    checkpoint = HfCheckpoint(target)
    assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in tensors)
    assert checkpoint.tensors.keys() == tensors.keys()
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], tensors[name]) for name in tensors)


def test_existing_folder_is_not_touched(source: Path) -> None:
    before = (source / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        write_hf_checkpoint(source, {"x": torch.zeros(1)}, source_directory=source)
    assert (source / "model.safetensors").read_bytes() == before


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """No file of this process may grow beyond this: what a full disk looks like to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_nothing(source: Path, tmp_path: Path, file_size_limit: int) -> None:
    tensors = load_file(source / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) > file_size_limit
    target = tmp_path / "out" / "checkpoint"
    with pytest.raises(CheckpointError, match="could not be written"):
        write_hf_checkpoint(target, tensors, source_directory=source)
    assert list(target.parent.iterdir()) == []
