"""What `tools/demo` and `tools/check` decide before anything is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools import environment


def test_the_user_s_own_build_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    assert environment.build_flags() == "-DGGML_CUDA=ON"


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        pytest.param({"avx2", "fma"}, {"native"}, id="without AMX the compiler chooses"),
        pytest.param({"avx2", "fma", "amx_tile"}, {"AVX2", "FMA"}, id="with AMX all but AMX is named"),
    ],
)
def test_amx_is_never_built(monkeypatch: pytest.MonkeyPatch, features: set[str], expected: set[str]) -> None:
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    monkeypatch.setattr(environment, "_cpu_features", lambda: frozenset(features))
    flags = environment.build_flags().split()
    named = {flag.removeprefix("-DGGML_").removesuffix("=ON") for flag in flags if flag.endswith("=ON")}
    assert named == (set() if expected == {"native"} else expected)
    assert ("-DGGML_NATIVE=OFF" in flags) == ("amx_tile" in features)
    assert not any("AMX" in flag for flag in flags)


def test_a_failed_stage_is_reported_and_ends_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    stages = environment.Stages()
    with stages.stage("goes on", go_on=True):
        raise environment.Failure("for a reason")
    with pytest.raises(SystemExit), stages.stage("ends"):
        raise environment.Failure("for another")
    stages.report()
    assert stages.failed == ["goes on", "ends"]
    assert "for a reason" in capsys.readouterr().out


def test_the_scripts_need_nothing_but_the_standard_library(repository: Path) -> None:
    code = "import sys; sys.path.insert(0, 'tools'); import environment"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=repository, check=True)
