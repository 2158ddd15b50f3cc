"""What can be known of Dockerfile.jetson without a board: its parts fit each other and the project; its checks bite.

The commands that look at something while the image is built are run here as they stand, with their paths moved into a
folder and the programs of another machine replaced by scripts that print what those would.
"""

import http.server
import os
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from edge_rag.cli import serving
from edge_rag.cli.app import app
from edge_rag.config import ENVIRONMENT_PREFIX, load_settings
from tests.deploy.dockerfile import Instruction, Stage, ancestry, arguments, environment, read

IMAGES = ("server", "trainer")
REGISTERED = (serving,)


@pytest.fixture(scope="module")
def text(repository: Path) -> str:
    return (repository / "Dockerfile.jetson").read_text()


@pytest.fixture(scope="module")
def stages(text: str) -> list[Stage]:
    return read(text)


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text())


def stage(stages: list[Stage], name: str) -> Stage:
    return next(found for found in stages if found.name == name)


def command(stage: Stage, word: str) -> str:
    """The RUN of a stage in which `word` stands."""
    (found,) = (run.value for run in stage.all("RUN") if word in run.value)
    return found


def copied(stages: list[Stage]) -> list[str]:
    """Paths of the repository that go into an image."""
    own = [run for stage in stages for run in stage.all("COPY") if "from" not in run.flags]
    return [source for run in own for source in run.words()[:-1]]


# ---------------------------------------------------------------------------------------------- its parts fit together


def test_a_line_that_is_no_instruction_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction"):
        read("FROM ubuntu:24.04\nRUM true")
    with pytest.raises(ValueError, match="before the first FROM"):
        read("RUN true\nFROM ubuntu:24.04")


def test_continued_lines_are_one_and_comments_between_them_are_none() -> None:
    (only,) = read('FROM x AS y\nRUN --mount=type=bind,from=z true \\\n# why\n && false\nCMD ["a", "b c"]')
    assert (only.name, only.base) == ("y", "x")
    assert only.last("RUN") == Instruction("RUN", {"mount": ["type=bind,from=z"]}, "true  && false")
    assert only.last("CMD").words() == ["a", "b c"]


def test_every_stage_starts_from_ubuntu_24_04_or_an_earlier_stage(stages: list[Stage]) -> None:
    for number, found in enumerate(stages):
        assert found.base == "ubuntu:24.04" or found.base in {earlier.name for earlier in stages[:number]}


def test_every_stage_that_is_taken_from_stands_before(stages: list[Stage]) -> None:
    seen: set[str] = set()
    for found in stages:
        for instruction in found.instructions:
            mounts = [re.search(r"\bfrom=([^,]+)", mount) for mount in instruction.flags.get("mount", [])]
            named = [*instruction.flags.get("from", []), *(mount[1] for mount in mounts if mount)]
            assert set(named) <= seen
        seen.add(found.name)


def test_the_server_is_what_is_built_when_no_target_is_named(stages: list[Stage]) -> None:
    assert stages[-1].name == "server"
    assert {found.name for found in stages} >= set(IMAGES)


def test_arguments_that_two_stages_share_have_one_default(stages: list[Stage]) -> None:
    assert arguments(stages)["CUDA"] == "13-2"


def test_every_argument_that_is_used_is_declared_in_its_own_stage(stages: list[Stage]) -> None:
    every = set(arguments(stages))
    for found in stages:
        declared = {arg.words()[0].partition("=")[0] for arg in found.all("ARG")}
        used = {name for each in found.instructions for name in re.findall(r"\$\{([A-Z0-9_]+)", each.value)}
        assert used & every <= declared, found.name


# -------------------------------------------------------------------------------------------------- it fits the project


def test_everything_copied_is_there_in_a_fresh_clone(repository: Path, stages: list[Stage]) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=True).stdout
    tracked = listed.splitlines()
    assert copied(stages)
    for source in copied(stages):
        assert (repository / source).exists()
        assert any(name == source or name.startswith(f"{source}/") for name in tracked), source


def test_what_is_copied_is_all_that_the_package_is_built_from(stages: list[Stage], project: dict[str, Any]) -> None:
    sources = set(copied(stages))
    settings = project["tool"]["setuptools"]
    folders = {name: settings["package-dir"].get(name, name.replace(".", "/")) for name in settings["packages"]}
    for name, folder in folders.items():
        inside = {f"{folder}/{file}" for file in ("__init__.py", *settings["package-data"].get(name, []))}
        assert folder.split("/")[0] in sources or inside <= sources, name
    assert sources >= {"pyproject.toml", "setup.py", project["project"]["readme"], *project["project"]["license-files"]}


def test_no_weights_can_get_into_an_image(repository: Path, stages: list[Stage]) -> None:
    for source in copied(stages):
        path = repository / source
        assert source not in {".", "models"}
        assert not (path.is_dir() and [file for file in path.rglob("*") if file.suffix in {".gguf", ".onnx"}])


def test_llama_is_pinned_as_in_pyproject(stages: list[Stage], project: dict[str, Any]) -> None:
    pinned = next(name for name in project["project"]["dependencies"] if name.startswith("llama-cpp-python"))
    assert arguments(stages)["LLAMA"] == pinned


@pytest.mark.parametrize("image", IMAGES)
def test_an_entry_point_is_a_command_that_exists(stages: list[Stage], project: dict[str, Any], image: str) -> None:
    assert stage(stages, image).last("ENTRYPOINT").words()[0] in project["project"]["scripts"]


def test_the_server_s_options_exist(stages: list[Stage]) -> None:
    words = stage(stages, "server").last("ENTRYPOINT").words()
    typer.main.get_command(app).commands[words[1]].make_context(words[1], words[2:])  # type: ignore[attr-defined]


@pytest.mark.parametrize("image", IMAGES)
def test_settings_of_an_image_are_settings_we_know(stages: list[Stage], image: str) -> None:
    variables = environment(ancestry(stages, image))
    settings = load_settings(environment=variables)
    assert any(name.startswith(ENVIRONMENT_PREFIX) for name in variables)
    assert settings.models.folder == "/models"
    assert variables["EDGE_RAG_DATA"] == "/data"


def test_commands_in_the_server_s_container_ask_the_server(stages: list[Stage]) -> None:
    entry = stage(stages, "server").last("ENTRYPOINT").words()
    assert environment(ancestry(stages, "server"))["EDGE_RAG_UDS"] == entry[entry.index("--uds") + 1]
    assert "EDGE_RAG_UDS" not in environment(ancestry(stages, "trainer"))  # there no server runs


@pytest.mark.parametrize("image", IMAGES)
def test_models_and_data_are_volumes_of_the_user_who_runs(stages: list[Stage], image: str) -> None:
    line = ancestry(stages, image)
    (volumes,) = (found.words() for each in line for found in each.all("VOLUME"))
    assert volumes == ["/data", "/models"]
    made = command(stage(stages, "installed"), "useradd")
    user = line[-1].last("USER").value
    folders = re.search(rf"install --directory --mode 700 --owner {user} --group {user} (.+)$", made)
    assert folders is not None
    assert set(folders[1].split()) == {*volumes, "/run/edge_rag"}


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_does_not_run_as_root_and_may_use_the_gpu(stages: list[Stage], image: str) -> None:
    user = stage(stages, image).last("USER").value
    assert user not in {"root", "0"}
    assert re.search(rf"useradd .*--groups video,render .*{user} ", command(stage(stages, "installed"), "useradd"))


def test_the_user_gets_the_number_that_was_asked_for(tmp_path: Path, stages: list[Stage]) -> None:
    for name in ("userdel", "groupadd", "install"):
        program(tmp_path, name, "exit 0")
    program(tmp_path, "useradd", f'echo "$@" > {tmp_path}/asked')
    # Bash has variables of its own that no argument can change, UID among them.
    done = run_moved(command(stage(stages, "installed"), "useradd"), tmp_path, variables=arguments(stages))
    assert done.returncode == 0, done.stderr
    assert "--uid 1000 " in (tmp_path / "asked").read_text()


def test_torch_is_in_the_trainer_only(stages: list[Stage]) -> None:
    def fetched(image: str) -> str:
        return " ".join(run.value for found in ancestry(stages, image) for run in found.all("RUN"))

    assert "[train]" in fetched("trainer")
    assert not re.search(r"\[train\]|torch", fetched("server"))


def test_the_server_is_installed_from_the_wheels_that_were_built_and_nothing_else(stages: list[Stage]) -> None:
    installs = [run.value for found in ancestry(stages, "server") for run in found.all("RUN") if "pip" in run.value]
    assert len(installs) == 1
    assert "pip install --no-cache-dir --no-index --find-links /wheels" in installs[0]


def test_no_host_but_nvidia_s_is_named(text: str) -> None:
    assert set(re.findall(r"https?://([^/\s]+)", text)) == {"repo.download.nvidia.com", "localhost"}


def test_the_head_says_that_nobody_ran_it(text: str) -> None:
    head = text[: text.index("FROM ")]
    assert "NOT RUN ON HARDWARE" in head
    assert "docs/deploy.md" in head


# ------------------------------------------------------------------------------------------------------ its checks bite


def run_moved(text: str, folder: Path, *moved: str, variables: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run a RUN's commands as Docker would, with the paths `moved` and /tmp below `folder`, and its bin first."""
    paths = "|".join(re.escape(path) for path in (*moved, "/tmp"))
    text = re.sub(rf"(?<![\w/.])({paths})(?=[/\s)]|$)", rf"{folder}\1", text)
    (folder / "tmp").mkdir(exist_ok=True)
    shell = ["bash", "-o", "errexit", "-o", "nounset", "-o", "pipefail", "-c", text]
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        shell, env={"PATH": path, "HOME": str(folder)} | variables, capture_output=True, text=True, check=False
    )


def program(folder: Path, name: str, script: str) -> None:
    """A script that stands in for a program."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / name).chmod(0o755)


@pytest.mark.parametrize(
    ("architectures", "fine"),
    [
        pytest.param(("87", "110"), True, id="both are there"),
        pytest.param(("110",), False, id="Orin is missing"),
        pytest.param(("87",), False, id="Thor is missing"),
        pytest.param(("90", "1100"), False, id="others are there"),
        pytest.param((), False, id="there is no GPU code"),
    ],
)
def test_a_library_without_code_for_both_boards_ends_the_build(
    tmp_path: Path, stages: list[Stage], architectures: tuple[str, ...], fine: bool
) -> None:
    given = arguments(stages)["CUDA_ARCHITECTURES"]
    assert set(given.split(";")) == {"87", "110"}
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "llama_cpp_python-0.3.36-py3-none-linux_aarch64.whl", "w") as wheel:
        wheel.writestr("llama_cpp/lib/libggml-cuda.so", "")
    listed = [f"ELF file    {n}: libggml-cuda.{n}.sm_{name}.cubin" for n, name in enumerate(architectures, start=1)]
    program(tmp_path, "cuobjdump", 'test -f "$2" || exit 9\n' + "\n".join(f'echo "{line}"' for line in listed))
    text = command(stage(stages, "build"), "cuobjdump --list-elf")
    done = run_moved(text, tmp_path, "/wheels", variables={"CUDA_ARCHITECTURES": given})
    assert (done.returncode == 0) is fine, done.stderr


def test_the_library_is_built_for_what_is_checked(stages: list[Stage]) -> None:
    text = command(stage(stages, "build"), "-DGGML_CUDA=ON")
    assert "-DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCHITECTURES} " in text
    assert "-DGGML_NATIVE=OFF" in text


@pytest.mark.parametrize(
    ("missing", "fine"),
    [
        pytest.param(["libcuda.so.1"], True, id="the driver is missing"),
        pytest.param([], True, id="nothing is missing: built with the NVIDIA runtime"),
        pytest.param(["libcuda.so.1", "libcublas.so.13"], False, id="a library of CUDA is missing"),
    ],
)
def test_a_library_that_the_image_lacks_ends_the_build(
    tmp_path: Path, stages: list[Stage], missing: list[str], fine: bool
) -> None:
    lines = ["libc.so.6 => /lib/libc.so.6 (0x1)", *(f"{name} => not found" for name in missing)]
    program(tmp_path, "ldd", "\n".join(f'echo "{line}"' for line in lines))
    program(tmp_path, "python", "exit 0")
    done = run_moved(command(stage(stages, "installed"), "ldd "), tmp_path, variables={})
    assert (done.returncode == 0) is fine, done.stderr


def test_the_packages_with_compiled_parts_load_as_the_image_loads_them(tmp_path: Path, stages: list[Stage]) -> None:
    program(tmp_path, "ldd", "exit 0")
    program(tmp_path, "python", f'exec "{sys.executable}" "$@"')
    done = run_moved(command(stage(stages, "installed"), "ldd "), tmp_path, variables={})
    assert done.returncode == 0, done.stderr


def test_a_server_tells_nobody_that_it_runs(tmp_path: Path, repository: Path, stages: list[Stage]) -> None:
    unit = (repository / "deploy" / "edge-rag.service").read_text()
    assert "Environment=ORT_DISABLE_TELEMETRY=1\n" in unit
    for image in IMAGES:
        told = environment(ancestry(stages, image)) | {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        subprocess.run([sys.executable, "-c", "import onnxruntime"], env=told, check=True)
    # Where it reports, it keeps an id of the machine and what it has not sent yet.
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two signing keys, 1.asc and 2.asc, both together in both.asc, and their fingerprints."""
    if not shutil.which("gpg"):
        pytest.skip("gpg is not installed")
    folder = tmp_path_factory.mktemp("keys")
    home = ["gpg", "--homedir", str(folder), "--batch", "--quiet"]
    for name in ("1", "2"):
        made = [*home, "--passphrase", "", "--quick-generate-key", name, "ed25519", "sign"]
        subprocess.run(made, check=True, capture_output=True)
        out = subprocess.run([*home, "--armor", "--export", f"={name}"], check=True, capture_output=True).stdout
        (folder / f"{name}.asc").write_bytes(out)
        listed = [*home, "--with-colons", "--list-keys", f"={name}"]
        told = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
        (folder / f"{name}.fpr").write_text(told.partition("\nfpr:")[2].split(":")[8])
    both = subprocess.run([*home, "--armor", "--export"], check=True, capture_output=True).stdout
    (folder / "both.asc").write_bytes(both)
    subprocess.run(["gpgconf", "--homedir", str(folder), "--kill", "all"], check=False, capture_output=True)
    return folder


@pytest.mark.parametrize(
    ("served", "fine"),
    [
        pytest.param("1", True, id="the key that was asked for"),
        pytest.param("2", False, id="another key"),
        pytest.param("both", False, id="another key beside it"),
    ],
)
def test_only_the_key_with_the_known_fingerprint_is_trusted(
    tmp_path: Path, stages: list[Stage], keys: Path, served: str, fine: bool
) -> None:
    script = f'while [ "$1" != --output ]; do shift; done; cp {keys / served}.asc "$2"'
    program(tmp_path, "curl", script)
    text = command(stage(stages, "key"), "gpg --show-keys")
    known = (keys / "1.fpr").read_text()
    done = run_moved(text, tmp_path, "/jetson.asc", "/jetson.gpg", "/listed", variables={"KEY_FINGERPRINT": known})
    assert (done.returncode == 0) is fine, done.stderr
    assert (tmp_path / "jetson.gpg").exists() is fine


def test_the_known_fingerprint_is_a_whole_one(stages: list[Stage]) -> None:
    assert re.fullmatch(r"[0-9A-F]{40}", arguments(stages)["KEY_FINGERPRINT"])


def test_models_are_fetched_without_a_driver(tmp_path: Path, repository: Path) -> None:
    # docs/deploy.md pulls them before the GPU is there: llama_cpp cannot be imported then.
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('libcuda.so.1')")
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{repository}"}
    listing = [sys.executable, "-m", "edge_rag", "models", "list"]
    subprocess.run(listing, env=variables, cwd=tmp_path, check=True, capture_output=True)
    loading = [sys.executable, "-c", "import edge_rag.native.llama"]
    assert subprocess.run(loading, env=variables, cwd=tmp_path, check=False, capture_output=True).returncode != 0


# ------------------------------------------------------------------------------------------------------ the healthcheck


class Healthy(http.server.BaseHTTPRequestHandler):
    """Answers GET /health with the server's `status`, everything else with 404."""

    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/health" else 404)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing: the client's address is an empty text on a Unix socket."""


class OnSocket(socketserver.UnixStreamServer):
    """HTTP on a Unix socket."""

    status = 200

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, _ = super().get_request()
        return connection, ("socket", 0)


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[OnSocket]:
    with OnSocket(str(tmp_path / "edge_rag.sock"), Healthy) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def health(stages: list[Stage], path: Path) -> int:
    """Run the image's HEALTHCHECK against the socket at `path`; its exit code."""
    check = stage(stages, "server").last("HEALTHCHECK").value
    words = Instruction("CMD", {}, check.removeprefix("CMD").strip()).words()
    if not shutil.which(words[0]):
        pytest.skip(f"{words[0]} is not installed")
    words[words.index("--unix-socket") + 1] = str(path)
    return subprocess.run(words, capture_output=True, check=False).returncode


def test_a_server_that_is_ready_is_healthy(stages: list[Stage], answering: OnSocket, tmp_path: Path) -> None:
    assert health(stages, tmp_path / "edge_rag.sock") == 0


@pytest.mark.parametrize("status", [503, 500, 404])
def test_a_server_that_says_otherwise_is_not_healthy(
    stages: list[Stage], answering: OnSocket, tmp_path: Path, status: int
) -> None:
    answering.status = status
    assert health(stages, tmp_path / "edge_rag.sock") != 0


def test_without_a_server_nothing_is_healthy(stages: list[Stage], tmp_path: Path) -> None:
    assert health(stages, tmp_path / "edge_rag.sock") != 0


def test_the_healthcheck_asks_where_the_server_listens(stages: list[Stage]) -> None:
    entry = stage(stages, "server").last("ENTRYPOINT").words()
    assert f'"--unix-socket", "{entry[entry.index("--uds") + 1]}"' in stage(stages, "server").last("HEALTHCHECK").value
