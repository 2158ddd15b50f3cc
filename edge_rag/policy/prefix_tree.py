"""Finding a stored prompt state that begins as a new prompt does.

A state covers a path: the keys of its segments in order. Any leading part of it can be used, because a state can be cut
behind a segment; what comes later cannot, because attention has seen what stood before. Paths have a handful of
segments, so every leading part is simply a key of one dictionary.
"""

Path = tuple[str, ...]


class PrefixTree:
    """The names of stored states by what they cover. Not thread-safe."""

    def __init__(self) -> None:
        self._paths: dict[str, Path] = {}
        self._names: dict[Path, dict[str, None]] = {}  # of each leading part; the newest name is the last

    def add(self, path: Path, name: str) -> None:
        """Note that the state `name` covers `path`. A name has one path: the latest."""
        self.remove(name)
        self._paths[name] = path
        for end in range(1, len(path) + 1):
            self._names.setdefault(path[:end], {})[name] = None

    def longest(self, path: Path) -> tuple[int, str | None]:
        """How many leading segments of `path` some state covers, and which: (0, None) if none.

        Among several, one that ends exactly there (nothing has to be cut), then the newest.
        """
        for end in range(len(path), 0, -1):
            if names := self._names.get(path[:end]):
                newest_first = list(reversed(names))
                exact = (name for name in newest_first if len(self._paths[name]) == end)
                return end, next(exact, newest_first[0])
        return 0, None

    def remove(self, name: str) -> None:
        """Forget a state. Idempotent."""
        path = self._paths.pop(name, ())
        for end in range(1, len(path) + 1):
            names = self._names[path[:end]]
            del names[name]
            if not names:
                del self._names[path[:end]]

    def __len__(self) -> int:
        return len(self._paths)
