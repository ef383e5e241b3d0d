"""pykv.verify, by hand-worked numbers, and by faults planted in every op and in its reference."""

import inspect
import json
import re
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pykv import cuda, ops, testing, verify
from pykv.arrays import BFLOAT16
from pykv.errors import ParameterError
from pykv.ops import dequant, linear, resident_program
from pykv.specs import KVSpec
from tests import planted
from tests.helpers import without_simt

F16, F32, F64 = np.float16, np.float32, np.float64


def judge(op, xp):
    """The rows of a family, made as they are asked for."""
    family = verify.families()[op]
    return (verify.Row(op, *case) for case in family(np.random.default_rng(0), xp))


# --- The whole ---


def test_a_family_is_found_by_its_stem_or_in_its_op(monkeypatch):
    """What a new kernel needs is an op with cases; without them it is named as wrong."""
    op = ModuleType("pykv.ops.tripled")
    op.__spec__ = ModuleSpec(op.__name__, None)
    monkeypatch.setitem(sys.modules, op.__name__, op)
    monkeypatch.setattr(cuda, "stems", lambda: ["norm", "tripled", "without_op"])
    *rows, tripled, without_op = verify.run()
    assert {row.op for row in rows} == {"norm"} and all(row.ok for row in rows)
    for row, name in ((tripled, "tripled"), (without_op, "without_op")):
        assert not row.ok
        assert row.as_text().split()[:2] == ["WRONG", name]
        assert row.as_text().endswith("  has no cases(rng, xp) to be judged by")
    op.cases = lambda rng, xp: iter([("of three", 0.0, 0.0)])
    assert verify.Row("tripled", "of three", 0.0, 0.0) in list(verify.run())


def test_an_op_that_raises_is_wrong_and_no_other(monkeypatch):
    def after_one_case(rng, xp):
        yield "first", 0.0, 0.0
        raise TypeError("no\nsuch option")

    sound = verify.families()["rope"]
    monkeypatch.setattr(verify, "families", lambda spec: {"norm": after_one_case, "rope": sound})
    first, raised, *others = verify.run()
    assert first.ok and not raised.ok
    assert (raised.op, raised.case) == ("norm", "raised TypeError: no such option")
    assert others and all(row.op == "rope" and row.ok for row in others)


def test_every_op_holds_and_every_public_function_is_called(monkeypatch):
    """By a family itself: what an op calls on its way does not count."""
    functions = {f"{found[0]}.{found[2]}": found[1:] for found in public_functions()}
    assert {"norm.rms_norm", "permute.nhd_to_hnd", "paged_check.check_slots"} <= functions.keys()
    called = set()

    def recorded(key, function):
        def call(*args, **options):
            frame = sys._getframe(1)  # a family stands in pykv.verify, or in its op as `cases`
            is_family = frame.f_globals["__name__"].startswith("pykv.verify.")
            if is_family or frame.f_code.co_name == "cases":
                called.add(key)
            return function(*args, **options)

        return call

    for key, (module, name, function) in functions.items():
        monkeypatch.setattr(module, name, recorded(key, function))
    rows = list(verify.run())
    assert [row.as_text() for row in rows if not row.ok] == []
    assert list(dict.fromkeys(row.op for row in rows)) == cuda.stems()
    assert len({(row.op, row.case) for row in rows}) == len(rows)
    assert sorted(functions.keys() - called) == []


def is_public(module, name, function):
    """Whether a name of an op's module is a function for users that computes something: it takes a
    stream, by name or among its options, or is listed here. What only public functions call is
    told the name of its `op` first."""
    if not inspect.isfunction(function) or function.__module__ != module.__name__:
        return False
    first, *others = inspect.signature(function).parameters or [""]
    if name.startswith(("_", "reference")) or first == "op":
        return False
    listed = ("contiguous_append.read_token", "rope.frequencies")
    is_listed = f"{module.__name__.rpartition('.')[2]}.{name}" in listed
    return is_listed or name.startswith("check_") or bool({"stream", "options"} & set(others))


# Rows that judge no array that a public function returns or writes: what it raises, hands over in
# an object, or writes by an address; NaN, which stays one; and what stays as it was.
OTHERWISE = ("paged_check ", "mailbox jobs", "phase_program ", "resident_program ")
OTHERWISE_CASES = ("by address", "no finite maximum", "0 steps")


def test_every_row_fails_where_all_results_are_wrong(monkeypatch):
    """On the host, too, where a comparison with the host's own results would hold."""
    for _, module, name, function in public_functions():
        monkeypatch.setattr(module, name, with_all_wrong(function))
    held = [f"{row.op} {row.case}" for row in verify.run() if row.ok]
    expected = [x for x in held if x.startswith(OTHERWISE) or any(y in x for y in OTHERWISE_CASES)]
    assert [x for x in held if x not in expected] == []


def with_all_wrong(function):
    """A function all of whose results, and what it writes, are altered."""

    def call(*args, **options):
        given = [x for x in arrays_in([args, options]) if x.flags.writeable]
        before = [x.copy() for x in given]
        found = function(*args, **options)
        if not sys._getframe(1).f_globals["__name__"].startswith(("pykv.verify.", "pykv.ops.")):
            return found
        changed = [x for x, was in zip(given, before, strict=True) if x.tobytes() != was.tobytes()]
        places = {x.ctypes.data: x for x in [*changed, *arrays_in([found])] if x.flags.writeable}
        for x in places.values():
            x[...] = (
                x ^ 1 if x.dtype.kind in "iub" else (x.astype(F64) * 1.5 + 0.25).astype(x.dtype)
            )
        return found + 1 if isinstance(found, int) else found

    return call


def arrays_in(values):
    """NumPy arrays among values, and in what holds some."""
    for value in values:
        if isinstance(value, np.ndarray):
            yield value
        elif isinstance(value, list | tuple):
            yield from arrays_in(value)
        elif isinstance(value, dict) or hasattr(value, "__dict__") and not callable(value):
            yield from arrays_in((value if isinstance(value, dict) else vars(value)).values())


def public_functions():
    """Stem, module, name and function of all of them."""
    for path in Path(ops.__path__[0]).glob("[a-z]*.py"):
        module = import_module(f"pykv.ops.{path.stem}")
        for name, function in list(vars(module).items()):
            if is_public(module, name, function):
                yield path.stem, module, name, function


def test_judges_share_no_code_with_ops():
    """Oracles import no op, families name no reference, and of kinds both take names alone."""
    for package in (testing, verify):
        for path in Path(package.__file__).parent.glob("[a-z]*.py"):
            text = path.read_text(encoding="utf-8")
            assert ".reference" not in text, path
            assert package is verify or "pykv.ops" not in text, path
            taken = re.findall(r"^from pykv(?: import .*|.kinds import) (.*)$", text, re.M)
            names = {name for line in taken for name in line.split(", ")}
            assert names <= {"KVSpec", "Kind", "SCALE_DTYPES"}, path


def test_the_seed_decides(monkeypatch):
    monkeypatch.setattr(cuda, "stems", lambda: ["norm"])
    first, again, other = ([row.error for row in verify.run(seed)] for seed in (1, 1, 2))
    assert first == again and first != other
    with pytest.raises(ParameterError, match="seed is -1, expected at least 0"):
        verify.run(-1)


@pytest.mark.parametrize("text", ["fp16", "int8", "int4:fp32:HND", "fp8:head", "fp32+e5m2:tensor"])
def test_the_ops_of_one_cache(text):
    spec = KVSpec.parse(text)
    rows = list(verify.run(spec=spec))
    assert [row.as_text() for row in rows if not row.ok] == []
    ops = "attention_scores kv_compact kv_scores kvtc_rows paged_append paged_convert "
    ops += "paged_decode paged_qkv prefill qkv_decode"
    assert list(dict.fromkeys(row.op for row in rows)) == ops.split()
    for row in rows:
        assert str(spec) in row.case


@without_simt
def test_every_block_type_is_judged(xp):
    assert [row.case for row in judge("dequant", xp)] == list(dequant.KINDS)


def test_without_gguf_there_is_no_judge_of_blocks(monkeypatch):
    from pykv.verify import dequant as family

    monkeypatch.setattr(family, "find_spec", lambda name: None)
    assert list(judge("dequant", np)) == []


@pytest.mark.gpu
def test_cublas_is_judged_where_it_is_found():
    import cupy

    has_rows = any("cublas" in row.case for row in judge("linear", cupy))
    assert has_rows == linear.has_cublas()


def test_launches_may_end_before_they_are_told_of_a_start(monkeypatch):
    """As often as a busy host takes."""
    starts, start = iter([None] * 20), resident_program.ResidentProgram.start
    late = lambda *args, **given: 0 if next(starts, "") is None else start(*args, **given)  # noqa: E731
    monkeypatch.setattr(resident_program.ResidentProgram, "start", late)
    assert all(row.ok for row in judge("resident_program", np)) and not list(starts)


# --- Errors and bounds, worked by hand ---


@pytest.mark.parametrize(
    "dtype, ulps", [(F16, 2.0**-10), (BFLOAT16, 2.0**-7), (F32, 2.0**-23), (F64, 2.0**-52)], ids=str
)
def test_error_and_bound(dtype, ulps):
    oracle = np.array([1.0, 0.5, -4.0])
    low = np.array([1.0, 0.5 + 2**-5, -4.0]).astype(dtype)  # errs by 2^-5
    got = np.array([1.25, 0.5, -4.0]).astype(dtype)  # errs by 2^-2
    # Twice 2^-5, and four units in the last place of numbers between 1 and 2, times 4.
    assert testing.error_and_bound(got, low, oracle) == (0.25, 2**-4 + 16 * ulps)


def test_an_exact_result_passes_and_nothing_is_no_error():
    oracle = np.array([3.0, -8.0])
    got = oracle.astype(F32)
    assert testing.error_and_bound(got, got, oracle) == (0.0, 4 * 2.0**-23 * 8)
    assert testing.error_and_bound(got[:0], got[:0], oracle[:0]) == (0.0, 0.0)


def test_the_bound_separates():
    """An error at the bound passes, one above it does not."""
    oracle = np.array([1.0])
    low = oracle.astype(F32)
    for got, ok in ((1 + 4 * 2.0**-23, True), (1 + 5 * 2.0**-23, False)):
        result = testing.error_and_bound(np.array([got], F32), low, oracle)
        assert verify.Row("op", "case", *result).ok is ok


def test_an_infinity_of_the_oracle_is_asked_for():
    """As the log-sum-exp of no keys is."""
    oracle = np.array([-np.inf, 2.0])
    low = oracle.astype(F32)
    assert testing.error_and_bound(low.copy(), low, oracle) == (0.0, 4 * 2.0**-23 * 2)
    for first, second in ((np.inf, 2), (-1e30, 2), (np.nan, 2), (-np.inf, 3), (-np.inf, -np.inf)):
        got = np.array([first, second], F32)
        assert not verify.Row("", "", *testing.error_and_bound(got, low, oracle)).ok


@pytest.mark.parametrize(
    "got",
    [
        np.array([1.0, np.nan], F32),
        np.array([np.inf, 2.0], F32),
        np.array([1.0, 2.0, 2.0], F32),
        np.array([[1.0, 2.0]], F32),
        np.array([], F32),
        np.array([1.0, 2.0], F16),  # right, but less exact than was asked for
        np.array([1.0, 2.0], F64),
    ],
    ids=repr,
)
def test_what_can_never_pass(got):
    oracle = np.array([1.0, 2.0])
    assert not verify.Row("", "", *testing.error_and_bound(got, oracle.astype(F32), oracle)).ok
    assert not verify.Row("", "", testing.wrong_values(got, oracle.astype(F32)), 0.0).ok


def test_wrong_values_count_bits():
    want = np.array([0.0, np.nan, 1.0, 2.0], F32)
    assert testing.wrong_values(want.copy(), want) == 0
    assert testing.wrong_values(np.array([-0.0, np.nan, 1.0, 2.0], F32), want) == 1
    assert testing.wrong_values(np.array([0.0, -np.nan, 1.0, 3.0], F32), want) == 2
    assert testing.wrong_values(np.repeat(want, 2)[::2], want) == 0  # strided
    halves = want.astype(BFLOAT16)
    assert testing.wrong_values(halves, halves) == 0
    assert testing.wrong_values(halves.astype(F16), halves) == np.inf


# --- Rows ---


@pytest.mark.parametrize(
    "error, bound, ok",
    [(0, 0, True), (1, 1, True), (2, 1, False), (np.nan, 1, False), (0, np.nan, False)],
)
def test_row(error, bound, ok):
    row = verify.Row("op", "a case", float(error), float(bound))
    assert row.ok is ok
    assert row.as_text().split()[0] == ("ok" if ok else "WRONG")
    assert "a case" in row.as_text()
    kept = json.loads(json.dumps(row.as_dict(), allow_nan=False))
    assert kept == {
        "op": "op",
        "case": "a case",
        "error": None if np.isnan(error) else error,
        "bound": None if np.isnan(bound) else bound,
        "ok": ok,
    }


def test_columns_stay_in_line():
    rows = [
        verify.Row(op, case, error, 0.0)
        for op, case, error in (("norm", "x", 0.0), (max(cuda.stems(), key=len), "y" * 99, np.inf))
    ]
    places = [re.search(" <= ", row.as_text()).start() for row in rows]
    assert places[0] == places[1]
    assert {row.as_text().index(row.case[0] * len(row.case)) for row in rows} == {
        len(row.as_text()) - len(row.case) for row in rows
    }


# --- Faults planted in public functions: each must turn at least one row of its op WRONG ---


def op_tests(stem):
    """The tests of an op, which may have faults of its own: nothing here is edited for a new op."""
    name = f"tests.ops.test_{stem}"
    return import_module(name) if find_spec(name) else None


TESTS = {stem: op_tests(stem) for stem in cuda.stems()}


FAULTS = dict(planted.FAULTS)


for stem, tests in TESTS.items():
    FAULTS |= {name: (*fault, stem) for name, fault in getattr(tests, "FAULTS", {}).items()}


def family_of(fault):
    """The name of the op's module, unless the fault names another family."""
    module, _, _, *family = fault
    return family[0] if family else module.__name__.rpartition(".")[2]


def fails(family, xp):
    wrong = next((row for row in judge(family, xp) if not row.ok), None)
    assert wrong is not None, f"verify sees nothing wrong with {family}"
    assert wrong.as_text().startswith("WRONG")


@without_simt
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_shows(monkeypatch, xp, name):
    module, function, plant, *_ = FAULTS[name]
    monkeypatch.setattr(module, function, plant(getattr(module, function)))
    fails(family_of(FAULTS[name]), xp)


@pytest.mark.simt
@pytest.mark.parametrize(
    "name",
    [
        *("norm: epsilon doubled", "rope: one position late", "swiglu: 1e-4 off"),
        *("merge: a state is left out", "table: lengths one less", "append: scales halved"),
        *("convert: pages in reverse", "qkv: always half", "contiguous: no values"),
        *("permute: heads in reverse", "copy: a byte too few", "write: another seed"),
        *("append_ragged: counted before", "norm: heads together", "gather: zeros"),
        *("copy by address: a byte too few", "merge: always the natural base"),
    ],
)
@pytest.mark.parametrize("device", ["simt"], indirect=True)
def test_a_planted_fault_shows_where_kernels_run(monkeypatch, device, name):
    module, function, plant, *_ = FAULTS[name]
    monkeypatch.setattr(module, function, plant(getattr(module, function)))
    fails(family_of(FAULTS[name]), device)


# --- Faults planted in what runs on a CPU: the judge must not share them ---


REFERENCE_FAULTS = list(planted.REFERENCE_FAULTS)

for stem, tests in TESTS.items():
    REFERENCE_FAULTS += [([stem], *fault) for fault in getattr(tests, "REFERENCE_FAULTS", [])]


@pytest.mark.parametrize(
    "families, module, function, plant",
    REFERENCE_FAULTS,
    ids=[f"{module.__name__}.{function}" for _, module, function, _ in REFERENCE_FAULTS],
)
def test_a_fault_of_a_reference_shows(monkeypatch, families, module, function, plant):
    monkeypatch.setattr(module, function, plant(getattr(module, function)))
    for family in families:
        fails(family, np)


def test_every_family_has_planted_faults():
    assert set(map(family_of, FAULTS.values())) == set(cuda.stems())
    assert {name for names, *_ in REFERENCE_FAULTS for name in names} == set(cuda.stems())
