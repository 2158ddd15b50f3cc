"""GET /v1/models, and POST /v1/embeddings with the embedding model, which is not among those that can be asked."""

import base64
from collections.abc import Sequence

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from edge_rag.errors import NotFound
from edge_rag.native.embedder import Vectors
from edge_rag.server.bodies import answered, body
from edge_rag.server.openai_requests import Embed, check_model, refuse_unsupported
from edge_rag.server.openai_shapes import Shape
from edge_rag.server.service import Service, service_of

BATCH = 32  # texts that are embedded in one go: between two, others come, and who has gone away is noticed


class ModelShape(Shape, frozen=True, kw_only=True):
    """A model that can be asked. When it was made is not known."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "edge_rag"


class ModelList(Shape, frozen=True, kw_only=True):
    """All of them."""

    object: str = "list"
    data: tuple[ModelShape, ...]


class Embedding(Shape, frozen=True, kw_only=True):
    """A unit vector: numbers, or base64 of little-endian float32."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Shape, frozen=True, kw_only=True):
    """Tokens that the embedding model has read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(Shape, frozen=True, kw_only=True):
    """One embedding an input, in order."""

    object: str = "list"
    data: tuple[Embedding, ...]
    model: str
    usage: EmbeddingUsage


async def models(request: Request) -> Response:
    """The models that can be asked."""
    name = service_of(request).settings.models.llm
    return answered(ModelList(data=(ModelShape(id=name),)))


async def model(request: Request) -> Response:
    """One of them. Raises NotFound."""
    asked, name = request.path_params["model"], service_of(request).settings.models.llm
    if asked != name:
        raise NotFound(f"there is no model {asked[:100]!r}", field="model", remedy=f"there is {name!r}")
    return answered(ModelShape(id=name))


async def embed(request: Request) -> Response:
    """Embed texts; what is behind a text's 512th token is not read. Raises InputError, NotFound and Busy."""
    service = service_of(request)
    texts, as_base64 = _reading(service, await body(request, Embed))
    vectors, tokens = await _embedded(request, texts)
    return answered(
        EmbeddingReply(
            data=tuple(Embedding(index=n, embedding=_written(v, as_base64)) for n, v in enumerate(vectors)),
            model=service.settings.models.embedder,
            usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
        )
    )


def _reading(service: Service, wanted: Embed) -> tuple[tuple[str, ...], bool]:
    """The texts, and whether their vectors are wanted as base64; the request itself is not needed any more."""
    refuse_unsupported(wanted)
    check_model(wanted.model, service.settings.models.embedder)
    texts = (wanted.input,) if isinstance(wanted.input, str) else wanted.input
    return texts, wanted.encoding_format == "base64"


async def _embedded(request: Request, texts: Sequence[str]) -> tuple[Vectors, int]:
    """Vectors of shape [len(texts), dimensions], and the tokens read. Raises ClientDisconnect."""
    service = service_of(request)
    parts, tokens = [], 0
    for start in range(0, len(texts), BATCH):
        if await request.is_disconnected():
            raise ClientDisconnect
        vectors, read = await service.call(service.rag.embed, texts[start : start + BATCH])
        parts.append(vectors)
        tokens += read
    return np.concatenate(parts), tokens


def _written(vector: Vectors, as_base64: bool) -> list[float] | str:
    if as_base64:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


ROUTES = [
    Route("/v1/models", models, methods=["GET"]),
    Route("/v1/models/{model:path}", model, methods=["GET"]),
    Route("/v1/embeddings", embed, methods=["POST"]),
]
