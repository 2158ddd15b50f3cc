"""Settings, frozen, one group per subsystem. Flag > environment > TOML file > default.

    [retrieval]            in  <config folder>/config.toml  or the file named by EDGE_RAG_CONFIG
    top_k = 8

    EDGE_RAG_RETRIEVAL__TOP_K=8        edge-rag --set retrieval.top_k=8

An unknown key or a bad value is a ConfigError that names the nearest key or the allowed range. Help texts stand in the
fields' metadata, so that `edge-rag settings` and the documentation cannot drift from the code.
"""

import difflib
import os
import tomllib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import platformdirs
from msgspec import Meta, Struct

from edge_rag.errors import ConfigError

ENVIRONMENT_PREFIX = "EDGE_RAG_"
# These name places, not settings; they are read elsewhere.
ENVIRONMENT_PLACES = frozenset({"EDGE_RAG_DATA", "EDGE_RAG_CONFIG", "EDGE_RAG_UDS"})

SOCKET = "edge_rag.sock"


class Group(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all groups: immutable, and an unknown key is an error."""


class Models(Group, frozen=True):
    """Which models are used and where their files are."""

    llm: Annotated[str, Meta(description="Manifest name of the language model.")] = "qwen2.5-coder-0.5b"
    embedder: Annotated[str, Meta(description="Manifest name of the embedding model.")] = "all-minilm-l6-v2"
    folder: Annotated[str, Meta(description="Folder of model files; empty = the user's data folder.")] = ""
    offline: Annotated[bool, Meta(description="Never touch the network.")] = False


class Ingest(Group, frozen=True):
    """How files become chunks."""

    chunk_tokens: Annotated[int, Meta(ge=32, le=2048, description="Largest chunk, in LLM tokens.")] = 256
    max_file_mb: Annotated[int, Meta(ge=1, le=4096, description="Larger files are refused, in MB.")] = 100
    include: Annotated[tuple[str, ...], Meta(description="Only files matching one of these globs.")] = ()
    exclude: Annotated[tuple[str, ...], Meta(description="Files matching one of these globs are skipped.")] = ()


class Retrieval(Group, frozen=True):
    """How passages are found and ranked."""

    top_k: Annotated[int, Meta(ge=1, le=64, description="Passages per question.")] = 5
    candidates: Annotated[int, Meta(ge=8, le=1000, description="Candidates of each ranking before fusion.")] = 50
    embedding_weight: Annotated[float, Meta(ge=0, le=100, description="Weight of the dense ranking.")] = 1.0
    text_weight: Annotated[float, Meta(ge=0, le=100, description="Weight of the BM25 ranking.")] = 2.0
    rrf_k: Annotated[float, Meta(ge=0, le=1000, description="Constant of reciprocal rank fusion.")] = 5.0
    min_similarity: Annotated[
        float,
        Meta(ge=-1, le=1, description="Passages below this cosine need matching words to count; -1 = never refuse."),
    ] = 0.3
    order_margin: Annotated[
        float, Meta(ge=0, le=1, description="Neighbours of one document within this share of score keep its order.")
    ] = 0.1
    exact_limit: Annotated[int, Meta(ge=0, description="Up to this many chunks the vector search is exact.")] = 50_000
    rescore: Annotated[int, Meta(ge=10, le=100_000, description="Candidates of the coarse search to rescore.")] = 4000


class Engine(Group, frozen=True):
    """The llama.cpp context."""

    n_ctx: Annotated[int, Meta(ge=512, le=1_048_576, description="Context size in tokens.")] = 4096
    n_batch: Annotated[
        int, Meta(ge=0, le=4096, description="Tokens per prefill step; small = quick to stop; 0 = 128, on a GPU 512.")
    ] = 0
    threads: Annotated[int, Meta(ge=0, le=512, description="CPU threads; 0 = physical cores.")] = 0
    slots: Annotated[int, Meta(ge=1, le=128, description="Answers that are written at the same time.")] = 4
    queue: Annotated[int, Meta(ge=1, le=10_000, description="Requests that may wait; more are turned away.")] = 64
    share: Annotated[
        bool, Meta(description="Requests with the same passages share their cells, equal ones their answer.")
    ] = True
    gpu_layers: Annotated[int, Meta(ge=-1, le=1000, description="Layers on the GPU; -1 = all, when there is one.")] = -1


class Answering(Group, frozen=True):
    """How answers are generated."""

    max_tokens: Annotated[int, Meta(ge=1, le=32_768, description="Longest answer in tokens.")] = 256
    temperature: Annotated[float, Meta(ge=0, le=5, description="0 = greedy.")] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1, description="Nucleus sampling; 1 = off.")] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1, description="Least share of the best token; 0 = off.")] = 0.0
    seed: Annotated[int, Meta(ge=0, le=4_294_967_294, description="Seed of the sampler.")] = 0
    stop: Annotated[tuple[str, ...], Meta(max_length=16, description="Strings that end the answer.")] = ()
    instructions: Annotated[str, Meta(description="Your own instructions, put before the question.")] = ""
    rewrite: Annotated[
        Literal["auto", "never"], Meta(description="Rewrite a chat question that leans on earlier turns.")
    ] = "auto"
    citation_floor: Annotated[float, Meta(ge=0, le=1, description="Least support for a citation.")] = 0.45


class KV(Group, frozen=True):
    """Passages as KV: what is kept, where, and how it is put together."""

    enabled: Annotated[bool, Meta(description="Keep passages' KV and load it instead of reading them again.")] = True
    ram_mb: Annotated[int, Meta(ge=0, le=1_048_576, description="KV kept in memory, in MB.")] = 512
    disk_mb: Annotated[int, Meta(ge=0, le=1_073_741_824, description="KV kept on disk, in MB; 0 = none.")] = 8192
    codec: Annotated[Literal["f16", "q8", "q5", "q4"], Meta(description="How KV is quantised when kept.")] = "q8"
    zstd_level: Annotated[int, Meta(ge=0, le=19, description="Compression where it pays; 0 = never.")] = 1
    link_tokens: Annotated[
        int, Meta(ge=-1, le=256, description="Tokens computed again at the head of a moved passage; -1 = never move.")
    ] = 4
    idle: Annotated[bool, Meta(description="Compute KV and audit answers while nobody asks.")] = True
    audit_share: Annotated[float, Meta(ge=0, le=1, description="Share of spliced answers audited when idle.")] = 0.05
    audit_floor: Annotated[
        float, Meta(ge=0, le=1, description="Least agreement with full prefill; below it more tokens are linked.")
    ] = 0.4


class Learning(Group, frozen=True):
    """What is learned from questions while nobody asks, and how."""

    idle: Annotated[bool, Meta(description="Learn while nobody asks; training needs the `train` extra.")] = True
    half_life_days: Annotated[
        float, Meta(gt=0, le=36_500, description="Days after which a question counts half in what is grouped.")
    ] = 30.0
    most_passages: Annotated[int, Meta(ge=1, le=1024, description="Passages of a cluster at most.")] = 32
    most_tokens: Annotated[int, Meta(ge=64, le=1_000_000, description="Tokens of a cluster's passages at most.")] = 8192
    overlap: Annotated[bool, Meta(description="A passage may be in several clusters.")] = False
    least_questions: Annotated[
        float, Meta(ge=0, description="Weight of logged questions from which on a cluster is worth training.")
    ] = 8.0
    study_questions: Annotated[
        int, Meta(ge=0, le=200, description="Questions that the model writes about each passage of a cluster.")
    ] = 24
    targets: Annotated[
        Literal["down", "ffn", "all"], Meta(description="What is adapted: down projections, feed-forward, or all.")
    ] = "ffn"
    layers: Annotated[Literal["all", "last_half"], Meta(description="Which layers are adapted.")] = "all"
    rank: Annotated[int, Meta(ge=1, le=256, description="Rank of the adapters.")] = 16
    epochs: Annotated[int, Meta(ge=1, le=200, description="Times that a cluster's questions are gone through.")] = 8
    learning_rate: Annotated[float, Meta(gt=0, le=1, description="Peak learning rate.")] = 3e-4
    kl_share: Annotated[
        float, Meta(ge=0, le=1, description="Share of the teacher's distribution in the loss; the rest is its answer.")
    ] = 0.5
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="Where adapters are trained.")] = "auto"
    memory_mb: Annotated[int, Meta(ge=0, description="Memory for training, in MB; 0 = what is free.")] = 0
    keep: Annotated[
        float, Meta(ge=0, le=1, description="Share of the teacher's F1 that an adapter must keep to be used.")
    ] = 0.85
    drift: Annotated[
        float, Meta(ge=0, le=1, description="Change of answers to other questions that an adapter may cause.")
    ] = 0.02
    max_celsius: Annotated[float, Meta(ge=0, le=150, description="No training while the device is hotter.")] = 80.0
    on_battery: Annotated[bool, Meta(description="Learn while running on battery too.")] = False


class Adapters(Group, frozen=True):
    """Adapters in fast memory."""

    memory_mb: Annotated[int, Meta(ge=0, le=1_048_576, description="Adapters in fast memory, in MB.")] = 256
    least_coverage: Annotated[
        float, Meta(ge=0, le=1, description="Share of the retrieved passages that an adapter must cover.")
    ] = 0.3


class Router(Group, frozen=True):
    """Which adapter answers a question, or none, and which ones stay in fast memory."""

    mode: Annotated[
        Literal["linucb", "coverage", "off"],
        Meta(description="How it is chosen: learned from what answers were worth, by coverage, or never."),
    ] = "linucb"
    residency: Annotated[
        Literal["polar", "polar+", "lru", "lfu", "fifo", "cost-aware", "edgelora", "static"],
        Meta(description="What decides which adapters stay in fast memory."),
    ] = "polar"
    second_price: Annotated[
        float, Meta(ge=0, le=1000, description="What a second of waiting costs, in quality (0 to 1).")
    ] = 0.05
    alpha: Annotated[float, Meta(ge=0, le=100, description="How much is tried: weight of uncertainty.")] = 0.5
    discount: Annotated[float, Meta(gt=0, le=1, description="What a reward still counts after one more reward.")] = (
        0.997
    )
    projected: Annotated[int, Meta(ge=1, le=256, description="Dimensions of the question that are learned from.")] = 16
    trial_wait: Annotated[
        float, Meta(ge=0, le=3600, description="Seconds that somebody may wait longer so that something is tried.")
    ] = 1.0
    explore: Annotated[
        float, Meta(ge=0, le=0.5, description="Share of questions whose arm is drawn, to compare policies by.")
    ] = 0.0
    epoch: Annotated[int, Meta(ge=1, le=1_000_000, description="Questions between changes of what is kept.")] = 256
    review_share: Annotated[
        float, Meta(ge=0, le=1, description="Share of answers compared with full reading while nobody asks.")
    ] = 0.2


class Memory(Group, frozen=True):
    """What the process may take of the machine's memory."""

    limit_mb: Annotated[int, Meta(ge=0, description="Memory to use at most, in MB; 0 = what is available.")] = 0
    reserve_mb: Annotated[int, Meta(ge=0, description="Available memory that is left alone, in MB.")] = 512


class Server(Group, frozen=True):
    """Who may ask over the socket, and how much."""

    uds: Annotated[str, Meta(description="Path of the Unix socket; empty = the user's runtime folder.")] = ""
    tcp: Annotated[str, Meta(description="HOST:PORT to listen on, loopback only; empty = no TCP.")] = ""
    key_file: Annotated[str, Meta(description="File (0600) with the key that TCP callers must send.")] = ""
    hosts: Annotated[tuple[str, ...], Meta(description="Host names that TCP callers may use, besides loopback.")] = ()
    users: Annotated[tuple[int, ...], Meta(description="User ids that may use the socket, besides the server's.")] = ()
    roots: Annotated[
        tuple[str, ...], Meta(description="Folders from which documents are added by path; empty = the home folder.")
    ] = ()
    max_body_mb: Annotated[int, Meta(ge=1, le=10_000, description="Largest request, in MB.")] = 64
    timeout: Annotated[float, Meta(gt=0, le=86_400, description="Seconds an answer may take at most.")] = 600.0
    drain: Annotated[float, Meta(ge=0, le=3600, description="Seconds that answers may go on after SIGTERM.")] = 20.0
    ping: Annotated[float, Meta(ge=1, le=3600, description="Seconds of silence after which a stream pings.")] = 15.0


class Settings(Group, frozen=True):
    """All groups."""

    models: Models = Models()
    ingest: Ingest = Ingest()
    retrieval: Retrieval = Retrieval()
    engine: Engine = Engine()
    answering: Answering = Answering()
    kv: KV = KV()
    learning: Learning = Learning()
    adapters: Adapters = Adapters()
    router: Router = Router()
    memory: Memory = Memory()
    server: Server = Server()


def default_data_folder() -> Path:
    """The data folder when none is given: EDGE_RAG_DATA, else the platform's place for user data."""
    named = os.environ.get("EDGE_RAG_DATA")
    return Path(named) if named else platformdirs.user_data_path("edge_rag", appauthor=False) / "library"


def models_folder(settings: Settings) -> Path:
    """The folder that holds model files; shared by all data folders unless set."""
    named = settings.models.folder
    return Path(named).expanduser() if named else platformdirs.user_data_path("edge_rag", appauthor=False) / "models"


def socket_path(server: Server) -> Path:
    """The Unix socket on which a server listens and is looked for; in the user's runtime folder unless set.

    Raises ConfigError when the user has no such folder, and somebody else has made the one in its place (in /tmp).
    """
    if server.uds:
        return Path(server.uds).expanduser()
    try:
        # Having no XDG_RUNTIME_DIR is nothing to be warned of: containers and cron have none.
        with warnings.catch_warnings(action="ignore"):
            return platformdirs.user_runtime_path("edge_rag", appauthor=False) / SOCKET
    except PermissionError as error:
        raise ConfigError(
            f"has no place by itself: {str(error).partition(';')[0]}",
            field="server.uds",
            remedy="set XDG_RUNTIME_DIR, or name a path with --uds",
        ) from error


def config_file() -> Path:
    """The TOML file that is read when it exists."""
    named = os.environ.get("EDGE_RAG_CONFIG")
    return Path(named) if named else platformdirs.user_config_path("edge_rag", appauthor=False) / "config.toml"


def load_settings(flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None) -> Settings:
    """Merge file, environment and `flags` (dotted keys) into one `Settings`. Raises ConfigError."""
    merged = _read_file(config_file())
    for key, value in _from_environment(os.environ if environment is None else environment).items():
        _place(merged, key, value)
    for key, value in (flags or {}).items():
        _place(merged, key, value)
    return parse_settings(merged)


def parse_settings(values: Mapping[str, Any]) -> Settings:
    """Check nested `values` against the groups. Text is accepted for numbers (environment, flags)."""
    for group, fields in values.items():
        _check_keys(group, fields)
    try:
        return msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$.")
        raise ConfigError(reason, field=place.rstrip("`"), remedy="see `edge-rag settings`") from error


def describe_settings(settings: Settings) -> list[tuple[str, Any, str]]:
    """Every setting as (dotted key, value, help), in order."""
    return [
        (f"{group}.{name}", getattr(getattr(settings, group), name), _help(Settings, group, name))
        for group in Settings.__struct_fields__
        for name in getattr(settings, group).__struct_fields__
    ]


def _help(root: type[Settings], group: str, name: str) -> str:
    kind = root.__annotations__[group].__annotations__[name]
    return next((m.description or "" for m in getattr(kind, "__metadata__", ()) if isinstance(m, Meta)), "")


def _check_keys(group: str, fields: Any) -> None:
    groups = Settings.__struct_fields__
    if group not in groups:
        raise ConfigError("unknown group of settings", field=group, remedy=_nearest(group, groups))
    if not isinstance(fields, Mapping):
        raise ConfigError("is a group and needs keys below it", field=group, remedy=f"write [{group}] key = value")
    known = Settings.__annotations__[group].__struct_fields__
    for name in fields:
        if name not in known:
            raise ConfigError("unknown setting", field=f"{group}.{name}", remedy=_nearest(name, known))


def _nearest(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else "known are " + ", ".join(known)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if "EDGE_RAG_CONFIG" in os.environ:
            raise ConfigError("there is no such file", field=str(path), remedy="correct EDGE_RAG_CONFIG") from None
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", field=str(path), remedy="repair or remove the file") from error


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        key.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".", 1): value
        for key, value in environment.items()
        if key.startswith(ENVIRONMENT_PREFIX) and key not in ENVIRONMENT_PLACES
    }


def _place(values: dict[str, Any], dotted: str, value: Any) -> None:
    group, dot, name = dotted.partition(".")
    if not dot:
        raise ConfigError("names no setting", field=dotted, remedy="write GROUP.KEY, as in retrieval.top_k")
    kind = Settings.__annotations__.get(group)
    if isinstance(value, str) and kind is not None and "tuple" in str(kind.__annotations__.get(name, "")):
        value = [part for part in value.split(",") if part]
    fields = values.setdefault(group, {})
    if isinstance(fields, dict):
        fields[name] = value
