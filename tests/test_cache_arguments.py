"""Caches, their pages and who holds them: a wrong argument ends in an error of pykv's own, which
leaves everything as it was."""

from contextlib import suppress
from types import ModuleType

import numpy as np
import pytest

import pykv
from pykv import (
    PagedKVCache,
    SequenceCache,
    blocks,
    eviction,
    kinds,
    page_files,
    pages,
    transfer,
)
from pykv.errors import CapacityError, DtypeError, ParameterError, PykvError, UnsupportedError
from pykv.ops import activation, compaction, contiguous_append

NO_WHOLE = ("3", None, 1.0, np.float32(1), True, [1], 1j, object(), np.nan, np.ones(2))
WILD = (*NO_WHOLE, -1, 2**31, 2**62, 2**64, -(2**63), np.int64(-7), "", [], b"x")
NO_PAGES = ([1.5], [True, False], ["0"], [[1, 2]], [[1], [1, 2]], [None], [-2], [2**31], [2**70])
NO_PAGES += (3, None, "12", {1: 2}, [np.nan], np.zeros((1, 1), np.int64), np.ones(2))


def contents(cache):
    held = (cache.k, cache.v, cache.k_scales, cache.v_scales)
    return [None if x is None else x.tobytes() for x in held]


def refuses(call, *state, error=PykvError):
    """That a call raises, and leaves what the functions of `state` return."""
    before = [look() for look in state]
    with pytest.raises(error) as raised:
        call()
    assert [look() for look in state] == before
    assert "expected" in str(raised.value) or isinstance(raised.value, CapacityError)


# --- Sizes ---


@pytest.mark.parametrize("name", ["layers", "pages", "heads", "head_dim", "page_size"])
def test_sizes_of_a_cache(name):
    sizes = dict(layers=1, pages=2, heads=1, head_dim=8, page_size=4)
    for x in NO_WHOLE:
        refuses(lambda x=x: PagedKVCache(**{**sizes, name: x}), error=DtypeError)
    for x in (0, -1, 2**62, 2**70):
        refuses(lambda x=x: PagedKVCache(**{**sizes, name: x}))
    assert PagedKVCache(**{name: np.int64(size) for name, size in sizes.items()}).nbytes == 256


def test_options_of_a_cache():
    for x in ("1.5", True, [1], 1j, object()):
        refuses(lambda x=x: PagedKVCache(1, 1, 1, 8, margin=x), error=DtypeError)
    for x in (3, "numpy", None, kinds, ModuleType("jax.numpy"), ModuleType("cupy")):
        refuses(lambda x=x: PagedKVCache(1, 1, 1, 8, xp=x), error=ParameterError)
    refuses(lambda: PagedKVCache(2, 2**62, 2, 64), error=CapacityError)
    cache = PagedKVCache(1, 2, 1, 8)
    for x in (*NO_WHOLE, 1, -1, 2**50):
        refuses(lambda x=x: cache.grow(x), lambda: cache.k.shape, lambda: cache.manager.num_pages)


@pytest.mark.parametrize("call", ["append", "append_qkv", "decode", "prefill"])
@pytest.mark.parametrize("spec", ["fp16", "int8:head"])
def test_layers(call, spec):
    cache = PagedKVCache(2, 2, 1, 8, page_size=4, spec=spec, margin=2.0)
    rows, table = np.ones((1, 1, 8), np.float32), np.zeros((1, 1), np.int32)
    ints, starts = np.zeros(1, np.int32), np.array([0, 1], np.int32)
    given = dict(
        append=(rows, rows, ints),
        append_qkv=(np.ones((1, 24), np.float32), ints),
        decode=(rows, table, ints),
        prefill=(rows, table, ints, starts),
    )[call]
    method = getattr(cache, call)
    for x in NO_WHOLE:
        refuses(lambda x=x: method(x, *given), lambda: contents(cache), error=DtypeError)
    for x in (-1, 2, 2**40):
        refuses(lambda x=x: method(x, *given), lambda: contents(cache), error=ParameterError)
    for i in range(len(given)):
        for x in (None, 3, "x", [1, 2], object(), given[i][..., None]):
            wrong = (*given[:i], x, *given[i + 1 :])
            refuses(lambda wrong=wrong: method(1, *wrong), lambda: contents(cache))
    method(np.int64(1), *given)


# --- Who holds which page ---


def manager_state(manager):
    counts = manager.num_pages, manager.num_free, manager.num_cached
    return counts, list(manager._states.counts), list(manager._states.keys)


def test_arguments_of_a_manager():
    manager = blocks.BlockManager(6, 4)
    held = manager.allocate(6)
    manager.publish(held, range(4))

    def state():
        return manager_state(manager), list(held)

    for x in WILD:
        if type(x) is not int or x < 0:
            refuses(lambda x=x: blocks.BlockManager(x, 4))
            refuses(lambda x=x: blocks.BlockManager(6, x))
            for call in (manager.allocate, manager.grow, manager.pages_for, manager.require):
                refuses(lambda x=x, call=call: call(x), state)
        refuses(lambda x=x: manager.extend(held, x, 6), state)
        refuses(lambda x=x: manager.extend(held, 6, x), state)
    for call in (
        manager.fork,
        manager.free,
        lambda x: manager.publish(x, [1]),
        lambda x: manager.extend(x, 0, 1),
    ):
        for x in (*NO_PAGES, (0, 1), [0.0], [np.True_], [0, 0], [5], [6], list):
            refuses(lambda x=x, call=call: call(x), state)
    for call in (lambda x, **salt: manager.publish(held, x, **salt), manager.reuse):
        wrong = [[x] * 4 for x in ("a", 1.5, None, 2**63)]
        for x in (None, 3, {i: i for i in range(4)}, {1, 2, 3, 4}, iter([1]), *wrong):
            refuses(lambda x=x, call=call: call(x), state)
        for x in (None, 3, 1.5, ["a"]):
            refuses(lambda x=x, call=call: call([1] * 4, salt=x), state, error=DtypeError)


def test_a_stale_list_takes_nothing_from_others():
    """Pages of a copy may have gone to another sequence."""
    manager = blocks.BlockManager(4, 4)
    first = manager.allocate(8)
    stale = list(first)
    manager.free(first)
    second = manager.allocate(8)
    assert sorted(second) == sorted(stale)
    manager.publish(second, range(8))
    for call in (
        lambda: manager.extend(stale, 0, 4),
        lambda: manager.extend(stale, 7, 8),
        lambda: manager.free(stale),
        lambda: manager.publish(stale, range(8)),
    ):
        refuses(call, lambda: manager_state(manager), error=ParameterError)
    assert manager.reuse(range(8)) == second
    own = []  # a new sequence may be the caller's list
    assert manager.extend(own, 0, 3) is None and own
    manager.free(manager.fork(second[:1]))
    manager.free(own)


def test_salts_keep_equal_tokens_apart():
    manager = blocks.BlockManager(8, 2)
    sequences = {}
    for salt in ("", "lora", b"\x00lora", "tenant"):
        sequences[salt] = manager.allocate(4)
        manager.publish(sequences[salt], [1, 2, 3, 4], salt=salt)
    for salt, held in sequences.items():
        assert manager.reuse([1, 2, 3, 4], salt=salt) == held
    assert manager.reuse([1, 2, 3, 4]) == sequences[""]
    assert manager.reuse([1, 2], salt="lora ") == []
    assert manager.reuse([1, 2], salt=b"lora") == sequences["lora"][:1]
    for tokens, salt in (([1, 2, 3, 4], "tenant"), ([1, 3, 3, 4], "lora")):
        with pytest.raises(ParameterError, match="published with other tokens or another salt"):
            manager.publish(sequences["lora"], tokens, salt=salt)


# --- Tables ---


def test_arguments_of_slots():
    assert blocks.slots([3, 2], np.int32(1), np.int64(6), 4).tolist() == [13, 14, 15, 8, 9]
    assert blocks.slots([2**27 - 1], 15, 16, 16).tolist() == [2**31 - 1]
    assert blocks.slots([-1, 5], 4, 5, 4).tolist() == [20]  # what is not written may be a hole
    for x in NO_WHOLE:
        refuses(lambda x=x: blocks.slots([3, 2], x, 6, 4), error=DtypeError)
        refuses(lambda x=x: blocks.slots([3, 2], 1, x, 4), error=DtypeError)
        refuses(lambda x=x: blocks.slots([3, 2], 1, 6, x), error=DtypeError)
    for start, stop, P in ((-2, 2, 4), (3, 2, 4), (0, 1, 0), (0, 1, -4), (0, 2**62, 4), (0, 9, 4)):
        refuses(lambda start=start, stop=stop, P=P: blocks.slots([3, 2], start, stop, P))
    for x in (*NO_PAGES, [-1], [2**27]):
        refuses(lambda x=x: blocks.slots(x, 0, 2, 16), error=ParameterError)


def test_arguments_of_page_table():
    for x in NO_WHOLE:
        refuses(lambda x=x: blocks.page_table([[1]], x), error=DtypeError)
    for x in NO_PAGES:
        refuses(lambda x=x: blocks.page_table([[0], x], 4), error=ParameterError)
    for sequences, width in (([[1, 2, 3]], 2), ([[1]], -1)):
        refuses(lambda s=sequences, w=width: blocks.page_table(s, w), error=ParameterError)
    for x in (None, 3, object(), np.array(3)):
        refuses(lambda x=x: blocks.page_table(x, 4), error=DtypeError)
    assert blocks.page_table([[2, -1, 4], np.zeros(0)], 3).tolist() == [[2, -1, 4], [-1, -1, -1]]


# --- Pages ---


@pytest.mark.parametrize(
    "call", ["zero", "copy", "copy to", "convert", "out", "in", "host", "save"]
)
def test_arguments_of_pages(call, tmp_path):
    cache, other = (PagedKVCache(1, 4, 1, 8, page_size=4, spec="int8") for _ in range(2))
    cache.k[...] = 3
    store = pages.host_pages(cache, 1)
    calls = dict(
        zero=lambda cache, ids: pages.zero_pages(cache, ids),
        copy=lambda cache, ids: pages.copy_pages(cache, other, ids, [0]),
        convert=lambda cache, ids: pages.convert_pages(cache, other, ids, [0]),
        out=lambda cache, ids: pages.swap_out(cache, ids),
        save=lambda cache, ids: page_files.save(tmp_path / "x", cache, ids),
        host=lambda cache, ids: pages.host_pages(cache, 1),
    )
    calls["copy to"] = lambda cache, ids: pages.copy_pages(other, cache, [0], ids)
    calls["in"] = lambda cache, ids: pages.swap_in(cache, ids, store)

    def state():
        return contents(cache), contents(other), list(tmp_path.iterdir())

    for x in (*NO_PAGES, [-1], [4], [2**40]):
        if call != "host" and not (x is None and call in ("convert", "save")):
            refuses(lambda x=x: calls[call](cache, x), state, error=ParameterError)
    lists = pages.Pages([1], [2], None, None, "int8")
    floats = pages.Pages(*(np.zeros((1, 4, 4, 1, 8)) for _ in range(2)), None, None, "fp16")
    for x in (None, 3, "cache", object(), lists, floats, np.ones(3)):
        refuses(lambda x=x: calls[call](x, [0]), state)
    for x in (*NO_WHOLE, -1):
        refuses(lambda x=x: pages.host_pages(cache, x))


def test_pages_are_listed_on_the_host(device, tmp_path):
    """Where CuPy raises a TypeError of its own."""
    cache, other = (PagedKVCache(1, 4, 1, 8, page_size=4, xp=device) for _ in range(2))
    ids = device.asarray(np.array([0, 1], np.int32))
    own = SequenceCache(4, 4, 1, 8, xp=device)
    for call in (
        lambda x: blocks.slots(x, 0, 2, 4),
        lambda x: blocks.page_table([x], 4),
        lambda x: cache.clamped(x),
        lambda x: pages.zero_pages(cache, x),
        lambda x: pages.copy_pages(cache, other, x, [2, 3]),
        lambda x: pages.convert_pages(cache, other, x, [2, 3]),
        lambda x: pages.swap_out(cache, x),
        lambda x: page_files.save(tmp_path / "x", cache, x),
        lambda x: own.assign(x),
    ):
        for x in (ids, [ids[0], ids[1]]):
            with pytest.raises(ParameterError, match="expected a sequence of page ids on the host"):
                call(x)
    for lengths in (ids[:1], [ids[0]]):
        held = cache.manager.allocate(2)
        with suppress(PykvError):
            eviction.evict(cache, [held], lengths, "streaming:1")
    for size in (ids[:1], [ids[0]]):
        with pytest.raises(DtypeError, match="memcpy_batch: size is a .*, expected integers"):
            transfer.memcpy_batch([64], [128], size, device="cpu")
    for scale in (device.ones(1), [device.ones(1)]):
        with pytest.raises(DtypeError, match="kinds.quantize: scale is .*, expected an array"):
            kinds.quantize(np.ones((1, 8), np.float32), kinds.KINDS["int8"], scale=scale)


@pytest.mark.parametrize(
    "name", ["extend", "grow", "clamped", "assign", "advance", "read_token", "kept", "evict"]
)
def test_what_the_host_does_is_neither_prepared_nor_captured(device, name):
    """A replay would leave it out, or CUDA refuse to wait."""
    cache, own = PagedKVCache(1, 4, 1, 8, page_size=4, xp=device), SequenceCache(4, 4, 1, 8)
    if name in ("assign", "advance"):
        own = SequenceCache(4, 4, 1, 8, xp=device)
        own.assign([2])
    held = cache.manager.allocate(5)
    pools = (device.zeros((1, 4, 1, 8), np.float16),) * 2
    compressed = compaction.compress(device.ones(8, np.float32), 0.5)
    call, arguments = dict(
        extend=(cache.extend, (held, 5, 6)),
        grow=(cache.grow, (4,)),
        clamped=(cache.clamped, ([0],)),
        assign=(own.assign, ([1],)),
        advance=(own.advance, (1,)),
        read_token=(contiguous_append.read_token, (*pools, 0, 1)),
        kept=(compressed.kept, ()),
        evict=(eviction.evict, (cache, [held], [5], "streaming:2")),
    )[name]
    x = device.ones((2, 8), np.float32)
    activation.add(x, x)
    graph = pykv.graph(lambda: (activation.add(x, x), captured and call(*arguments)))
    captured = False
    graph()
    captured = True
    state = manager_state(cache.manager), list(held), own.blocks, own.length
    with pytest.raises(UnsupportedError, match=rf"\b{name}: cannot be captured into a CUDA graph"):
        graph()
    if name != "kept":
        with pytest.raises(UnsupportedError, match=rf"\b{name}: cannot be prepared"):
            pykv.prepare(call, *arguments)
    assert (manager_state(cache.manager), list(held), own.blocks, own.length) == state


# --- The cache of one sequence ---


def test_arguments_of_a_sequence_cache():
    cache = SequenceCache(4, 4, 1, 8, spec="fp32")
    cache.assign([2, 1])
    rows, q = np.ones((3, 1, 8), np.float32), np.ones((2, 8), np.float32)
    cache.append(rows, rows)
    cache.advance(3)

    def state():
        table = cache.block_table.tolist(), cache.context_lens.tolist()
        return cache.blocks, cache.length, table, contents(cache)

    for x in (*NO_PAGES, [1, 1], [4], [-1], [0, 1, 2, 3, 0], "0"):
        refuses(lambda x=x: cache.assign(x), state)
    for x in NO_WHOLE:
        refuses(lambda x=x: cache.advance(x), state, error=DtypeError)
        if x is not None:
            refuses(lambda x=x: cache.append(rows, rows, length_before=x), state, error=DtypeError)
            refuses(lambda x=x: cache.decode(q, length=x), state, error=DtypeError)
    for x in (-4, 6, 2**62):
        refuses(lambda x=x: cache.advance(x), state)
    for x in (-1, 6, 2**62):
        refuses(lambda x=x: cache.append(rows, rows, length_before=x), state)
    for x in (-1, 9, 2**62):
        refuses(lambda x=x: cache.decode(q, length=x), state)
    for x in (None, 3, "x", [1, 2], q[..., None], q[0], q.astype(np.int32), np.ones((0, 0))):
        refuses(lambda x=x: cache.append(x, rows), state)
        refuses(lambda x=x: cache.append(rows, x), state)
        refuses(lambda x=x: cache.decode(x), state)
        if x is not None:
            refuses(lambda x=x: cache.decode(q, out=x), state)
            refuses(lambda x=x: cache.decode(q, lse=x), state)
    for name in ("max_blocks", "block_size", "heads", "head_dim"):
        sizes = dict(max_blocks=4, block_size=4, heads=1, head_dim=8)
        for x in (*NO_WHOLE, 0, -1, 2**62):
            refuses(lambda x=x, name=name, sizes=sizes: SequenceCache(**{**sizes, name: x}))
    cache.advance(-1)
    assert cache.length == 2 and cache.decode(q).shape == (2, 8)
