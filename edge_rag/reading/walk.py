"""Finding the files to read below the given paths."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pathspec import GitIgnoreSpec

from edge_rag.errors import InputError
from edge_rag.reading.kinds import EXTENSIONS, is_readable, printable
from edge_rag.records import Record

IGNORE_FILE = ".edgeragignore"
IGNORED_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages"})

# The ignore rules that hold in a folder, outermost first; each counts from the folder that its file lies in.
_Rules = tuple[tuple[Path, GitIgnoreSpec], ...]


class Walk(Record, frozen=True, kw_only=True):
    """What was found. Paths are absolute and sorted, and occur once.

    `folders` are the given paths that are folders; `problems` pair a printable path with a reason.
    """

    files: tuple[Path, ...]
    folders: tuple[Path, ...]
    problems: tuple[tuple[str, str], ...]


def find_files(paths: Sequence[Path], *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Walk:
    """The readable files among and below `paths`; reads folders and ignore files, never raises for a bad path.

    `include` and `exclude` are gitignore-style globs, counted from each given folder. A file that is itself in
    `paths` is taken whatever its extension and the rules.
    """
    search = _Search(_globs(include, "include"), _globs(exclude, "exclude"))
    for path in paths:
        search.start(path)
    return Walk(
        files=tuple(sorted(search.files)),
        folders=tuple(sorted(search.folders)),
        problems=tuple(dict.fromkeys(search.problems)),
    )


def _globs(patterns: Sequence[str], field: str) -> GitIgnoreSpec:
    try:
        return GitIgnoreSpec.from_lines(patterns)
    except ValueError as error:
        raise InputError(f"not a usable pattern ({error})", remedy="write it as in .gitignore", field=field) from error


class _Search:
    """One call of `find_files`: the patterns, and what has been found so far."""

    def __init__(self, include: GitIgnoreSpec, exclude: GitIgnoreSpec) -> None:
        self.include = include
        self.exclude = exclude
        self.files: set[Path] = set()
        self.folders: set[Path] = set()
        self.problems: list[tuple[str, str]] = []

    def start(self, given: Path) -> None:
        """Take one of the given paths."""
        if not self._nameable(given):
            return
        path = stored_name(given)
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            broken = "a link to something that does not exist" if path.is_symlink() else "no such file or folder"
            self._problem(path, broken)
        except OSError as error:
            self._problem(path, f"cannot be reached: {error.strerror}")
        else:
            if path.is_dir():
                self._folder(path.resolve())
            else:
                self.files.add(path)

    def _folder(self, root: Path) -> None:
        self.folders.add(root)
        problems = len(self.problems)
        found = set(self._below(root))
        self.files |= found
        if not found and len(self.problems) == problems:
            self._problem(root, f"no readable documents; read are {EXTENSIONS}, unless a rule leaves them out")

    def _below(self, root: Path) -> Iterator[Path]:
        # A stack, not recursion: folders may nest deeper than Python's call limit.
        stack: list[tuple[Path, _Rules]] = [(root, ())]
        while stack:
            folder, rules = stack.pop()
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                self._problem(folder, f"the folder cannot be listed: {error.strerror}")
                continue
            if any(entry.name == IGNORE_FILE for entry in entries):
                rules = self._with_rules_of(folder, rules)
            for entry in entries:
                path = folder / entry.name
                is_folder = _is_folder(entry)
                if not self._wanted(path, root, rules, is_folder):
                    continue
                if is_folder:
                    stack.append((path, rules))
                elif self._is_file(entry, path):
                    yield path

    def _with_rules_of(self, folder: Path, rules: _Rules) -> _Rules:
        try:
            lines = (folder / IGNORE_FILE).read_text(encoding="utf-8").splitlines()
            return (*rules, (folder, GitIgnoreSpec.from_lines(lines)))
        except (OSError, ValueError) as error:
            self._problem(folder / IGNORE_FILE, f"its rules are not applied: {error}")
            return rules

    def _wanted(self, path: Path, root: Path, rules: _Rules, is_folder: bool) -> bool:
        if path.name.startswith(".") or not self._by_kind(path, is_folder):
            return False
        name = _relative(path, root, is_folder)
        if self.exclude.match_file(name) or _ignored(path, rules, is_folder):
            return False
        return is_folder or not self.include.patterns or self.include.match_file(name)

    def _by_kind(self, path: Path, is_folder: bool) -> bool:
        if not is_folder:
            return is_readable(path)
        return path.name not in IGNORED_FOLDERS and not os.path.lexists(path / "pyvenv.cfg") and self._nameable(path)

    def _is_file(self, entry: os.DirEntry[str], path: Path) -> bool:
        try:
            return entry.is_file() and self._nameable(path)
        except OSError as error:
            self._problem(path, f"cannot be reached: {error.strerror}")
            return False

    def _nameable(self, path: Path) -> bool:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            self._problem(path, "the name is not valid UTF-8; rename it")
            return False
        return True

    def _problem(self, path: Path, reason: str) -> None:
        self.problems.append((printable(path), reason))


def stored_name(path: Path) -> Path:
    """The name under which a given path is stored: absolute, links followed but for the last part's own."""
    path = Path(os.path.normpath(Path.cwd() / path.expanduser()))
    try:
        return path.parent.resolve() / path.name
    except (OSError, RuntimeError):
        return path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # Links to folders are not followed: they may lead round in circles.
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _relative(path: Path, folder: Path, is_folder: bool) -> str:
    return path.relative_to(folder).as_posix() + ("/" if is_folder else "")


def _ignored(path: Path, rules: _Rules, is_folder: bool) -> bool:
    # As in git, the innermost ignore file that says anything about a path decides.
    for folder, spec in reversed(rules):
        verdict = spec.check_file(_relative(path, folder, is_folder)).include
        if verdict is not None:
            return verdict
    return False
