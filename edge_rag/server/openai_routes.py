"""The routes that OpenAI's clients know, all below /v1."""

from edge_rag.server import openai_chat, openai_completions, openai_files, openai_models, openai_stores

ROUTES = [
    *openai_chat.ROUTES,
    *openai_completions.ROUTES,
    *openai_models.ROUTES,
    *openai_files.ROUTES,
    *openai_stores.ROUTES,
]
