"""What a comparison of the engine's weights with the segment's says about one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["equal", "differs", "not checkable"]


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """Attributes:
    name: Hugging Face name.
    status: ``"not checkable"`` never means equal.
    max_relative_error: max |engine - segment| / max |segment|; ``None`` if not checkable.
    reason: why it is not checkable, or what was compared.
    """

    name: str
    status: Status
    max_relative_error: float | None
    reason: str
