"""`pykv verify`: every op on this machine against an oracle that shares no code with it.

Moves and codes must agree bit for bit. Arithmetic may err by twice what the oracle errs when it
computes in float32, and a few units in the last place. On a machine without a GPU the public
functions run their references in NumPy, which are held to the same oracles and bounds.

How to add a family: the cases of kernels_cu/<stem>.cu are the generator

    cases(rng, xp)          yields (name, worst error, bound) of each case, on an array module

in pykv/verify/<stem>.py, or else in the op's own module pykv/ops/<stem>.py; nothing is registered,
and a stem with neither is reported as wrong, by its name. Call the op's public functions with
`xp.asarray` of NumPy inputs, and judge the results by pykv.testing: `judged` with an oracle, or
`wrong_values` where bits are exact. An oracle never calls the op's `reference`: on a CPU that is
what is judged. Ops of caches have

    cases_of(spec, rng, xp)  the same for a cache of one KVSpec, as `pykv verify --kv-dtype` asks

as well. For an op that triples its argument:

    def cases(rng, xp):
        x = rng.standard_normal((5, 64)).astype(np.float32)
        got = tripled.triple(xp.asarray(x))
        yield "5 rows", *judged(got, lambda dtype: x.astype(dtype) * dtype(3), np.float32)

A kernel that another op launches, such as paged_decode_mma.cu, has a family of its own that calls
this op. tests/test_verify.py asks that families call every public function of an op. It breaks
every family's op and its reference, and must see a case fail: the faults to plant stand in
tests/ops/test_<stem>.py, as tests/faults.py says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import Any

import numpy as np

from pykv import cuda
from pykv.errors import ParameterError
from pykv.specs import KVSpec

Case = tuple[str, float, float]  # name, worst error, bound
Cases = Iterator[Case]
Family = Callable[[np.random.Generator, Any], Cases]


@dataclass
class Row:
    """The result of one case of a family; `error` may not exceed `bound`."""

    op: str
    case: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False where it is NaN

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON, which knows no infinity and no NaN: those become None."""
        finite = {
            name: value if np.isfinite(value) else None
            for name, value in (("error", self.error), ("bound", self.bound))
        }
        return {**vars(self), **finite, "ok": self.ok}

    def as_text(self) -> str:
        """In columns, with the case, which may be of any length, last."""
        verdict, width = "ok" if self.ok else "WRONG", max(map(len, cuda.stems()))
        numbers = f"{self.error:8.2e} <= {self.bound:8.2e}"
        return f"{verdict:<5}  {self.op:<{width}}  {numbers}  {self.case}"


def run(seed: int = 0, spec: KVSpec | None = None) -> Iterator[Row]:
    """Check every op on the device that pykv would use, one row a case. Where an op raises, the
    next row is wrong and says what, and the rest of its family is left out.

    Args:
        seed: of the random inputs, at least 0.
        spec: check the ops of a cache that holds this, and no others; None: check all ops.

    Raises:
        ParameterError: `seed` is negative.
    """
    if seed < 0:
        raise ParameterError(f"verify: seed is {seed}, expected at least 0")
    xp = cuda.array_module("auto")
    return chain.from_iterable(
        rows(stem, family, np.random.default_rng(seed), xp)
        for stem, family in families(spec).items()
    )


def rows(stem: str, family: Family, rng: np.random.Generator, xp: Any) -> Iterator[Row]:
    """The rows of one family."""
    try:
        for case in family(rng, xp):
            yield Row(stem, *case)
    except Exception as error:  # families make valid calls only, so any error is a fault
        text = " ".join(f"{type(error).__name__}: {error}".split())
        yield Row(stem, f"raised {text}", np.inf, 0.0)


def families(spec: KVSpec | None = None) -> dict[str, Family]:
    """The cases of every stem, found by its name; with `spec`, of those that write or read a cache
    of this kind."""
    found: dict[str, Family] = {}
    for stem in cuda.stems():
        module = _module_of(stem)
        if spec is None:
            found[stem] = getattr(module, "cases", _no_cases)
        elif hasattr(module, "cases_of"):
            found[stem] = partial(module.cases_of, spec)
    return found


def _module_of(stem: str) -> Any:
    """The module that has a stem's cases, or may have them; None where there is not even an op."""
    for name in (f"pykv.verify.{stem}", f"pykv.ops.{stem}"):
        if find_spec(name):
            return import_module(name)
    return None


def _no_cases(rng: np.random.Generator, xp: Any) -> Cases:
    yield "has no cases(rng, xp) to be judged by", np.inf, 0.0
