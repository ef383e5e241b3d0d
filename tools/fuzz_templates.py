"""Render random chat templates, most of which ask for far too much; see fuzz.py.

    python tools/fuzz_templates.py [COUNT] [--seed N] [--keep FOLDER]

Each template is a few random statements of Jinja: every filter and test, methods of strings and
lists, huge numbers, nested loops, macros that call themselves. An attempt renders BATCH of them, so
that they share a process of pykv.llm.templates. Exits with 1 if there is a fault; --keep writes the
batches that have one.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import fuzz  # noqa: I001 - first, as it sets the number of threads

from jinja2.defaults import DEFAULT_FILTERS, DEFAULT_TESTS

from pykv.errors import PykvError
from pykv.llm import templates
from pykv.llm.chat import chat_prompt

BATCH = 20
SECONDS = 0.5  # time that a template may take; those that end take a millisecond
MESSAGES = [
    {"role": "user", "content": "<b>Hi</b> {0.__class__} %999999999d"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
]
ATOMS = r"""
    1 -1 0 10**9 9**9**9 1.5 1e308 true none 'a' 'a'*10**9 '' '%999999999d' '{:999999999}'
    '{0.__class__.__init__}' '\u00e9\U0001f600' '\x1b[2J' [1,2] [[1],'b'] {'a':1} (1,2) range(9)
    range(9**5) range(10**9) messages messages[0].content messages[1].tool_calls m s n nothing loop
    self cycler('a') joiner('a') namespace(a=1) dict(a=1) lipsum() raise_exception('no')
    strftime_now('%Y') f f(1) messages.__class__ f.__globals__
""".split()
BINARY = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or", "is not"]
STATEMENTS = ["include", "import", "extends", "from", "do", "with", "break", "else"]
METHODS = [
    *("center", "ljust", "zfill", "replace", "join", "split", "format", "expandtabs", "upper"),
    *("startswith", "items", "update", "append", "get", "encode", "translate", "count", "keys"),
    *("__class__", "mro", "format_map", "to_bytes", "bit_length"),
]


def expression(rng: random.Random, depth: int) -> str:
    """A random expression of Jinja."""
    if depth <= 0:
        return rng.choice(ATOMS)

    def more() -> str:
        return expression(rng, depth - 1 - rng.randrange(2))

    def arguments() -> str:
        return ", ".join(more() for _ in range(rng.randrange(3)))

    match rng.randrange(7):
        case 0:
            return f"({more()} {rng.choice(BINARY)} {more()})"
        case 1 | 2:
            return f"({more()}) | {rng.choice([*DEFAULT_FILTERS])}({arguments()})"
        case 3 | 4:
            return f"({more()}).{rng.choice(METHODS)}({arguments()})"
        case 5:
            return (
                f"({more()})[{more()}:{more()}]" if rng.random() < 0.5 else f"({more()})[{more()}]"
            )
        case _:
            return f"({more()} is {rng.choice([*DEFAULT_TESTS])})"


def block(rng: random.Random, depth: int) -> str:
    """A random piece of a template."""
    inner = block(rng, depth - 1) + block(rng, depth - 1) if depth > 0 else "x"
    value = expression(rng, 3)
    return rng.choice(
        [
            f"{{{{ {value} }}}}",
            f"{{{{ {value} }}}}{inner}",
            f"{{% for m in {value} %}}{inner}{{% endfor %}}",
            f"{{% for m in range(9**5) %}}{{% for n in 'a' * 9**5 %}}{inner}{{% endfor %}}"
            "{% endfor %}",
            f"{{% for m in {value} recursive %}}{{{{ loop(m) }}}}{inner}{{% endfor %}}",
            f"{{% if {value} %}}{inner}{{% else %}}{value}{{% endif %}}",
            f"{{% set s = {value} %}}{inner}",
            f"{{% set s %}}{inner}{{% endset %}}{{{{ s * 99999 }}}}",
            f"{{% set n = namespace(s={value}) %}}{{% for i in range(99) %}}"
            f"{{% set n.s = n.s ~ n.s %}}{{% endfor %}}{inner}",
            f"{{% macro f(s) %}}{{{{ f({value}) }}}}{inner}{{% endmacro %}}{{{{ f(1) }}}}",
            f"{{% filter {rng.choice([*DEFAULT_FILTERS])} %}}{inner}{{% endfilter %}}",
            f"{{% generation %}}{inner}{{% endgeneration %}}",
            f"{{% {rng.choice(STATEMENTS)} {value} %}}{inner}",
        ]
    )


def batches(count: int, seed: int) -> Iterator[fuzz.Mutant]:
    """Templates behind one another."""
    rng = random.Random(seed)
    for n in range(0, count, BATCH):
        sources = [block(rng, rng.randrange(4)) for _ in range(min(BATCH, count - n))]
        yield f"templates from {n} of seed {seed}", "\0".join(sources).encode()


def attempt(data: bytes) -> None:
    """Render a batch; a PykvError is what a template deserves, on one line."""
    templates.SECONDS = SECONDS
    for source in data.decode().split("\0"):
        try:
            chat_prompt(source, MESSAGES)
        except PykvError as error:
            if not str(error).isprintable() or len(str(error)) > 2000:
                raise RuntimeError(f"message {str(error)!r:.500} of {source!r}") from None


def main() -> int:
    given = fuzz.arguments("Render random chat templates.", 300)
    seconds = 10 + BATCH * (SECONDS + 1)  # a killed process is replaced, which takes time
    report = fuzz.run(attempt, batches(given.count, given.seed), seconds=seconds)
    return report.finish(given.keep, ".jinja")


if __name__ == "__main__":
    sys.exit(main())
