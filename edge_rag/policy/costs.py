"""What things cost on this machine: running estimates, so that load-or-recompute is decided by measurement.

Exponentially weighted means of observed times. Values in, values out: an observation gives new `Costs`. The defaults
are guesses that lean towards loading; the first observation of a kind replaces its guess.
"""

from msgspec.structs import replace

from edge_rag.records import Record

WEIGHT = 0.2  # of the newest observation
OUTLIER = 4  # times the estimate: one stalled load must not end all loading, and with it all observation
LARGE = 64  # decodes of at least so many tokens tell the cost of a token, smaller ones that of a decode as such


class Costs(Record, frozen=True):
    """Seconds. `seen` names the fields that are measured; the others are guesses.

    A decode of n prompt tokens takes `step` + n × `token`: on a GPU mostly the first, on a CPU mostly the second.
    `assemble`: to dequantise, turn and hand over one token's KV. `read`: to read and check one byte from the SSD.
    `write`: to write a token of an answer, and `dressed`: to do so under an adapter; `words`: tokens of an answer.
    """

    token: float = 5e-3
    step: float = 2e-2
    assemble: float = 5e-5
    read: float = 1e-9
    write: float = 2e-2
    dressed: float = 2e-2
    words: float = 32.0
    seen: tuple[str, ...] = ()

    def decoded(self, tokens: int, seconds: float) -> "Costs":
        """A decode of so many prompt tokens took so long."""
        if tokens >= LARGE or "token" not in self.seen:
            known = self.step if "step" in self.seen else 0.0
            return self._observed("token", max(seconds - known, 0.1 * seconds) / max(1, tokens))
        return self._observed("step", max(0.0, seconds - tokens * self.token))

    def assembled(self, tokens: int, seconds: float) -> "Costs":
        """Putting together the KV of so many tokens took so long."""
        return self._observed("assemble", min(seconds / max(1, tokens), OUTLIER * self.assemble))

    def was_read(self, size: int, seconds: float) -> "Costs":
        """Reading so many bytes took so long."""
        return self._observed("read", min(seconds / size, OUTLIER * self.read)) if size else self

    def written(self, tokens: int, seconds: float, *, dressed: bool) -> "Costs":
        """Behind its first token an answer of so many more took so long; `dressed`: under an adapter."""
        if tokens < 1:
            return self
        counted = self._observed("words", float(tokens + 1))
        return counted._observed("dressed" if dressed else "write", seconds / tokens)

    @property
    def slowdown(self) -> float:
        """Predicted seconds that an answer takes longer under an adapter; 0 until both were seen."""
        both = "write" in self.seen and "dressed" in self.seen
        return max(0.0, self.dressed - self.write) * self.words if both else 0.0

    def prefill_time(self, tokens: int) -> float:
        """Predicted time to compute so many tokens."""
        return tokens * self.token

    def load_time(self, tokens: int, size: int) -> float:
        """Predicted time to put so many tokens in place, of which `size` bytes come from the SSD."""
        return tokens * self.assemble + size * self.read

    def _observed(self, name: str, value: float) -> "Costs":
        if name not in self.seen:
            return replace(self, **{name: value, "seen": (*self.seen, name)})
        return replace(self, **{name: (1 - WEIGHT) * getattr(self, name) + WEIGHT * value})
