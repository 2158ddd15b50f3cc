"""One error tree. Each error says whose fault it is, which field or file, and what to do.

    EdgeRAGError
    ├── UsageError            the caller asked for something that cannot be done as asked
    │   ├── ConfigError       a setting is unknown or out of range
    │   ├── InputError        an argument is (a question, a limit, a path)
    │   ├── NotFound          no such document, answer or model
    │   └── DocumentError     one file cannot be read; the others go on
    ├── MachineError          something outside must be repaired first
    │   ├── ModelError        a model is missing, corrupt or refuses to load
    │   │   ├── ModelMissing
    │   │   └── ModelCorrupt
    │   ├── StorageError      the data folder is full, read-only, locked or from a newer version
    │   └── NetworkError      a download failed
    ├── Busy                  too many requests wait already
    ├── Cancelled             the caller stopped the request
    └── EngineError           llama.cpp or onnxruntime failed in a way we did not foresee (ours)

Foreign errors are mapped where they are raised: `native` for engines, `store` for SQLite and downloads,
`reading` for document formats. Nothing above those rooms sees a foreign exception.
"""


class EdgeRAGError(Exception):
    """Base of all our errors: `message` says what is wrong, `remedy` what to do, `field` what it is about."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "", field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.field = field

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        return f"{where}{self.message}" + (f" — {self.remedy}" if self.remedy else "")


class UsageError(EdgeRAGError):
    """The caller asked for something that cannot be done as asked."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting is unknown or has a bad value; `field` is its dotted key."""


class InputError(UsageError):
    """An argument is out of range; `field` is its name."""


class NotFound(UsageError):
    """There is no such document, answer or model."""


class DocumentError(UsageError):
    """One file cannot be read as a document; `field` is its path."""


class MachineError(EdgeRAGError):
    """Something outside this program must be repaired first."""

    exit_code = 3


class ModelError(MachineError):
    """A model cannot be used; `field` is its name or file."""


class ModelMissing(ModelError):
    """The model's file is not on this machine."""


class ModelCorrupt(ModelError):
    """The model's file has another hash than its manifest entry."""


class StorageError(MachineError):
    """The data folder is full, read-only, locked, damaged or written by a newer version."""


class NetworkError(MachineError):
    """A download failed; what had arrived is kept for the next try."""


class Busy(EdgeRAGError):
    """Too many requests wait already; nothing of this one was done."""

    exit_code = 75  # EX_TEMPFAIL


class Cancelled(EdgeRAGError):
    """The caller stopped the request before its end."""

    exit_code = 130


class EngineError(EdgeRAGError):
    """A foreign engine failed in a way we did not foresee."""

    exit_code = 70
