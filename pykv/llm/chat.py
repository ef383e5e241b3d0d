"""Chat messages to a prompt, by the template that a model file carries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from pykv.errors import FormatError, ParameterError, UnsupportedError
from pykv.llm.gguf import ModelFile

OP = "chat_prompt"


def chat_prompt(
    model: ModelFile | str,
    messages: Sequence[dict[str, Any]],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt of a conversation; encode it with `special=True`.

    Args:
        model: a model file, or the text of a Jinja template.
        messages: dicts with the strings "role" and "content", oldest first.
        add_generation_prompt: end with the opening of the assistant's turn.

    Raises:
        UnsupportedError: the file has no chat template.
        ParameterError: the messages are malformed, or the template refuses them.
        FormatError: the template is no valid Jinja or fails.

    A template is foreign code and runs in Jinja's sandbox, which keeps it from Python's internals
    but does not bound its running time.
    """
    name, source, tokens = "the given chat template", model, {}
    if not isinstance(model, str):
        name, source = f"the chat template of {model.path}", _template(model)
        tokens = _special_tokens(model)
    _check(messages)
    from jinja2.exceptions import SecurityError, TemplateError

    try:
        prompt: str = _compile(source).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **tokens,
        )
    except ParameterError:
        raise
    except SecurityError as error:
        raise FormatError(f"{OP}: {name} leaves the sandbox ({error})") from None
    except TemplateError as error:
        where = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
        raise FormatError(f"{OP}: {name} fails ({where}{error})") from None
    except Exception as error:  # foreign code may raise anything
        what = f"{type(error).__name__}: {error}"
        raise FormatError(f"{OP}: {name} fails ({what})") from None
    return prompt


def _template(file: ModelFile) -> str:
    source: str | None = file.get("tokenizer.chat_template", None, str)
    if source is None:
        raise UnsupportedError(
            f"{OP}: {file.path} has no chat template (a base model?), expected a chat model; "
            "use a plain prompt instead"
        )
    return source


def _special_tokens(file: ModelFile) -> dict[str, str]:
    """What templates call bos_token and eos_token."""
    tokens = file.get("tokenizer.ggml.tokens", [], list)
    ids = {role: file.get(f"tokenizer.ggml.{role}_token_id", -1, int) for role in ("bos", "eos")}
    return {f"{role}_token": tokens[i] for role, i in ids.items() if 0 <= i < len(tokens)}


def _check(messages: Sequence[dict[str, Any]]) -> None:
    if isinstance(messages, str | dict) or not isinstance(messages, Sequence) or not messages:
        raise ParameterError(
            f"{OP}: messages has {type(messages).__name__}, expected a list of at least one message"
        )
    for n, message in enumerate(messages):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, dict) else None
            if not isinstance(value, str):
                raise ParameterError(
                    f"{OP}: messages[{n}] has {key} {value!r}, expected a string "
                    '({"role": ..., "content": ...})'
                )


@lru_cache(8)
def _compile(source: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own filter escapes for HTML, which models have not been trained on."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(text: str) -> NoReturn:
    raise ParameterError(f"{OP}: the chat template refuses the messages ({text})")
