"""Reading and writing a Hugging Face checkpoint folder (safetensors, whole or in several files).

Reading touches only the bytes that are asked for.  Writing is atomic: everything goes into a
temporary folder beside the target, which is renamed when it is complete.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from asystem_bridge.durable_files import sync_to_disk
from asystem_bridge.errors import CheckpointError, ModelError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_FILE_BYTES = 4 * 1024**3

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class TensorMetadata:
    """What the header of a safetensors file says about a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class HfCheckpoint:
    """The tensors of a checkpoint folder, read piece by piece.

    Attributes:
        directory: the folder.
        tensors: name -> shape and dtype, sorted by name.

    Raises:
        ModelError: no safetensors files, or a file is missing, damaged or of an unknown dtype.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, TensorMetadata] = {}
        self._files: dict[str, Any] = {}  # tensor name -> open safetensors file
        for file_name in self._file_names():
            self._open(directory / file_name)
        self.tensors = dict(sorted(self.tensors.items()))

    def read(
        self, name: str, start: Sequence[int] | None = None, size: Sequence[int] | None = None
    ) -> torch.Tensor:
        """A whole tensor, or the box of ``size`` elements from ``start`` on each axis.

        Raises:
            ModelError: there is no such tensor or box.
        """
        if name not in self.tensors:
            raise ModelError(f"{self.directory} has no tensor {name}")
        shape = self.tensors[name].shape
        if start is None or size is None:
            return self._files[name].get_tensor(name)  # type: ignore[no-any-return]
        outside = len(start) != len(shape) or any(
            first < 0 or first + count > extent
            for first, count, extent in zip(start, size, shape, strict=False)
        )
        if outside:
            raise ModelError(
                f"{self.directory}: {name} has shape {shape}, asked for {tuple(size)} from "
                f"{tuple(start)}"
            )
        slices = tuple(slice(first, first + n) for first, n in zip(start, size, strict=True))
        return self._files[name].get_slice(name)[slices]  # type: ignore[no-any-return]

    def _file_names(self) -> list[str]:
        index = self.directory / INDEX_FILE
        if index.exists():
            return sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if (self.directory / WEIGHTS_FILE).exists():
            return [WEIGHTS_FILE]
        raise ModelError(
            f"{self.directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}: convert the checkpoint "
            "to safetensors"
        )

    def _open(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from None
        for name in file.keys():  # noqa: SIM118  a safetensors file is no mapping
            tensor = file.get_slice(name)
            dtype = _DTYPES.get(tensor.get_dtype())
            if dtype is None:
                raise ModelError(
                    f"{path}: {name} is {tensor.get_dtype()}, supported are {sorted(_DTYPES)}"
                )
            self.tensors[name] = TensorMetadata(tuple(tensor.get_shape()), dtype)
            self._files[name] = file


def write_hf_checkpoint(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    source_directory: Path,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a complete checkpoint folder, or nothing.

    Args:
        directory: must not exist yet.
        tensors: full tensors under their Hugging Face names.
        source_directory: its config, tokenizer and other small files are copied.
        max_file_bytes: tensors are spread over several files above this size.

    Raises:
        CheckpointError: the folder exists, or the disk is full or not writable.
    """
    if directory.exists():
        raise CheckpointError(f"{directory} exists already: remove it or choose another folder")
    temporary: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        _copy_small_files(source_directory, temporary)
        _write_tensors(temporary, tensors, max_file_bytes)
        for path in (*temporary.iterdir(), temporary):
            sync_to_disk(path)
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.rename(directory)
        sync_to_disk(directory.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} could not be written: {error}. Nothing was left behind; free some space "
            "or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already when it was renamed


def _copy_small_files(source: Path, target: Path) -> None:
    suffixes = {".json", ".jinja", ".txt", ".model", ".py"}
    for path in source.iterdir():
        if path.is_file() and path.suffix in suffixes and path.name != INDEX_FILE:
            shutil.copyfile(path, target / path.name)


def _write_tensors(
    directory: Path, tensors: Mapping[str, torch.Tensor], max_file_bytes: int
) -> None:
    parts: list[dict[str, torch.Tensor]] = [{}]
    part_bytes = 0
    for name, tensor in tensors.items():
        if parts[-1] and part_bytes + tensor.nbytes > max_file_bytes:
            parts.append({})
            part_bytes = 0
        parts[-1][name] = tensor.detach().contiguous()
        part_bytes += tensor.nbytes
    metadata = {"format": "pt"}
    if len(parts) == 1:
        save_file(parts[0], directory / WEIGHTS_FILE, metadata=metadata)
        return
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file_name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, directory / file_name, metadata=metadata)
        weight_map.update(dict.fromkeys(part, file_name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
