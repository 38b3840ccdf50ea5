"""A checkpoint by name or by folder."""

from __future__ import annotations

from pathlib import Path

from asystem_bridge.errors import ModelError
from asystem_bridge.models.cache import cached_folder
from asystem_bridge.models.smollm2 import smollm2_checkpoint
from asystem_bridge.models.tiny_ring import tiny_ring_checkpoint

NAMES = ("smollm2", "tiny-ring")

TINY_RING_BYTES = 8 * 2**20


def checkpoint_folder(name_or_path: str) -> Path:
    """The folder of a Hugging Face checkpoint; a named model is made in the cache if needed.

    Raises:
        ModelError: it is neither a name nor a folder with a ``config.json``.
    """
    if name_or_path == "smollm2":
        return smollm2_checkpoint()
    if name_or_path == "tiny-ring":
        return cached_folder("tiny-ring-1", _make_tiny_ring, needed_bytes=TINY_RING_BYTES)
    path = Path(name_or_path).expanduser()
    if not (path / "config.json").is_file():
        raise ModelError(
            f"model.checkpoint = {name_or_path!r}: neither one of {', '.join(NAMES)} nor a folder "
            "with a Hugging Face checkpoint (no config.json there)"
        )
    return path.absolute()


def _make_tiny_ring(folder: Path) -> None:
    tiny_ring_checkpoint(folder, seed=0)
