"""What a trainer says on its standard output: one JSON object a line, told apart by "event". No torch here.

    started → loaded → step … step → finished        checkpoint, paused and resumed between steps; failed at any time

After `stop` the last event is a checkpoint. Seconds are wall time; `tokens` those that were trained on.
"""

import msgspec
from msgspec import Struct


class Started(Struct, frozen=True, tag_field="event", tag="started"):
    """The job was read: where it is computed, and how many examples it has."""

    device: str
    examples: int


class Loaded(Struct, frozen=True, tag_field="event", tag="loaded"):
    """The model is ready after `seconds`. `done` of `steps` were taken before, from a checkpoint.

    `note` says what is unusual, '' when nothing is.
    """

    seconds: float
    parameters: int
    done: int
    steps: int
    note: str = ""


class Step(Struct, frozen=True, tag_field="event", tag="step"):
    """One update of the adapter: `step` of `steps`, 1 is the first. `tokens` and `seconds` count from the beginning."""

    epoch: int
    step: int
    steps: int
    loss: float
    tokens: int
    seconds: float


class Paused(Struct, frozen=True, tag_field="event", tag="paused"):
    """Nothing is computed from now on: `seconds` after it was asked for the `pauses`th time."""

    pauses: int
    seconds: float


class Resumed(Struct, frozen=True, tag_field="event", tag="resumed"):
    """It goes on after `seconds`."""

    seconds: float


class Checkpoint(Struct, frozen=True, tag_field="event", tag="checkpoint"):
    """What was learned in `step` steps is on the disk."""

    step: int


class Finished(Struct, frozen=True, tag_field="event", tag="finished"):
    """The adapter is in the job folder: `sha256` of its file, mean `loss` of the last epoch; `note` as in Loaded."""

    sha256: str
    loss: float
    seconds: float
    note: str = ""


class Failed(Struct, frozen=True, tag_field="event", tag="failed"):
    """There will be no adapter: why, and what to do about it."""

    reason: str
    remedy: str = ""


Event = Started | Loaded | Step | Paused | Resumed | Checkpoint | Finished | Failed

_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def to_line(event: Event) -> bytes:
    """An event as a line."""
    return msgspec.json.encode(event) + b"\n"


def from_line(line: bytes) -> Event:
    """The event of a line. Raises msgspec.DecodeError when it is none."""
    event: Event = _decoder.decode(line)
    return event
