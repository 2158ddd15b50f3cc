"""The part of `Client` that is about what was learned: the methods of `runtime.learned`, asked of a server."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from msgspec import Struct

from edge_rag.records import Adapter, Cluster, ClusterView, LearningStatus, Lesson, RouterStatus
from edge_rag.runtime import checked
from edge_rag.wire import Wire, decoded

if TYPE_CHECKING:
    from edge_rag.policy.hindsight import Comparison


class Learned:
    """What the server has learned from questions, and how to look at it, to undo it, and to learn more."""

    _wire: Wire

    def clusters(self) -> list[Cluster]:
        """Passages that are asked for together, the heaviest cluster first."""
        return self._wire.call("GET", "/clusters", list[Cluster])

    def cluster(self, cluster_id: int) -> ClusterView:
        """A cluster with its passages and the questions about them. Raises NotFound."""
        return self._wire.call("GET", f"/clusters/{checked.converted(cluster_id, int, 'id')}", ClusterView)

    def adapters(self) -> list[Adapter]:
        """All adapters, the oldest first; also those that are not used, with the reason."""
        return self._wire.call("GET", "/adapters", list[Adapter])

    def adapter(self, adapter_id: str) -> Adapter:
        """The adapter whose id begins so. Raises NotFound, or InputError when there are several."""
        return self._wire.call("GET", _place(adapter_id), Adapter)

    def pin_adapter(self, adapter_id: str, pinned: bool = True) -> Adapter:
        """Keep an adapter in fast memory as long as possible, or no longer. Raises as `adapter`."""
        return self._wire.call(
            "POST", _place(adapter_id), Adapter, {"pinned": checked.converted(pinned, bool, "pinned")}
        )

    def disable_adapter(self, adapter_id: str) -> Adapter:
        """Use an adapter no longer; its passages are read as text. Raises as `adapter`."""
        return self._wire.call("POST", _place(adapter_id), Adapter, {"enabled": False})

    def enable_adapter(self, adapter_id: str) -> Adapter:
        """Use a disabled adapter again. Raises as `adapter`, and InputError for one that failed its exam."""
        return self._wire.call("POST", _place(adapter_id), Adapter, {"enabled": True})

    def delete_adapter(self, adapter_id: str) -> Adapter:
        """Delete an adapter and its file. Raises as `adapter`."""
        return self._wire.call("DELETE", _place(adapter_id), Adapter)

    def export_adapter(self, adapter_id: str, target: str | Path) -> Adapter:
        """Have the server write an adapter into a new file below its `server.roots`. Raises as `adapter`."""
        [path] = absolute([target])
        return self._wire.call("POST", f"{_place(adapter_id)}/export", Adapter, {"path": path})

    def import_adapter(self, file: str | Path) -> Adapter:
        """Have the server take in an exported adapter from below its `server.roots`."""
        [path] = absolute([file])
        return self._wire.call("POST", "/adapters", Adapter, {"path": path})

    def router(self) -> RouterStatus:
        """How questions were routed, what came of each arm, and which adapters are to stay in fast memory."""
        return self._wire.call("GET", "/router", RouterStatus)

    def replay_router(self, rules: Sequence[str] = ("polar", "lru")) -> "Comparison":
        """Whether other residency rules would have done better on the server's journal, and plain retrieval."""
        from edge_rag.policy.hindsight import Comparison

        named = checked.converted(list(rules), list[str], "rules")
        return self._wire.call("POST", "/router/replay", Comparison, {"rules": named})

    def learn(
        self,
        *,
        least: float | None = 0.0,
        until: float | None = None,
        progress: Callable[[LearningStatus], None] | None = None,
    ) -> list[Lesson]:
        """Have the server learn now; as `EdgeRAG.learn`. A `least` of None is the server's own setting."""

        def tell(step: bytes) -> None:
            if progress:
                progress(decoded(step, LearningStatus))

        return self._wire.job("/learn", {"least": least, "until": until}, list[Lesson], tell)

    def idle_once(self) -> str:
        """Have the server do one piece of the work that is done while nobody asks; what it was, '' for nothing."""
        return self._wire.job("/idle", {}, _Done, lambda step: None).done


def absolute(paths: Iterable[str | Path]) -> list[str]:
    """Paths as the server must have them, whose current folder is another one."""
    return [str(path.absolute()) for path in checked.as_paths(paths)]


def _place(adapter_id: str) -> str:
    return "/adapters/" + quote(checked.as_text(adapter_id, "id"), safe="", errors="replace")


class _Done(Struct, frozen=True):
    done: str
