"""Engines in little memory: what fits is made, the rest is given up with a reason or refused, and nothing aborts."""

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from edge_rag.config import Settings, load_settings
from edge_rag.errors import ModelError
from edge_rag.native import device
from edge_rag.native.device import DeviceMemory
from edge_rag.native.llama import Model, library
from edge_rag.native.llama.geometry import Geometry, geometry
from edge_rag.policy.budget import LEAST_RAM, Budget, plan_threads
from edge_rag.policy.ledger import MEGABYTE, Accounts, Claim, Ledger
from edge_rag.records import Sampling
from edge_rag.runtime import parts
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.generations import Finished
from edge_rag.runtime.kv_cache import KVCache
from edge_rag.runtime.parts import (
    EMBEDDER_WORK,
    Home,
    Memory,
    admitted,
    fitted,
    gpu_share,
    kv_bytes,
    layer_count,
    make_cache,
    make_engine,
    open_accounts,
    plan_engine,
)
from edge_rag.runtime.rag import EdgeRAG
from edge_rag.store.database import Database
from tests.native.tiny_models import HEAD, KV_HEADS, TINY_MODELS, write_tiny_model
from tests.runtime.serving import Toy, toy_prompt

LOTS = 1 << 40
SETTINGS = load_settings(
    {"adapters.memory_mb": 0, "engine.n_ctx": 1024, "engine.n_batch": 64, "kv.ram_mb": 40}, environment={}
)
SLACK = 4096  # bytes: buffers of slots that are given up are not, and fewer than a block of cells takes
LIBRARY_LOG = "edge_rag.native.llama.library"


def settings_of(flags: dict[str, Any]) -> Settings:
    return load_settings({"adapters.memory_mb": 0} | flags, environment={})


def memory_of(free: int) -> Memory:
    return Memory(Accounts(Ledger("the machine's memory", free)))


def planned(model: Model, free: int, settings: Settings = SETTINGS) -> Budget:
    return plan_engine(model, settings, memory_of(free))


def takes(budget: Budget, *, ram: bool) -> int:
    """Bytes of a plan, with its RAM tier or without."""
    return sum(claim.host for claim in budget.claims) - (0 if ram else budget.ram)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Toy(write_tiny_model("llama", tmp_path_factory.mktemp("llama")), gpu_layers=0) as model:
        yield model


@contextlib.contextmanager
def started(model: Model, folder: Path, settings: Settings) -> Iterator[tuple[Engine, list[KVCache]]]:
    """An engine and its cache, as the house makes them."""
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(Database(folder))
        made: list[KVCache] = []

        def make(found: Geometry | None) -> KVCache:
            made.append(stack.enter_context(make_cache(settings, Home(database, folder, "model"), found)))
            return made[0]

        yield stack.enter_context(make_engine(model, settings, threads=1, cache=make)), made


def answers(engine: Engine) -> int:
    """Tokens of an answer to a short question."""
    last = list(engine.submit(toy_prompt([1, 2]), Sampling(max_tokens=5)))[-1]
    assert isinstance(last, Finished)
    return last.usage.completion_tokens


# --- plans of real models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "n_ctx", "ram", "reasons"),
    [
        pytest.param(4, 1024, 40, 0, id="enough"),
        pytest.param(4, 1024, LEAST_RAM // MEGABYTE, 1, id="a small RAM tier"),
        pytest.param(4, 1024, 0, 1, id="no RAM tier"),
        pytest.param(2, 1024, 0, 2, id="half the slots"),
        pytest.param(1, 1024, 0, 2, id="one slot"),
        pytest.param(1, 512, 0, 3, id="half the context"),
    ],
)
def test_an_engine_is_made_as_large_as_memory_allows_and_answers(
    slots: int, n_ctx: int, ram: int, reasons: int, toy: Model, tmp_path: Path
) -> None:
    sizes = {"engine.slots": slots, "engine.n_ctx": n_ctx, "engine.n_batch": 64, "kv.ram_mb": ram}
    just_enough = takes(planned(toy, LOTS, settings_of(sizes)), ram=True) + SLACK
    memory = memory_of(just_enough)
    budget = plan_engine(toy, SETTINGS, memory)
    assert (budget.slots, budget.n_ctx, budget.ram) == (slots, n_ctx, ram * MEGABYTE)
    assert len(budget.reasons) == reasons
    with (
        admitted(memory.accounts, *budget.claims, model="model"),
        started(toy, tmp_path, fitted(SETTINGS, budget)) as (engine, caches),
    ):
        assert (engine.capacity.slots, engine.n_ctx, engine.capacity.cells) == (slots, n_ctx, budget.cells)
        assert slots + engine.capacity.queue == SETTINGS.engine.slots + SETTINGS.engine.queue, "as many callers"
        assert caches[0].status(moving="", link_tokens=0).ram_budget == budget.ram
        assert answers(engine) == 5
    memory.accounts.check()
    assert memory.accounts.host.free <= SLACK


def test_what_cannot_even_take_one_short_question_is_refused_before_anything_is_made(toy: Model) -> None:
    least = settings_of({"engine.slots": 1, "engine.n_ctx": 512, "engine.n_batch": 64, "kv.ram_mb": 0})
    with pytest.raises(ModelError, match="512 tokens needs") as error:
        planned(toy, takes(planned(toy, LOTS, least), ram=True) - 1)
    assert error.value.field == SETTINGS.models.llm
    assert "smaller model" in error.value.remedy


def test_a_ram_tier_is_not_planned_when_no_kv_is_kept(toy: Model) -> None:
    assert planned(toy, LOTS, settings_of({"kv.enabled": False})).ram == 0


def test_a_context_longer_than_the_model_was_trained_for_is_not_paid_for(toy: Model) -> None:
    wanted = settings_of({"engine.n_ctx": 100_000})
    assert planned(toy, LOTS, wanted).n_ctx == toy.n_ctx_train
    assert planned(toy, LOTS, wanted).reasons == ()


def test_fitted_settings_are_those_that_were_asked_for_when_all_of_it_fits(toy: Model) -> None:
    assert fitted(SETTINGS, planned(toy, LOTS)) == SETTINGS


def test_why_a_gpu_was_not_asked_stands_before_the_reasons(toy: Model) -> None:
    memory = replace(memory_of(LOTS), note="nobody knows")
    assert plan_engine(toy, SETTINGS, memory).reasons == ("nobody knows",)


# --- what a model takes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_size_of_kv_is_that_of_the_models_geometry(name: str, tmp_path: Path) -> None:
    with Model(write_tiny_model(name, tmp_path), gpu_layers=0) as model:
        found = geometry(model)
        assert layer_count(model) == TINY_MODELS[name].layers
        if isinstance(found, Geometry):
            shape = found.shape
            assert kv_bytes(model) == shape.layers * (shape.k_width + shape.v_width) * 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("gpt2", 2 * 2 * 4 * HEAD * 2, id="all heads have keys"),
        pytest.param("gemma2", 2 * 2 * KV_HEADS * HEAD * 2, id="windows count as whole layers"),
        pytest.param("mamba", 0, id="a recurrent one has none"),
    ],
)
def test_the_size_of_kv_is_known_without_geometry_and_without_weights(name: str, expected: int, tmp_path: Path) -> None:
    with Model(write_tiny_model(name, tmp_path), vocab_only=True) as model:
        assert kv_bytes(model) == expected


class Uneven(Model):
    """A model whose layers have different numbers of key heads."""

    def metadata(self, key: str) -> str:
        return "[1, 8, 2]" if key.endswith("head_count_kv") else super().metadata(key)


def test_of_layers_that_differ_the_largest_counts(tmp_path: Path) -> None:
    path = write_tiny_model("llama", tmp_path)
    with Uneven(path, vocab_only=True) as uneven, Model(path, vocab_only=True) as even:
        assert kv_bytes(uneven) == kv_bytes(even) * 8 // KV_HEADS


def reported(lines: list[str], pattern: str) -> float:
    """The sum of sizes (MiB) that llama.cpp logged with these words, in bytes."""
    return sum(float(found[1]) for line in lines if (found := re.search(pattern, line))) * 2**20


def claimed_and_reported(
    model: Model, wanted: Settings, caplog: pytest.LogCaptureFixture
) -> dict[str, tuple[int, float]]:
    """Bytes of cells and of buffers: what is claimed for them, and what llama.cpp says that it took."""
    claims = {claim.name: claim.host for claim in planned(model, LOTS, wanted).claims}
    caplog.set_level(logging.DEBUG, logger=LIBRARY_LOG)
    with make_engine(model, wanted, threads=1):
        lines = [record.getMessage() for record in caplog.records]
    return {
        name: (claims[name], reported(lines, rf"{word} buffer size = +([\d.]+) MiB"))
        for name, word in (("KV cells", "KV"), ("compute buffers", "compute"))
    }


@pytest.mark.parametrize("flags", [{"engine.n_ctx": 512}, {"engine.n_ctx": 2048, "engine.n_batch": 64}])
def test_claims_cover_what_llama_cpp_takes_for_a_model_with_many_tokens(
    flags: dict[str, Any], small_llm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Model(small_llm, gpu_layers=0) as model:
        found = claimed_and_reported(model, settings_of(flags), caplog)
    cells, buffers = found["KV cells"], found["compute buffers"]
    assert cells[0] == pytest.approx(cells[1], rel=0.001)
    assert buffers[1] <= buffers[0] <= 1.5 * buffers[1] + 10 * MEGABYTE


@pytest.mark.parametrize("flags", [{"engine.slots": 1, "engine.n_ctx": 512, "engine.n_batch": 512}, {}])
def test_claims_cover_what_llama_cpp_takes_where_activations_and_the_mask_count(
    flags: dict[str, Any], toy: Model, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = settings_of({"engine.n_ctx": 2048, "engine.n_batch": 64} | flags)
    cells, buffers = claimed_and_reported(toy, wanted, caplog).values()
    assert cells[0] == pytest.approx(cells[1], rel=0.01)
    assert buffers[1] <= buffers[0] <= 2.6 * buffers[1]


# --- the accounts of this process ------------------------------------------------------------------------------------


def test_claims_are_given_back_when_what_they_were_for_could_not_be_made() -> None:
    memory = memory_of(100)
    with pytest.raises(ZeroDivisionError), admitted(memory.accounts, Claim("a", 60), Claim("b", 40), model="model"):
        raise ZeroDivisionError
    assert memory.accounts.host.free == 100


def test_claims_that_are_refused_are_a_model_error_that_names_the_model() -> None:
    memory = memory_of(100)
    with (
        pytest.raises(ModelError, match="b: ") as error,
        admitted(memory.accounts, Claim("a", 60), Claim("b", 41), model="large one"),
    ):
        pytest.fail("nothing may be made")
    assert error.value.field == "large one"
    assert memory.accounts.host.free == 100


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with 2000 MB available, of which the process has 300 already; no GPU."""
    found = DeviceMemory(kind="cpu", total=4000 * MEGABYTE, available=2000 * MEGABYTE)
    monkeypatch.setattr(device, "host_memory", lambda: found)
    monkeypatch.setattr(device, "memory_used", lambda: 300 * MEGABYTE)
    monkeypatch.setattr(library, "has_gpu", lambda: False)
    return monkeypatch


@pytest.mark.parametrize(
    ("flags", "room"),
    [
        pytest.param({}, 2000 - 512, id="what is available, but for the reserve"),
        pytest.param({"memory.reserve_mb": 0}, 2000, id="no reserve"),
        pytest.param({"memory.limit_mb": 1000}, 1000 - 300, id="a limit, with what is used already"),
        pytest.param({"memory.limit_mb": 9000}, 2000 - 512, id="a limit above what there is"),
        pytest.param({"memory.limit_mb": 200}, 0, id="a limit that is passed already"),
    ],
)
@pytest.mark.usefixtures("machine")
def test_what_may_be_claimed_follows_the_settings(flags: dict[str, Any], room: int) -> None:
    memory = open_accounts(settings_of(flags))
    assert memory.accounts.host.capacity == room * MEGABYTE
    assert (memory.accounts.gpu, memory.note) == (None, "")


def test_a_discrete_gpu_has_an_account_of_its_own(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(library, "has_gpu", lambda: True)
    machine.setattr(device, "memory", lambda: DeviceMemory("discrete", 9000 * MEGABYTE, 8000 * MEGABYTE))
    memory = open_accounts(settings_of({"memory.limit_mb": 1000}))
    assert memory.accounts.host.capacity == 700 * MEGABYTE
    assert memory.accounts.gpu is not None
    assert memory.accounts.gpu.capacity == 1000 * MEGABYTE
    unused = open_accounts(settings_of({"engine.gpu_layers": 0}))
    assert unused.accounts.gpu is None


def test_an_integrated_gpu_shares_the_machines_account_and_an_unknown_one_too(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(library, "has_gpu", lambda: True)
    machine.setattr(device, "memory", lambda: DeviceMemory("integrated", 9, 9))
    assert open_accounts(settings_of({})).accounts.gpu is None
    machine.setattr(device, "memory", lambda: DeviceMemory("cpu", 9, 9, note="not installed"))
    unknown = open_accounts(settings_of({}))
    assert (unknown.accounts.gpu, unknown.note) == (None, "not installed")


@pytest.mark.parametrize(
    ("gpu", "layers", "share"),
    [(False, -1, 0.0), (True, 0, 0.0), (True, -1, 1.0), (True, 6, 0.5), (True, 12, 1.0), (True, 99, 1.0)],
)
def test_the_share_of_the_gpu_is_that_of_its_layers(
    gpu: bool, layers: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "has_gpu", lambda: gpu)
    assert gpu_share(settings_of({"engine.gpu_layers": layers}), lambda: 11) == share


# --- whole libraries -------------------------------------------------------------------------------------------------


def small(settings: Settings, flags: dict[str, Any]) -> Settings:
    chosen = {"models.llm": settings.models.llm, "models.folder": settings.models.folder, "engine.n_ctx": 512}
    return settings_of(chosen | {"kv.idle": False, "learning.idle": False, "engine.threads": 1} | flags)


def limit(*sizes: int) -> int:
    """MB that this process may have when it is to have room for so many bytes more, and for the embedding model."""
    return (device.memory_used() + EMBEDDER_WORK + 23 * MEGABYTE + sum(sizes)) // MEGABYTE


def test_a_limit_that_is_passed_already_is_refused_and_leaves_nothing_behind(
    small_settings: Settings, tmp_path: Path
) -> None:
    with EdgeRAG.open(tmp_path, settings=small(small_settings, {"memory.limit_mb": 1})) as rag:
        for _ in range(2):
            with pytest.raises(ModelError, match=r"embedding model: .* are needed, 0 MB") as error:
                rag.load()
        status = rag.status()
    assert error.value.field == small_settings.models.embedder
    assert (status.loaded, status.accounts, status.budget, status.engine) == ((), (), None, None)


def test_a_language_model_that_does_not_fit_is_refused_before_it_is_loaded(
    small_settings: Settings, small_llm: Path, tmp_path: Path
) -> None:
    tight = limit(small_llm.stat().st_size // 2)
    with EdgeRAG.open(tmp_path, settings=small(small_settings, {"memory.limit_mb": tight})) as rag:
        with pytest.raises(ModelError, match=r"weights: \d+ MB of the machine's memory are needed"):
            rag.load()
        status = rag.status()
    assert {part.what for part in status.loaded} == {"embedding model", "coarse vector index"}
    assert [list(account.claims) for account in status.accounts] == [["embedding model"]]


def test_in_little_memory_a_library_works_without_a_ram_tier_and_says_so(
    small_settings: Settings, small_llm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Model(small_llm, gpu_layers=0) as model:
        needed = takes(planned(model, LOTS, small(small_settings, {})), ram=False)
    tight = limit(small_llm.stat().st_size, needed, 40 * MEGABYTE)
    flags = {"memory.limit_mb": tight, "retrieval.min_similarity": -1, "answering.max_tokens": 2}
    note = tmp_path / "note.md"
    note.write_text("The red pump has run well since May.")
    with EdgeRAG.open(tmp_path / "data", settings=small(small_settings, flags)) as rag:
        assert rag.add(note).count("added") == 1
        before = rag.status()
        assert rag.ask("How does the red pump run?").usage.completion_tokens == 2
        status = rag.status()
    assert (before.budget, before.engine) == (None, None)
    assert status.budget is not None
    assert 0 < status.budget.ram < small_settings.kv.ram_mb * MEGABYTE
    assert (status.budget.slots, status.budget.n_ctx) == (small_settings.engine.slots, 512)
    assert [reason.split()[1] for reason in status.budget.reasons] == ["RAM"]
    assert [record.getMessage() for record in caplog.records if "RAM tier" in record.getMessage()] != []
    assert status.kv is not None
    assert status.kv.ram_budget == status.budget.ram
    claims = status.accounts[0].claims
    assert {"embedding model", "weights", "KV cells", "compute buffers", "RAM tier"} <= claims.keys()
    assert sum(claims.values()) <= status.accounts[0].capacity


def test_status_tells_what_the_engine_does_and_how_threads_are_spent(small_settings: Settings, tmp_path: Path) -> None:
    with EdgeRAG.open(tmp_path, settings=small(small_settings, {})) as rag:
        rag.load()
        status = rag.status()
    assert status.engine is not None
    assert status.budget is not None
    assert (status.engine.slots, status.engine.cells) == (status.budget.slots, status.budget.cells)
    assert (status.engine.active, status.engine.waiting, status.engine.cells_used) == (0, 0, 0)
    assert status.threads == plan_threads(device.physical_cores(), 1)
    assert status.n_ctx == 512


def test_an_engine_that_cannot_be_made_gives_its_memory_back(
    small_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ModelError("no context could be made")

    with EdgeRAG.open(tmp_path, settings=small(small_settings, {})) as rag:
        monkeypatch.setattr(parts, "examine", fail)
        with pytest.raises(ModelError, match="no context"):
            rag.load()
        claims = rag.status().accounts[0].claims
        assert claims.keys() == {"embedding model", "weights"}
        monkeypatch.undo()
        rag.load()
        assert "KV cells" in rag.status().accounts[0].claims


def test_a_training_claims_its_memory_until_it_ends(small_settings: Settings, small_llm: Path, tmp_path: Path) -> None:
    flags = {"adapters.memory_mb": 16, "learning.memory_mb": 300, "learning.idle": False}
    with EdgeRAG.open(tmp_path / "data", settings=small(small_settings, flags)) as rag:
        learner = rag._house.school.learner()
        assert learner
        with learner._tools.train(tmp_path):
            assert rag._house.memory().accounts.host.account().claims["training"] == 300 * MEGABYTE
        assert "training" not in rag._house.memory().accounts.host.account().claims
