"""Chat templates come from model files, which nobody vouches for."""

from pathlib import Path

import pytest

from edge_rag.errors import ModelError
from edge_rag.native.chat_template import ChatTemplate
from edge_rag.native.llama import Model
from edge_rag.policy.prompt import INSTRUCTION, cut_at_marks, marked_messages
from edge_rag.records import Message

MESSAGES = [Message(role="system", content="Be brief."), Message(role="user", content="Hi <b>&</b>")]


def rendered(source: str, messages: list[Message] = MESSAGES) -> str:
    return ChatTemplate(source, bos="<s>", eos="</s>").render(messages)


@pytest.fixture(scope="module")
def real(small_llm: Path) -> ChatTemplate:
    """The template of the small model."""
    with Model(small_llm, vocab_only=True) as model:
        return ChatTemplate(model.chat_template, bos=model.token_text("bos"), eos=model.token_text("eos"))


def test_the_small_models_template_renders_a_conversation(real: ChatTemplate) -> None:
    assert real.render(MESSAGES) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>&</b><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("turns", [pytest.param(1, id="one turn"), pytest.param(5, id="five turns")])
def test_the_small_models_template_can_be_cut_at_the_marks(real: ChatTemplate, turns: int) -> None:
    prefix, behind = cut_at_marks(real.render(marked_messages(turns, system_role=True)), turns)
    assert prefix == f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\n"
    assert behind[-1] == "<|im_end|>\n<|im_start|>assistant\n"
    assert len(behind) == turns


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param("{{ bos_token }}{{ eos_token }}", "<s></s>", id="token names"),
        pytest.param("{{ messages[1].content }}", "Hi <b>&</b>", id="contents are not escaped"),
        pytest.param("{{ messages[0]['content'] | tojson }}", '"Be brief."', id="tojson"),
        pytest.param("{{ 'é<' | tojson }}", '"é<"', id="tojson writes characters as they are"),
        pytest.param("{% if add_generation_prompt %}yes{% endif %}", "yes", id="asks for the assistant header"),
        pytest.param("  {% if true %}\na\n  {% endif %}\nb", "a\nb", id="lines of blocks leave no blanks"),
        pytest.param("{% if tools is defined %}tools{% endif %}", "", id="names that are not given"),
        pytest.param("{{ strftime_now('%d')|length }}", "2", id="today's date"),
    ],
)
def test_rendering(source: str, expected: str) -> None:
    assert rendered(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("{{ ''.__class__.__mro__ }}", id="classes of a string"),
        pytest.param("{{ ''|attr('__class__') }}", id="classes by filter"),
        pytest.param("{{ raise_exception.__globals__ }}", id="globals of a function"),
        pytest.param("{{ tojson.__globals__ }}{{ strftime_now.__globals__ }}", id="globals of a filter"),
        pytest.param("{{ messages.__class__.__base__.__subclasses__() }}", id="all classes"),
        pytest.param("{{ cycler.__init__.__globals__.os.popen('id').read() }}", id="the well-known way out"),
        pytest.param("{{ '{0.__class__}'.format('') }}", id="classes by format"),
    ],
)
def test_a_template_cannot_reach_python(source: str) -> None:
    try:
        text = rendered(source)
    except ModelError:
        text = ""
    assert "class" not in text
    assert "module" not in text
    assert "uid" not in text


def test_a_template_cannot_change_what_it_is_given() -> None:
    with pytest.raises(ModelError):
        rendered("{{ messages.append(messages[0]) }}")


def test_files_cannot_be_included() -> None:
    with pytest.raises(ModelError):
        rendered("{% include '/etc/passwd' %}")


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("{% if %}", id="broken block"),
        pytest.param("{{ unclosed", id="unclosed expression"),
        pytest.param("{{ x | no_such_filter }}", id="unknown filter"),
    ],
)
def test_a_broken_template_is_refused_when_it_is_compiled(source: str) -> None:
    with pytest.raises(ModelError) as caught:
        ChatTemplate(source, bos="", eos="")
    assert caught.value.field == "tokenizer.chat_template"
    assert caught.value.remedy


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("{{ nothing.at.all }}", id="undefined name"),
        pytest.param("{{ 'a' + 1 }}", id="type error"),
        pytest.param("{{ messages | length // 0 }}", id="division by zero"),
        pytest.param("{% for i in range(10**9) %}{% endfor %}", id="endless loop"),
        pytest.param("{{ messages | map('no_such_filter') | list }}", id="unknown filter at run time"),
        pytest.param("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", id="endless recursion"),
        pytest.param("{{ messages[0].content.index('x') }}", id="value error"),
        pytest.param("{{ {}.popitem() }}", id="key error"),
    ],
)
def test_a_template_that_fails_while_rendering_is_a_model_error(source: str) -> None:
    with pytest.raises(ModelError, match="chat template cannot be used"):
        rendered(source)


def test_the_reason_a_template_gives_is_passed_on() -> None:
    with pytest.raises(ModelError, match="System role not supported"):
        rendered("{{ raise_exception('System role not supported') }}")
