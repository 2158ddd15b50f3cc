"""Groups of passages under two caps, improved by joining groups and by moving passages while that ties more together.

A passage that is packed may move between groups; members that a group began with stay. What each packed passage is
tied to each group with is kept up to date (its pull), so that to try a move costs a look-up. Moves and exchanges are
those of Kernighan and Lin ("An efficient heuristic procedure for partitioning graphs", 1970), taken whenever they gain
and not in whole passes: capped groups are nearly full, so most gains need an exchange.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from msgspec import Struct

Ties = Mapping[int, Mapping[int, float]]

SLACK = 1e-9  # ties that differ by less are equal: sums of floats depend on their order


class Caps(Struct, frozen=True):
    """What a group may have at most; `tokens` are those of each passage."""

    tokens: Mapping[int, int]
    most: int
    most_tokens: int

    def fit(self, passages: Collection[int]) -> bool:
        """Whether these may be one group."""
        return len(passages) <= self.most and self.sum(passages) <= self.most_tokens

    def sum(self, passages: Iterable[int]) -> int:
        """Their tokens; passages that are gone have none."""
        return sum(self.tokens.get(passage, 0) for passage in passages)


class Packing:
    """Groups, of which the first are `fixed` with what they hold. `ties` are symmetric, and of no passage to itself."""

    def __init__(self, caps: Caps, fixed: Sequence[Collection[int]], ties: Ties) -> None:
        self.groups = [set(group) for group in fixed]
        self.fixed = len(fixed)
        self._caps = caps
        self._ties = ties
        self._tokens = [caps.sum(group) for group in fixed]
        self._home: dict[int, int] = {}
        self._pull: dict[int, dict[int, float]] = {}

    def pack(self, pieces: Iterable[Collection[int]]) -> None:
        """Put in new groups, each of which must fit; what they hold may move from now on. Once."""
        for piece in pieces:
            self.groups.append(set(piece))
            self._tokens.append(self._caps.sum(piece))
            self._home |= dict.fromkeys(piece, len(self.groups) - 1)
        places: dict[int, list[int]] = defaultdict(list)
        for place, group in enumerate(self.groups):
            for passage in group:
                places[passage].append(place)
        for passage in self._home:
            pull = self._pull[passage] = defaultdict[int, float](float)
            for other, tie in self._ties[passage].items():
                for place in places.get(other, ()):
                    pull[place] += tie

    def bonds(self, place: int) -> float:
        """What the passages that were packed into this group are tied to it with."""
        return sum(self._pull[passage][place] for passage in sorted(self._packed(place)))

    def join(self) -> None:
        """Join each group, the smallest first, to the one that it is tied to most and fits into."""
        joined = 1
        while joined:
            order = sorted(range(self.fixed, len(self.groups)), key=lambda place: (len(self.groups[place]), place))
            joined = sum(self._join(place) for place in order if self.groups[place])

    def improve(self) -> bool:
        """Let each passage move or change places once when that gains; whether any did."""
        return sum(self._move(passage) or self._exchange(passage) for passage in sorted(self._home)) > 0

    def _join(self, place: int) -> bool:
        pull: dict[int, float] = defaultdict(float)
        for passage in sorted(self.groups[place]):
            for other, tie in self._pull[passage].items():
                pull[other] += tie
        for other in _strongest_first(pull, above=0.0):
            if other != place and self._fit_together(place, other):
                for passage in sorted(self.groups[place]):
                    self._shift(passage, other)
                return True
        return False

    def _move(self, passage: int) -> bool:
        home, pull = self._home[passage], self._pull[passage]
        for place in _strongest_first(pull, above=pull[home]):
            if passage not in self.groups[place] and self._has_room(place, passage):
                self._shift(passage, place)
                return True
        return False

    def _exchange(self, passage: int) -> bool:
        """Change places with the passage of a better group with which that gains most."""
        home, pull = self._home[passage], self._pull[passage]
        offers = [
            (self._gain(passage, other), -other)
            for place in _strongest_first(pull, above=pull[home])
            if passage not in self.groups[place]
            for other in self._packed(place)
            if other not in self.groups[home] and self._tokens_allow(passage, other)
        ]
        gain, other = max(offers, default=(0.0, 0))
        if gain <= SLACK:
            return False
        place = self._home[-other]
        self._shift(passage, place)
        self._shift(-other, home)
        return True

    def _gain(self, passage: int, other: int) -> float:
        home, place = self._home[passage], self._home[other]
        mine, its = self._pull[passage], self._pull[other]
        return mine[place] - mine[home] + its[home] - its[place] - 2 * self._ties[passage].get(other, 0.0)

    def _packed(self, place: int) -> list[int]:
        return [passage for passage in self.groups[place] if self._home.get(passage) == place]

    def _has_room(self, place: int, passage: int) -> bool:
        tokens = self._tokens[place] + self._caps.sum([passage])
        return len(self.groups[place]) < self._caps.most and tokens <= self._caps.most_tokens

    def _fit_together(self, place: int, other: int) -> bool:
        apart = self.groups[place].isdisjoint(self.groups[other])
        return apart and self._caps.fit(self.groups[place] | self.groups[other])

    def _tokens_allow(self, passage: int, other: int) -> bool:
        more = self._caps.sum([passage]) - self._caps.sum([other])
        home, place = self._tokens[self._home[passage]], self._tokens[self._home[other]]
        return place + more <= self._caps.most_tokens and home - more <= self._caps.most_tokens

    def _shift(self, passage: int, place: int) -> None:
        home, tokens = self._home[passage], self._caps.sum([passage])
        self.groups[home].remove(passage)
        self.groups[place].add(passage)
        self._tokens[home] -= tokens
        self._tokens[place] += tokens
        self._home[passage] = place
        for other, tie in self._ties[passage].items():
            if other in self._pull:
                self._pull[other][home] -= tie
                self._pull[other][place] += tie


def _strongest_first(pull: Mapping[int, float], *, above: float) -> list[int]:
    """Places with more than `above`, the most first, ties by place."""
    found = [(-tie, place) for place, tie in pull.items() if tie > above + SLACK]
    return [place for _, place in sorted(found)]
