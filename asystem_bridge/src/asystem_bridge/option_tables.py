"""Tables of a configuration file as option classes: strict types, unknown keys refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from asystem_bridge.errors import ConfigError

T = TypeVar("T")


def options_from_table(
    kind: type[T],
    table: Any,
    *,
    where: str,
    supplied: Mapping[str, Any] | None = None,
) -> T:
    """Make ``kind``, a dataclass, from the plain values of a table.

    Args:
        kind: its fields are the allowed keys.
        table: what the file says.
        where: of the table, such as ``"file.toml: [c3po]"``, for messages.
        supplied: fields that the file may not set.

    Raises:
        ConfigError: naming each key that is unknown, missing, of a wrong type or refused by the
            class itself.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: must be a table of keys and values, got {table!r}")
    supplied = supplied or {}
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    refuse_unknown(table, [name for name in names if name not in supplied], where)
    try:
        # Through JSON, since pydantic's strict mode makes a dataclass from nothing else.
        values = json.dumps({**table, **supplied})
        return TypeAdapter(kind).validate_json(values, strict=True)
    except TypeError as error:  # a date, which TOML has and JSON has not
        raise ConfigError(f"{where}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{where}: {'; '.join(map(_problem, error.errors()))}") from None


def refuse_unknown(table: Mapping[str, Any], allowed: list[str], where: str) -> None:
    """Raises: ConfigError, if the table has another key than those allowed."""
    unknown = sorted(table.keys() - set(allowed))
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {', '.join(unknown)}; allowed are {', '.join(sorted(allowed))}"
        )


def _problem(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":  # the class itself refused it and names the key
        return str(message)
    if detail["type"] == "missing":
        return f"{key} is missing and has no default"
    return f"{key} = {detail['input']!r}: {message}"
