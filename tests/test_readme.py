"""The README files: their Python runs, their links lead somewhere, and what they name exists.

.ci/run runs the commands of the first one's `sh` blocks.
"""

import io
import re
import warnings
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from pykv import bench, cli

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels_cu", "pykv", "tests", "tools")
READMES = [
    ROOT / "README.md",
    *(path for name in FOLDERS for path in ROOT.glob(f"{name}/**/README.md")),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in READMES}
MAIN = TEXTS["README.md"]


def python_blocks():
    for name, text in TEXTS.items():
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL), 1):
            if re.match(r"# \w+/\S+\.py\n", code):
                continue  # a file of the example op, which tools/try_readme_op.py runs
            if "localhost:8000" in code:
                continue  # needs a server; tests/serve/test_examples.py has one
            marks = pytest.mark.model if "LLM" in code else ()
            imported = re.findall(r"^import .*", code, re.MULTILINE)
            needs = " ".join(x for x in ("torch", "transformers") if x in " ".join(imported))
            label = f"{name}:{number}{needs and ' with ' + needs}"
            yield pytest.param(name, code, needs, marks=marks, id=label)


@pytest.mark.parametrize("name, code, needs", list(python_blocks()))
def test_python_blocks_run(name, code, needs):
    for library in needs.split():
        pytest.importorskip(library)
    exec(compile(code, name, "exec"), {})


def test_the_first_has_five_examples_and_is_short():
    assert len(re.findall(r"^\*\*.*?\*\*", MAIN, re.MULTILINE)) == 5
    assert len(MAIN.splitlines()) <= 170


def test_ci_runs_its_two_commands():
    commands = re.findall(r"```sh\n(.*?)\n```", MAIN, re.DOTALL)
    assert len(commands) == 2 and all(command.startswith("pip install") for command in commands)


# --- Links ----------------------------------------------------------------------------------------


def links():
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target:
                yield name, target


@pytest.mark.parametrize("name, target", sorted(links()))
def test_links_lead_somewhere(name, target):
    assert ((ROOT / name).parent / target).exists()


# --- Commands -------------------------------------------------------------------------------------


def commands():
    """(command with subcommands, option) of each line that names a command; an option belongs to
    the command before it on its line."""
    found = set()
    for text in TEXTS.values():
        for line in text.splitlines():
            command = None
            for span in re.findall(r"`([^`]+)`", line):
                words = span.split()
                if words[0] == "pykv" and len(words) > 1:
                    options = [word for word in words if word.startswith("--")]
                    command = subcommand(words)
                    found.add((command, "--help"))
                elif command and words[0].startswith("--"):
                    options = words[:1]
                else:
                    continue
                found |= {(command, option.partition("=")[0]) for option in options}
    return sorted(found)


def subcommand(words):
    """`pykv cache info` and the like; of `pykv bench NAME`, a benchmark that there is."""
    if words[1] == "bench":
        return ("bench", "copy" if words[2:3] in ([], ["NAME"]) else words[2])
    return tuple(words[1:3] if words[1] in ("cache", "eval", "kvtc") else words[1:2])


@cache
def help_of(command):
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(text), pytest.raises(SystemExit):
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` replaces it
        cli.main([*command, "--help"])
    return text.getvalue()


@pytest.mark.parametrize(
    "command, option", commands(), ids=lambda x: x if type(x) is str else " ".join(x)
)
def test_commands_and_options_exist(command, option):
    """What is no command prints no help."""
    assert re.search(rf"(?<![\w-]){option}\b(?!-)", help_of(command))


def named_in(parser, before=()):
    """Commands of a parser that have none below them."""
    below = [a for a in parser._actions if a.choices and a.dest == "==SUPPRESS=="]
    if not below:
        return {before}
    return set().union(*(named_in(p, (*before, name)) for name, p in below[0].choices.items()))


def test_every_command_is_named():
    """`pykv bench NAME` without a name, as the next test has these."""
    named = {c[:1] if c[0] == "bench" else c for c, _ in commands()}
    assert named_in(cli._parser()) <= named


def test_every_benchmark_is_named():
    (line,) = (line for line in MAIN.splitlines() if line.startswith("| `pykv bench NAME`"))
    named = set(re.search(r"one job \(([^)]*)\)", line)[1].split(", "))
    assert named == set(bench.names())


# --- Environment ----------------------------------------------------------------------------------

INTERNAL = {"PYKV_SIMT"}  # a macro of tests/simt, no variable


def variables(text):
    return set(re.findall(r"\bPYKV_[A-Z_]*[A-Z]\b", text)) - INTERNAL


def test_environment_variables_are_those_of_the_code():
    files = [
        path for folder in ("pykv", "tests", "tools") for path in (ROOT / folder).rglob("*.py")
    ]
    read = set().union(
        *(variables(p.read_text(encoding="utf-8")) for p in files if p != Path(__file__))
    )
    read |= {"PYKV_REQUIRE_GPU", "PYKV_REQUIRE_SIMT"}  # conftest.py makes these names
    assert set().union(*map(variables, TEXTS.values())) == read
    of_users = re.findall(r"^\| `(PYKV_[A-Z_]+)", MAIN, re.MULTILINE)
    assert set(of_users) == {"PYKV_REQUIRE_GPU"} | set().union(
        *(
            variables(p.read_text(encoding="utf-8"))
            for p in files
            if "pykv" in p.relative_to(ROOT).parts
        )
    )


# --- Files ----------------------------------------------------------------------------------------


def test_tools_has_a_line_for_each_tool():
    named = set(
        re.findall(
            r"`([\w.]+)`", "\n".join(re.findall(r"^\| (.*?) \|", TEXTS["tools/README.md"], re.M))
        )
    )
    there = {p.name for p in (ROOT / "tools").iterdir() if p.is_file() and p.suffix != ".md"}
    assert named == {name for name in there if not name.startswith((".", "__"))}


def test_the_architecture_names_files_that_exist():
    table = TEXTS["pykv/README.md"].partition("## The path")[0]
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", table):
        assert (ROOT / "pykv" / name).exists(), name
