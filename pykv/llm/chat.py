"""Chat messages to a prompt, by the template that a model file carries.

What a template writes itself may be control tokens; what messages say never is. The template is
rendered with the messages as they are, and, where they hold signs that control tokens are spelled
with, again with another character for each such sign. Control tokens of the second text are the
template's own. Where the first has the same ones, it is the prompt, as it is for any harmless
message; else the second is, and its signs are put back once its control tokens are found. Where
the template itself looks for signs, such as those of </think>, it looks for the other characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

from pykv.errors import FormatError, ParameterError, UnsupportedError, quoted
from pykv.llm.gguf import ModelFile
from pykv.llm.templates import OP, Rendered, render
from pykv.llm.token_types import known_id
from pykv.llm.tokenizer import Tokenizer

_OTHER = "zq_other"  # that no message says
_TALK = ("user", "assistant")  # whom templates write, but for thoughts, and words beside calls
_DEFAULTS: dict[str, Any] = {"add_generation_prompt": True, "tools": None, "documents": None}


class _Template(NamedTuple):
    """What errors call a template, its text, and what it calls bos_token and the like."""

    name: str
    source: str
    tokens: tuple[tuple[str, str], ...]


def chat_prompt(
    model: ModelFile | str,
    messages: Sequence[Mapping[str, Any]],
    *,
    template_variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt of a conversation as text, in which control tokens look like what messages say.

    Args:
        model: a model file, or the text of a Jinja template.
        messages: dicts with the strings "role" and "content", oldest first. Templates may know
            other keys; with "tool_calls" there may be no content, and content may be a list of
            parts.
        template_variables: what the template sees beside them, for example enable_thinking or
            tools; add_generation_prompt is True unless it is given.

    Raises:
        UnsupportedError: the file has no chat template, or no process can be started to render it.
        ParameterError: the messages are malformed, the template refuses them, it wants strings
            where contents are parts, or it leaves a system message out.
        FormatError: the template is no valid Jinja, fails, or takes too much time or memory.
        InstallError: jinja2 is not installed.
    """
    template = _template(model, template_variables)
    variables = _variables(messages, template_variables, dict(template.tokens))
    return _rendered(template, _as_wanted(template, variables)).text


def chat_ids(
    model: ModelFile,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template_variables: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> list[int]:
    """The prompt of a conversation as token ids; what messages and variables say is text alone.

    Args, Raises: as `chat_prompt`; CapacityError, see Tokenizer.encode for `limit`.
    """
    template = _template(model, template_variables)
    source, tokens = template.source, dict(template.tokens)
    variables = _as_wanted(template, _variables(messages, template_variables, tokens))
    plain = _rendered(template, variables)
    given = {key: value for key, value in variables.items() if key not in tokens}
    said = list(_strings(list(given.values())))
    characters = frozenset().union(*said)
    if tokenizer.control_signs.isdisjoint(characters):
        return tokenizer.encode(plain.text, special=True, limit=limit, name="prompt")

    used = characters | set(source)
    unused = (c for c in map(chr, range(0x1F700, 0x30000)) if c.isprintable() and c not in used)
    # Of all signs, so that the template is compiled once for most messages.
    stand_ins = dict(zip(sorted(tokenizer.control_signs), unused, strict=False))
    safe = _marked(template, plain, given, stand_ins, tokenizer)
    own = _control_ids(tokenizer, safe)
    if own == _control_ids(tokenizer, plain.text) and not _control_ids(tokenizer, *said):
        return tokenizer.encode(plain.text, special=True, limit=limit, name="prompt")
    back = {ord(stand_in): sign for sign, stand_in in stand_ins.items()}
    return tokenizer.encode(safe, special=True, stand_ins=back, limit=limit, name="prompt")


def _marked(
    template: _Template,
    plain: Rendered,
    given: dict[str, Any],
    stand_ins: dict[str, str],
    tokenizer: Tokenizer,
) -> str:
    """What a template writes where variables have stand-ins for signs, and where it looks for signs
    in them, too. Should that be another text, as it keeps what it looks for in a variable or sees a
    token such as bos_token, only variables have stand-ins."""
    name, source, tokens = template.name, template.source, dict(template.tokens)
    raw, spell = "".join(stand_ins.values()), str.maketrans(stand_ins)
    back = {ord(stand_in): sign for sign, stand_in in stand_ins.items()}
    marked = {
        key: _mapped(value, lambda text: text.translate(spell)) for key, value in given.items()
    }
    sought = {
        text: text.translate(spell) for text in plain.strings if text.translate(spell) != text
    }
    with suppress(FormatError, ParameterError):  # perhaps for what it does not find
        safe = render(name, source, marked | tokens, raw, sought).text
        if safe.translate(back) == plain.text:
            return safe
    marker = _marker(stand_ins, plain.strings, tokenizer)
    marked = {key: _mapped(value, marker) for key, value in given.items()}
    return render(name, source, marked | tokens, raw).text


def _as_wanted(template: _Template, variables: dict[str, Any]) -> dict[str, Any]:
    """The variables, with contents as parts where the template knows no others: it would leave out
    the strings without a word."""
    if _reads(template, parts=False) is not False or not _reads(template, parts=True):
        return variables
    messages = [
        {**message, "content": _parts(message["content"])} if "content" in message else message
        for message in variables["messages"]
    ]
    return variables | {"messages": messages}


def _parts(content: Any) -> Any:
    """A content as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _reads(template: _Template, *, parts: bool) -> bool | None:
    """Whether contents that are parts, or strings, make a difference to what a template writes.
    None: it refuses a message; of parts also where it fails, perhaps for another reason."""
    try:
        return _tells_apart(template, "user", parts)
    except ParameterError:
        return None
    except FormatError:
        return None if parts else False


@lru_cache(32)  # it keeps no errors, as time or memory may have been short
def _tells_apart(template: _Template, role: str, parts: bool) -> bool:
    """Whether a template writes something else where the first message, of a role, does."""
    prompts = set()
    for said in ("one", "three"):
        texts = {role: said} | ({} if role == "user" else {"user": "two"})
        messages = [{"role": r, "content": _parts(x) if parts else x} for r, x in texts.items()]
        variables = _DEFAULTS | dict(template.tokens) | {"messages": messages}
        prompts.add(render(template.name, template.source, variables).text)
    return len(prompts) > 1


def _check_heard(template: _Template, variables: dict[str, Any], text: str) -> None:
    """Refuse a message that the template has left out of its text without a word, as some do with
    roles that they do not know, or with all system messages but the first."""
    messages = variables["messages"]
    said = [[x.strip() for x in _strings(_texts(m.get("content")))] for m in messages]
    for n, message in enumerate(messages):
        if message["role"] in _TALK or not any(said[n]) or _is_in(said, said[n], text):
            continue
        other = _OTHER if isinstance(message["content"], str) else _parts(_OTHER)
        changed = [*messages[:n], {**message, "content": other}, *messages[n + 1 :]]
        try:
            found = render(template.name, template.source, variables | {"messages": changed}).text
        except (ParameterError, FormatError):  # perhaps for another reason
            continue
        if found == text:
            raise ParameterError(
                f"{OP}: messages[{n}] has role {message['role']!r}, which {template.name} leaves "
                "out; let the user say what it says"
            )


def _texts(content: Any) -> Any:
    """What a content says; of parts, their texts."""
    return [part.get("text") for part in content] if isinstance(content, list) else content


def _is_in(said: list[list[str]], texts: list[str], text: str) -> bool:
    """Whether a prompt has texts as often as messages have them."""
    return all(text.count(x) >= sum(x in y for other in said for y in other) for x in texts)


def _rendered(template: _Template, variables: dict[str, Any]) -> Rendered:
    """The prompt, of messages that the template takes. Many want strings, and fail with Python's
    own words at parts, write them as Python does, or leave them out."""
    name, source, _ = template
    contents = [message["content"] for message in variables["messages"] if "content" in message]
    others = [content for content in contents if not isinstance(content, str)]
    try:
        plain = render(name, source, variables)
        is_spelled = any(str(content) in plain.text for content in others if content)
        if not is_spelled and not (any(others) and _reads(template, parts=True) is False):
            _check_heard(template, variables, plain.text)
            return plain
    except FormatError:
        texts = [{**message, "content": ""} for message in variables["messages"]]
        if not others or not _renders(name, source, variables | {"messages": texts}):
            raise
    n, content = next((n, x) for n, x in enumerate(contents) if not isinstance(x, str))
    raise ParameterError(
        f"{OP}: messages[{n}] has content {quoted(content)}, which {name} does not take: it "
        "wants a string"
    )


def _renders(name: str, source: str, variables: dict[str, Any]) -> bool:
    try:
        render(name, source, variables)
    except (FormatError, ParameterError):
        return False
    return True


def _marker(
    stand_ins: dict[str, str], constants: list[str], tokenizer: Tokenizer
) -> Callable[[str], str]:
    """A function that puts stand-ins into a text, but not where it holds a string that the template
    may look for, such as </think>."""
    kept = _apart(tuple(constants), tuple(tokenizer.control.ids))
    kept = [text for text in kept if not stand_ins.keys().isdisjoint(text)]
    pattern = re.compile("|".join(map(re.escape, [*kept, *stand_ins])))
    return lambda text: pattern.sub(lambda found: stand_ins.get(found[0], found[0]), text)


@lru_cache(8)
def _apart(texts: tuple[str, ...], tokens: tuple[str, ...]) -> list[str]:
    """Those texts of which no occurrence can share a character with one of a token, longest first:
    none is part of the other, and none ends as the other begins."""
    spelled = "\0".join(["", *tokens, ""])
    longest = max(map(len, tokens))

    def is_apart(text: str) -> bool:
        inside = (token in text for token in tokens)
        parts = range(1, min(len(text), longest + 1))
        ends = (f"\0{text[-n:]}" in spelled or f"{text[:n]}\0" in spelled for n in parts)
        return not (text in spelled or any(inside) or any(ends))

    return sorted(filter(is_apart, texts), key=len, reverse=True)


def _control_ids(tokenizer: Tokenizer, *texts: str) -> list[int]:
    parts = (part for text in texts for part in tokenizer.control.split(text))
    return [part for part in parts if isinstance(part, int)]


def _strings(value: Any) -> Iterator[str]:
    """Every string in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON with every string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value


def template_of(model: ModelFile, *, tools: bool) -> str | None:
    """The text of a file's template; of two the one for calls of tools, if there are any."""
    usual: str | None = model.get("tokenizer.chat_template", None, str)
    other: str | None = model.get("tokenizer.chat_template.tool_use", usual, str)
    return other if tools else usual


def check_template(model: ModelFile) -> None:
    """Raise the UnsupportedError of `chat_prompt` for a file without a template."""
    if template_of(model, tools=False) is None:
        raise _no_template(model)


def _no_template(model: ModelFile) -> UnsupportedError:
    return UnsupportedError(
        f"{OP}: {model.path} has no chat template (a base model?), expected a chat model; "
        "use a plain prompt instead"
    )


def _template(model: ModelFile | str, given: Mapping[str, Any] | None) -> _Template:
    if isinstance(model, str):
        return _Template("the given chat template", model, ())
    source = template_of(model, tools=isinstance(given, Mapping) and bool(given.get("tools")))
    if source is None:
        raise _no_template(model)
    tokens = model.get("tokenizer.ggml.tokens", [], list)
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: known_id(model, role, len(tokens)) for name, role in roles.items()}
    known = ((f"{name}_token", tokens[i]) for name, i in ids.items() if i is not None)
    return _Template(f"the chat template of {model.path}", source, tuple(known))


def _variables(
    messages: Sequence[Mapping[str, Any]], given: Mapping[str, Any] | None, tokens: dict[str, str]
) -> dict[str, Any]:
    """All that a template sees, checked."""
    check_messages(messages)
    if given is not None and not isinstance(given, Mapping):
        raise ParameterError(
            f"{OP}: template_variables has {type(given).__name__}, expected a dict of names"
        )
    own = {"messages": [_stated(message) for message in messages], **tokens}
    for name in given or {}:
        if not isinstance(name, str) or name in own:
            raise ParameterError(
                f"{OP}: template_variables has {name!r}, expected names other than {', '.join(own)}"
            )
    return _DEFAULTS | dict(given or {}) | own


def _stated(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without keys that are None, which templates would write so, or iterate over; the
    content beside calls is then empty."""
    given = {key: "" if key == "content" and x is None else x for key, x in message.items()}
    return {key: value for key, value in given.items() if value is not None}


def check_messages(messages: Any) -> None:
    """Check that messages are such as `chat_prompt` takes.

    Raises:
        ParameterError: they are not.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ParameterError(
            f"{OP}: messages is {quoted(messages)}, expected a list of at least one message"
        )
    for n, message in enumerate(messages):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, Mapping) else None
            parts = key == "content" and (
                (isinstance(value, list) and value and all(isinstance(x, Mapping) for x in value))
                or (value is None and isinstance(message, Mapping) and message.get("tool_calls"))
            )
            if not isinstance(value, str) and not parts:
                raise ParameterError(
                    f"{OP}: messages[{n}] has {key} {quoted(value)}, expected a string "
                    '({"role": ..., "content": ...})'
                )
