"""A made-up world for routers: questions of topics, arms that are good at some, and what one does who knows all.

A question is (1, z) / √2, where z is its topic's centre and something of its own, of unit length; topics are drawn by
Zipf's law. An arm's quality is ½ + ½⟨w, z⟩, linear and within 0..1, where w (unit length) is made of the centres of the
arm's own topics and of chance, by `skill` and 1 - `skill`. What is observed has noise of mean 0 and stays within 0..1.
All draws come from one seed, the same for every policy that is compared.

The regret of a request is what the clairvoyant gains by it less what the policy gains in the mean (without the noise),
where gain is quality less price. The clairvoyant knows all qualities and takes the best arm each time; what is resident
is the best fixed set for all of the requests, for which it pays nothing. So with drift it too gains less than could be.
"""

import math

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from edge_rag.policy.resident_set import choose

Array = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]
Bytes = npt.NDArray[np.int64]

OWN = 0.5  # length of what a question has of its own, beside its topic's centre
NOISE = 0.2  # the largest error of an observed quality
MEGABYTE = 1_000_000
SMALLEST, LARGEST = 4, 24  # megabytes, of mixed sizes
POOL = 40  # questions of each topic that exams are made of
EXAM = 16  # questions of an arm's exam
EXAMS, ORDERS = 1, 2  # draws of their own
MOST = 1_000_000  # requests × arms for which the best set is sought; of more, requests are left out


class Shape(Struct, frozen=True):
    """A world's measures. With `phases` > 1 each has another order of popularity.

    `resident` arms of mean size fit into memory; a page-in of mean size has the `price`, and with `mixed` sizes the
    price goes with the size. A topic has so many `candidates`, 0 = all arms. `plain`: the quality of answering without
    an arm, at `plain_price`; None when that is no choice. `turned`: from the middle on arms are good at other things.
    """

    name: str = ""
    arms: int = 15
    dimensions: int = 17
    resident: int = 4
    requests: int = 8000
    price: float = 0.1
    topics: int = 10
    exponent: float = 0.9
    phases: int = 1
    skill: float = 0.5
    candidates: int = 0
    mixed: bool = False
    plain: float | None = None
    plain_price: float = 0.4
    turned: bool = False


class World(Struct, frozen=True, eq=False):
    """What is asked and offered, and what each arm would be worth; arms by place, in the order of `names`."""

    shape: Shape
    names: tuple[str, ...]
    sizes: dict[str, int]
    prices: Array  # [arms], of a page-in
    budget: int
    contexts: Array  # [requests, dimensions]
    qualities: Array  # [requests, arms]
    offered: list[Places]  # the candidates of each request
    noise: Array  # [requests], -1..1
    best: Array  # [requests], what the clairvoyant gains
    centres: Array  # [topics, dimensions - 1]
    directions: Array  # [arms, dimensions - 1]
    seed: int


def world(shape: Shape, seed: int) -> World:
    """The world of this shape and seed."""
    rng = np.random.default_rng(seed)
    topics = max(shape.topics, 1)
    centres = _directions(rng, topics, shape.dimensions - 1)
    asked = _asked(rng, shape, np.random.default_rng([seed, ORDERS]))
    about = _unit(centres[asked] + OWN * _directions(rng, shape.requests, shape.dimensions - 1))
    directions, own = _arms(rng, shape, centres)
    qualities = _qualities(about, directions)
    sizes = _sizes(rng, shape)
    prices = shape.price * sizes / sizes.mean()
    by_topic = _offered(rng, shape, own)
    offered = [by_topic[topic] for topic in asked]
    noise = rng.uniform(-1, 1, shape.requests)
    if shape.turned:
        half = shape.requests // 2
        qualities[half:] = _qualities(about[half:], _arms(rng, shape, centres)[0])
    budget = int(shape.resident * sizes.mean())
    names = tuple(f"{place:04d}" for place in range(shape.arms))
    return World(
        shape=shape,
        names=names,
        sizes=dict(zip(names, sizes.tolist(), strict=True)),
        prices=prices,
        budget=budget,
        contexts=_contexts(about),
        qualities=qualities,
        offered=offered,
        noise=noise,
        best=_clairvoyant(shape, qualities, offered, sizes, prices, budget),
        centres=centres,
        directions=directions,
        seed=seed,
    )


def observed(world: World, request: int, quality: float) -> float:
    """What is seen of a quality, from 0 to 1; its mean is the quality."""
    return quality + float(world.noise[request]) * min(NOISE, quality, 1 - quality)


def exams(world: World) -> tuple[Array, Array]:
    """For each arm the contexts [arms, EXAM, dimensions] and its qualities [arms, EXAM] of the questions of an exam.

    They are like those that it is best at: of n arms an n-th of all questions, which are not among the requests.
    """
    rng = np.random.default_rng([world.seed, EXAMS])
    questions = np.repeat(world.centres, POOL, axis=0)
    about = _unit(questions + OWN * _directions(rng, *questions.shape))
    qualities = _qualities(about, world.directions)
    best_first = np.argsort(-qualities, axis=0)[: max(EXAM, len(about) // len(world.names))]
    asked = np.array([rng.permutation(column)[:EXAM] for column in best_first.T])
    return _contexts(about)[asked], np.take_along_axis(qualities.T, asked, axis=1)


def _contexts(about: Array) -> Array:
    return np.hstack([np.ones((len(about), 1)), about]) / math.sqrt(2)


def _qualities(about: Array, directions: Array) -> Array:
    qualities: Array = 0.5 + 0.5 * about @ directions.T
    return qualities


def _asked(rng: np.random.Generator, shape: Shape, orders: np.random.Generator) -> Places:
    """The topic of each request; `orders` are drawn apart, so that worlds with and without drift are the same else."""
    weights = np.arange(1, shape.topics + 1) ** -shape.exponent
    drawn = rng.choice(shape.topics, shape.requests, p=weights / weights.sum())
    phase = np.arange(shape.requests) * shape.phases // shape.requests
    others = [orders.permutation(shape.topics) for _ in range(shape.phases - 1)]
    asked: Places = np.array([np.arange(shape.topics), *others])[phase, drawn]
    return asked


def _arms(rng: np.random.Generator, shape: Shape, centres: Array) -> tuple[Array, Places]:
    """The direction of each arm, and whose each topic is: they are dealt out in turn."""
    own = rng.permutation(len(centres)) % shape.arms
    sums = np.zeros((shape.arms, shape.dimensions - 1))
    np.add.at(sums, own, centres)
    chance = _directions(rng, shape.arms, shape.dimensions - 1)
    return _unit(shape.skill * _unit(sums) + (1 - shape.skill) * chance), own


def _offered(rng: np.random.Generator, shape: Shape, own: Places) -> list[Places]:
    """The arms that each topic may use: its own and others by chance, in order; all arms when that is not limited."""
    if not 0 < shape.candidates < shape.arms:
        return [np.arange(shape.arms)] * len(own)
    others = [rng.permutation(shape.arms)[: shape.candidates - 1] for _ in own]
    return [np.union1d(some, owner) for some, owner in zip(others, own, strict=True)]


def _sizes(rng: np.random.Generator, shape: Shape) -> Bytes:
    mean = (SMALLEST + LARGEST) / 2
    megabytes = rng.uniform(SMALLEST, LARGEST, shape.arms) if shape.mixed else np.full(shape.arms, mean)
    return np.asarray(np.round(megabytes * MEGABYTE), np.int64)


def _clairvoyant(
    shape: Shape, qualities: Array, offered: list[Places], sizes: Bytes, prices: Array, budget: int
) -> Array:
    """What the best arms gain at each request with the best fixed set."""
    resident = np.full(qualities.shape, -np.inf)
    for request, places in enumerate(offered):
        resident[request, places] = qualities[request, places]
    floor = (resident - prices).max(axis=1)
    if shape.plain is not None:
        floor = np.maximum(floor, shape.plain - shape.plain_price)
    lift = np.maximum(resident.T - floor, 0)
    every = 1 + lift.size // MOST
    chosen = choose(lift[:, ::every], sizes.astype(np.float64), np.zeros(len(sizes)), budget)
    best: Array = floor + lift[chosen].max(axis=0, initial=0)
    return best


def _directions(rng: np.random.Generator, count: int, dimensions: int) -> Array:
    return _unit(rng.standard_normal((count, dimensions)))


def _unit(rows: Array) -> Array:
    unit: Array = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit
