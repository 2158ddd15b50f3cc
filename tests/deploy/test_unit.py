"""The systemd units: systemd itself accepts them, and they fit the server, its settings and its exit codes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from edge_rag import errors
from edge_rag.cli import serving
from edge_rag.cli.app import app
from edge_rag.config import Settings, load_settings
from edge_rag.server.serve import LAST_WORDS

REGISTERED = (serving,)
EXPOSURE = 15  # tenths, as `systemd-analyze security` counts: 0 all shut, 100 all open

Unit = dict[str, dict[str, list[str]]]


def read(path: Path) -> Unit:
    """Sections → keys → values in order. Raises ValueError when a line is nothing that systemd knows."""
    unit: Unit = {}
    keys: dict[str, list[str]] | None = None
    for line in path.read_text().splitlines():
        if not line or line.startswith(("#", ";")):
            continue
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            keys = unit.setdefault(heading[1], {})
        elif keys is not None and (entry := re.fullmatch(r"(\w+)=(.*)", line)):
            keys.setdefault(entry[1], []).append(entry[2])
        else:
            raise ValueError(f"{path.name}: {line}")
    return unit


def seconds(span: str) -> float:
    """A time as systemd writes it, in one unit."""
    number, unit = re.fullmatch(r"(\d+)(s|min|)", span).groups()  # type: ignore[union-attr]
    return int(number) * (60 if unit == "min" else 1)


def placed(text: str) -> str:
    """A value with systemd's specifiers for a unit of the system."""
    return text.replace("%t", "/run").replace("%S", "/var/lib")


@pytest.fixture(scope="module")
def folder(repository: Path) -> Path:
    return repository / "deploy"


@pytest.fixture(scope="module")
def service(folder: Path) -> dict[str, list[str]]:
    return read(folder / "edge-rag.service")["Service"]


@pytest.fixture(scope="module")
def listening(folder: Path) -> dict[str, list[str]]:
    return read(folder / "edge-rag.socket")["Socket"]


def test_a_line_that_is_none_of_a_unit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.service").write_text("[Service]\nType notify\n")
    with pytest.raises(ValueError, match="Type notify"):
        read(tmp_path / "x.service")


def test_the_command_and_its_options_exist(service: dict[str, list[str]]) -> None:
    (command,) = service["ExecStart"]
    words = placed(command).split()
    assert words[0].endswith("/bin/edge-rag")
    typer.main.get_command(app).commands[words[1]].make_context(words[1], words[2:])  # type: ignore[attr-defined]


def test_the_settings_of_the_unit_are_settings_we_know(service: dict[str, list[str]]) -> None:
    variables = dict(placed(value).split("=", 1) for value in service["Environment"])
    settings = load_settings(environment=variables)
    assert settings.models.offline
    assert settings.models.folder == "/var/lib/edge_rag/models"
    assert variables["EDGE_RAG_DATA"] == "/var/lib/edge_rag/library"


def test_what_the_server_writes_is_below_the_folders_that_systemd_makes(service: dict[str, list[str]]) -> None:
    made = [f"/run/{name}" for name in service["RuntimeDirectory"][0].split()]
    made += [f"/var/lib/{name}" for name in service["StateDirectory"][0].split()]
    named = re.findall(r"(?:/run|/var/lib)/\S+", placed(" ".join([*service["ExecStart"], *service["Environment"]])))
    assert len(named) == 3
    for path in named:
        assert any(path == folder or path.startswith(f"{folder}/") for folder in made), path


def test_folders_and_files_are_the_account_s_own(service: dict[str, list[str]]) -> None:
    assert service["RuntimeDirectoryMode"] == service["StateDirectoryMode"] == ["0700"]
    assert service["UMask"] == ["0077"]
    assert service["User"] != ["root"]


def test_the_server_has_time_to_drain(service: dict[str, list[str]]) -> None:
    # After the last words the library is closed: journal, caches, threads.
    assert seconds(service["TimeoutStopSec"][0]) >= Settings().server.drain + LAST_WORDS + 20


def test_systemd_waits_for_ready_and_watches_afterwards(service: dict[str, list[str]]) -> None:
    assert service["Type"] == ["notify"]
    assert seconds(service["WatchdogSec"][0]) >= 30
    assert seconds(service["TimeoutStartSec"][0]) >= 300


def test_a_server_that_cannot_succeed_is_not_started_again(service: dict[str, list[str]]) -> None:
    assert service["Restart"] == ["on-failure"]
    final = {int(code) for code in service["RestartPreventExitStatus"][0].split()}
    assert final == {errors.UsageError.exit_code}


def test_a_machine_that_stays_broken_is_not_tried_for_ever(folder: Path, service: dict[str, list[str]]) -> None:
    unit = read(folder / "edge-rag.service")["Unit"]
    tries, span = int(unit["StartLimitBurst"][0]), seconds(unit["StartLimitIntervalSec"][0])
    # A start that fails for want of a model takes a few seconds at most.
    assert tries * (seconds(service["RestartSec"][0]) + 30) < span


def test_a_stop_that_cuts_answers_off_is_no_failure(service: dict[str, list[str]]) -> None:
    (code,) = service["SuccessExitStatus"]
    assert int(code) == errors.EdgeRAGError.exit_code


def test_nothing_hides_the_gpu_or_the_memory_s_size(service: dict[str, list[str]]) -> None:
    hiding = {"PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock", "ProcSubset", "MemoryDenyWriteExecute"}
    assert not hiding & set(service)
    assert set(service["SupplementaryGroups"][0].split()) == {"video", "render"}


def test_other_accounts_ask_through_a_socket_of_the_service_s_group(
    service: dict[str, list[str]], listening: dict[str, list[str]]
) -> None:
    assert listening["SocketMode"] == ["0660"]
    assert listening["SocketUser"] == service["User"]
    assert listening["SocketGroup"] == service["Group"]
    # The service's own folder goes when it stops, and lets nobody in.
    assert not placed(listening["ListenStream"][0]).startswith(f"/run/{service['RuntimeDirectory'][0]}/")


def systemd_analyze(*arguments: str) -> "subprocess.CompletedProcess[str]":
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def installed(folder: Path, tmp_path: Path) -> list[str]:
    """Both units as they are, but with a program that is there."""
    for path in folder.glob("edge-rag.*"):
        text = re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", path.read_text(), flags=re.MULTILINE)
        (tmp_path / path.name).write_text(text)
    return [str(path) for path in sorted(tmp_path.iterdir())]


def test_systemd_finds_no_fault(installed: list[str]) -> None:
    told = systemd_analyze("verify", *installed)
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")
    assert len(installed) == 2


def test_systemd_would_find_a_fault(installed: list[str]) -> None:
    path = next(Path(name) for name in installed if name.endswith(".service"))
    path.write_text(path.read_text().replace("UMask=0077", "UMusk=0077"))
    assert "UMusk" in systemd_analyze("verify", str(path)).stderr


def test_the_service_is_hardened(installed: list[str]) -> None:
    (path,) = (name for name in installed if name.endswith(".service"))
    told = systemd_analyze("security", "--offline=true", f"--threshold={EXPOSURE}", "--no-pager", path)
    if "unrecognized option" in told.stderr:
        pytest.skip("this systemd cannot judge units that are not installed")
    assert told.returncode == 0, told.stdout[-2000:]
