"""Chat templates: what they see, what they may do, and one clear error for each failure."""

import re

import gguf as library
import pytest

from pykv.errors import FormatError, ParameterError, UnsupportedError
from pykv.llm import gguf
from pykv.llm.chat import chat_prompt

USER = [{"role": "user", "content": "Hi"}]
CHATML = """\
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""


@pytest.fixture
def file(tmp_path):
    """A function that makes a model file with a template."""

    def make(template):
        writer = library.GGUFWriter(tmp_path / "model.gguf", "llama")
        writer.add_token_list(["a", "<s>", "</s>"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        if template is not None:
            writer.add_chat_template(template)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return gguf.read(tmp_path / "model.gguf")

    return make


def test_chatml_by_hand(file):
    messages = [{"role": "system", "content": "Be brief."}, *USER]
    want = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert chat_prompt(CHATML, messages, add_generation_prompt=False) == want
    want += "<|im_start|>assistant\n"
    assert chat_prompt(CHATML, messages) == chat_prompt(file(CHATML), messages) == want


def test_what_a_template_sees(file):
    assert chat_prompt(file("{{ bos_token }}|{{ eos_token }}"), USER) == "<s>|</s>"
    assert chat_prompt("{{ bos_token is defined }}{{ tools is none }}", USER) == "FalseTrue"
    content = [{"role": "user", "content": "<é> 'x'"}]
    assert chat_prompt("{{ messages[0] | tojson }}", content) == (
        '{"role": "user", "content": "<é> \'x\'"}'
    )
    assert chat_prompt("{{ [1] | tojson(indent=2) }}", USER) == "[\n  1\n]"
    assert re.fullmatch(r"\d{4}", chat_prompt("{{ strftime_now('%Y') }}", USER))
    loop = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert chat_prompt(loop, USER) == "01"


def test_extra_keys_of_a_message_reach_the_template():
    assert chat_prompt("{{ messages[0].name }}", [{**USER[0], "name": "Ada"}]) == "Ada"


def test_the_callers_messages_stay_as_they_are():
    messages = [dict(USER[0])]
    template = "{% set _ = messages[0].update({'content': 'x'}) %}{{ messages[0].content }}"
    with pytest.raises(FormatError, match="leaves the sandbox"):
        chat_prompt(template, messages)
    assert messages == USER


def test_a_template_may_refuse():
    template = "{{ raise_exception('roles must alternate') }}"
    message = r"the chat template refuses the messages \(roles must alternate\)"
    with pytest.raises(ParameterError, match=message):
        chat_prompt(template, USER)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for %}", r"fails \(line 1: Expected an expression"),
        ("\n{{ 'a' | nosuch }}", r"fails \(line 2: No filter named 'nosuch'"),
        ("{{ nothing.here }}", r"fails \('nothing' is undefined\)"),
        ("{{ 1 / 0 }}", r"fails \(ZeroDivisionError: division by zero\)"),
        ("{{ messages + 1 }}", r"fails \(TypeError: "),
        ("{% include 'secret' %}", r"fails \(TypeError: no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"fails \(RecursionError: "),
        ("{{ ''.__class__.__mro__ }}", "leaves the sandbox"),
        ("{{ messages.append(1) }}", "leaves the sandbox"),
        ("{{ range(10000000) | list }}", r"fails \(OverflowError: "),
    ],
)
def test_templates_that_fail(file, template, message):
    with pytest.raises(FormatError, match=f"the given chat template {message}"):
        chat_prompt(template, USER)
    with pytest.raises(FormatError, match=f"model.gguf {message}"):
        chat_prompt(file(template), USER)


def test_a_file_without_a_template(file):
    message = "model.gguf has no chat template .* use a plain prompt instead"
    with pytest.raises(UnsupportedError, match=message):
        chat_prompt(file(None), USER)


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "messages has list, expected a list of at least one message"),
        ("Hi", "messages has str, expected a list"),
        (USER[0], "messages has dict, expected a list"),
        (None, "messages has NoneType, expected a list"),
        (["Hi"], r"messages\[0\] has role None, expected a string"),
        ([*USER, {"role": "user"}], r"messages\[1\] has content None, expected a string"),
        ([{"role": 1, "content": "Hi"}], r"messages\[0\] has role 1, expected a string"),
    ],
)
def test_malformed_messages(messages, message):
    with pytest.raises(ParameterError, match=message):
        chat_prompt(CHATML, messages)


@pytest.mark.model
def test_a_real_template(model_path):
    prompt = chat_prompt(gguf.read(model_path("smollm2-135m")), USER)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert prompt == (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
