"""The application: routes, who is let in, what becomes of errors. `serve` gives it sockets, tests may give it others.

HangUp → RequestLog → Access → Starlette's routing, where `errors` turns exceptions into responses → a route
"""

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from edge_rag.server import document_routes, learning_routes, native_routes, openai_routes, openapi
from edge_rag.server.access import Access, read_key
from edge_rag.server.bodies import HangUp
from edge_rag.server.errors import HANDLERS
from edge_rag.server.logs import RequestLog
from edge_rag.server.service import Service

ROUTES = [
    *native_routes.ROUTES,
    *document_routes.ROUTES,
    *learning_routes.ROUTES,
    *openapi.ROUTES,
    *openai_routes.ROUTES,
]


def make_app(service: Service) -> Starlette:
    """The application over one service; handlers find it by `service_of(request)`. Raises ConfigError for a bad key."""
    settings = service.settings.server
    app = Starlette(
        routes=ROUTES,
        middleware=[
            Middleware(HangUp),
            Middleware(RequestLog, metrics=service.metrics, routes=_names(ROUTES)),
            Middleware(Access, settings=settings, key=read_key(settings), ready=lambda: service.ready),
        ],
        exception_handlers=HANDLERS,
    )
    app.router.redirect_slashes = False  # it would send callers to whatever their Host header says
    app.state.service = service
    return app


def _names(routes: list[Route]) -> dict[object, str]:
    return {route.endpoint: route.path for route in routes}
