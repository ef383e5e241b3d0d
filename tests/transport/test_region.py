"""Regions: what another process reads is the page, or an error, whatever its memory holds."""

import zlib

import numpy as np
import pytest

from pykv.errors import CapacityError, DtypeError, ParameterError, ShapeError, TransportError
from pykv.transport import messages, region
from pykv.transport.messages import Message
from pykv.transport.region import PeerRegion, Region, size_of

FACTS = dict(model="a", spec="fp16")
N = 200  # bytes of a page
FIRST_CONSTANT = 12466887728733407977  # the first constant of the checksums
COUNT = 1021  # of them
KEYS = [bytes([i + 1]) * 16 for i in range(3)]


def row(key):
    return np.random.default_rng(list(key)).integers(0, 256, N).astype(np.uint8)


def filled(count=3, facts=FACTS):
    """Memory of a region with three pages."""
    memory = np.zeros(size_of(count, N), np.uint8)
    own = Region(memory, count, N, facts)
    for slot, key in enumerate(KEYS[:count]):
        own.rows[slot] = row(key)
        own.put(key, slot)
    return memory, own


def peer_of(memory, size=None, facts=FACTS, nbytes=N):
    size = len(memory) if size is None else size

    def read(parts):
        for offset, out in parts:
            assert 0 <= offset and offset + out.nbytes <= size, "beyond the region"
            assert out.dtype == np.uint8
            out[...] = memory[offset : offset + out.nbytes]
            yield out

    return PeerRegion("peer", read, size, facts, nbytes)


def test_pages_come_as_they_are():
    memory, own = filled()
    peer, got = peer_of(memory), np.zeros(N, np.uint8)
    assert peer.exists(KEYS) == KEYS
    assert peer.exists([KEYS[2], bytes(16), KEYS[0]]) == KEYS[2:] and len(peer._slots) == 2
    with pytest.raises(ParameterError, match=f"get: keys has {KEYS[1].hex()}, expected those of"):
        peer.get(KEYS[1:], [got, got])
    assert peer.exists([]) == [] and peer.exists(KEYS) == KEYS
    for key in KEYS:
        assert peer.get([key], [got]) == 1 and (got == row(key)).all()
    own.drop(1)
    assert peer_of(memory).exists(KEYS) == KEYS[:1]


def test_a_row_that_was_filled_anew_is_none():
    """Whatever the reader knew of it, and where the same page came back."""
    memory, own = filled()
    peer, got = peer_of(memory), np.zeros(N, np.uint8)
    assert peer.exists(KEYS) == KEYS
    own.drop(0)
    own.rows[0] = 7
    assert peer.get(KEYS[:2], [got, got.copy()]) == 0
    own.put(b"x" * 16, 0)
    assert peer.exists(KEYS) == []
    own.rows[1] = 7
    own.put(KEYS[1], 1)
    assert not peer_of(memory)._slots and peer.exists(KEYS[1:]) == KEYS[1:]
    assert peer.get([KEYS[1]], [got]) == 1 and (got == 7).all()


def test_a_page_that_came_back_meanwhile_is_not_damaged():
    """A reader finds its key again, of which it knew the checksum of another generation."""
    memory, own = filled()
    peer, got = peer_of(memory), np.zeros(N, np.uint8)
    assert peer.exists(KEYS) == KEYS
    own.drop(1)
    own.rows[1] = 7
    own.put(KEYS[1], 1)
    assert peer.get(KEYS, [got, got.copy(), got.copy()]) == 1
    assert peer.exists(KEYS) == KEYS
    assert peer.get(KEYS, [got, got.copy(), got.copy()]) == 3


def test_every_flipped_bit_is_seen():
    """Of header and table: what they say is refused, or found nowhere, or right."""
    good, _ = filled()
    got = np.zeros(N, np.uint8)
    errors = gone = 0
    for at in range(4096 + 3 * N):
        if 128 + 3 * 64 <= at < 4096:
            continue  # nothing is there
        memory = good.copy()
        memory[at] ^= 1 << (at % 8)
        try:
            peer = peer_of(memory)
            there = peer.exists(KEYS)
            for key in there:
                if peer.get([key], [got]):
                    assert (got == row(key)).all()
            gone += len(there) < 3
        except TransportError:
            errors += 1
    assert gone == 3 * 16 and errors >= 128 - 64 + 3 * (8 + N)


def test_memory_that_is_no_region_is_refused():
    size = size_of(2, N)
    for memory, error, text in (
        (
            np.zeros(size - 1, np.uint8),
            CapacityError,
            f"memory has {size - 1} bytes, expected {size}",
        ),
        (np.zeros(2 * size, np.uint8)[::2], ShapeError, "memory has strides"),
        (np.zeros(size, np.int8), DtypeError, "memory has dtype int8, expected uint8"),
        (np.frombuffer(bytes(size), np.uint8), ParameterError, "memory is read-only"),
    ):
        with pytest.raises(error, match=f"Region: {text}"):
            Region(memory, 2, N, FACTS)


def test_a_key_of_zeros_is_none():
    """Nobody would find it: entries without a page have it."""
    with pytest.raises(ParameterError, match="key is .*, expected one that is not all zeros"):
        filled()[1].put(bytes(16), 0)


def test_rows_that_share_memory_are_refused():
    """The second page would have come over the first."""
    peer = peer_of(filled()[0])
    assert peer.exists(KEYS) == KEYS
    memory = np.zeros(3 * N, np.uint8)
    for begin in (0, N - 8):
        rows = [memory[:N], memory[begin : begin + N], memory[2 * N :]]
        with pytest.raises(ParameterError, match=r"PeerRegion.get: rows\[\d\] overlaps rows\[\d\]"):
            peer.get(KEYS, rows)
    assert not memory.any()


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(size=100), "peer has 100 bytes, expected a region"),
        (dict(size=4096), "peer has rows 3, expected as many as its 4096 bytes hold"),
        (dict(facts=dict(model="b")), "peer has pages of facts '"),
        (dict(nbytes=N + 8), "peer has rows of bytes 200, expected 208"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    with pytest.raises(TransportError, match=text):
        peer_of(filled()[0], **change)


def test_a_table_that_is_too_large_is_refused(monkeypatch):
    """Whatever the peer says that it has: nothing of that size is allocated."""
    memory = np.frombuffer(region._pack(region.MOST_ROWS + 1, N, region.digest(FACTS)), np.uint8)
    with pytest.raises(TransportError, match="peer has rows 4194305, expected .*, 4194304 at most"):
        peer_of(memory, size=1 << 60)
    peer, empty = peer_of(filled()[0]), np.empty

    def refuse(shape, dtype):
        if dtype == region._ENTRY:
            raise MemoryError
        return empty(shape, dtype)

    monkeypatch.setattr(np, "empty", refuse)
    with pytest.raises(CapacityError, match="PeerRegion.exists: a table of 3 rows"):
        peer.exists(KEYS)


def test_another_version_is_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(region, "VERSION", region.VERSION + 1)
        memory, _ = filled()
    with pytest.raises(TransportError, match="peer has version 4, expected 3"):
        peer_of(memory)


def test_checksums_are_those_of_other_processes():
    """Worked out with Python's integers; NumPy must not change the constants."""
    constants = [x | 1 for x in np.random.PCG64(2024).random_raw(COUNT).tolist()]
    assert constants[0] == FIRST_CONSTANT
    for count in (3, COUNT, COUNT + 1, 4 * COUNT + 5):
        words = np.random.default_rng(count).integers(0, 2**64, count, np.uint64)
        want = sum(w * constants[i % COUNT] for i, w in enumerate(words.tolist()))
        want += zlib.crc32(b"k" * 16 + (7).to_bytes(8, "little"))
        assert region._checksum(b"k" * 16, 7, words.view(np.uint8)) == want % 2**64
    with pytest.raises(ParameterError, match="Region: nbytes is 12, expected a multiple of 8"):
        Region(np.zeros(5000, np.uint8), 1, 12, FACTS)


def test_blocks_that_change_places_are_seen(rng):
    """Of a page that is longer than the constants are many."""
    nbytes = 1 << 16
    memory = np.zeros(size_of(1, nbytes), np.uint8)
    own = Region(memory, 1, nbytes, FACTS)
    own.rows[0] = right = rng.integers(0, 256, nbytes).astype(np.uint8)
    own.put(KEYS[0], 0)
    peer, got = peer_of(memory, nbytes=nbytes), np.zeros(nbytes, np.uint8)
    assert peer.exists(KEYS) == KEYS[:1] and peer.get(KEYS[:1], [got]) == 1
    for size in 1 << np.arange(3, 16):
        own.rows[0] = np.r_[right[size : 2 * size], right[:size], right[2 * size :]]
        with pytest.raises(TransportError, match="peer has a page 0101.* that is damaged"):
            peer.get(KEYS[:1], [got])


# --- Messages ---


def test_messages():
    message = Message("a", dict(request="ä", tokens=[1, 2]))
    assert messages.unpack(messages.pack(message)) == message


def test_messages_that_are_none(monkeypatch):
    good = messages.pack(Message("a", dict(request="x")))
    wrong = [good[:n] for n in range(len(good))] + [good + b"x", b"x" * 100]
    wrong += [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
    wrong += [messages.pack(Message(name, {})) for name in ("", "a/b", ".x", "a" * 41)]
    wrong += [messages.pack(Message("a", facts)) for facts in ([], 1, None)]
    monkeypatch.setattr(messages.json, "dumps", lambda facts: "[" * 100_000)
    wrong.append(messages.pack(Message("a", {})))
    for data in wrong:
        with pytest.raises(TransportError):
            messages.unpack(data)
    monkeypatch.setattr(messages, "VERSION", 2)
    with pytest.raises(TransportError, match="a message has version 1, expected 2"):
        messages.unpack(good)


def test_names():
    assert messages.check_name("op", "name", "a-1_b.c") == "a-1_b.c"
    for name in ("", "a b", "a/b", "..", "-a", "a" * 41, "ä", "a\n"):
        with pytest.raises(ParameterError, match="op: name is .*, expected up to 40 letters"):
            messages.check_name("op", "name", name)
    with pytest.raises(DtypeError, match="op: name is an int"):
        messages.check_name("op", "name", 1)
