"""What becomes of the requests of OpenAI's clients, before anything is asked."""

from typing import Any

import msgspec
import pytest

from edge_rag.errors import InputError, NotFound
from edge_rag.records import Turn
from edge_rag.server import openai_requests
from edge_rag.server.bodies import decoded
from edge_rag.server.openai_requests import (
    MOST_HISTORY,
    MOST_INSTRUCTIONS,
    Chat,
    ChatMessage,
    Complete,
    Conversation,
    Embed,
    check_model,
    conversation,
    refuse_unsupported,
)
from edge_rag.server.openai_stores import Ranking, StoreSearch

QUESTION = {"role": "user", "content": "What?"}


def chat(**fields: Any) -> Chat:
    asked = decoded(msgspec.json.encode({"messages": [QUESTION], **fields}), Chat)
    refuse_unsupported(asked)
    return asked


def talk(*messages: tuple[str, Any]) -> Conversation:
    return conversation(chat(messages=[{"role": role, "content": content} for role, content in messages]).messages)


# --- conversations ---------------------------------------------------------------------------------------------------


def test_system_messages_are_instructions_and_the_last_message_is_the_question() -> None:
    asked = talk(
        ("system", "Be brief."),
        ("user", "Who?"),
        ("assistant", "Ann. [1]"),
        ("developer", "Be kind."),
        ("user", "Since when?"),
    )
    assert asked == Conversation(
        question="Since when?",
        history=(Turn(role="user", content="Who?"), Turn(role="assistant", content="Ann. [1]")),
        instructions="Be brief.\n\nBe kind.",
    )


def test_without_system_messages_the_settings_instructions_hold() -> None:
    assert talk(("user", "Who?")).instructions is None


def test_an_empty_system_message_means_no_instructions() -> None:
    assert talk(("system", ""), ("user", "Who?")).instructions == ""


def test_parts_of_a_message_become_lines() -> None:
    parts = [{"type": "text", "text": "Who"}, {"type": "text", "text": "are you?", "cache_control": {}}]
    assert talk(("user", parts)).question == "Who\nare you?"


def test_a_message_without_content_is_empty() -> None:
    assert talk(("user", "a"), ("assistant", None), ("user", "b")).history[1] == Turn(role="assistant", content="")


def test_a_system_message_may_stand_at_the_end() -> None:
    assert talk(("user", "Who?"), ("system", "Be brief.")).question == "Who?"


@pytest.mark.parametrize("messages", [[("system", "a")], [("user", "a"), ("assistant", "b")]])
def test_a_conversation_that_ends_with_another_word_than_the_users_is_refused(messages: list[tuple[str, str]]) -> None:
    with pytest.raises(InputError) as caught:
        talk(*messages)
    assert caught.value.field == "messages"


def test_of_a_long_history_the_newest_is_looked_at() -> None:
    long = "x" * 200_000
    most = MOST_HISTORY // len(long)
    asked = talk(*[("user", long)] * (most + 1), ("assistant", "no"), ("user", "Who?"))
    assert len(asked.history) == most  # the short one takes the room of a long one
    assert asked.history[-1].content == "no"


def test_too_many_instructions_are_refused() -> None:
    half = "x" * (MOST_INSTRUCTIONS // 2)
    assert len(talk(("system", half), ("system", half), ("user", "a")).instructions or "") == MOST_INSTRUCTIONS + 2
    with pytest.raises(InputError, match="together"):
        talk(("system", half), ("system", half + "x"), ("user", "a"))


def test_a_message_may_carry_what_a_client_was_given() -> None:
    given = {"role": "assistant", "content": "b", "refusal": None, "annotations": [], "tool_calls": [], "audio": None}
    assert chat(messages=[QUESTION, given, QUESTION]).messages[1].text == "b"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "tool", "content": "x"}, "messages[1].role"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": 3}, "messages[1].content"),
        ({"content": "x"}, "messages[1].role"),
    ],
)
def test_a_message_that_cannot_be_read_is_named(message: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        chat(messages=[QUESTION, message])
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["tool_calls", "function_call"])
def test_a_message_about_tools_is_refused(field: str) -> None:
    asked = chat(messages=[QUESTION, {"role": "assistant", field: [{"id": "1"}]}])
    with pytest.raises(InputError) as caught:
        conversation(asked.messages)
    assert caught.value.field == f"messages[1].{field}"


# --- fields ----------------------------------------------------------------------------------------------------------

UNSUPPORTED = {
    "n": 2,
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "logprobs": True,
    "top_logprobs": 3,
    "logit_bias": {"50256": -100},
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy"},
    "web_search_options": {},
    "moderation": {"model": "m"},
}
NEUTRAL = {
    "n": 1,
    "tools": [],
    "tool_choice": "auto",
    "functions": [],
    "function_call": "none",
    "response_format": {"type": "text"},
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "modalities": ["text"],
}
HARMLESS = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "reasoning_effort": "low",
    "verbosity": "low",
    "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "x"},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_a_field_that_would_change_the_answer_is_refused_by_name(field: str) -> None:
    with pytest.raises(InputError, match="not supported") as caught:
        chat(**{field: UNSUPPORTED[field]})
    assert caught.value.field == field


@pytest.mark.parametrize(
    "fields", [NEUTRAL, HARMLESS, dict.fromkeys([*UNSUPPORTED, *HARMLESS])], ids=["neutral", "harmless", "null"]
)
def test_fields_that_change_nothing_are_ignored(fields: dict[str, Any]) -> None:
    assert chat(**fields).messages == chat().messages


def test_a_mistyped_field_is_refused_by_name() -> None:
    with pytest.raises(InputError) as caught:
        chat(max_token=3)
    assert caught.value.field == "max_token"


def test_each_rule_is_about_a_field_of_some_request() -> None:
    fields = {
        name for kind in (Chat, ChatMessage, Complete, Embed, StoreSearch, Ranking) for name in kind.__struct_fields__
    }
    assert fields >= set(openai_requests.NEUTRAL) >= set(openai_requests._REMEDIES)


def test_the_newer_name_of_the_longest_answer_wins() -> None:
    assert chat(max_tokens=5).sampling["max_tokens"] == 5
    assert chat(max_tokens=5, max_completion_tokens=7).sampling["max_tokens"] == 7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_completion_tokens", 10**9),
        ("temperature", -1),
        ("top_p", 0),
        ("seed", -1),
        ("top_k", 65),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("where", {"kind": "pdf"}),
        ("messages", []),
        ("stream", "yes"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        chat(**{field: value})
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2], [1], [], [""], "", None])
def test_a_prompt_is_one_text(prompt: Any) -> None:
    with pytest.raises(InputError) as caught:
        decoded(msgspec.json.encode({"prompt": prompt}), Complete)
    assert caught.value.field.startswith("prompt")


@pytest.mark.parametrize("value", [b"1e999", b'"\xff"', b"[" + b" " * 100 + b"]"], ids=["number", "letter", "long"])
def test_what_is_refused_unread_is_refused_by_name(value: bytes) -> None:
    asked = decoded(b'{"messages": [{"role": "user", "content": "a"}], "tools": %b}' % value, Chat)
    with pytest.raises(InputError, match="not supported") as caught:
        refuse_unsupported(asked)
    assert caught.value.field == "tools"


@pytest.mark.parametrize("kind", [Chat, ChatMessage, Complete, Embed, StoreSearch, Ranking])
def test_fields_that_are_not_used_are_never_made_into_objects(kind: type[msgspec.Struct]) -> None:
    shapes = msgspec.inspect.type_info(kind)
    assert isinstance(shapes, msgspec.inspect.StructType)
    assert not [field.name for field in shapes.fields if isinstance(field.type, msgspec.inspect.AnyType)]


@pytest.mark.parametrize("field", ["echo", "best_of", "suffix"])
def test_what_only_old_completions_had_is_refused(field: str) -> None:
    with pytest.raises(InputError) as caught:
        refuse_unsupported(decoded(msgspec.json.encode({"prompt": "a", field: 2}), Complete))
    assert caught.value.field == field


def test_another_model_than_the_served_one_is_not_found() -> None:
    check_model(None, "served")
    check_model("served", "served")
    with pytest.raises(NotFound, match="'other' is not served, 'served' is") as caught:
        check_model("other", "served")
    assert caught.value.field == "model"
