"""What `client` says and hears: JSON over HTTP, event streams, and the server's errors as our exceptions again.

Event streams (SSE) are read as bytes: httpx's own lines would also break at U+2028 and its like, which JSON leaves as
they are.
"""

import contextlib
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
from msgspec import Struct

from edge_rag import errors
from edge_rag.closing import Closing
from edge_rag.errors import Busy, EdgeRAGError, EngineError, InputError, MachineError, UsageError
from edge_rag.peers import KNOCK, listener_uid
from edge_rag.records import Answer, Event

HOST = "http://edge-rag"  # on a socket it names nobody
# The server closes an idle connection after 5 s; one that it is about to close must not get the next request.
LIMITS = httpx.Limits(keepalive_expiry=2.0)
JSON = {"Content-Type": "application/json"}
LINE_END = re.compile(rb"\r\n|\n|\r(?!\n|\Z)")
# An error's code is the name of its class in snake case; what has another code is told apart by its type.
CODES: Mapping[str, type[EdgeRAGError]] = {
    name.lower(): kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, EdgeRAGError)
}
TYPES: Mapping[str, type[EdgeRAGError]] = {"unavailable_error": Busy, "server_error": EngineError}

T = TypeVar("T")


class Wire(Closing):
    """Requests to one server. `place` is where it is looked for, `start` the command that would start it there.

    All methods raise what the server says is wrong, and MachineError when nobody answers or the answer breaks off.
    """

    def __init__(self, http: httpx.Client, place: str, start: str) -> None:
        self._http = http
        self._place = place
        self._start = start

    @classmethod
    def over_socket(cls, path: Path, timeout: float) -> "Wire":
        """To a Unix socket; `timeout` seconds of silence are a failure."""
        http = httpx.Client(transport=_socket(path), base_url=HOST, timeout=timeout, trust_env=False)
        return cls(http, str(path), f"edge-rag serve --uds {path}")

    @classmethod
    def over_tcp(cls, base_url: str, key: str, timeout: float) -> "Wire":
        """To an address. Raises InputError for one that is none, and for a key that no header can hold."""
        if not (key.isascii() and key.isprintable()):
            raise InputError("holds characters that no key has", field="key")
        # A proxy from the environment has no business between two programs of one machine.
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            http = httpx.Client(base_url=base_url, headers=headers, timeout=timeout, limits=LIMITS, trust_env=False)
        except httpx.InvalidURL as error:
            raise InputError(
                f"is no address: {error}", field="base_url", remedy="as in http://127.0.0.1:8080"
            ) from error
        return cls(http, base_url, "edge-rag serve --tcp HOST:PORT --key-file FILE")

    def close(self) -> None:
        """Close all connections. Idempotent."""
        self._http.close()

    def call(
        self,
        method: str,
        path: str,
        kind: type[T],
        fields: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, Any] | None = None,
    ) -> T:
        """Ask for a record of this `kind`; an answer without content is None."""
        content = None if fields is None else body(fields)
        with self._reached():
            response = self._http.request(method, path, content=content, params=query, headers=JSON)
        if not response.is_success:
            raise failure(response.content)
        return decoded(response.content or b"null", kind)

    def job(self, path: str, fields: Mapping[str, Any], kind: type[T], tell: Callable[[bytes], None]) -> T:
        """Have long work done: `tell` hears each `progress` event's JSON, the `report` is returned."""
        report = b""
        with contextlib.closing(self.events(path, fields)) as events:
            for name, data in events:
                if name == "progress":
                    tell(data)
                elif name == "report":
                    report = data
        if not report:
            raise self._broken("it ended too early")
        return decoded(report, kind)

    def answering(self, path: str, fields: Mapping[str, Any]) -> Generator[Event, None, None]:
        """The events of an answer. The last one is held back until the stream has ended, so that none is cut off."""
        answer = None
        with contextlib.closing(self.events(path, fields)) as events:
            for _, data in events:
                event: Event = decoded(data, Event)  # type: ignore[arg-type]  # a union is a type to msgspec
                if isinstance(event, Answer):
                    answer = event
                else:
                    yield event
        if answer is None:
            raise self._broken("it ended too early")
        yield answer

    def events(self, path: str, fields: Mapping[str, Any]) -> Generator[tuple[str, bytes], None, None]:
        """Each event of a stream as (name, JSON). Closing the generator hangs up, which cancels the work."""
        with (
            self._reached(),
            self._http.stream("POST", path, content=body(fields), headers=JSON) as response,
        ):
            if not response.is_success:
                raise failure(response.read())
            for name, data in parsed(response.iter_bytes()):
                if name == "error":
                    raise failure(data)
                yield name, data

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
            raise MachineError(
                f"no server answers there ({error})", field=self._place, remedy=f"start one: `{self._start}`"
            ) from error
        except httpx.HTTPError as error:
            raise self._broken(str(error) or type(error).__name__) from error

    def _broken(self, why: str) -> MachineError:
        return MachineError(f"the server's answer broke off: {why}", field=self._place, remedy="look at its log")


def knock(path: Path) -> int:
    """The HTTP status of a server's health; 0 when nobody answers on this socket."""
    if listener_uid(path) is None:  # the usual case without a server costs next to nothing
        return 0
    try:
        with httpx.Client(transport=_socket(path), base_url=HOST, timeout=KNOCK, trust_env=False) as http:
            return http.get("/health").status_code
    except httpx.HTTPError:
        return 0


def body(fields: Mapping[str, Any]) -> bytes:
    """JSON of these fields without those that are None. Raises InputError naming one that has no JSON."""
    return msgspec.json.encode({name: _value(name, value) for name, value in fields.items() if value is not None})


def _value(name: str, value: Any) -> msgspec.Raw:
    try:
        text = msgspec.json.encode(value)
    except (TypeError, UnicodeEncodeError) as error:
        raise InputError(str(error), field=name) from error
    if text == b"null":
        raise InputError(f"must be a finite number, not {value}", field=name)
    return msgspec.Raw(text)


def decoded(data: bytes, kind: type[T]) -> T:
    """JSON as a `kind`. Raises MachineError when it is none, as with another version or another program."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MachineError(
            f"the server's answer cannot be read: {error}", remedy="have client and server of one version"
        ) from error


class _Failure(Struct, frozen=True):
    message: str
    type: str = ""
    param: str | None = None
    code: str | int | None = None
    remedy: str | None = None


class _Failed(Struct, frozen=True):
    error: _Failure


def failure(data: bytes) -> EdgeRAGError:
    """The exception that an error of the server's stands for, from its JSON."""
    told = decoded(data, _Failed).error
    kind = CODES.get(str(told.code).replace("_", "")) or TYPES.get(told.type, UsageError)
    return kind(told.message, remedy=told.remedy or "", field=told.param or "")


def parsed(chunks: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """The events of a stream as (name, data), after the HTML standard's chapter on server-sent events.

    Comments (pings) and fields that we do not use are passed over, and so is an event whose end is missing.
    """
    name, data = "message", []
    for line in lines(chunks):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"event":
            name = value.decode()
        elif field == b"data":
            data.append(value)
        elif not line:
            if data:
                yield name, b"\n".join(data)
            name, data = "message", []


def lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a stream of bytes; they end with CR LF, LF or CR, wherever the stream is cut into chunks."""
    rest = b""
    for chunk in chunks:
        *whole, rest = LINE_END.split(rest + chunk)
        yield from whole


def _socket(path: Path) -> httpx.HTTPTransport:
    # There is no TLS on a Unix socket; reading the certificates would take longer than most requests.
    return httpx.HTTPTransport(uds=str(path), verify=False, limits=LIMITS)
