"""What a calibration found, and its file.

A file, little-endian, each of its three parts padded with zeros to a multiple of 64 bytes:

    header   offset  type     field
                  0  8s       magic, b"\\x89PYKVTC\\n"
                  8  u32      version, 1
                 12  u32      pairing of rotated elements, 0 half, 1 adjacent
                 16  u64      bytes of the file
                 24  32s      SHA-256 of the file, computed with zeros here
                 56  32s      SHA-256 that names the model
                 88  32s      its architecture, ASCII, padded with zeros
                120  u32 each L layers, H KV heads, D head_dim, R rotated pairs of a head, G groups
                              of layers, Q ratios, T texts, sinks, window
    tables   u32 [L]           the group of each layer
             f32 [L, R]        inv_freq, radians a position
             u32 [Q]           ratios, rising
             u32 [G, 2]        C, components of the bases of K and V
             u32 [G, 2, Q, 8]  widths: how many components have 8, 7, ..., 1 bits
             f32 [G, 2, Q]     held-out errors
             T times           96s name, UTF-8, padded with zeros; 32s SHA-256; u64 tokens
    arrays   of each group, of K, then of V, F = layers of the group * H * D:
             f16 [F]           mean
             f16 [F, C]        basis
             f32 [C'] Q times  steps, C' = sum of widths

Arrays begin at multiples of 4 bytes; nothing else lies between them.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pykv import whole_files
from pykv.errors import DtypeError, FormatError, ParameterError
from pykv.kvtc import coder
from pykv.ops.rope import PAIRINGS

MAGIC = b"\x89PYKVTC\n"
VERSION = 1
SINKS, WINDOW = 4, 128  # first tokens kept as they are, and last ones kept as int8
_HEADER = struct.Struct("<8s2IQ32s32s32s9I")
_TEXT = np.dtype([("name", "S96"), ("sha256", "V32"), ("tokens", "<u8")])
_ALIGNMENT = 64
_MOST = 1 << 14  # of a number in the header


class Text(NamedTuple):
    """A text that a calibration used: its name, the SHA-256 of its UTF-8, and how many tokens."""

    name: str
    sha256: str
    tokens: int


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What a model's rows depend on.

    Attributes:
        architecture: as its file names it.
        layers, kv_heads, head_dim: sizes.
        pairing: of rotated elements, see rope.rotate.
        inv_freq: [layers, pairs] float32, radians a position; zeros where a layer is not rotated.
        sha256: names the weights, see rows.fingerprint.
    """

    architecture: str
    layers: int
    kv_heads: int
    head_dim: int
    pairing: str
    inv_freq: Any
    sha256: str

    def difference(self, other: Fingerprint) -> str:
        """What differs, as "layers=30, expected 32" with the other's value last; "" if nothing."""
        for name in ("architecture", "layers", "kv_heads", "head_dim", "pairing", "sha256"):
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others:
                return f"{name}={mine}, expected {others}"
        same = np.array_equal(self.inv_freq, other.inv_freq)
        return "" if same else "inv_freq of other values, expected those of the model"


@dataclass(frozen=True, eq=False)
class Plan:
    """How components are coded at one ratio, see pykv.kvtc.coder.

    Attributes:
        widths: how many components have 8, 7, ..., 1 bits, each a multiple of 32.
        steps: [C'] float32, of the first C' = sum(widths) components; the others are dropped.
        error: of rows that the calibration held out, the norm of (row - decoded row) over that of
            (row - mean), both over all rows.
    """

    widths: tuple[int, ...]
    steps: Any
    error: float

    @property
    def row_bytes(self) -> int:
        """Bytes of a coded row, a multiple of 4."""
        return coder.row_bytes(self.widths)


@dataclass(frozen=True, eq=False)
class Side:
    """Keys or values of a group of layers. A row is a token's [layer, head, dim], F elements.

    Attributes:
        mean: [F] float16.
        basis: [F, C] float16, orthonormal columns, by falling variance.
        plans: by ratio.
    """

    mean: Any
    basis: Any
    plans: dict[int, Plan]


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that share rows; keys have their rotation undone."""

    layers: tuple[int, ...]
    k: Side
    v: Side


@dataclass(frozen=True, eq=False)
class Artefact:
    """What a calibration found.

    Attributes:
        model: whose rows these are.
        groups: every layer is in one of them.
        texts: what it was calibrated on.
        sinks: first tokens of a sequence that are kept as float16.
        window: last tokens of a sequence that are kept as int8, rotated by a Hadamard matrix.
    """

    model: Fingerprint
    groups: tuple[Group, ...]
    texts: tuple[Text, ...] = ()
    sinks: int = SINKS
    window: int = WINDOW

    @property
    def ratios(self) -> tuple[int, ...]:
        """The ratios that it has plans for, rising."""
        return tuple(self.groups[0].k.plans)

    def row_bytes(self, ratio: int) -> int:
        """Bytes of a token's coded keys and values in all layers.

        Raises:
            ParameterError: there is no plan for `ratio`.
        """
        self.check_ratio("Artefact.row_bytes", ratio)
        sides = [side for group in self.groups for side in (group.k, group.v)]
        return sum(side.plans[ratio].row_bytes for side in sides)

    def as_dict(self) -> dict[str, Any]:
        """Its facts without arrays, as JSON has them."""
        model = {name: x for name, x in vars(self.model).items() if isinstance(x, (str, int))}
        plans = [
            {
                "layers": list(group.layers),
                "side": side,
                "ratio": ratio,
                "components": sum(plan.widths),
                "widths": list(plan.widths),
                "row_bytes": plan.row_bytes,
                "error": plan.error,
            }
            for group in self.groups
            for side, of_side in (("k", group.k), ("v", group.v))
            for ratio, plan in of_side.plans.items()
        ]
        texts = [text._asdict() for text in self.texts]
        return {"model": model, "texts": texts, "plans": plans, "sinks": self.sinks} | {
            "window": self.window
        }

    def as_text(self) -> str:
        """Bytes and held-out errors at each ratio, a line for each group of layers."""
        tokens = sum(text.tokens for text in self.texts)
        lines = [f"{self.model.architecture}, {tokens:,} tokens of {len(self.texts)} texts"]
        lines.append(f"{'ratio':>5}  {'bytes a token':>13}  {'K error':>7}  {'V error':>7}  layers")
        for ratio in self.ratios:
            for group in self.groups:
                k, v = group.k.plans[ratio], group.v.plans[ratio]
                lines.append(
                    f"{ratio:>5}  {k.row_bytes + v.row_bytes:>13,}  {k.error:>7.3f}  "
                    f"{v.error:>7.3f}  {_ranges(group.layers)}"
                )
        return "\n".join(lines)

    def check_ratio(self, op: str, ratio: Any) -> int:
        """Check a ratio, and return it as an int.

        Raises:
            ParameterError: there is no plan for `ratio`; the text names those that there are.
        """
        if isinstance(ratio, bool) or ratio not in self.ratios:
            has = ", ".join(map(str, self.ratios))
            raise ParameterError(f"{op}: ratio is {ratio!r:.80}, expected one of {has}")
        return int(ratio)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file, whole or not at all; one that exists is replaced.

        Raises:
            ParameterError: `path` is a folder, a pipe or a device, or a field of the artefact has
                no such value.
            DtypeError: `path` is no path.
            OSError: the file cannot be written; what was there before is still there.
        """
        op = "Artefact.save"
        found = whole_files.regular_path(op, path)
        for name, has, expected in _problems(self):
            raise ParameterError(f"{op}: {name} is {has!r:.80}, expected {expected}")
        tables, arrays = _parts(self)
        body = [x for part in (tables, arrays) for x in (*part, _padding(part))]
        counts = len(self.groups), len(self.ratios), len(self.texts), self.sinks, self.window
        first = bytearray(-(-_HEADER.size // _ALIGNMENT) * _ALIGNMENT)
        model = self.model
        facts = [MAGIC, VERSION, PAIRINGS.index(model.pairing), len(first) + _nbytes(body)]
        named = bytes.fromhex(model.sha256), model.architecture.encode()
        sizes = model.layers, model.kv_heads, model.head_dim, model.inv_freq.shape[1]
        _HEADER.pack_into(first, 0, *facts, bytes(32), *named, *sizes, *counts)
        digest = hashlib.sha256(first)
        for part in body:
            digest.update(part)
        first[24:56] = digest.digest()
        whole_files.replace(found, [bytes(first), *body])

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Artefact:
        """Read what `save` wrote. Arrays are read-only views of the file's bytes.

        Raises:
            FormatError: this is no such file, it is damaged or of another version; the text names
                the field.
            ParameterError: `path` is a folder, a pipe or a device.
            DtypeError: `path` is no path.
            OSError: the file cannot be read.
        """
        op = "Artefact.load"
        found = whole_files.regular_path(op, path)
        with open(found, "rb") as file:
            header = _Header.read(op, found, file.read(_HEADER.size), os.fstat(file.fileno()))
            file.seek(0)
            data = file.read()
        return _read(op, found, header, data)


# --- Writing --------------------------------------------------------------------------------------


def _parts(artefact: Artefact) -> tuple[list[memoryview], list[memoryview]]:
    """Tables and arrays of a file, in order."""
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
    """Fields of the header that the rest of a file follows from."""

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
        """Unpack and check; all sizes that follow are bounded by that of the file."""

        def wrong(name: str, has: Any, expected: Any) -> FormatError:
            return FormatError(f"{op}: {path} has {name} {has!r:.80}, expected {expected}")

        if not data.startswith(MAGIC):
            raise wrong("magic", data[: len(MAGIC)], MAGIC)
        if len(data) < _HEADER.size:
            raise wrong("size", len(data), f"at least {_HEADER.size}")
        _, version, pairing, size, sha256, model, name, *counts = _HEADER.unpack(data)
        if version != VERSION:
            raise wrong("version", version, VERSION)
        if size != stat.st_size:
            raise wrong("size", stat.st_size, f"the {size} that it says")
        if pairing >= len(PAIRINGS):
            raise wrong("pairing", pairing, "0 or 1")
        architecture = name.rstrip(b"\0")
        if not (architecture.isascii() and architecture.decode("ascii").isprintable()):
            raise wrong("architecture", architecture, "printable ASCII")
        found = _Header(sha256, model, architecture.decode(), PAIRINGS[pairing], *counts)
        for count in found._fields[4:]:
            least = 0 if count in ("pairs", "texts", "sinks", "window") else 1
            value = getattr(found, count)
            if not least <= value <= _MOST:
                raise wrong(count, value, f"{least} to {_MOST}")
        if found.groups > found.layers:
            raise wrong("groups", found.groups, f"at most the {found.layers} layers")
        return found


class _Reader:
    """Takes arrays from a file's bytes, and never more than there are."""

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
    """The artefact of a file's bytes."""
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
            mean, basis = reader.take("mean", "<f2", F), reader.take("basis", "<f2", F, C)
            plans = {
                ratio: Plan(tuple(counts), reader.take("steps", "<f4", sum(counts)), error)
                for ratio, counts, error in zip(
                    ratios, widths[g][side], errors[g][side], strict=True
                )
            }
            if len(plans) != Q:
                raise FormatError(f"{op}: {path} has ratios {ratios}, expected rising ones")
            sides.append(Side(mean, basis, plans))
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
    for name, has, expected in _problems(artefact):
        raise FormatError(f"{op}: {path} has {name} {has!r:.80}, expected {expected}")
    return artefact


# --- What an artefact may hold --------------------------------------------------------------------


def _problems(artefact: Artefact) -> Iterator[tuple[str, Any, str]]:
    """Fields that no calibration gives: name, value, and what is expected instead."""
    model, groups, ratios = artefact.model, artefact.groups, list(artefact.ratios)
    if not 0 < len(model.architecture.encode()) <= 32:
        yield "architecture", model.architecture, "1 to 32 bytes"
    pairs = model.inv_freq.shape[1]
    if 2 * pairs > model.head_dim:
        yield "inv_freq", f"{pairs} pairs", f"at most head_dim / 2 = {model.head_dim // 2}"
    if not (np.isfinite(model.inv_freq).all() and (model.inv_freq >= 0).all()):
        yield "inv_freq", "a value", "finite ones, not negative"
    if sorted(i for group in groups for i in group.layers) != list(range(model.layers)):
        yield "groups", [group.layers for group in groups], "each layer in one of them"
    if ratios != sorted(set(ratios)) or ratios[0] < 1:
        yield "ratios", ratios, "rising ones"
    for text in artefact.texts:
        if not (text.name.isprintable() and 0 < len(text.name.encode()) <= 96):
            yield "texts", text.name, "printable names of 1 to 96 bytes"
        if text.tokens < 1:
            yield "texts", text.tokens, "at least 1 token"
    for group in groups:
        F = len(group.layers) * model.kv_heads * model.head_dim
        for side in (group.k, group.v):
            if list(side.plans) != ratios:
                yield "plans", list(side.plans), f"those of ratios {ratios}"
            yield from _problems_of_side(side, F)


def _problems_of_side(side: Side, F: int) -> Iterator[tuple[str, Any, str]]:
    C = side.basis.shape[1] if side.basis.ndim == 2 else 0
    if side.mean.shape != (F,) or side.mean.dtype != np.float16:
        yield "mean", f"{side.mean.dtype}{list(side.mean.shape)}", f"float16 [{F}]"
    if side.basis.shape != (F, C) or side.basis.dtype != np.float16 or not 0 < C <= F:
        yield "basis", f"{side.basis.dtype}{list(side.basis.shape)}", f"float16 [{F}, C <= {F}]"
    if not np.isfinite(side.mean).all():
        yield "mean", "a value", "finite ones"
    norms = np.einsum("fc,fc->c", side.basis, side.basis, dtype=np.float32)
    if not (abs(norms - 1) < 0.01).all():
        yield "basis", "a column", "columns of length 1"
    for ratio, plan in side.plans.items():
        counts, steps, total = plan.widths, plan.steps, sum(plan.widths)
        if len(counts) != len(coder.WIDTHS) or any(n % coder.GROUP or n < 0 for n in counts):
            yield "widths", counts, f"eight multiples of {coder.GROUP}"
        if not 0 < total <= C:
            yield "widths", counts, f"1 to {C} components"
        if plan.row_bytes * ratio > 2 * F:
            yield "widths", counts, f"at most {2 * F // ratio} bytes a row at ratio {ratio}"
        if steps.shape != (total,) or steps.dtype != np.float32:
            yield "steps", f"{steps.dtype}{list(steps.shape)}", f"float32 [{total}]"
        if not (np.isfinite(steps).all() and (steps > 0).all()):
            yield "steps", "a value", "positive finite ones"
        if not 0 <= plan.error < np.inf:
            yield "error", plan.error, "a finite number"


def _ranges(layers: tuple[int, ...]) -> str:
    """Layers as "0-4, 6"."""
    runs: list[list[int]] = []
    for i in layers:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)


def check_artefact(op: str, artefact: Any) -> Artefact:
    """Check that an argument is an Artefact, and return it.

    Raises:
        DtypeError: it is something else.
    """
    if not isinstance(artefact, Artefact):
        given = type(artefact).__name__
        raise DtypeError(f"{op}: artefact is a {given}, expected a pykv.kvtc.Artefact")
    return artefact
