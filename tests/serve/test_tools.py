"""Answers that follow a schema, calls of tools, and what templates see of both."""

import json
import re
import time
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from pykv.errors import UnsupportedError
from pykv.serve import constraints
from pykv.serve.fields import Fields
from pykv.serve.tools import CallReader, Tools, grammar, read_messages
from tests.serve.conftest import PLAIN, TOOLS, Scripted, make_tiny_server

USER = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"City": {"type": "string", "enum": ["Paris", "Rome"]}},
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "time", "description": "What time it is."}}
ARGUMENTS = '{"city": "Paris", "days": 3}'
CALL = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
MARKED = f"<tool_call>\n{CALL}\n</tool_call>"
STRICT = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}


def text_of(chunks):
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)


# --- Schemas ---


@pytest.mark.parametrize(
    "form, text", [(STRICT, ARGUMENTS), ({"type": "json_object"}, '{"a": [1, "€"]}')]
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_follows_a_schema(serve, form, text, stream):
    client = serve(text)
    if stream:
        chunks = client.events(CHAT, messages=USER, response_format=form)
        assert text_of(chunks) == text and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        (choice,) = client.ask(CHAT, messages=USER, response_format=form)["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    if form is STRICT:
        answer = client.ask("/v1/completions", prompt="x", response_format=form, max_tokens=99)
        assert answer["choices"][0]["text"] == text


@pytest.mark.parametrize("text", ['{"city": "Paris", "days": 3}', "{}"])
def test_an_object_by_the_schema_beside_its_type(serve, text):
    """llama.cpp's clients put the schema there."""
    client = serve(text)
    form = {"type": "json_object", "schema": SCHEMA}
    if text == "{}":  # which the scripted model refuses to say against the mask
        assert client.refused(CHAT, messages=USER, response_format=form)[0] == 500
    else:
        assert client.ask(CHAT, messages=USER, response_format=form)["choices"]


@pytest.mark.parametrize("text", ['{"city": "Oslo"', "Hello", '{"city": "Paris"}', " {", "[1]"])
def test_a_token_against_the_schema_has_no_bit(serve, text):
    """The scripted model refuses to say what the mask forbids."""
    client = serve(text)
    status, error = client.refused(CHAT, messages=USER, response_format=STRICT)
    assert status == 500 and "AssertionError" in error["message"]


def test_choices_follow_the_schema_each_for_itself(serve):
    client = serve(lambda s: ARGUMENTS if s.params.seed % 2 else ARGUMENTS.replace("Paris", "Rome"))
    answer = client.ask(CHAT, messages=USER, response_format=STRICT, n=4, seed=0)
    cities = [json.loads(c["message"]["content"])["city"] for c in answer["choices"]]
    assert cities == ["Rome", "Paris", "Rome", "Paris"]


@pytest.mark.parametrize("schema", [{"type": "objekt"}, {"$ref": "#/nowhere"}, {"pattern": "("}])
def test_schemas_that_are_none(serve, schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    status, error = serve().refused(CHAT, messages=USER, response_format=form)
    assert status == 400 and error["param"] == "response_format"


def test_ignore_eos_and_a_schema_exclude_each_other(serve):
    status, error = serve().refused(CHAT, messages=USER, response_format=STRICT, ignore_eos=True)
    assert (status, error["param"]) == (400, "ignore_eos")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"type": "array", "uniqueItems": True},
        {"type": "integer", "minimum": 3, "maximum": 2},
        {"allOf": [{"type": "string", "pattern": f"^{letter}$"} for letter in "ab"]},
        {"enum": [str(n) * 5 for n in range(100_000)]},  # beyond what a lexer may have
        SCHEMA | {"properties": {f"{n}": SCHEMA for n in range(20_000)}},  # nor items
        SCHEMA,
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_a_check_refuses_what_the_engine_would(llms, monkeypatch, schema):
    """By the same words, and without a vocabulary, which takes a second to make."""
    from pykv.serve.constraints import Grammars, check_grammar

    def said_by(check):
        try:
            check(grammar(None, schema).grammar)
        except UnsupportedError as error:
            return str(error)

    tokenizer = llms().tokenizer
    said = said_by(Grammars(tokenizer, 300).constraint)
    monkeypatch.setattr(type(tokenizer), "token_bytes", None)
    assert said_by(check_grammar) == said and (said is None) is (schema is SCHEMA)


def test_a_body_with_a_schema_is_read_without_a_vocabulary(llms, monkeypatch):
    protocol = make_tiny_server(llms(), Scripted(llms(), lambda s: "x")).protocol
    monkeypatch.setattr(type(llms().tokenizer), "token_bytes", None)
    assert protocol.chat(dict(messages=USER, response_format=STRICT)).rule is not None


def test_a_mask_by_hand(llms):
    """Of the bytes of {"a": 1 or 2}, by a model whose tokens are bytes."""
    from pykv.serve.constraints import Grammars

    tokenizer = llms().tokenizer
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 5)  # logits beyond the tokens
    first = grammars.constraint('start: /[12]/ "x"')
    other = first.copy()

    def allowed(constraint):
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
        return [
            tokenizer.token(i) if i not in tokenizer.stop_ids else "" for i in np.flatnonzero(bits)
        ]

    ids = {c: tokenizer.encode(c, bos=False) for c in "12x"}
    assert allowed(first) == ["1", "2"]
    first.push(ids["2"], "2")
    assert allowed(first) == ["x"] and allowed(other) == ["1", "2"]
    first.push(ids["x"], "2x")
    assert allowed(first) == [""]  # the end alone


def optional(count, required=()):
    """The schema of an object of k0, k1, ..."""
    keys = {f"k{i}": {"type": "integer"} for i in range(count)}
    return dict(type="object", properties=keys, required=[*required], additionalProperties=False)


def form_of(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_the_parser_gives_up_is_no_answer(serve, stream):
    """llguidance bounds its work for a token: beside each other so many objects are too much, and
    half of an answer is not what was asked for."""
    schema = {"anyOf": [optional(200), optional(300), optional(400)]}
    client = serve(lambda s: [*b"{"])
    data = json.dumps(dict(messages=USER, response_format=form_of(schema), stream=stream))
    status, _, answer = client.request("POST", CHAT, data)
    assert status == (200 if stream else 400)
    assert b"the schema cannot be followed to its end: " in answer and b'"stop"' not in answer
    assert client.scheduler.is_idle


@pytest.mark.parametrize("stream", [False, True])
def test_too_many_optional_properties_are_refused_before_anything_begins(
    serve, monkeypatch, stream
):
    """The parser of an object of 10,000 kept the engine from all orders for four seconds."""
    import llguidance

    parser = Mock(wraps=llguidance.LLMatcher)
    monkeypatch.setattr(llguidance, "LLMatcher", parser)
    client = serve(lambda s: [*b'{"k0": 1, "k499": 2}'])
    tool = {"type": "function", "function": {"name": "f", "parameters": optional(10_000)}}
    nested = {"type": "array", "items": optional(501)}
    for body, param in (
        (dict(response_format=form_of(nested)), "response_format"),
        (dict(response_format=form_of(optional(1200, ["k600"]))), "response_format"),
        (dict(response_format=form_of(optional(501) | {"required": True})), "response_format"),
        (dict(tools=[tool], tool_choice="required"), "tools"),
    ):
        status, error = client.refused(CHAT, messages=USER, stream=stream, **body)
        assert (status, error["param"]) == (400, param)
        assert re.search(r"an object has [\d,]+ optional properties in a row", error["message"])
    assert not parser.mock_calls
    for schema in (optional(500), optional(1000, ["k0", "k499"])):
        assert client.ask(CHAT, messages=USER, response_format=form_of(schema))["choices"]
    assert parser.call_count == parser.validate_grammar.call_count == 2


def test_a_schema_that_names_a_call_is_no_tool(serve):
    form = form_of({"type": "object", "properties": {"callback": {"type": "none"}}})
    error = serve().refused(CHAT, messages=USER, response_format=form)[1]
    assert error["param"] == "response_format"


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("said", ["< g o >", "a < g o >", "< g o >Ċ", "< g o >! < g o >Ċ"])
def test_what_triggers_a_grammar_may_end_within_a_token(tmp_path, said, once):
    """Of models that spell <tool_call> with ordinary tokens, of which one is often ">\n"."""
    from pykv.serve.constraints import Grammars
    from tests.llm.test_tokenizer import BYTES, build

    tokens = [*BYTES, ">Ċ", ">!", "ok", "<|end|>"]
    keys = dict(pre="gpt-2", merges=["> Ċ", "> !", "o k"], eos_token_id=259)
    tokenizer = build(tmp_path / "t.gguf", "gpt2", tokens, token_type=[1] * 259 + [3], **keys)
    made = Grammars(tokenizer, 260).constraint(r'start: /\s*/ "ok"', "<go>", once).copy()
    text = ""
    for token in said.split():
        assert made.mask() is None, text
        text += tokenizer.token_bytes(tokens.index(token)).decode()
        made.push([tokens.index(token)], text)
    bits = np.unpackbits(made.mask().view(np.uint8), bitorder="little")
    assert bits[ord("o")] and bits[258] and not bits[ord("x")] and not bits[259]
    made.push([258], text + "ok")
    assert (made.mask() is None) is not once


def test_a_parser_that_allows_nothing_allows_the_end():
    """Where the answer ends, and `error` says why: else it would seem a fault of the model."""
    from pykv.serve.constraints import Constraint

    matcher = SimpleNamespace(unsafe_compute_mask_ptr=lambda *given: None)
    ends = np.array([0, 4], np.int32)
    assert Constraint(matcher, "", ends, False, list).mask() is ends


def test_what_a_parser_says_of_itself_is_left_out(serve):
    """A schema that is itself and nothing else: llguidance prints its state, pages of it."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    status, error = serve(lambda s: []).refused(CHAT, messages=USER, response_format=form)
    assert status == 400 and error["message"].startswith("the schema cannot be followed")
    assert "<state>" not in error["message"] and "\n" not in error["message"]
    panic = "panic: assertion failed: x\n<backtrace>\n   0: <unknown>\n</backtrace>"
    assert constraints._reason(panic) == "panic: assertion failed: x"


# --- Calls ---


@pytest.mark.parametrize("template, said", [(PLAIN, CALL), (TOOLS, MARKED)])
@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call(serve, template, said, choice):
    client = serve(said, template=template)
    fields = dict(messages=USER, tools=[WEATHER, TIME], tool_choice=choice)
    (got,) = client.ask(CHAT, **fields)["choices"]
    assert got["finish_reason"] == "tool_calls" and got["message"]["content"] is None
    (call,) = got["message"]["tool_calls"]
    assert call["id"].startswith("call_") and call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": ARGUMENTS}

    chunks = client.events(CHAT, **fields)
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    (calls,) = (delta["tool_calls"] for delta in deltas if "tool_calls" in delta)
    assert calls[0]["index"] == 0 and calls[0]["function"] == call["function"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls" and not text_of(chunks)


@pytest.mark.parametrize("template", [PLAIN, TOOLS])
def test_a_text_where_a_call_was_possible(serve, template):
    client = serve("No {tool} < needed.", template=template)
    chunks = client.events(CHAT, messages=USER, tools=[WEATHER])
    assert text_of(chunks) == "No {tool} < needed."
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    (choice,) = client.ask(CHAT, messages=USER, tools=[WEATHER])["choices"]
    assert choice["message"]["content"] == "No {tool} < needed."
    assert "tool_calls" not in choice["message"]


def test_text_and_several_calls(serve):
    said = f"Let me see. {MARKED}\n{MARKED.replace('Paris', 'Rome')}"
    client = serve(said, template=TOOLS)
    (choice,) = client.ask(CHAT, messages=USER, tools=[WEATHER])["choices"]
    calls = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "Let me see."
    assert [json.loads(c["function"]["arguments"])["city"] for c in calls] == ["Paris", "Rome"]
    assert len({call["id"] for call in calls}) == 2
    deltas = [c["choices"][0]["delta"] for c in client.events(CHAT, messages=USER, tools=[WEATHER])]
    assert [d["tool_calls"][0]["index"] for d in deltas if "tool_calls" in d] == [0, 1]


def test_an_answer_that_is_cut_behind_a_call(serve):
    client = serve(MARKED + " more" * 9, template=TOOLS)
    count = len(client.server.language.tokenizer.encode(MARKED, bos=False))
    fields = dict(messages=USER, tools=[WEATHER], max_tokens=count + 9)
    (choice,) = client.ask(CHAT, **fields)["choices"]
    assert choice["message"]["tool_calls"] and choice["finish_reason"] == "length"


def test_one_call_alone(serve):
    """The scripted model refuses to say what the mask forbids, a second call."""
    said = iter([f"Look. {MARKED}", f"Look. {MARKED}\n{MARKED}"])
    client = serve(lambda _: next(said), template=TOOLS)
    fields = dict(messages=USER, tools=[WEATHER], parallel_tool_calls=False)
    (choice,) = client.ask(CHAT, **fields)["choices"]
    assert choice["finish_reason"] == "tool_calls" and len(choice["message"]["tool_calls"]) == 1
    assert client.refused(CHAT, **fields)[0] == 500


@pytest.mark.parametrize("template, said", [(PLAIN, CALL), (TOOLS, MARKED)])
@pytest.mark.parametrize("what", ["Oslo", "name"])
def test_a_call_of_nothing_has_no_bits(serve, template, said, what):
    wrong = said.replace("Paris", what) if what == "Oslo" else said.replace("weather", "wether")
    client = serve(wrong, template=template)
    status, _ = client.refused(CHAT, messages=USER, tools=[WEATHER])
    assert status == 500  # the scripted model refuses to say it


def test_blanks_before_a_call_free_it_of_nothing(serve):
    fields = dict(messages=USER, tools=[WEATHER])
    (choice,) = serve(f" \n{CALL}").ask(CHAT, **fields)["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == ARGUMENTS
    for wrong in (CALL.replace("Paris", "Oslo"), CALL.replace("weather", "wether"), "{"):
        assert serve(f"\n{wrong}").refused(CHAT, **fields)[0] == 500
    for text in ("", " ", "\n\nNo {call}.\n{"):
        (choice,) = serve(text).ask(CHAT, **fields)["choices"]
        assert choice["message"]["content"] == text and choice["finish_reason"] == "stop"


@pytest.mark.parametrize("parameters", [{}, {"parameters": None}, {"parameters": {}}])
def test_a_function_without_parameters_gets_none(serve, parameters):
    """As OpenAI says of parameters that are left out."""
    tool = {"type": "function", "function": {"name": "now", **parameters}}
    options = dict(messages=USER, tools=[tool], tool_choice="required")
    client = serve('{"name": "now", "arguments": {}}')
    (call,) = client.ask(CHAT, **options)["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": "{}"}
    client = serve('{"name": "now", "arguments": {"zone": 1}}')
    assert client.refused(CHAT, **options)[0] == 500, "the mask forbids it"


@pytest.mark.parametrize(
    "more",
    [{}, {"type": ["object", "null"]}, {"anyOf": [{"type": "integer"}, {"required": ["x"]}]}],
)
def test_arguments_are_an_object_also_where_the_schema_does_not_say_so(serve, more):
    """Others are no call, though one was required."""
    tool = {"name": "now", "parameters": {"properties": {"x": {"type": "integer"}}, **more}}
    options = dict(messages=USER, tools=[{"function": tool}], tool_choice="required")
    client = serve('{"name": "now", "arguments": {"x": 1}}')
    (call,) = client.ask(CHAT, **options)["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"x": 1}'
    for wrong in ("5", "null", '"x"'):
        client = serve(f'{{"name": "now", "arguments": {wrong}}}')
        assert client.refused(CHAT, **options)[0] == 500, "the mask forbids it"


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    "arguments",
    ['{"x": 12345678901234567890.123456789}', '{"x": 1E5, "y": -0, "z": 1e400}',
     '{"x": 1, "x": 2}', '{"x": "\\"\\\\", "y": "\\u00e9"}',
     '{"x": "a </tool_call> b", "arguments": {"y": "<tool_call>"}}'],
)  # fmt: skip
def test_arguments_stay_as_they_are_written(native, arguments):
    """A detour by float64 would change them, and the first mark of an end would cut them."""
    said = f'{{"name": "any", "arguments": {arguments}}}'
    reader = CallReader(Tools({"any": {}}, [], False, native))
    marked = f"<tool_call>\n{said}\n</tool_call>"
    (call,) = reader.push(marked if native else said, True)[1]
    assert call == ("any", arguments)


@pytest.mark.parametrize(
    "said",
    ['{"name": "any", "arguments": {"x": NaN}}', '{"name": "any", "argu\\u006dents": {}}',
     '{"arguments": {"x": 1}, "name": "any", "arguments": {}}', '{"name": "any"}', "5"],
)  # fmt: skip
def test_what_is_no_plain_call_is_text(said):
    reader = CallReader(Tools({"any": {}}, [], False, False))
    assert reader.push(said, True) == (said, [])


def test_a_mark_in_a_string_that_does_not_end_ends_the_call_at_last():
    reader = CallReader(Tools({"any": {}}, [], False, True))
    said = 'a <tool_call>{"x</tool_call> b'
    assert reader.push(said, False)[0] == "a" and reader.push("", True) == (said[1:], [])


@pytest.mark.parametrize("piece", ['"a", ', "some words "])
def test_a_long_call_takes_a_time_that_grows_as_it_does(piece):
    reader = CallReader(Tools({"any": {}}, [], False, True))
    begun, end = '<tool_call>\n{"name": "any", "arguments": ', "}\n</tool_call>"
    opening, closing = ('{"x": [', '"a"]}') if "," in piece else ('{"x": "', '"}')
    started = time.process_time()
    assert reader.push(begun + opening, False) == ("", [])
    for _ in range(8000):
        assert reader.push(piece, False) == ("", [])
    assert reader.push(closing + end, False) == ("", [("any", opening + piece * 8000 + closing)])
    assert time.process_time() - started < 3


def test_pieces_of_an_escape_and_of_a_mark():
    said = r'<tool_call>{"name": "any", "arguments": {"x": "a\\\"</tool_call>\\"}}</tool_call>.'
    reader = CallReader(Tools({"any": {}}, [], False, True))
    found = [reader.push(character, False) for character in said]
    assert [call for _, calls in found for call in calls] == [
        ("any", r'{"x": "a\\\"</tool_call>\\"}')
    ]
    assert "".join(text for text, _ in found) == "."


def test_no_tool_may_be_called(serve):
    seen = []
    client = serve(lambda s: seen.append(s.prompt) or CALL)
    (choice,) = client.ask(CHAT, messages=USER, tools=[WEATHER], tool_choice="none")["choices"]
    assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"
    assert seen[0] == client.server.language.chat_ids(USER)


def test_a_call_that_is_cut_off_is_text(serve):
    client = serve(CALL)
    (choice,) = client.ask(CHAT, messages=USER, tools=[WEATHER], max_tokens=20)["choices"]
    text = choice["message"]["content"]
    assert choice["finish_reason"] == "length" and text and CALL.startswith(text)


# --- What models see ---


def test_a_template_that_knows_tools_gets_them(serve):
    seen = []
    client = serve(lambda s: seen.append(s.prompt) or "x", template=TOOLS)
    client.ask(CHAT, messages=USER, tools=[WEATHER])
    llm = client.server.language
    assert seen[0] == llm.chat_ids(USER, template_variables={"tools": [WEATHER]})


def test_another_template_is_told_in_the_system_message(serve):
    seen = []
    client = serve(lambda s: seen.append(client.server.language.detokenize(s.prompt)) or "x")
    client.ask(CHAT, messages=USER, tools=[TIME])
    client.ask(CHAT, messages=[{"role": "system", "content": "Be brief."}, *USER], tools=[TIME])
    for text, start in zip(seen, ("[system:You can", "[system:Be brief.\n\nYou can"), strict=True):
        assert text.startswith(start) and json.dumps(TIME["function"]) in text
        assert text.endswith("[user:Hi][assistant:")


# As SmolLM3's: tools have another name, and calls of earlier answers are left out.
XML_TOOLS = "{% if xml_tools %}<tool_call>{{ xml_tools[:] | string }}{% endif %}" + PLAIN
# As Qwen3-Coder's: between the marks stands something else than JSON.
CODER = """{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}:{{
m.content }}{% for c in m.tool_calls or [] %}<tool_call><function={{ c.function.name }}></tool_call>
{% endfor %}]{% endfor %}[assistant:"""
# Tools are never read, though there is something like it in the code.
PRETENDS = "{% if use_tools %}<tool_call>{% endif %}" + PLAIN


@pytest.mark.parametrize("template", [XML_TOOLS, CODER, PRETENDS, TOOLS])
def test_a_model_sees_the_tools_the_calls_and_the_results(serve, template):
    """Once each, whatever the template makes of them, and a call as the model shall write one."""
    seen, said = [], {CODER: CALL, PRETENDS: CALL}.get(template, MARKED)
    client = serve(
        lambda s: seen.append(client.server.language.detokenize(s.prompt)) or said,
        template=template,
    )
    (choice,) = client.ask(CHAT, messages=TALK, tools=[TIME, WEATHER])["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (prompt,) = seen
    assert prompt.count(TIME["function"]["description"]) == 1
    assert prompt.count("sunny") == prompt.count(said) == prompt.count("[assistant:" + said) == 1
    assert "function=" not in prompt


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


DEAF = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"


@pytest.mark.parametrize("head", [NO_SYSTEM, DEAF])
@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER]}])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_a_template_without_system_messages_has_the_user_say_them(serve, head, fields, system):
    """Whether it refuses them or leaves them out."""
    client = serve("x", template=head + PLAIN)
    for talk in (USER, [], [{"role": "assistant", "content": "Hello"}, *USER]):
        if system + talk:
            client.ask(CHAT, messages=system + talk, **fields)
    prompt = client.server.language.tokenizer.decode(client.server.protocol.chat(
        {"messages": [*system, *USER], **fields}
    ).orders[0].prompt)  # fmt: skip
    assert prompt.startswith("[user:") and prompt.endswith("Hi][assistant:")
    assert ("Be brief." in prompt) == bool(system) and ("weather" in prompt) == bool(fields)


FIRST_ALONE = "{% if messages[0].role == 'system' %}[first:{{ messages[0].content }}]{% endif %}"
FIRST_REFUSES = """{% for m in messages[1:] if m.role == 'system' %}{{
raise_exception('System messages come first') }}{% endfor %}"""


@pytest.mark.parametrize("head", [FIRST_ALONE + DEAF, FIRST_REFUSES])
def test_a_template_with_one_system_message_has_the_user_say_others(serve, head):
    """Agents put reminders in the midst of a talk."""
    say = [{"role": role, "content": role[0].upper() * 2} for role in ("system", "user")]
    (system, user), hello = say, {"role": "assistant", "content": "AA"}
    protocol = serve("x", template=head + PLAIN).server.protocol

    def prompt(*talk):
        (order,) = protocol.chat({"messages": [*talk]}).orders
        return protocol.language.tokenizer.decode(order.prompt)

    first = prompt(system, user).removesuffix("[user:UU][assistant:")
    assert first in ("[first:SS]", "[system:SS]")
    told = "SS\n\nUU"
    assert prompt(system, user, hello, system, user) == (
        f"{first}[user:UU][assistant:AA][user:{told}][assistant:"
    )
    assert prompt(user, hello, system) == "[user:UU][assistant:AA][user:SS][assistant:"
    assert prompt(user, system, hello) == "[user:UU\n\nSS][assistant:AA][assistant:"
    assert prompt(system, system, user) == f"{first}[user:{told}][assistant:"


def test_letters_of_any_script_stay_as_they_are(serve):
    """Of functions and of earlier calls; \\u escapes would be read, and repeated, as they are."""
    seen = []
    client = serve(lambda s: seen.append(client.server.language.detokenize(s.prompt)) or "x")
    tool = {"type": "function", "function": {"name": "f", "description": "\u5929\u6c14"}}
    call = {"id": "a", "function": {"name": "f", "arguments": '{"city": "\u5317\u4eac"}'}}
    client.ask(CHAT, messages=[*USER, {"role": "assistant", "tool_calls": [call]}], tools=[tool])
    assert "\u5929\u6c14" in seen[0] and "\u5317\u4eac" in seen[0] and "\\u" not in seen[0]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_templates_see_what_was_thought(serve, name):
    seen = []
    template = "{% for m in messages %}({{ m.reasoning_content }}){{ m.content }}{% endfor %}"
    template += "{% if tools %}<tool_call>{% endif %}"
    client = serve(
        lambda s: seen.append(client.server.language.detokenize(s.prompt)) or "x", template=template
    )
    messages = [{"role": "assistant", "content": "Yes.", name: "Hm."}, {**USER[0], name: "no"}]
    client.ask(CHAT, messages=messages)
    assert seen == ["(Hm.)Yes.()Hi"]


def test_a_conversation_is_counted_as_it_is_answered(serve):
    """With its tools and the template's variables, as vLLM's /tokenize has it."""
    client = serve("x", template="{{ flavour }}" + TOOLS)
    fields = dict(messages=USER, tools=[WEATHER], chat_template_kwargs={"flavour": "mild"})
    count = client.ask("/tokenize", **fields)["count"]
    assert count == client.ask(CHAT, **fields)["usage"]["prompt_tokens"]


TALK = [
    *USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": ARGUMENTS},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]


@pytest.mark.parametrize("given", [None, "", " \n", "null", "{}", "[]", [], {}])
def test_calls_of_functions_that_take_nothing(given):
    call = {"id": "1", "function": {"name": "now", "arguments": given}}
    messages = [*USER, {"role": "assistant", "tool_calls": [call]}]
    made = read_messages(Fields({"messages": messages}), native=True)[1]
    assert made["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


def test_results_of_calls():
    native = read_messages(Fields({"messages": TALK}), native=True)
    function = native[1]["tool_calls"][0]["function"]
    assert function == {"name": "weather", "arguments": json.loads(ARGUMENTS)}
    assert native[2] == {
        "role": "tool", "content": "sunny", "tool_call_id": "call_1", "name": "weather"
    }  # fmt: skip
    nameless = json.loads(json.dumps(TALK).replace('"call_1"', "null"))  # as aichat sends them
    told = read_messages(Fields({"messages": nameless}), native=True)
    assert told[1]["tool_calls"][0]["id"] == told[2]["tool_call_id"] == ""
    assert told[2]["name"] == "weather"
    plain = read_messages(Fields({"messages": TALK}), native=False)
    assert plain[1] == {"role": "assistant", "content": CALL}
    assert plain[2] == {"role": "user", "content": "Result of weather: sunny"}


def test_results_of_several_calls_are_one_turn():
    """Of a template that knows no tools; such as Gemma's refuse two turns of a user."""
    calls = [{**TALK[1]["tool_calls"][0], "id": f"call_{n}"} for n in range(2)]
    results = [{"role": "tool", "tool_call_id": f"call_{n}", "content": f"{n}"} for n in range(2)]
    talk = [USER[0], {"role": "assistant", "tool_calls": calls}, *results, USER[0], *results]
    plain = read_messages(Fields({"messages": talk}), native=False)
    assert [m["role"] for m in plain] == ["user", "assistant", "user", "user", "user"]
    assert (
        plain[2]["content"] == "Result of weather: 0\nResult of weather: 1" == plain[4]["content"]
    )
    assert read_messages(Fields({"messages": talk}), native=True)[2:4] == [
        {**result, "name": "weather"} for result in results
    ]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_pieces_of_any_size_make_the_same(native, size):
    tools = Tools({"weather": SCHEMA}, [], False, native)
    texts = {
        CALL: (CALL, 0) if native else ("", 1),
        f"a < b {MARKED} c": ("a < bc", 1) if native else (f"a < b {MARKED} c", 0),
        f"{MARKED}\n\n{MARKED} ": ("", 2) if native else (f"{MARKED}\n\n{MARKED} ", 0),
        "{not json} ": ("{not json} ", 0),
        "<tool_call>{</tool_call>! ": ("<tool_call>{</tool_call>! ", 0),
        "<tool_cal": ("<tool_cal", 0),
        "": ("", 0),
    }
    for text, want in texts.items():
        reader, said, num_calls = CallReader(tools), "", 0
        parts = [text[start : start + size] for start in range(0, len(text), size)]
        for n, part in enumerate([*parts, ""]):
            piece, calls = reader.push(part, n == len(parts))
            said, num_calls = said + piece, num_calls + len(calls)
        assert (said, num_calls) == want
