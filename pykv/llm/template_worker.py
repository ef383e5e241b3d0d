"""The program of the process that renders chat templates, see pykv.llm.templates.

One line of JSON comes in for each template, and one goes out. Run by path, without site-packages;
its arguments are the folders of jinja2 and markupsafe. It imports nothing of pykv.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

MEMORY = 1 << 29  # limit of address space in bytes, where the system can enforce one
LENGTH = 1 << 25  # characters of a rendered template
raw = ""  # characters that `tojson` never escapes
# Methods and filters whose first argument is looked for in a text.
METHODS = {
    *("split", "rsplit", "partition", "rpartition", "startswith", "endswith", "find", "rfind"),
    *("index", "rindex", "count", "replace", "strip", "lstrip", "rstrip", "removeprefix"),
    "removesuffix",
}
FILTERS = {"replace", "trim"}


class Refusal(Exception):
    """The template has called raise_exception."""


@lru_cache(8)
def compiled(source: str, sought: tuple[tuple[str, str], ...]) -> tuple[Any, list[str]]:
    """The template, and the strings that it writes out. Where it looks for the first of two strings
    in a text, it looks for the second."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks for training what the assistant says; here it is only a block."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    tree, others = environment.parse(source), dict(sought)
    constants = tree.find_all(nodes.Const)
    strings = {node.value for node in constants if isinstance(node.value, str)}
    for node in looked_for(tree):
        if isinstance(node.value, str):
            node.value = others.get(node.value, node.value)
    return environment.from_string(tree), sorted(strings)


def looked_for(tree: Any) -> Iterator[Any]:
    """Constants that are compared with something, or looked for in it; none is written out."""
    from jinja2 import nodes

    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter)):
        if isinstance(node, nodes.Compare):
            found = [node.expr, *(operand.expr for operand in node.ops)]
        elif isinstance(node, nodes.Call):
            is_method = isinstance(node.node, nodes.Getattr) and node.node.attr in METHODS
            found = node.args[:1] if is_method else []
        else:
            found = node.args[:1] if node.name in FILTERS else []
        for value in found:
            items = value.items if isinstance(value, nodes.List | nodes.Tuple) else [value]
            yield from (item for item in items if isinstance(item, nodes.Const))


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it; Jinja's own filter escapes for HTML, which models do not know."""
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if ensure_ascii:
        others = rf"[^\x00-\x7f{re.escape(raw)}]"
        text = re.sub(others, lambda found: json.dumps(found[0])[1:-1], text)
    return text


def refuse(text: object) -> NoReturn:
    """raise_exception of templates."""
    raise Refusal(text)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What a template makes of its variables, or what is wrong with it."""
    from jinja2.exceptions import SecurityError, TemplateError

    global raw
    raw = request["raw"]
    try:
        template, strings = compiled(request["source"], tuple(request["sought"].items()))
        pieces, length = [], 0
        for piece in template.generate(request["variables"]):
            pieces.append(piece)
            length += len(piece)
            if length > LENGTH:
                return {"kind": "fails", "text": f"writes more than {LENGTH} characters"}
        return {"kind": "text", "text": "".join(pieces), "strings": strings}
    except Refusal as error:
        return {"kind": "refuses", "text": brief(error)}
    except SecurityError as error:
        return {"kind": "leaves", "text": brief(error)}
    except TemplateError as error:
        where = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
        return {"kind": "fails", "text": where + brief(error)}
    except MemoryError:
        return {"kind": "fails", "text": "it takes more memory than it may"}
    except Exception as error:  # foreign code may raise anything
        return {"kind": "fails", "text": f"{type(error).__name__}: {brief(error)}"}


def brief(error: Exception) -> str:
    """An error's text on one line, without what a terminal would obey."""
    text = " ".join(str(error)[:1000].split())[:300]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def main() -> None:
    sys.path[:0] = sys.argv[1:]
    import jinja2.sandbox  # noqa: F401 so that it is no part of what templates may use

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # Windows has none, macOS refuses: time is bounded
        pass
    for line in sys.stdin.buffer:
        try:
            reply = json.dumps(answer(json.loads(line)))
        except MemoryError:
            reply = json.dumps({"kind": "fails", "text": "it takes more memory than it may"})
        sys.stdout.buffer.write(reply.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
