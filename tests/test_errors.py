"""How errors quote values: cut ones say so, and huge ones cost nothing."""

import re
from pathlib import Path

import numpy as np
import pytest

import pykv
from pykv.errors import DtypeError, quoted
from pykv.options import check_flag

VALUES = [
    *(None, True, -3, 0.5, "a", "it's", b"a\n", "\x1b[31m", 10**70, range(3), {1}, np.float32),
    *([], (), {}, [1, [2.5, "b"]], (1,), (1, 2), {"a": [None], 2: ()}, np.arange(4), np.int8(3)),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_fits_is_its_repr(value):
    assert quoted(value) == repr(value)


def test_what_is_cut_says_so():
    assert quoted("a" * 78) == repr("a" * 78)
    assert quoted("a" * 79) == f"'{'a' * 76}..."
    assert quoted([100] * 16) == repr([100] * 16) and len(repr([100] * 16)) == 80
    assert quoted([100] * 17) == repr([100] * 17)[:77] + "..."
    assert quoted({"key": "x" * 500}, 20) == "{'key': 'xxxxxxxx..."
    assert quoted(b"\0" * 30, 40) == repr(b"\0" * 30)[:37] + "..."
    assert quoted(-(10**5000)) == "an integer of 16610 bits"


def test_what_nobody_will_see_is_not_made():
    class Never:
        def __repr__(self):
            raise AssertionError("nobody reads that far")

    rest = [Never()] * 1_000_000
    for huge in (["a" * 99, *rest], ("a" * 99, *rest), {"a" * 99: 0} | dict(enumerate(rest))):
        assert quoted(huge).endswith("aaa...")
        assert quoted([[huge]]).startswith("[[") and quoted([[huge]]).endswith("aaa...")
    endless = []
    endless.append(endless)
    assert quoted(endless) == "[" * 77 + "..."
    assert quoted(np.full((9, 9), Never())) == "object[9, 9]"
    with pytest.raises(DtypeError, match=r"check: x is \['aa.*a\.\.\., expected True or False"):
        check_flag("check", "x", ["a" * 99, *rest])


def test_no_error_cuts_a_value_so_that_it_looks_whole():
    root = Path(pykv.__file__).parent
    files = list(root.rglob("*.py"))
    cuts = re.compile(r"!\w:\.\d|\{[\w.\[\]]+:\.\d+\}")
    found = {str(path.relative_to(root)): cuts.findall(path.read_text()) for path in files}
    assert len(files) > 300 and {name: cut for name, cut in found.items() if cut} == {}
