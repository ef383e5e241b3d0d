"""Streams, read by `struct` alone, and damaged ones."""

import struct
import zlib

import numpy as np
import pytest

from pykv.errors import DtypeError, FormatError
from pykv.kvtc import Codec, parse
from pykv.kvtc.stream import Coded, Header
from tests.kvtc import made
from tests.kvtc.made import D, H, L


@pytest.fixture
def stream(rng):
    artefact = made.artefact(rng)
    cache, table, positions, *_ = made.sequence(rng, np, artefact, 12, spec="int8:HND", start=5)
    return Codec(artefact, 4).compress(cache, table, positions).to_bytes()


def sealed(stream):
    """A stream whose checksum holds."""
    body = stream[:12] + bytes(4) + stream[16:]
    return body[:12] + struct.pack("<I", zlib.crc32(body)) + body[16:]


def test_a_stream_is_what_the_format_says(stream):
    magic, version, crc, size = struct.unpack_from("<8sIIQ", stream)
    assert (magic, version, size) == (b"\x89PYKVTS\n", 2, len(stream))
    assert crc == zlib.crc32(stream[:12] + bytes(4) + stream[16:])
    ratio, *sizes, tokens, sinks, window, row_bytes = struct.unpack_from("<8I", stream, 56)
    assert (ratio, sizes, tokens, sinks, window) == (4, [L, H, D], 12, 2, 3)
    assert stream[88:120].rstrip(b"\0") == b"int8:HND" and not any(stream[120:128])
    at, sections = 128, []
    for count, code in (
        *((tokens, "i"), (sinks * 2 * L * H * D, "e"), (window * 2 * L * H * D, "b")),
        *((window * 2 * L * H, "e"), ((tokens - sinks - window) * row_bytes, "B")),
    ):
        assert not any(stream[at : -(-at // 128) * 128])
        at = -(-at // 128) * 128
        sections.append(struct.unpack_from(f"<{count}{code}", stream, at))
        at += struct.calcsize(f"<{count}{code}")
    assert at == len(stream)
    assert sections[0] == tuple(range(5, 17))
    coded = parse(stream)
    for mine, of_parser in zip(sections, coded.arrays().values(), strict=True):
        assert mine == tuple(of_parser.ravel().tolist())
    assert coded.header.row_bytes == row_bytes and coded.to_bytes() == stream


@pytest.mark.parametrize("count", [400, pytest.param(3000, marks=pytest.mark.sweep)])
def test_damaged_streams_are_refused(stream, rng, count):
    """Whatever bit is changed, and wherever the end is cut off."""
    for at in rng.permutation(8 * len(stream))[:count].tolist():
        damaged = bytearray(stream)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(FormatError, match="stream"):
            parse(bytes(damaged))
    for end in rng.permutation(len(stream))[:100].tolist():
        with pytest.raises(FormatError, match="stream"):
            parse(stream[:end])
    with pytest.raises(FormatError, match="expected the"):
        parse(stream + b"\0")


FIELDS = dict(  # offset, code, wrong values, and what the text says
    magic=(0, "8s", [b"PYKVTS\n\0"], "magic"),
    version=(8, "I", [0, 1, 3], "version"),
    size=(16, "Q", [0, 2**63], "bytes"),
    ratio=(56, "I", [0, 2**31], "ratio"),
    layers=(60, "I", [0, L + 1, 2**32 - 1], "layers|bytes"),
    heads=(64, "I", [0, H + 1], "heads|bytes"),
    head_dim=(68, "I", [0, 1, 2**31], "head_dim|bytes"),
    tokens=(72, "I", [0, 11, 13, 2**32 - 1], "tokens|bytes"),
    sinks=(76, "I", [1, 3, 13, 2**32 - 1], "sinks|bytes"),
    window=(80, "I", [0, 2, 4, 2**32 - 4], "window|bytes"),
    row_bytes=(84, "I", [0, 1, 4, 2**32 - 1], "row_bytes|bytes"),
    spec=(88, "32s", [b"int9", b"\xff", b"", b"fp16 \0x"], "spec"),
    padding=(124, "I", [1], "zeros after its fields"),
    gap=(128 + 4 * 12, "B", [1], "bytes before sinks, expected zeros"),
    position=(128 + 4 * 3, "i", [7, -1, 2**31 - 1], "positions"),
)


@pytest.mark.parametrize("name", FIELDS)
def test_lies_under_a_sound_checksum_are_refused(stream, name):
    offset, code, values, text = FIELDS[name]
    for value in values:
        lie = bytearray(stream)
        struct.pack_into(f"<{code}", lie, offset, value)
        with pytest.raises(FormatError, match=text):
            parse(sealed(bytes(lie)))


def test_rows_of_odd_sizes_are_refused_where_there_are_none():
    header = Header("5a" * 32, 4, L, H, D, 3, 2, 1, 8, "fp16")
    data = np.zeros(header.nbytes, np.uint8)
    data[:12] = np.arange(3, dtype="<i4").view(np.uint8)
    lie = bytearray(Coded(header, data).to_bytes())
    assert parse(bytes(lie)).header == header
    struct.pack_into("<I", lie, FIELDS["row_bytes"][0], 6)
    with pytest.raises(FormatError, match="row_bytes 6, expected a multiple of 4"):
        parse(sealed(bytes(lie)))


def test_what_is_no_stream(stream):
    for other in (b"", b"\x89PYKVTS\n", bytes(128)):
        with pytest.raises(FormatError, match="stream has"):
            parse(other)
    for other in ("text", 5, None, [1]):
        with pytest.raises(DtypeError, match="expected bytes"):
            parse(other)
    for same in (bytearray(stream), memoryview(stream), np.frombuffer(stream, np.uint8)):
        assert parse(same).to_bytes() == stream
