"""paged_check: the first offender is named, on every device the same."""

import numpy as np
import pytest

from pykv.errors import DtypeError, ParameterError, ShapeError
from pykv.ops import paged_check


def table(xp, *lists, dtype=np.int32):
    return [None if x is None else xp.asarray(np.array(x, dtype)) for x in lists]


def fails(text, check, *arguments, **options):
    with pytest.raises(ParameterError) as caught:
        check(*arguments, **options)
    assert str(caught.value) == text


# --- Slots ---


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(
    "slots, text",
    [
        ([], None),
        ([5, 0, -1, 63, -1, -7], None),
        ([5, 64], "slots[1] is 64, expected below 64"),
        ([3, 99, 3, 70], "slots[1] is 99, expected below 64"),  # range before repetition
        ([3, 0, 3], "slots[2] is 3, expected no slot twice"),
        ([9, 3, 7, 3, 9, 9, 3], "slots[3] is 3, expected no slot twice"),
        ([0, 0], "slots[1] is 0, expected no slot twice"),
        (list(range(64)), None),
        ([*range(64), 63], "slots[64] is 63, expected no slot twice"),
    ],
    ids=str,
)
def test_slots(xp, slots, text, dtype):
    (slots,) = table(xp, slots, dtype=dtype)
    if text is None:
        paged_check.check_slots(slots, 64)
    else:
        fails(
            f"paged_append.append: {text}",
            paged_check.check_slots,
            slots,
            64,
            op="paged_append.append",
        )


def test_many_slots(xp, rng):
    """Hashes collide; the first repetition is found among several."""
    n = 3000
    slots = rng.permutation(10 * n)[:n].astype(np.int32)
    slots[rng.permutation(n)[:100]] = -1
    paged_check.check_slots(xp.asarray(slots), 10 * n)
    pairs = np.sort(rng.permutation(np.flatnonzero(slots >= 0))[:40].reshape(2, 20), 0)
    slots[pairs[1]] = slots[pairs[0]]
    seen, first = set(), None
    for i, slot in enumerate(slots.tolist()):
        if slot in seen:
            first = i
            break
        seen |= {slot} - {-1}
    fails(
        f"paged_check.check_slots: slots[{first}] is {slots[first]}, expected no slot twice",
        *(paged_check.check_slots, xp.asarray(slots), 10 * n),
    )


# --- Lists of pages ---


def test_pages(xp):
    pages, wrong = table(xp, [0, 3, -1, -(2**31)], [0, 3, 4, -1, 9])
    paged_check.check_pages(pages, 4)
    op = "paged_check.check_pages"
    fails(f"{op}: pages[2] is 4, expected below 4", paged_check.check_pages, wrong, 4)
    fails(
        f"{op}: ids[2] is -1, expected 0 to 3",
        *(paged_check.check_pages, pages, 4),
        may_skip=False,
        name="ids",
    )


# --- Starts ---


@pytest.mark.parametrize(
    "starts, text",
    [
        ([0], None),
        ([0, 0, 3, 3, 10], None),
        ([1, 2], "starts[0] is 1, expected 0"),
        ([-1, 2], "starts[0] is -1, expected 0"),
        ([0, 4, 2, 1], "starts[2] is 2, expected at least 4 like starts[1]"),
        ([0, 4, 11], "starts[2] is 11, expected at most 10"),
        ([0, 40, 3], "starts[2] is 3, expected at least 40 like starts[1]"),
        ([3], "starts[0] is 3, expected 0"),
    ],
    ids=str,
)
def test_starts(xp, starts, text):
    (starts,) = table(xp, starts)
    if text is None:
        paged_check.check_starts(starts, 10)
    else:
        fails(f"paged_check.check_starts: {text}", paged_check.check_starts, starts, 10)


# --- Tables as lists ---

GOOD = dict(indices=[4, 0, 2, 9, 1, 2147480000], indptr=[0, 2, 2, 5], last_page_len=[16, 77, 1])


@pytest.mark.parametrize(
    "change, options, text",
    [
        ({}, {}, None),
        ({"last_page_len": None}, {}, None),
        ({"last_page_len": [0, 0, 16]}, {}, None),
        # Appends: request 1 has no page and is skipped, whatever its count.
        ({"last_page_len": [15, 77, 1]}, {"counts": "before"}, None),
        ({"last_page_len": [16, 0, 1]}, {"counts": "after"}, None),
        ({"last_page_len": [16, 77, 1]}, {"counts": "before"},
         "last_page_len[0] is 16, expected -16 to 15"),
        ({"last_page_len": [-16, -1, -32]}, {"counts": "before"}, None),
        ({"last_page_len": [0, 1, -33]}, {"counts": "before"},
         "last_page_len[2] is -33, expected -32 to 15"),
        ({"last_page_len": [-16, 1, -1]}, {"counts": "after"},
         "last_page_len[0] is -16, expected -15 to 16"),
        ({"last_page_len": [-15, 77, 17]}, {"counts": "after"},
         "last_page_len[2] is 17, expected -31 to 16"),
        ({"indptr": [0, 2, 3, 5], "last_page_len": [1, -1, 0]}, {"counts": "before"},
         "last_page_len[1] is -1, expected 0 to 15"),
        ({"indptr": [0, 2, 3, 5], "last_page_len": [3, 0, 1]}, {"counts": "after"},
         "last_page_len[1] is 0, expected 1 to 16"),
        ({"indices": [4, -1, -(2**31), 9, 1, 99], "last_page_len": [3, 0, 1]},
         {"counts": "before"}, None),
        ({"indices": [4, -1, 10, 9, 1, 99], "last_page_len": [3, 0, 1]},
         {"counts": "before"}, "indices[2] is 10, expected below 10"),
        # A listed page is looked at, whether these tokens need it or later ones do.
        ({"indices": [4, 99, 2, 9, 1, 3], "last_page_len": [-9, 77, 9]},
         {"counts": "before", "starts": [0, 7, 7, 7]}, "indices[1] is 99, expected below 10"),
        # Appends of several tokens: 7, 5 and 0 of them; those without pages or tokens are skipped.
        ({"last_page_len": [9, 77, 99]}, {"counts": "before", "starts": [0, 7, 12, 12]}, None),
        ({"last_page_len": [10, 77, 99]}, {"counts": "before", "starts": [0, 7, 12, 12]},
         "last_page_len[0] is 10, expected -16 to 9"),
        ({"last_page_len": [-17, 77, 99]}, {"counts": "before", "starts": [0, 7, 12, 12]},
         "last_page_len[0] is -17, expected -16 to 9"),
        ({"last_page_len": [16, 77, -32]}, {"counts": "after", "starts": [0, 7, 7, 7]}, None),
        ({"last_page_len": [-9, 77, 8]}, {"counts": "after", "starts": [0, 7, 7, 47]}, None),
        ({"last_page_len": [-10, 77, 8]}, {"counts": "after", "starts": [0, 7, 7, 47]},
         "last_page_len[0] is -10, expected -9 to 16"),
        ({"last_page_len": [16, 77, 7]}, {"counts": "after", "starts": [0, 7, 7, 47]},
         "last_page_len[2] is 7, expected 8 to 16"),
        ({"last_page_len": [17, 77, 8]}, {"counts": "after", "starts": [0, 7, 7, 47]},
         "last_page_len[0] is 17, expected -9 to 16"),
        ({"last_page_len": [16, 77, 16]}, {"counts": "after", "starts": [0, 33, 33, 34]},
         "indptr[1] is 2, expected at least 3, because request 0 needs pages for 33 tokens"),
        ({"last_page_len": [16, 77, 17]}, {}, "last_page_len[2] is 17, expected 0 to 16"),
        ({"last_page_len": [-1, 77, 17]}, {}, "last_page_len[0] is -1, expected 0 to 16"),
        ({"indices": [4, 10, 2, -1, 1, 3]}, {}, "indices[1] is 10, expected 0 to 9"),
        ({"indices": [4, 0, 2, 9, -1, 3]}, {}, "indices[4] is -1, expected 0 to 9"),
        ({"indptr": [0, 3, 2, 5]}, {}, "indptr[2] is 2, expected at least 3 like indptr[1]"),
        ({"indptr": [0, 2, 2, 7]}, {}, "indptr[3] is 7, expected at most 6"),
        ({"indptr": [1, 2, 2, 5]}, {}, "indptr[0] is 1, expected 0"),
        ({"indptr": [-(2**31), 2, 2, 5]}, {}, "indptr[0] is -2147483648, expected 0"),
        ({"indices": [99] * 6, "indptr": [0, -5, 2, 5]}, {},
         "indptr[1] is -5, expected at least 0 like indptr[0]"),
        ({"indices": [], "indptr": [0], "last_page_len": []}, {}, None),
        ({"indices": [99], "indptr": [1], "last_page_len": []}, {}, "indptr[0] is 1, expected 0"),
        ({"indices": [4, 99, 2, 9, 77, 1]}, {"starts": [0, 16, 16, 40]}, None),
        ({"indices": [4, 99, 2, 9, 77, 1]}, {"starts": [0, 17, 17, 40]},
         "indices[1] is 99, expected 0 to 9"),
        ({}, {"starts": [0, 33, 33, 40]}, "indptr[1] is 2, expected at least 3, because request 0 "
         "needs pages for 33 tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_table(xp, change, options, text):
    arrays = table(xp, *{**GOOD, **change}.values())
    options = dict(options, appends="counts" in options)
    if "starts" in options:
        options |= dict(starts=table(xp, options["starts"])[0])
    if text is None:
        paged_check.check_table(*arrays, 10, 16, **options)
    else:
        text = f"paged_check.check_table: {text}"
        fails(text, paged_check.check_table, *arrays, 10, 16, **options)


def test_a_long_table(xp):
    """Several thread blocks."""
    indices = np.arange(3000, dtype=np.int32)
    indptr = np.arange(0, 3001, 3).astype(np.int32)
    paged_check.check_table(*table(xp, indices, indptr, None), 3000, 16)
    indices[[2000, 1999, 2900]] = -1
    with pytest.raises(ParameterError, match=r"indices\[1999\] is -1"):
        paged_check.check_table(*table(xp, indices, indptr, None), 3000, 16)


# --- Tables with rows ---


@pytest.mark.parametrize(
    "page_table, lengths, text",
    [
        ([[1, 2, 99], [0, -1, -1], [-7, -7, -7]], [32, 1, 0], None),
        ([[1, 2, 99], [0, -1, -1]], [33, 1], "page_table[0, 2] is 99, expected 0 to 9"),
        ([[1, 2, 3], [0, -1, -1]], [48, 17], "page_table[1, 1] is -1, expected 0 to 9"),
        ([[1, 99, 3], [0, 1, 2]], [48, 49], "lengths[1] is 49, expected at most 48"),
        ([[1, 2, 3], [-1, -1, -1]], [48, -(2**31)], None),
        (np.zeros((2, 0)), [0, -1], None),
        (np.zeros((2, 0)), [0, 3], "lengths[1] is 3, expected at most 0"),
        (np.zeros((0, 4)), [], None),
    ],
    ids=str,
)
def test_page_table(xp, page_table, lengths, text):
    arrays = table(xp, page_table, lengths)
    if text is None:
        paged_check.check_page_table(*arrays, 10, 16)
    else:
        text = f"paged_check.check_page_table: {text}"
        fails(text, paged_check.check_page_table, *arrays, 10, 16)


def test_page_table_rows_may_be_strided(xp):
    wide, lengths = table(xp, [[1, 2, 99, 99], [3, 10, 99, 99]], [17, 16])
    paged_check.check_page_table(wide[:, :2], lengths, 10, 16)
    (lengths,) = table(xp, [17, 17])
    with pytest.raises(ParameterError, match=r"page_table\[1, 1\] is 10"):
        paged_check.check_page_table(wide[:, :2], lengths, 10, 16)


# --- Positions ---


@pytest.mark.parametrize(
    "batch_indices, positions, text",
    [
        ([0, 0, 2, -1, 2], [0, 31, 47, 9999, 16], None),
        ([0, 3], [0, 0], "batch_indices[1] is 3, expected below 3"),
        ([0, 1, 1, 1], [0, 0, -5, 99], None),  # request 1 has no pages
        ([0, 0], [31, 32], "positions[1] is 32, expected 0 to 31, the pages of request 0"),
        ([2], [-1], "positions[0] is -1, expected 0 to 47, the pages of request 2"),
        ([], [], None),
    ],
    ids=str,
)
def test_positions(xp, batch_indices, positions, text):
    arrays = table(xp, batch_indices, positions, [0, 2, 2, 5])
    if text is None:
        paged_check.check_positions(*arrays, 16)
    else:
        text = f"paged_check.check_positions: {text}"
        fails(text, paged_check.check_positions, *arrays, 16)


# --- When ---


def test_the_environment_turns_it_on(monkeypatch):
    for always, wanted, want in (
        *((False, None, False), (False, True, True), (False, False, False)),
        *((True, None, True), (True, True, True), (True, False, False)),
    ):
        monkeypatch.setattr(paged_check, "ALWAYS", always)
        assert paged_check.enabled("op", wanted) is want


@pytest.mark.parametrize(
    "wrong, seen, starts, found",
    [
        ((0, 0), None, None, True),
        ((0, 0), 34, None, False),  # the last 34 of 66 tokens begin at token 32
        ((0, 1), 34, None, False),
        ((0, 2), 34, None, True),
        ((0, 1), 35, None, True),
        ((0, 1), 1, [0, 34, 34], False),
        ((0, 1), 1, [0, 35, 35], True),
        ((0, 4), 2, None, True),
        ((0, 5), None, None, False),
        ((1, 0), None, [0, 1, 1], False),  # no sequence has a query
        ((1, 0), None, [0, 1, 2], True),
    ],
)
def test_pages_that_nobody_reads_may_be_anything(xp, wrong, seen, starts, found):
    pages = np.arange(12, dtype=np.int32).reshape(2, 6)
    pages[wrong] = 99
    arrays = table(xp, pages.tolist(), [66, 3])
    options = dict(seen=seen, starts=None if starts is None else table(xp, starts)[0])
    if not found:
        paged_check.check_page_table(*arrays, 12, 16, **options)
        return
    at = f"page_table[{wrong[0]}, {wrong[1]}]"
    text = f"paged_check.check_page_table: {at} is 99, expected 0 to 11"
    fails(text, paged_check.check_page_table, *arrays, 12, 16, **options)


def test_lengths_of_sequences_without_queries_may_be_anything(xp):
    arrays = table(xp, [[1, 99], [2, 99]], [999, 16])
    *wide, starts, wrong = *arrays, *table(xp, [0, 0, 3], [0, 1, 4])
    paged_check.check_page_table(*wide, 10, 16, starts=starts)
    with pytest.raises(ParameterError, match=r"lengths\[0\] is 999, expected at most 32"):
        paged_check.check_page_table(*wide, 10, 16, starts=wrong)
    paged_check.check_page_table(
        wide[0][:, :0], wide[1] - 16, 10, 16, starts=table(xp, [0, 0, 3])[0]
    )


@pytest.mark.gpu
def test_nothing_is_checked_while_a_graph_is_captured():
    import cupy

    slots = cupy.full(1, 7, np.int32)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        paged_check.check_slots(slots, 7)
        stream.end_capture()
        with pytest.raises(ParameterError, match=r"slots\[0\] is 7, expected below 7"):
            paged_check.check_slots(slots, 7)


def test_errors_of_the_arrays(xp):
    slots, indices = table(xp, [0], [0])
    with pytest.raises(DtypeError, match="slots has dtype float32, expected int32 or int64"):
        paged_check.check_slots(slots.astype(np.float32), 4)
    with pytest.raises(ShapeError, match=r"lengths has B=1, expected B=2"):
        paged_check.check_page_table(*table(xp, [[0], [0]], [0]), 4, 16)
    with pytest.raises(ShapeError, match=r"indptr has size 0, expected B\+1=1"):
        paged_check.check_table(*table(xp, [0], [], []), 4, 16)
    with pytest.raises(ShapeError, match="last_page_len has B=2, expected B=1"):
        paged_check.check_table(*table(xp, [0], [0, 1], [1, 1]), 4, 16)
