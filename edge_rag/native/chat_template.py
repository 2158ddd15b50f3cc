"""Rendering a model's own chat template, in a sandbox: the template comes from a model file, which is not trusted."""

import datetime
import json
from collections.abc import Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_rag.errors import ModelError
from edge_rag.records import Message


class ChatTemplate:
    """A compiled chat template. Raises ModelError when its source is no Jinja template."""

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise _unusable(error) from error
        self._names: dict[str, Any] = {"bos_token": bos, "eos_token": eos}

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as the model was trained to see it, ending with the assistant header."""
        plain = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=plain, add_generation_prompt=True, **self._names)
        except Exception as error:  # a template is a stranger's program and may fail like one (1 // 0, recursion)
            raise _unusable(error) from error


def _refuse(reason: str) -> NoReturn:
    raise jinja2.TemplateError(reason)


def _unusable(error: Exception) -> ModelError:
    return ModelError(
        f"the model's chat template cannot be used: {error}",
        field="tokenizer.chat_template",
        remedy="use another build of the model",
    )
