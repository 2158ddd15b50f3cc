"""The border of the Python interface: what callers pass is checked here, once, and becomes records.

Plain dicts and lists are taken for records and tuples (`{"role": "user", "content": "…"}` for a `Turn`); anything that
does not fit is an InputError that names the argument.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from edge_rag.config import Settings
from edge_rag.errors import InputError
from edge_rag.reading.kinds import KINDS
from edge_rag.records import Filter, Sampling, Turn

T = TypeVar("T")


def converted(value: Any, kind: type[T], field: str) -> T:
    """`value` as a `kind`. Raises InputError naming `field` and the place inside it."""
    try:
        return msgspec.convert(msgspec.to_builtins(value), kind)
    except (msgspec.ValidationError, TypeError, UnicodeEncodeError) as error:
        reason, _, place = str(error).partition(" - at `$")
        raise InputError(reason, field=field + place.rstrip("`")) from error


def as_text(value: Any, field: str) -> str:
    """`value` when it is a str."""
    if not isinstance(value, str):
        raise InputError(f"must be a str, not {type(value).__name__}", field=field)
    return value


def as_paths(paths: Iterable[Any]) -> list[Path]:
    """Paths with '~' expanded."""
    given = list(paths)
    if not given:
        raise InputError("names nothing", field="paths", remedy="give a file or a folder")
    for path in given:
        if not isinstance(path, str | Path):
            raise InputError(f"must be str or Path, not {type(path).__name__}", field="paths")
    return [Path(path).expanduser() for path in given]


def as_globs(patterns: Any, field: str) -> tuple[str, ...]:
    """Globs; a single one may be given as it is."""
    return (patterns,) if isinstance(patterns, str) else converted(patterns, tuple[str, ...], field)


def as_history(history: Any) -> tuple[Turn, ...]:
    """Turns, or dicts with role and content."""
    return converted(history, tuple[Turn, ...], "history")


def as_filter(where: Any) -> Filter | None:
    """A `Filter`, or a dict with its fields; kinds must be known ones."""
    if where is None:
        return None
    checked = converted(where, Filter, "where")
    known = sorted(set(KINDS.values()))
    for kind in checked.kinds:
        if kind not in known:
            raise InputError(f"unknown type {kind!r}", field="where.kinds", remedy="known are " + ", ".join(known))
    return checked


def as_limit(limit: Any) -> int:
    """A positive int."""
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise InputError(f"must be a positive int, not {limit!r}", field="limit")
    return limit


def as_sampling(settings: Settings, overrides: Mapping[str, Any]) -> Sampling:
    """Sampling from the settings with `overrides` (None = as set), held to the settings' bounds."""
    known = Sampling.__struct_fields__
    for name in overrides:
        if name not in known:
            raise InputError("unknown option", field=name, remedy="known are " + ", ".join(known))
    given = {name: value for name, value in overrides.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    try:
        values = msgspec.convert(msgspec.to_builtins(settings.answering) | given, type(settings.answering))
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$.")
        raise InputError(reason, field=place.rstrip("`")) from error
    return replace(Sampling(), **{name: getattr(values, name) for name in known})
