"""Settings: where a value comes from, and what is said about a bad one."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from edge_rag.config import (
    Server,
    Settings,
    config_file,
    default_data_folder,
    describe_settings,
    load_settings,
    models_folder,
    parse_settings,
    socket_path,
)
from edge_rag.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration file that is read, empty."""
    path = tmp_path / "config.toml"
    path.touch()
    monkeypatch.setenv("EDGE_RAG_CONFIG", str(path))
    return path


def load(flags: Mapping[str, Any] | None = None, **environment: str) -> Settings:
    return load_settings(flags, environment)


def test_without_settings_of_ones_own_all_defaults_hold(file: Path) -> None:
    assert load() == Settings()


def test_the_usual_file_need_not_exist_but_a_named_one_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("EDGE_RAG_CONFIG")
    assert load() == Settings()
    monkeypatch.setenv("EDGE_RAG_CONFIG", str(tmp_path / "nowhere.toml"))
    with pytest.raises(ConfigError, match="no such file"):
        load()


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(file: Path) -> None:
    assert load().retrieval.top_k == Settings().retrieval.top_k
    file.write_text("[retrieval]\ntop_k = 11\ncandidates = 60\n[engine]\nn_ctx = 1024\n")
    assert load().retrieval.top_k == 11
    assert load(EDGE_RAG_RETRIEVAL__TOP_K="12").retrieval.top_k == 12
    settings = load({"retrieval.top_k": 13}, EDGE_RAG_RETRIEVAL__TOP_K="12", EDGE_RAG_ENGINE__N_CTX="2048")
    assert settings.retrieval.top_k == 13
    assert settings.engine.n_ctx == 2048
    assert settings.retrieval.candidates == 60, "the rest of a group stays"


def test_the_environment_of_the_process_is_read_when_none_is_given(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RAG_ANSWERING__MAX_TOKENS", "99")
    assert load_settings().answering.max_tokens == 99


def test_text_becomes_what_the_setting_is(file: Path) -> None:
    settings = load(
        {"answering.stop": "END,STOP", "engine.gpu_layers": "-1"},
        EDGE_RAG_MODELS__OFFLINE="true",
        EDGE_RAG_RETRIEVAL__RRF_K="12.5",
        EDGE_RAG_INGEST__EXCLUDE="*.log,build/",
        EDGE_RAG_MODELS__LLM="42",
    )
    assert settings.answering.stop == ("END", "STOP")
    assert settings.engine.gpu_layers == -1
    assert settings.models.offline is True
    assert settings.retrieval.rrf_k == 12.5
    assert settings.ingest.exclude == ("*.log", "build/")
    assert settings.models.llm == "42"


def test_variables_that_name_places_and_those_of_others_are_no_settings(file: Path) -> None:
    assert load(EDGE_RAG_DATA="/data", EDGE_RAG_CONFIG="/c.toml", HOME="/root", EDGE_RAGE="1") == Settings()


@pytest.mark.parametrize(
    ("flag", "field", "remedy"),
    [
        pytest.param("retrieval.topk", "retrieval.topk", "did you mean 'top_k'?", id="key"),
        pytest.param("retreival.top_k", "retreival", "did you mean 'retrieval'?", id="group"),
        pytest.param(
            "engine.zzz",
            "engine.zzz",
            "known are n_ctx, n_batch, threads, slots, queue, share, gpu_layers",
            id="nothing near",
        ),
        pytest.param("top_k", "top_k", "write GROUP.KEY", id="no group"),
        pytest.param("engine.n_ctx.x", "engine.n_ctx.x", "did you mean 'n_ctx'?", id="too deep"),
    ],
)
def test_an_unknown_key_names_the_nearest(file: Path, flag: str, field: str, remedy: str) -> None:
    variable = "EDGE_RAG_" + flag.upper().replace(".", "__", 1)
    for flags, environment in (({flag: "1"}, {}), ({}, {variable: "1"})):
        with pytest.raises(ConfigError) as caught:
            load_settings(flags, environment)
        assert caught.value.field == field
        assert remedy in caught.value.remedy


def test_an_unknown_key_of_the_file_names_the_nearest(file: Path) -> None:
    file.write_text("[answering]\nmax_token = 5\n")
    with pytest.raises(ConfigError, match=r"answering\.max_token: unknown setting — did you mean 'max_tokens'\?"):
        load()


BOUNDS = [
    ("ingest.chunk_tokens", 32, 2048),
    ("ingest.max_file_mb", 1, 4096),
    ("retrieval.top_k", 1, 64),
    ("retrieval.candidates", 8, 1000),
    ("retrieval.rrf_k", 0, 1000),
    ("retrieval.min_similarity", -1, 1),
    ("retrieval.rescore", 10, 100_000),
    ("engine.n_ctx", 512, 1_048_576),
    ("engine.n_batch", 0, 4096),
    ("engine.threads", 0, 512),
    ("engine.gpu_layers", -1, 1000),
    ("answering.max_tokens", 1, 32_768),
    ("answering.temperature", 0, 5),
    ("answering.min_p", 0, 1),
    ("answering.seed", 0, 4_294_967_294),
    ("answering.citation_floor", 0, 1),
]


@pytest.mark.parametrize(("key", "low", "high"), BOUNDS, ids=[key for key, _, _ in BOUNDS])
def test_bounds_belong_to_the_range_and_what_is_past_them_is_refused(
    file: Path, key: str, low: float, high: float
) -> None:
    group, name = key.split(".")
    for good in (low, high):
        assert getattr(getattr(load({key: good}), group), name) == good
    for bad in (low - 1, high + 1, str(high + 1), "many", True, float("nan")):
        with pytest.raises(ConfigError) as caught:
            load({key: bad})
        assert caught.value.field == key
        assert "edge-rag settings" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "field"),
    [
        pytest.param("retrieval = 3", "retrieval", id="a value where a group should be"),
        pytest.param("[retrieval]\ntop_k = [1]", "retrieval.top_k", id="a list where a number should be"),
        pytest.param("[retrieval]\nrrf_k = nan", "retrieval.rrf_k", id="not a number"),
        pytest.param('[answering]\nrewrite = "sometimes"', "answering.rewrite", id="none of the choices"),
        pytest.param("[answering]\nstop = [1]", "answering.stop[0]", id="a list of the wrong things"),
    ],
)
def test_a_bad_value_in_the_file_names_its_key(file: Path, text: str, field: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load()
    assert caught.value.field == field


@pytest.mark.parametrize("content", [b"[retrieval\n", b"top_k = ", b"\xff\xfe\x00"], ids=["bracket", "value", "bytes"])
def test_a_file_that_is_no_toml_is_named(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load()
    assert caught.value.field == str(file)


def test_a_folder_in_place_of_the_file_is_named(file: Path) -> None:
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load()


def test_a_value_in_place_of_a_group_is_refused_also_when_a_flag_is_below_it(file: Path) -> None:
    file.write_text("retrieval = 3")
    with pytest.raises(ConfigError) as caught:
        load({"retrieval.top_k": 4})
    assert caught.value.field == "retrieval"


def test_places_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_RAG_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("EDGE_RAG_CONFIG", str(tmp_path / "my.toml"))
    assert default_data_folder() == tmp_path / "data"
    assert config_file() == tmp_path / "my.toml"
    assert models_folder(parse_settings({"models": {"folder": "~/models"}})) == Path.home() / "models"
    monkeypatch.delenv("EDGE_RAG_DATA")
    assert default_data_folder().name == "library"
    assert models_folder(Settings()).name == "models"


def test_a_user_without_a_runtime_folder_is_not_warned_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    script = "from edge_rag.config import Server, socket_path; print(socket_path(Server()))"
    # A process of its own: each cause is warned of once.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("/edge_rag/edge_rag.sock\n")
    assert done.stderr == ""


def test_a_runtime_folder_that_is_another_user_s_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def owned_by_another(*_: object, **__: object) -> Path:
        raise PermissionError("runtime directory /tmp/runtime-1 is owned by uid 2, not 1; set XDG_RUNTIME_DIR instead")

    monkeypatch.setattr(platformdirs, "user_runtime_path", owned_by_another)
    with pytest.raises(ConfigError, match="owned by uid 2") as raised:
        socket_path(Server())
    assert raised.value.field == "server.uds"
    assert "--uds" in raised.value.remedy
    assert socket_path(Server(uds="/run/a.sock")) == Path("/run/a.sock")


def test_every_setting_is_described_with_its_value() -> None:
    described = describe_settings(Settings())
    assert ("retrieval.top_k", 5, "Passages per question.") in described
    assert all(text.endswith(".") for _, _, text in described)
    assert len({key for key, _, _ in described}) == len(described)
    for key, value, _ in described:
        assert load_settings({key: value}, {}) is not None
