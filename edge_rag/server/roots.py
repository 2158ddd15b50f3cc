"""Which paths a server reads: those below `server.roots`, with all links followed."""

import os
from collections.abc import Sequence
from pathlib import Path

from edge_rag.errors import InputError
from edge_rag.reading.walk import find_files


def absolute(paths: Sequence[str]) -> list[Path]:
    """Paths with '~' expanded. Raises InputError for a relative one: a server's current folder is nobody's."""
    given = []
    for name in paths:
        path = _expanded(name)
        if "\0" in name or not path.is_absolute():
            raise InputError(f"{name!r} is no absolute path", field="paths", remedy="send absolute paths")
        given.append(path)
    return given


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # there is no such user
        return Path(name)


def readable(
    paths: Sequence[str], roots: Sequence[str], *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[Path]:
    """The paths, when they and all files to be read below them are below `roots` (default: the home folder).

    Reads folders. Raises InputError for the first that is not, be it for a link on its way.
    """
    given = absolute(paths)
    allowed = _folders(roots)
    _check(given, allowed)  # first, so that no folder is read that may not be
    _check(find_files(given, include=include, exclude=exclude).files, allowed)
    return given


def below(name: str, roots: Sequence[str]) -> Path:
    """One path, of a file that need not be there yet, when it is below `roots`. Raises InputError naming `path`."""
    try:
        [path] = absolute((name,))
        _check([path], _folders(roots))
    except InputError as error:
        raise InputError(error.message, field="path", remedy="name one in a folder of server.roots") from error
    return path


def _folders(roots: Sequence[str]) -> list[Path]:
    return [Path(os.path.realpath(Path(root).expanduser())) for root in roots or ("~",)]


def _check(paths: Sequence[Path], allowed: Sequence[Path]) -> None:
    for path in paths:
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(root) for root in allowed):
            raise InputError(
                f"{path} is not below {' or '.join(map(str, allowed))}",
                field="paths",
                remedy="add its folder to server.roots, exclude it, or upload the file",
            )
