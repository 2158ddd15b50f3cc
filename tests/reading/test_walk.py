import os
from pathlib import Path

import pytest

from edge_rag.errors import InputError
from edge_rag.reading.walk import Walk, find_files


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    return root


def names(walk: Walk, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in walk.files]


def test_folders_are_searched_to_the_bottom_and_only_for_documents(tmp_path: Path) -> None:
    tree(
        *(tmp_path, "b.md", "a.TXT", "sub/deep/c.pdf", "sub/d.py", "e", ".hidden.md", ".git/f.md"),
        *("__pycache__/g.md", "node_modules/h.md", "env/pyvenv.cfg", "env/i.txt"),
    )
    walk = find_files([tmp_path])
    assert names(walk, tmp_path) == ["a.TXT", "b.md", "sub/deep/c.pdf"]
    assert walk.folders == (tmp_path,)
    assert walk.problems == ()


def test_a_named_file_is_taken_whatever_the_rules_say(tmp_path: Path) -> None:
    tree(tmp_path, "script.py", ".hidden.md", "x/y.md")
    (tmp_path / ".edgeragignore").write_text("*\n")
    given = [tmp_path / "script.py", tmp_path / ".hidden.md", tmp_path / "x" / "y.md"]
    walk = find_files(given, exclude=["*.md"], include=["*.pdf"])
    assert set(walk.files) == set(given)
    assert walk.folders == ()


def test_a_file_that_is_found_twice_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "x/a.md")
    (tmp_path / "link").symlink_to("x")
    monkeypatch.chdir(tmp_path)
    walk = find_files([Path(), Path("x"), Path("x/../x/a.md"), Path("link/a.md")])
    assert walk.files == (tmp_path / "x" / "a.md",)
    assert walk.folders == (tmp_path, tmp_path / "x")


def test_ignore_files_count_from_their_folder_and_the_inner_one_decides(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "a.md",
        "draft.md",
        "in/draft.md",
        "in/keep.txt",
        "old/b.md",
        "in/old.md",
        "build/c.md",
        "in/build/d.md",
    )
    (tmp_path / ".edgeragignore").write_text("# comment\ndraft.md\nold/\n/build\n*.txt\n")
    (tmp_path / "in" / ".edgeragignore").write_text("!draft.md\n!keep.txt\n")
    walk = find_files([tmp_path])
    assert names(walk, tmp_path) == ["a.md", "in/build/d.md", "in/draft.md", "in/keep.txt", "in/old.md"]


def test_include_and_exclude_are_globs_below_the_given_folder(tmp_path: Path) -> None:
    tree(tmp_path, "a.md", "b.txt", "docs/c.md", "docs/d.txt", "docs/old/e.md")
    assert names(find_files([tmp_path], include=["*.md"]), tmp_path) == ["a.md", "docs/c.md", "docs/old/e.md"]
    assert names(find_files([tmp_path], include=["docs/"], exclude=["old/", "*.txt"]), tmp_path) == ["docs/c.md"]


def test_a_bad_pattern_of_the_caller_is_an_error_and_one_in_a_file_a_problem(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"include"):
        find_files([tmp_path], include=["!"])
    tree(tmp_path, "a.md")
    (tmp_path / ".edgeragignore").write_text("!\n")
    walk = find_files([tmp_path])
    assert names(walk, tmp_path) == ["a.md"]
    assert [path for path, _ in walk.problems] == [str(tmp_path / ".edgeragignore")]


def test_what_is_missing_or_holds_nothing_is_a_problem_with_a_reason(tmp_path: Path) -> None:
    tree(tmp_path, "empty/x.py", "file.md")
    (tmp_path / "dangling.md").symlink_to("nowhere")
    paths = [tmp_path / name for name in ("gone.md", "empty", "dangling.md", "file.md/below")]
    walk = find_files(paths)
    reasons = {Path(path).name: reason for path, reason in walk.problems}
    assert walk.files == ()
    assert reasons["gone.md"] == "no such file or folder"
    assert reasons["below"] == "no such file or folder"
    assert reasons["empty"].startswith("no readable documents; read are .md ")
    assert "link" in reasons["dangling.md"]
    assert walk.folders == (tmp_path / "empty",)


def test_links_to_files_are_taken_and_links_to_folders_not_followed(tmp_path: Path) -> None:
    tree(tmp_path, "in/a.md")
    (tmp_path / "in" / "loop").symlink_to(tmp_path)
    (tmp_path / "in" / "b.md").symlink_to("a.md")
    (tmp_path / "in" / "self.md").symlink_to("self.md")
    walk = find_files([tmp_path])
    assert names(walk, tmp_path) == ["in/a.md", "in/b.md"]
    assert [path for path, _ in walk.problems] == [str(tmp_path / "in" / "self.md")]
    (problem,) = find_files([tmp_path / "in" / "self.md"]).problems
    assert problem[1].startswith("cannot be reached")


def test_odd_names_are_found_or_named_as_problems(tmp_path: Path) -> None:
    tree(tmp_path, "two\nlines.md", "größe.md")
    bad = os.fsencode(tmp_path) + b"/caf\xe9"
    Path(os.fsdecode(bad + b".md")).write_text("text")
    Path(os.fsdecode(bad)).mkdir()
    walk = find_files([tmp_path, Path(os.fsdecode(bad + b".md"))])
    assert names(walk, tmp_path) == ["größe.md", "two\nlines.md"]
    assert {path for path, _ in walk.problems} == {f"{tmp_path}/caf\\xe9.md", f"{tmp_path}/caf\\xe9"}
    assert all("rename" in reason for _, reason in walk.problems)


def test_a_folder_that_cannot_be_listed_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "a.md", "secret/b.md")
    real = os.scandir

    # The tests may run as root, for whom no mode forbids anything.
    def forbidding(path: Path) -> object:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    walk = find_files([tmp_path])
    assert names(walk, tmp_path) == ["a.md"]
    assert walk.problems == ((str(tmp_path / "secret"), "the folder cannot be listed: Permission denied"),)


def test_pipes_in_folders_are_passed_over(tmp_path: Path) -> None:
    tree(tmp_path, "a.md")
    os.mkfifo(tmp_path / "pipe.md")
    assert names(find_files([tmp_path]), tmp_path) == ["a.md"]
