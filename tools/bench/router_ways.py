"""What `router` compares: worlds, and policies in them."""

from edge_rag.policy.residency import EPOCH, FIRST, Pace, doubling, fixed
from tools.bench.router_play import Way
from tools.bench.router_world import EXAM, Shape

# The worlds of the notes' table; number of topics and skill were set so that its plain policies come out as there.
NOTES = (
    Shape(name="c = .1"),
    Shape(name="c = .1, drift", phases=2),
    Shape(name="c = .4", price=0.4),
    Shape(name="c = .4, drift", price=0.4, phases=2),
)
CHEAP, CHEAP_DRIFT, DEAR, DEAR_DRIFT = (shape.name for shape in NOTES)
OTHERS = (
    Shape(name="specialists of 30 topics", topics=30, skill=0.8),
    Shape(name="specialists or all passages", topics=30, skill=0.8, plain=0.95, plain_price=0.3, phases=2),
    Shape(name="40 arms, 8 resident, drift", arms=40, resident=8, topics=30, phases=2),
    Shape(name="mixed sizes, c = .2", mixed=True, price=0.2),
    Shape(name="2,000 requests, drift", requests=2000, phases=2),
    Shape(name="1,000 arms, 40 resident", arms=1000, resident=40, topics=500, candidates=12, skill=0.8, requests=4000),
)
TURNED = Shape(name="c = .1, other qualities from the middle on", turned=True)
SCALE = Shape()

ENDLESS = 1_000_000
LONG = 8192
PLAIN_FIRST = 64

POLAR, PLUS, LRU = "POLAR", "POLAR+", "cost-aware LinUCB + LRU"
PLAIN_POLAR, PLAIN_PLUS = "POLAR, plain", "POLAR+, plain, uncapped"
EDGELORA = "EdgeLoRA's rule"

PLAIN_FIXED = Pace(scouting=0, pulls=0)
PLAIN_DOUBLING = Pace(first=PLAIN_FIRST, longest=ENDLESS, window=LONG, scouting=0, pulls=0)
PLAIN_CAPPED = Pace(first=PLAIN_FIRST, scouting=0, pulls=0)

# α = 1 for all, as in the notes.
TABLE = (
    Way(POLAR, pace=fixed()),
    Way(PLUS, pace=doubling()),
    Way(PLAIN_POLAR, pace=PLAIN_FIXED, trials=0),
    Way(PLAIN_PLUS, pace=PLAIN_DOUBLING, trials=2),
    Way("POLAR+, plain, capped", pace=PLAIN_CAPPED, trials=2),
    Way(LRU, "lru"),
    Way("cost-aware LinUCB + LRU, one more resident", "lru", more=1),
    Way("cost-aware LinUCB + LFU", "lfu"),
    Way("cost-aware LinUCB + FIFO", "fifo"),
    Way("cost-aware LinUCB + cost-aware LRU", "cost-aware"),
    Way("cost-aware LinUCB + static top-K", "static"),
    Way("cost-blind LinUCB + LRU", "lru", priced=False),
    Way("cost-blind LinUCB + Belady", "belady", priced=False),
    Way(EDGELORA, "edgelora"),
)

SHIPPED = 0.5  # the default of router.alpha
AS_SHIPPED, PLUS_SHIPPED = f"POLAR, α = {SHIPPED}", f"POLAR+, α = {SHIPPED}"
ALPHAS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5)
RIVALS = tuple(Way(f"{LRU}, α = {alpha}", "lru", alpha=alpha) for alpha in ALPHAS)
SHIPPED_WAYS = (
    Way(AS_SHIPPED, pace=fixed(), alpha=SHIPPED),
    Way(PLUS_SHIPPED, pace=doubling(), alpha=SHIPPED),
    *RIVALS,
)
ELSEWHERE = (
    *SHIPPED_WAYS[:2],
    Way(POLAR, pace=fixed()),
    Way(PLAIN_POLAR, pace=PLAIN_FIXED, trials=0),
    Way(LRU, "lru"),
    Way(EDGELORA, "edgelora"),
)

# One change after the other, and what did not help.
CHANGES = (
    Way("plain, α = 1", pace=PLAIN_FIXED, trials=0),
    Way("what was paged in stays while there is room", pace=Pace(scouting=0, pulls=0)),
    Way("and scouting in the first epoch", pace=Pace(pulls=0)),
    Way("and again when requests have doubled", pace=fixed()),
    Way("and α = .5", pace=fixed(), alpha=SHIPPED),
    Way("and doubling epochs", pace=doubling(), alpha=SHIPPED),
    Way("and seeded by exams", pace=doubling(), alpha=SHIPPED, seeded=EXAM),
    Way("and scouting with α too", pace=doubling(hope=SHIPPED), alpha=SHIPPED, seeded=EXAM),
    Way("and α = .25", pace=doubling(hope=0.25), alpha=0.25, seeded=EXAM),
    Way("LRU, seeded, α = .5", "lru", alpha=SHIPPED, seeded=EXAM),
    Way("LRU, seeded, α = .25", "lru", alpha=0.25, seeded=EXAM),
    Way("EdgeLoRA's rule, seeded", "edgelora", seeded=EXAM),
    Way("unseeded, α = .5, γ = .9997", pace=doubling(), alpha=SHIPPED, discount=0.9997),
    Way("unseeded, α = .5, γ = .997", pace=doubling(), alpha=SHIPPED, discount=0.997),
    Way("unseeded, α = .5, epochs of 64", pace=Pace(first=64, longest=64), alpha=SHIPPED),
    Way("unseeded, α = .5, window of 1,024", pace=Pace(first=FIRST, window=4 * EPOCH), alpha=SHIPPED),
    Way("unseeded, α = .5, scouting for 512", pace=Pace(first=FIRST, scouting=2 * EPOCH), alpha=SHIPPED),
    Way("unseeded, α = .5, 8 pulls when doubled", pace=Pace(first=FIRST, pulls=8), alpha=SHIPPED),
)

DISCOUNTS = tuple(
    Way(f"{name}, γ = {discount}", rule, pace, alpha=alpha, discount=discount)
    for discount in (1.0, 0.9997, 0.999, 0.997)
    for name, rule, pace, alpha in ((PLUS_SHIPPED, "", doubling(), SHIPPED), (f"{LRU}, α = 1", "lru", None, 1.0))
)

LOCKED = tuple(
    Way(f"{name}, α = {alpha}", rule, pace, trials, alpha=alpha)
    for name, rule, pace, trials in (
        (LRU, "lru", None, None),
        (PLAIN_POLAR, "", PLAIN_FIXED, 0),
        (POLAR, "", fixed(), None),
    )
    for alpha in ALPHAS
)

SCALED = (
    Way(PLUS_SHIPPED, pace=doubling(), alpha=SHIPPED),
    Way(f"{PLAIN_PLUS}, α = 1", pace=PLAIN_DOUBLING, trials=2),
    Way(f"{LRU}, α = 1", "lru"),
)
SCALES: dict[str, tuple[int, ...]] = {
    "requests": (1000, 2000, 4000, 8000, 16000, 32000),
    "arms": (8, 15, 30, 60, 120),
    "resident": (1, 2, 4, 8),
    "dimensions": (5, 9, 17, 33),
}
