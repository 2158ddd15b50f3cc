"""The part of `EdgeRAG` that is about what was learned: clusters, adapters, and learning now instead of while idle."""

from collections.abc import Callable, Sequence
from pathlib import Path

from edge_rag.errors import ConfigError, InputError, NotFound
from edge_rag.policy.hindsight import Comparison
from edge_rag.policy.prompt import LAYOUT_VERSION
from edge_rag.records import Adapter, Cluster, ClusterView, LearningStatus, Lesson, RouterStatus
from edge_rag.runtime import checked
from edge_rag.runtime.house import House
from edge_rag.runtime.learner import Learner
from edge_rag.runtime.parts import MEGABYTE
from edge_rag.runtime.replaying import compare
from edge_rag.store import adapters, clusters, items, library
from edge_rag.store.adapter_bundle import export_bundle, import_bundle

MOST = (1 << 63) - 1  # what SQLite can number


class Learned:
    """What was learned from questions, and how to look at it, to undo it, and to learn more."""

    _house: House

    # --- clusters ----------------------------------------------------------------------------------------------------

    def clusters(self) -> list[Cluster]:
        """Passages that are asked for together, the heaviest cluster first."""
        with self._house.database.read() as connection:
            return sorted(clusters.clusters(connection), key=lambda each: (-each.weight, each.id))

    def cluster(self, cluster_id: int) -> ClusterView:
        """A cluster with its passages and the questions about them. Raises NotFound."""
        wanted = checked.converted(cluster_id, int, "id")
        if not 0 < wanted <= MOST:
            raise NotFound(f"there is no cluster {wanted}", field="id", remedy="see `edge-rag clusters`")
        with self._house.database.read() as connection:
            found = clusters.cluster(connection, wanted)
            passages = library.passages(connection, found.members)
            asked = items.items_of(connection, found.members, model=self._house.base())
        return ClusterView(found, tuple(passages[chunk] for chunk in found.members if chunk in passages), tuple(asked))

    # --- adapters ----------------------------------------------------------------------------------------------------

    def adapters(self) -> list[Adapter]:
        """All adapters, the oldest first; also those that are not used, with the reason."""
        with self._house.database.read() as connection:
            return adapters.adapters(connection)

    def adapter(self, adapter_id: str) -> Adapter:
        """The adapter whose id begins so. Raises NotFound, or InputError when there are several."""
        with self._house.database.read() as connection:
            return adapters.adapter(connection, checked.as_text(adapter_id, "id"))

    def pin_adapter(self, adapter_id: str, pinned: bool = True) -> Adapter:
        """Keep an adapter in fast memory as long as possible, or no longer. Raises as `adapter`."""
        found = self.adapter(adapter_id)
        with self._house.database.write() as connection:
            adapters.set_pinned(connection, found.id, checked.converted(pinned, bool, "pinned"))
        return self._changed(found.id)

    def disable_adapter(self, adapter_id: str) -> Adapter:
        """Use an adapter no longer; its passages are read as text. Raises as `adapter`."""
        return self._set_state(adapter_id, enabled=False)

    def enable_adapter(self, adapter_id: str) -> Adapter:
        """Use a disabled adapter again. Raises as `adapter`, and InputError for one that did not pass its exam."""
        return self._set_state(adapter_id, enabled=True)

    def _set_state(self, adapter_id: str, *, enabled: bool) -> Adapter:
        found = self.adapter(adapter_id)
        if found.state == "failed":
            raise InputError(
                f"has failed: {found.reason}", field=found.id[: adapters.SHOWN], remedy="delete it, or learn anew"
            )
        if enabled and found.gate is None:
            raise InputError(
                "was not examined yet", field=found.id[: adapters.SHOWN], remedy="wait until it was; it is used then"
            )
        with self._house.database.write() as connection:
            reason = "" if enabled else "it was disabled"
            adapters.set_state(connection, found.id, "ready" if enabled else "disabled", reason)
        return self._changed(found.id)

    def delete_adapter(self, adapter_id: str) -> Adapter:
        """Delete an adapter and its file. It is trained anew only when its cluster changes. Raises as `adapter`."""
        found = self.adapter(adapter_id)
        with self._house.database.write() as connection:
            adapters.remove(connection, found.id)
        self._house.school.sweep()
        return found

    def export_adapter(self, adapter_id: str, target: str | Path) -> Adapter:
        """Write an adapter into one file, for another library with the same passages. Raises as `adapter`.

        It holds what was learned from the documents, and questions about them.
        """
        path = Path(target).expanduser()
        return export_bundle(self._house.database, self._house.school.folder, adapter_id, path)

    def import_adapter(self, file: str | Path) -> Adapter:
        """Take in an adapter that was exported elsewhere.

        Raises InputError when it is damaged, belongs to another model, or covers passages that are not here.
        """
        house = self._house
        new = import_bundle(
            house.database,
            house.school.folder,
            Path(file).expanduser(),
            base=house.base(),
            layout=LAYOUT_VERSION,
            embed=house.embedder().embed,
        )
        return self._changed(new.id)

    def _changed(self, adapter_id: str) -> Adapter:
        self._house.school.refresh()
        return self.adapter(adapter_id)

    # --- routing -----------------------------------------------------------------------------------------------------

    def router(self) -> RouterStatus:
        """How questions were routed, what came of each arm, and which adapters are to stay in fast memory."""
        return self._house.school.router_status()

    def replay_router(self, rules: Sequence[str] = ("polar", "lru")) -> Comparison:
        """Whether other residency rules would have done better on the questions of the journal, and plain retrieval.

        Nothing but the embedding model is loaded. Raises InputError for a rule that there is not.
        """
        named, house = checked.converted(list(rules), list[str], "rules"), self._house
        settings = house.settings
        with house.database.read() as connection:
            return compare(
                connection,
                house.school.space().tag,
                named,
                budget=settings.adapters.memory_mb * MEGABYTE,
                second_price=settings.router.second_price,
                epoch=settings.router.epoch,
            )

    # --- learning ----------------------------------------------------------------------------------------------------

    def learn(
        self,
        *,
        least: float = 0.0,
        until: float | None = None,
        progress: Callable[[LearningStatus], None] | None = None,
    ) -> list[Lesson]:
        """Learn now, until nothing is left or until `until` (seconds since the epoch); what became of each cluster.

        Clusters whose questions weigh less than `least` are left out. Questions that are asked meanwhile go first.
        Raises ConfigError when nothing can be trained here.
        """
        limit = None if until is None else checked.converted(until, float, "until")
        return self._learner().learn(least=checked.converted(least, float, "least"), until=limit, progress=progress)

    def idle_once(self) -> str:
        """Do one piece of the work that is done while nobody asks; what it was, in words, '' when there is none."""
        for name, step in self._house.idle_steps():
            if step():
                return name
        return ""

    def _learner(self) -> Learner:
        learner = self._house.school.learner()
        if learner is None:
            raise ConfigError(
                "no adapters are used",
                field="router.mode",
                remedy="set router.mode to linucb or coverage and adapters.memory_mb above 0",
            )
        if learner.trains:
            raise ConfigError(learner.trains, field="learning", remedy="install what is missing")
        return learner
