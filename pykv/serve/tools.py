"""Messages and tools in the form of chat templates, and tool calls in answers.

Templates of models that were trained on tools list them, and these models mark calls as <tool_call>
... </tool_call>. Other models are told in the system message to answer with JSON alone. Both write
{"name": ..., "arguments": {...}}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from pykv.errors import PykvError
from pykv.serve.fields import Fields, loads, wrong

OPENING, CLOSING = "<tool_call>", "</tool_call>"
_ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
# The schema of a function that states no parameters; OpenAI's rule.
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
# The schema of a part of a message's content.
_TEXT = {kind: {"type": "string"} for kind in ("text", "refusal")}
_PART = {"type": "object", "properties": {"type": {"enum": [*_TEXT]}, **_TEXT}}
_PART |= {"required": ["type"]}
# A small model may loop on blanks, so the grammar allows none.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Call(NamedTuple):
    """A call of a tool: its name, and its arguments as JSON."""

    name: str
    arguments: str


# --- Templates ---


class Dialect(NamedTuple):
    """How a template treats tools.

    Attributes:
        variable: the template variable that lists tools; empty: it has no tools.
        writes_calls: it writes the calls of earlier answers; else their text must contain them.
    """

    variable: str = ""
    writes_calls: bool = False


def find_dialect(write: Callable[[list[dict[str, Any]], dict[str, Any]], str]) -> Dialect:
    """Find out how a template treats tools, by rendering a sample. Searching its code for names
    would not do: SmolLM3's template lists `xml_tools`, but leaves out the calls of earlier answers.

    Args:
        write: renders messages and variables; raises PykvError if the template refuses them.
    """
    listed, called, result = "zq_listed", "zq_called", "zq_result"
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    tool = {"name": listed, "description": "Does it.", "parameters": schema}
    function = {"name": called, "arguments": {"a": "b"}}
    call = {"id": "123456789", "type": "function", "function": function}
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result, "name": called, "tool_call_id": call["id"]},
    ]
    for variable in ("tools", "xml_tools"):
        try:
            text = write(talk, {variable: [{"type": "function", "function": tool}]})
        except PykvError:
            continue
        reader = CallReader(Tools({called: schema}, [], False, True))
        is_read = bool(reader.push(text, True)[1])
        if listed in text and result in text and (is_read or text.count(called) == 0):
            return Dialect(variable, is_read)
    return Dialect()


# --- Messages ---


def read_messages(
    fields: Fields, *, native: bool, writes_calls: bool = True
) -> list[dict[str, Any]]:
    """The messages of a body, in the form that templates take.

    Args:
        fields: of the body.
        native: whether the template has tools; else calls and results become text.
        writes_calls: whether it also writes calls; else calls become text.
    """
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # by id of a call: the function's name
    after_result = False
    for message in fields.each("messages"):
        role = message.choice("role", None, *_ROLES)
        calls = _read_calls(message) if role == "assistant" else []
        content = _content(message, required=role != "assistant")
        if role == "assistant":  # which says one or the other
            content = content or message.take("refusal", str)
        made = {"role": "system" if role == "developer" else role, "content": content or ""}
        if name := message.take("name", str):
            made["name"] = name
        if role == "assistant" and (thoughts := _thoughts(message)):
            made["reasoning_content"] = thoughts
        names |= {call["id"]: call["function"]["name"] for call in calls}
        if role == "tool":
            call_id = message.take("tool_call_id", str, default="")
            made["tool_call_id"] = call_id
            made.setdefault("name", names.get(call_id, "the tool"))
        if calls and native and writes_calls:
            made["tool_calls"] = calls
        elif calls:
            made["content"] = _said(made["content"], calls, marked=native)
        if role == "tool" and not native:
            made = {"role": "user", "content": f"Result of {made['name']}: {made['content']}"}
        if after_result and role == "tool" and not native:  # many templates want alternating roles
            messages[-1]["content"] += f"\n{made['content']}"
        else:
            messages.append(made)
        after_result = role == "tool"
    return messages


def _content(message: Fields, *, required: bool) -> str | None:
    """The text of a message; parts are joined."""
    content = message.take("content", str, list, required=required, items=_PART)
    if content is None or isinstance(content, str):
        return content
    where, texts = f"{message.where}content", []
    for n, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        text = part.get(kind) if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise wrong(f"{where}[{n}].type", kind, '"text", and the text')
        texts.append(text)
    return "".join(texts)


def _thoughts(message: Fields) -> str | None:
    """The reasoning of an assistant, which some templates repeat; vLLM's clients send it as
    `reasoning`, others as `reasoning_content`."""
    thoughts: str | None = message.take("reasoning", str)
    thoughts = message.take("reasoning_content", str, default=thoughts)
    return thoughts


def _read_calls(message: Fields) -> list[dict[str, Any]]:
    """The calls of an assistant's message, with arguments as objects, as templates expect."""
    made = []
    if (legacy := message.take("function_call", enum=[None])) is not None:
        raise wrong(f"{message.where}function_call", legacy, "tool_calls, which took its place")
    for n, call in enumerate(message.take("tool_calls", list, default=[])):
        where = f"{message.where}tool_calls[{n}]"
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str):
            raise wrong(where, call, 'an object with {"function": {"name": ...}}')
        given = arguments = function.get("arguments")
        if isinstance(given, str):
            try:
                arguments = loads(given if given.strip() else "null")
            except (ValueError, RecursionError):
                raise wrong(f"{where}.function.arguments", given, "JSON") from None
        arguments = {} if arguments in (None, []) else arguments  # PHP writes {} as []
        if not isinstance(arguments, dict):  # templates iterate over its items
            raise wrong(f"{where}.function.arguments", given, "an object of JSON")
        call_id = call.get("id")
        if not isinstance(call_id, str | None):
            raise wrong(f"{where}.id", call_id, "a string")
        function = {"name": name, "arguments": arguments}
        made.append({"id": call_id or "", "type": "function", "function": function})
    return made


def _said(text: str, calls: list[dict[str, Any]], *, marked: bool) -> str:
    """The text of an assistant's message with its calls appended."""
    each = [_prompt_json(call["function"]) for call in calls]
    each = [f"{OPENING}\n{one}\n{CLOSING}" for one in each] if marked else each
    return "\n".join([text, *each]).strip()


def _prompt_json(value: dict[str, Any]) -> str:
    """JSON for a model to read: no escapes for letters of other scripts."""
    return json.dumps(value, ensure_ascii=False)


# --- Tools ---


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
        functions: the schema of the parameters of each function, by name.
        given: the field itself, for templates.
        forced: the answer must be a call.
        native: the template has tools.
        parallel: an answer may have several calls.
    """

    functions: dict[str, dict[str, Any]]
    given: list[dict[str, Any]]
    forced: bool
    native: bool
    parallel: bool = True

    def instruct(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages whose system message describes the tools, unless the template does."""
        if self.native:
            return messages
        described = "\n".join(_prompt_json(tool["function"]) for tool in self.given)
        text = (
            f"You can call these functions:\n{described}\n"
            'To call one, answer with nothing but {"name": ..., "arguments": {...}} in JSON.'
        )
        if messages[0]["role"] == "system":
            first = messages[0] | {"content": f"{messages[0]['content']}\n\n{text}"}
            return [first, *messages[1:]]
        return [{"role": "system", "content": text}, *messages]


def read_tools(fields: Fields, *, native: bool) -> Tools | None:
    """The tools of a body; None where there are none, or none may be called."""
    given = fields.take("tools", list, default=[])
    choice = fields.take("tool_choice", str, dict, default="auto" if given else "none")
    parallel = fields.flag("parallel_tool_calls", True)
    functions: dict[str, dict[str, Any]] = {}
    for n, tool in enumerate(given):
        where = f"tools[{n}]"
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            raise wrong(where, tool, 'an object with {"type": "function", "function": {...}}')
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise wrong(f"{where}.function.name", name, "1 to 64 letters, digits, _ and -")
        if name in functions:
            raise wrong(f"{where}.function.name", name, "a name that no function before it has")
        schema = function.get("parameters")
        if schema is not None and not isinstance(schema, dict):
            raise wrong(f"{where}.function.parameters", schema, "a JSON schema")
        kind = (schema or {}).get("type", "object")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise wrong(f"{where}.function.parameters.type", kind, '"object": arguments are one')
        functions[name] = schema | {"type": "object"} if schema else _NOTHING
    if choice == "none":
        return None
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in functions:
            raise wrong("tool_choice", choice, f"a function of tools: {', '.join(functions)}")
        return Tools({name: functions[name]}, given, True, native, parallel)
    if choice not in ("auto", "required"):
        raise wrong("tool_choice", choice, "none, auto, required, or a function")
    if not functions:
        raise wrong("tools", given, f"functions, as tool_choice is {choice!r}")
    return Tools(functions, given, choice == "required", native, parallel)


# --- Grammars ---


class Rule(NamedTuple):
    """The arguments of pykv.serve.constraints.Grammars.constraint."""

    grammar: str
    trigger: str = ""
    once: bool = False


def read_format(fields: Fields) -> dict[str, Any] | None:
    """The JSON schema that `response_format` asks for."""
    asked = fields.part("response_format")
    kind = asked.choice("type", "text", "text", "json_object", "json_schema")
    if kind == "text":
        return None
    if kind == "json_object":  # llama.cpp's clients send a schema in it
        return asked.take("schema", dict) or {"type": "object"}
    part = asked.part("json_schema")
    part.ignore("name", "description", "strict")
    schema: dict[str, Any] | None = part.take("schema", dict)
    if schema is None:
        raise wrong("response_format.json_schema.schema", None, "a JSON schema")
    return schema


def grammar(tools: Tools | None, schema: dict[str, Any] | None) -> Rule | None:
    """The grammar of an answer; None: any text."""
    if tools is None:
        return None if schema is None else Rule(f"start: {_json(schema)}")
    names = list(tools.functions)
    rules = [f"call: {' | '.join(f'call{n}' for n in range(len(names)))}"]
    for n, name in enumerate(names):
        head = json.dumps(f'{{"name": "{name}", "arguments": ')
        rules += [f'call{n}: {head} arguments{n} "}}"']
        rules += [f"arguments{n}: {_json(tools.functions[name])}"]
    marked = f'"{OPENING}\\n" call "\\n{CLOSING}"' if tools.native else "call"
    if tools.forced:
        start, trigger = f"start: {marked}", ""
    elif schema is not None:
        start, trigger = f"start: answer | {marked}\nanswer: {_json(schema)}", ""
    elif tools.native:  # any text; the grammar applies once a call is opened
        start, trigger = f'start: /\\s*/ call /\\s*/ "{CLOSING}"', OPENING
    else:
        start, trigger = "start: TEXT | /\\s*/ call\nTEXT: /\\s*([^{\\s](.|\\n)*)?/", ""
    return Rule("\n".join([start, *rules]), trigger, once=not tools.parallel)


def _json(schema: dict[str, Any]) -> str:
    """A schema as a rule in llguidance's dialect of Lark."""
    return "%json " + json.dumps({"x-guidance": _COMPACT, **schema})


# --- Calls in answers ---


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


_AS_WRITTEN = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_refuse)
_ARGUMENTS = re.compile(r'"arguments"\s*:\s*')
_QUOTE_OR_CLOSING = re.compile(f'"|{CLOSING}')
_QUOTE_OR_ESCAPE = re.compile(r'"|\\.', re.DOTALL)  # in a string


class CallReader:
    """Separates text from calls while an answer streams in.

    Args:
        tools: what may be called.
    """

    def __init__(self, tools: Tools) -> None:
        self._tools, self._held = tools, ""
        self._is_text = self._is_after_call = False
        self._looked, self._in_string = 0, False  # how far `_closing` has scanned the call
        self.num_calls = 0

    def push(self, text: str, ended: bool) -> tuple[str, list[Call]]:
        """Add text; returns the text and the calls that are now certain."""
        self._held += text
        read = self._read_marked if self._tools.native else self._read_bare
        said, calls = read(ended)
        self.num_calls += len(calls)
        return said, calls

    def _read_bare(self, ended: bool) -> tuple[str, list[Call]]:
        """Without marks: a call is the whole answer."""
        if not self._is_text and self._held.lstrip()[:1] in ("", "{") and not ended:
            return "", []
        call = None if self._is_text else self._call(self._held)
        said, self._held, self._is_text = self._held, "", True
        return ("", [call]) if call else (said, [])

    def _read_marked(self, ended: bool) -> tuple[str, list[Call]]:
        """Calls stand between marks; blanks around them are dropped."""
        said, calls = "", []
        while (start := self._held.find(OPENING)) >= 0:
            stop = self._closing(start, ended)
            if stop < 0 and not ended:
                break
            self._looked, self._in_string = 0, False
            stop = stop if stop >= 0 else len(self._held)
            call = self._call(self._held[start + len(OPENING) : stop])
            stop += len(CLOSING)
            before, self._held = self._held[:stop], self._held[stop:]
            if call:
                calls.append(call)
                before = before[:start].rstrip()
            said += self._unless_blank(before)
            self._is_after_call = call is not None
        keep = 0
        if start >= 0:
            keep = len(self._held) - len(self._held[:start].rstrip())
        elif not ended:
            certain = self._held[: len(self._held) - _overlap(self._held, OPENING)].rstrip()
            keep = len(self._held) - len(certain)
        at = len(self._held) - keep
        text, self._held = self._held[:at], self._held[at:]
        return said + self._unless_blank(text), calls

    def _closing(self, start: int, ended: bool) -> int:
        """The index of the mark that ends the call, or -1. Skips marks in strings of its arguments.
        Continues where the last scan stopped, as calls may be long."""
        while found := (_QUOTE_OR_ESCAPE if self._in_string else _QUOTE_OR_CLOSING).search(
            self._held, start + self._looked
        ):
            if found[0] == CLOSING:
                return found.start()
            self._looked = found.end() - start
            self._in_string ^= found[0] == '"'
        begun = 1 if self._in_string else len(CLOSING) - 1  # of an escape, or of the mark
        self._looked = max(self._looked, len(self._held) - start - begun)
        return self._held.find(CLOSING, start) if ended else -1

    def _unless_blank(self, text: str) -> str:
        """The text, without leading blanks if it follows a call."""
        text = text.lstrip() if self._is_after_call else text
        self._is_after_call = self._is_after_call and not text
        return text

    def _call(self, text: str) -> Call | None:
        """The call that a text is, or None. Arguments keep their spelling: numbers in JSON may have
        more digits than float64."""
        try:
            found = _AS_WRITTEN.decode(text)
            name, arguments = found["name"], found["arguments"]
            key = _ARGUMENTS.search(text)
            start = key.end() if key else 0
            given, stop = _AS_WRITTEN.raw_decode(text, start)
        except (ValueError, LookupError, TypeError, RecursionError):
            return None
        known = isinstance(name, str) and name in self._tools.functions
        if not known or not isinstance(arguments, dict) or given != arguments:
            return None
        return Call(name, text[start:stop])


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of a text are the beginning of a mark."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
