"""A reader of Dockerfiles: comments out, continued lines joined, stages told apart. Enough for ours, and strict."""

import json
import re
import shlex
from typing import NamedTuple

KNOWN = {
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "ONBUILD", "RUN",
    "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip


class Instruction(NamedTuple):
    """One instruction: its name, its flags (`--from=key` is from: key; several of one name in order), the rest."""

    name: str
    flags: dict[str, list[str]]
    value: str

    def words(self) -> list[str]:
        """The value as words, be it written as JSON or as a shell would read it."""
        return json.loads(self.value) if self.value.startswith("[") else shlex.split(self.value)


class Stage(NamedTuple):
    """What stands between one FROM and the next."""

    name: str
    base: str
    instructions: list[Instruction]

    def all(self, name: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.name == name]

    def last(self, name: str) -> Instruction:
        return self.all(name)[-1]


def read(text: str) -> list[Stage]:
    """The stages of a Dockerfile. Raises ValueError when a line is no instruction."""
    stages: list[Stage] = []
    for instruction in _instructions(text):
        if instruction.name == "FROM":
            base, _, name = instruction.value.partition(" AS ")
            stages.append(Stage(name or str(len(stages)), base, []))
        elif stages:
            stages[-1].instructions.append(instruction)
        else:
            raise ValueError(f"{instruction.name} before the first FROM")
    return stages


def ancestry(stages: list[Stage], name: str) -> list[Stage]:
    """The stages that an image of stage `name` is made of, the first first."""
    by_name = {stage.name: stage for stage in stages}
    line = [by_name[name]]
    while line[0].base in by_name:
        line.insert(0, by_name[line[0].base])
    return line


def arguments(stages: list[Stage]) -> dict[str, str]:
    """The default of every ARG. Raises ValueError when two stages give one name two defaults."""
    found: dict[str, str] = {}
    for stage in stages:
        for instruction in stage.all("ARG"):
            name, _, value = instruction.words()[0].partition("=")
            if found.setdefault(name, value) != value:
                raise ValueError(f"ARG {name} is both {found[name]} and {value}")
    return found


def environment(stages: list[Stage]) -> dict[str, str]:
    """All variables that ENV sets, in the order of `stages`."""
    words = [word for stage in stages for instruction in stage.all("ENV") for word in instruction.words()]
    return dict(word.split("=", 1) for word in words)


def _instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    return [_instruction(line) for line in joined.splitlines()]


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().partition(" ")
    if name not in KNOWN:
        raise ValueError(f"no instruction of Docker's: {line[:60]}")
    flags: dict[str, list[str]] = {}
    while flag := re.match(r"--([a-z-]+)=(\S+)\s+", rest := rest.lstrip()):
        flags.setdefault(flag[1], []).append(flag[2])
        rest = rest[flag.end() :]
    return Instruction(name, flags, rest)
