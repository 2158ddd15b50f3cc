"""The routes that OpenAI's clients know, all below /v1."""

from starlette.routing import Route

from edge_rag.server import openai_chat, openai_completions, openai_files, openai_models, openai_stores
from edge_rag.server.service import Service


def routes(service: Service) -> list[Route]:
    """All of them; handlers find the service in the request."""
    modules = (openai_chat, openai_completions, openai_models, openai_files, openai_stores)
    return [route for module in modules for route in module.ROUTES]
