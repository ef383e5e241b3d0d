"""The README's Python examples run as they stand; .ci/run runs its commands."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, marks=pytest.mark.model if "LLM" in code else (), id=str(number))
        for number, code in enumerate(EXAMPLES, 1)
    ],
)
def test_example(code):
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_four():
    assert len(EXAMPLES) == 4


def test_the_tree_names_what_exists():
    root = Path(__file__).parent.parent
    for name in re.findall(r"^  (\w+\.py) ", TEXT, re.MULTILINE):
        assert (root / "pykv" / name).is_file()
