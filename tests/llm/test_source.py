"""Bytes of tensors by pieces: all of them, in order, and none before those ahead have gone."""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from pykv.errors import CapacityError, FormatError
from pykv.llm import LLM, gguf, source
from pykv.llm.source import Source
from tests.helpers import assert_same_bits
from tests.llm import tiny


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Of matrices with rows of 68 to 256 bytes, by pieces of 200: of a few rows, or one longer."""
    monkeypatch.setattr(source, "_PIECE", 200)
    tiny.write(tmp_path / "x.gguf", "llama", kind="Q8_0", kinds=dict(ffn_down="F32", attn_k="F16"))
    return gguf.read(tmp_path / "x.gguf")


def check_pieces(info, pieces):
    """Each is of whole rows and follows the one ahead."""
    start = 0
    for first, blocks in pieces:
        assert first == start and 0 < blocks.nbytes <= max(200, info.row_bytes)
        assert_same_bits(blocks, info.blocks[first : first + len(blocks)])
        start += len(blocks)
    assert start == info.rows


def test_pieces_are_the_tensor(xp, file):
    seen = []
    with Source(file, xp, seen.append) as opened:
        for info in file.tensors.values():
            check_pieces(info, opened.pieces(info))
    assert sum(seen) == sum(info.nbytes for info in file.tensors.values())
    assert len(seen) > 2 * len(file.tensors)


def test_pieces_of_the_host(device, file):
    info = file.tensor("blk.0.attn_q.weight")
    with Source(file, device) as opened:
        for first, blocks in opened.pieces(info, on_host=True):
            assert isinstance(blocks, np.ndarray)
            assert_same_bits(blocks, info.blocks[first : first + len(blocks)])


@pytest.mark.simt
@pytest.mark.parametrize("device", ["simt"], indirect=True)
def test_copies_may_be_late(device, file, monkeypatch):
    """Pinned memory is read into only when the copy from it is done, and kept until the end."""
    late = []

    class Event:
        """Copies that were asked for happen when somebody waits for the event behind them."""

        def __init__(self):
            self.copies = []

        def record(self, stream):
            self.copies += late
            late.clear()

        def synchronize(self):
            for to, values in self.copies:
                to[...] = values
            self.copies.clear()

    monkeypatch.setattr(device.cuda, "Event", Event)
    monkeypatch.setattr(
        device.ndarray, "set", lambda self, values, stream: late.append((self.host, values))
    )
    found = []
    with Source(file, device) as opened:
        for info in file.tensors.values():
            found += [(info, *piece) for piece in opened.pieces(info)]
    for info, first, blocks in found:
        assert_same_bits(blocks, info.blocks[first : first + len(blocks)])


def test_a_file_that_changes_meanwhile(xp, file):
    info = file.tensor("blk.0.attn_q.weight")
    with Source(file, xp) as opened:
        pieces = opened.pieces(info)
        next(pieces)
        with file.path.open("ab") as end:
            end.write(b"\0")
        with pytest.raises(FormatError, match="has changed since its header was read"):
            list(pieces)


def test_a_file_that_changes_while_it_is_read(file, monkeypatch):
    info, right = file.tensor("blk.0.attn_q.weight"), type(file.path).open

    @contextmanager
    def open_(path, mode):
        with right(path, mode) as opened:

            def readinto(data):
                size = opened.readinto(data)
                os.utime(path, ns=(1, 1))
                return size

            yield SimpleNamespace(fileno=opened.fileno, seek=opened.seek, readinto=readinto)

    monkeypatch.setattr(type(file.path), "open", open_)
    with pytest.raises(FormatError, match="has changed since its header was read"):
        _ = info.blocks


def test_no_memory_to_pin(device, file, monkeypatch):
    def refuse(nbytes):
        raise device.cuda.runtime.CUDARuntimeError(2)  # cudaErrorMemoryAllocation

    monkeypatch.setattr(device.cuda, "PinnedMemory", refuse)
    text = "LLM: reading the model asks for 1,.* bytes of pinned host memory"
    with pytest.raises(CapacityError, match=text):
        Source(file, device)


def test_progress_is_by_bytes(tiny_paths, monkeypatch):
    """Of a model that is loaded: the bar reaches its end."""
    bars = []

    class Bar:
        def __init__(self, total, **options):
            self.total, self.steps = total, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, nbytes):
            self.steps.append(nbytes)

    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr(source, "_PIECE", 1 << 10)
    LLM(tiny_paths / "llama.gguf", device="cpu", progress=True)
    assert sum(bars[0].steps) == bars[0].total and max(bars[0].steps) < bars[0].total / 20
