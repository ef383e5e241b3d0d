"""The file format of an artefact.

Little-endian; each of the three parts is padded with zeros to a multiple of 64 bytes:

    header   offset  type     field
                  0  8s       magic, b"\\x89PYKVTC\\n"
                  8  u32      version, 3
                 12  u32      pairing of rotated elements, 0 half, 1 adjacent
                 16  u64      bytes of the file
                 24  32s      SHA-256 of the file, computed with zeros here
                 56  32s      SHA-256 that identifies the model's weights
                 88  32s      its architecture, ASCII, padded with zeros
                120  u32 each L layers, H KV heads, D head_dim, R rotated pairs of a head, G groups
                              of layers, Q ratios, T texts, sinks, window
    tables   u32 [L]           the group of each layer
             f32 [L, R]        inv_freq, radians a position
             u32 [Q]           ratios, ascending
             u32 [G, 2]        C, components of the bases of K and V
             u32 [G, 2, Q, 8]  widths: numbers of components with 8, 7, ..., 1 bits
             f32 [G, 2, Q]     held-out errors
             T times           96s name, UTF-8, padded with zeros; 32s SHA-256; u64 tokens
    arrays   for each group, for K, then V, with F = layers of the group * H * D:
             f16 [F]           mean
             f16 [F / D, D, D] weights, symmetric
             f16 [F, C]        basis
             f32 [C'] Q times  steps, C' = sum of widths

Arrays begin at multiples of 4 bytes; nothing else lies between them.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pykv import whole_files
from pykv.errors import FormatError, ParameterError, quoted
from pykv.kvtc import coder
from pykv.kvtc.artefact import MOST, Artefact, Fingerprint, Group, Plan, Side, Text, problems
from pykv.ops.rope import PAIRINGS

MAGIC = b"\x89PYKVTC\n"
VERSION = 3  # version 1 had no weights, version 2 a weight for each element
_HEADER = struct.Struct("<8s2IQ32s32s32s9I")
_TEXT = np.dtype([("name", "S96"), ("sha256", "V32"), ("tokens", "<u8")])
_ALIGNMENT = 64


def write(op: str, path: str | os.PathLike[str], artefact: Artefact) -> None:
    """See Artefact.save."""
    found = whole_files.regular_path(op, path)
    for name, has, expected in problems(artefact):
        raise ParameterError(f"{op}: {name} is {quoted(has)}, expected {expected}")
    tables, arrays = _parts(artefact)
    body = [x for part in (tables, arrays) for x in (*part, _padding(part))]
    counts = (
        len(artefact.groups),
        len(artefact.ratios),
        len(artefact.texts),
        artefact.sinks,
        artefact.window,
    )
    first = bytearray(-(-_HEADER.size // _ALIGNMENT) * _ALIGNMENT)
    model = artefact.model
    facts = [MAGIC, VERSION, PAIRINGS.index(model.pairing), len(first) + _nbytes(body)]
    named = bytes.fromhex(model.sha256), model.architecture.encode()
    sizes = model.layers, model.kv_heads, model.head_dim, model.inv_freq.shape[1]
    _HEADER.pack_into(first, 0, *facts, bytes(32), *named, *sizes, *counts)
    digest = hashlib.sha256(first)
    for part in body:
        digest.update(part)
    first[24:56] = digest.digest()
    whole_files.replace(found, [bytes(first), *body])


def read(op: str, path: str | os.PathLike[str]) -> Artefact:
    """See Artefact.load."""
    found = whole_files.regular_path(op, path)
    with open(found, "rb") as file:
        header = _Header.read(op, found, file.read(_HEADER.size), os.fstat(file.fileno()))
        file.seek(0)
        data = file.read()
    return _read(op, found, header, data)


# --- Writing --------------------------------------------------------------------------------------


def _parts(artefact: Artefact) -> tuple[list[memoryview], list[memoryview]]:
    """The tables and the arrays of a file, in order."""
    model, groups = artefact.model, artefact.groups
    of_layer = np.empty(model.layers, "<u4")
    for i, group in enumerate(groups):
        of_layer[list(group.layers)] = i
    sides = [side for group in groups for side in (group.k, group.v)]
    plans = [plan for side in sides for plan in side.plans.values()]
    texts = [
        (t.name.encode(), np.frombuffer(bytes.fromhex(t.sha256), "V32")[0], t.tokens)
        for t in artefact.texts
    ]
    tables = [
        of_layer,
        model.inv_freq.astype("<f4"),
        np.array(artefact.ratios, "<u4"),
        np.array([side.basis.shape[1] for side in sides], "<u4"),
        np.array([plan.widths for plan in plans], "<u4"),
        np.array([plan.error for plan in plans], "<f4"),
        np.array(texts, _TEXT),
    ]
    arrays = [
        x
        for side in sides
        for x in (
            side.mean.astype("<f2"),
            side.weights.astype("<f2"),
            side.basis.astype("<f2"),
            *(plan.steps.astype("<f4") for plan in side.plans.values()),
        )
    ]
    return [_memory(x) for x in tables], [_memory(x) for x in arrays]


def _memory(x: Any) -> memoryview:
    octets: Any = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return memoryview(octets)


def _nbytes(parts: list[memoryview]) -> int:
    return sum(part.nbytes for part in parts)


def _padding(parts: list[memoryview]) -> memoryview:
    return memoryview(bytes(-_nbytes(parts) % _ALIGNMENT))


# --- Reading --------------------------------------------------------------------------------------


class _Header(NamedTuple):
    """The header fields that determine the rest of a file."""

    sha256: bytes
    model: bytes
    architecture: str
    pairing: str
    layers: int
    kv_heads: int
    head_dim: int
    pairs: int
    groups: int
    ratios: int
    texts: int
    sinks: int
    window: int

    @staticmethod
    def read(op: str, path: Path, data: bytes, stat: os.stat_result) -> _Header:
        """Unpack and check. Counts are bounded by MOST; `_Reader` bounds sizes by the file's."""

        def wrong(name: str, has: Any, expected: Any) -> FormatError:
            return FormatError(f"{op}: {path} has {name} {quoted(has)}, expected {expected}")

        if not data.startswith(MAGIC):
            raise wrong("magic", data[: len(MAGIC)], MAGIC)
        if len(data) < _HEADER.size:
            raise wrong("size", len(data), f"at least {_HEADER.size}")
        _, version, pairing, size, sha256, model, name, *counts = _HEADER.unpack(data)
        if version > VERSION:
            raise wrong("version", version, f"{VERSION}: it is of a newer pykv, which reads it")
        if version < VERSION:
            again = (
                f"pykv kvtc calibrate --model MODEL --text FILE... --out {shlex.quote(str(path))}"
            )
            raise wrong("version", version, f"{VERSION}: calibrate again, by `{again}`")
        if size != stat.st_size:
            raise wrong("size", stat.st_size, f"the {size} of its header")
        if pairing >= len(PAIRINGS):
            raise wrong("pairing", pairing, "0 or 1")
        architecture = name.rstrip(b"\0")
        if not (architecture.isascii() and architecture.decode("ascii").isprintable()):
            raise wrong("architecture", architecture, "printable ASCII")
        found = _Header(sha256, model, architecture.decode(), PAIRINGS[pairing], *counts)
        for count in found._fields[4:]:
            least = 0 if count in ("pairs", "texts", "sinks", "window") else 1
            value = getattr(found, count)
            if not least <= value <= MOST:
                raise wrong(count, value, f"{least} to {MOST}")
        if found.groups > found.layers:
            raise wrong("groups", found.groups, f"at most the {found.layers} layers")
        return found


class _Reader:
    """Takes arrays from a file's bytes, and never reads past their end."""

    def __init__(self, op: str, path: Path, data: bytes) -> None:
        self.op, self.path, self.data, self.at = op, path, data, 0

    def take(self, name: str, dtype: Any, *shape: int) -> Any:
        dtype, count = np.dtype(dtype), prod(shape)
        end = self.at + count * dtype.itemsize
        if end > len(self.data):
            raise FormatError(
                f"{self.op}: {self.path} has {len(self.data)} bytes, expected {name} up to {end}"
            )
        found = np.frombuffer(self.data, dtype, count, self.at).reshape(shape)
        self.at = end
        return found

    def pad(self) -> None:
        size = -self.at % _ALIGNMENT
        if self.take("padding", np.uint8, size).any():
            raise FormatError(f"{self.op}: {self.path} has padding that is not zero")


def _read(op: str, path: Path, header: _Header, data: bytes) -> Artefact:
    """The artefact in a file's bytes."""
    digest = hashlib.sha256(data[:24] + bytes(32))
    digest.update(memoryview(data)[56:])
    if digest.digest() != header.sha256:
        raise FormatError(f"{op}: {path} is damaged: its SHA-256 does not hold")
    H, D, L, G, Q = header.kv_heads, header.head_dim, header.layers, header.groups, header.ratios
    reader = _Reader(op, path, data)
    reader.at = _HEADER.size
    reader.pad()
    of_layer = reader.take("groups of layers", "<u4", L)
    inv_freq = reader.take("inv_freq", "<f4", L, header.pairs)
    ratios = reader.take("ratios", "<u4", Q).tolist()
    components = reader.take("components", "<u4", G, 2).tolist()
    widths = reader.take("widths", "<u4", G, 2, Q, len(coder.WIDTHS)).tolist()
    errors = reader.take("errors", "<f4", G, 2, Q).tolist()
    texts = reader.take("texts", _TEXT, header.texts)
    reader.pad()
    groups = []
    for g in range(G):
        layers = tuple(np.flatnonzero(of_layer == g).tolist())
        sides = []
        for side in range(2):
            F, C = len(layers) * H * D, components[g][side]
            mean = reader.take("mean", "<f2", F)
            weights = reader.take("weights", "<f2", F // D, D, D)
            basis = reader.take("basis", "<f2", F, C)
            plans = {
                ratio: Plan(tuple(counts), reader.take("steps", "<f4", sum(counts)), error)
                for ratio, counts, error in zip(
                    ratios, widths[g][side], errors[g][side], strict=True
                )
            }
            if len(plans) != Q:
                raise FormatError(f"{op}: {path} has ratios {ratios}, expected rising ones")
            sides.append(Side(mean, weights, basis, plans))
        groups.append(Group(layers, *sides))
    reader.pad()
    if reader.at != len(data):
        raise FormatError(f"{op}: {path} has {len(data)} bytes, expected {reader.at}")
    model = Fingerprint(
        *(header.architecture, L, H, D, header.pairing, inv_freq, header.model.hex())
    )
    named = tuple(
        Text(t["name"].decode(errors="replace"), t["sha256"].tobytes().hex(), int(t["tokens"]))
        for t in texts
    )
    artefact = Artefact(model, tuple(groups), named, header.sinks, header.window)
    for name, has, expected in problems(artefact):
        raise FormatError(f"{op}: {path} has {name} {quoted(has)}, expected {expected}")
    return artefact
