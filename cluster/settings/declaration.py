"""How a setting is declared: once, as a field with its default, meaning and limits.

    class WorkerSettings:
        count: int = setting(3, "Number of workers.", least=1, most=4096)

The limits are checked whenever a table is made. From the same declaration follow the setting's
names (`cluster/settings/names.py`), its flag and the JSON schema (`cluster/settings/sources.py`).
Nothing outside the standard library is imported, because every process reads settings.
"""

from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields
from typing import Any, TypeVar

from milliways.wire.errors import ConfigError

T = TypeVar("T")


def setting(
    default: T,
    text: str,
    *,
    least: float | None = None,
    most: float | None = None,
    one_of: tuple[str, ...] = (),
) -> T:
    """Declares a field of a table; `text` says what it means, with its unit."""
    return _declared(text, least, most, one_of, default=default)


def setting_made_by(make: Callable[[], T], text: str) -> T:
    """As `setting`, for a default that each table makes for itself."""
    return _declared(text, None, None, (), default_factory=make)


def _declared(
    text: str, least: float | None, most: float | None, one_of: tuple[str, ...], **default: Any
) -> Any:
    # Keys with the names of pydantic's own: it reads them where it reads these classes.
    metadata: dict[str, Any] = {"description": text, "strict": True}
    if least is not None:
        metadata["ge"] = least
    if most is not None:
        metadata["le"] = most
    if one_of:
        metadata["json_schema_extra"] = {"enum": list(one_of)}
    return field(metadata=metadata, **default)


def description_of(declared: Field[Any]) -> str:
    """What a setting means."""
    return declared.metadata.get("description", "")


def choices_of(declared: Field[Any]) -> tuple[str, ...]:
    """The values that a setting may have, if they are listed."""
    return tuple(declared.metadata.get("json_schema_extra", {}).get("enum", ()))


def limit_of(declared: Field[Any]) -> str:
    """What a setting's value must be, as a text that continues "must be"; empty if anything."""
    if choices := choices_of(declared):
        return f"one of {', '.join(choices)}"
    if "ge" in declared.metadata:
        return f"between {declared.metadata['ge']:g} and {declared.metadata['le']:g}"
    return ""


def check(table: str, settings: Any) -> None:
    """Checks every field of a table against its declared limits.

    Raises:
        ConfigError: names table, field, value and limit.
    """
    for declared in fields(settings):
        value = getattr(settings, declared.name)
        if not _is_within(declared.metadata, value):
            raise ConfigError(f"{table}.{declared.name}", value, limit_of(declared))


def check_between(name: str, value: float, least: float, most: float) -> None:
    """Raises ConfigError unless a value is within limits that depend on other settings."""
    if not least <= value <= most:
        raise ConfigError(name, value, f"between {least:g} and {most:g}")


def _is_within(metadata: Mapping[str, Any], value: Any) -> bool:
    if choices := metadata.get("json_schema_extra"):
        return value in choices["enum"]
    if "ge" not in metadata:
        return True
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and metadata["ge"] <= value <= metadata["le"]
