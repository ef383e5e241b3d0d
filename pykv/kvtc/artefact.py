"""The artefact: what a calibration found. artefact_file has its file format."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pykv.errors import ParameterError
from pykv.kvtc import coder
from pykv.number_texts import counted
from pykv.ops.rope import PAIRINGS
from pykv.options import check_whole

SINKS, WINDOW = 4, 128  # the first tokens stay float16, the last ones become int8
MOST = 1 << 14  # limit of layers, heads, head size and the like, and of the ratio
# Bounds of head weights: a basis times weights in this range keeps its precision in float16.
LIGHTEST, HEAVIEST = 2.0**-5, 2.0**5
_LARGEST = float(np.finfo(np.float16).max)


class Text(NamedTuple):
    """A calibration text: its name, the `sha256` of its UTF-8, and the number of tokens read."""

    name: str
    sha256: str
    tokens: int


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """The facts of a model that its rows depend on.

    Attributes:
        architecture: its name in the model file.
        layers, kv_heads, head_dim: sizes.
        pairing: of rotated elements, see rope.rotate.
        inv_freq: [layers, pairs] float32, radians a position; zeros for layers without rotation.
        sha256: identifies the weights, see pykv.llm.fingerprint.
    """

    architecture: str
    layers: int
    kv_heads: int
    head_dim: int
    pairing: str
    inv_freq: Any = field(repr=False)
    sha256: str

    def difference(self, other: Fingerprint) -> str:
        """The first difference, such as "layers=30, expected 32" with the other's value last; or
        ""."""
        for name in ("architecture", "layers", "kv_heads", "head_dim", "pairing", "sha256"):
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others:
                return f"{name}={mine}, expected {others}"
        same = np.array_equal(self.inv_freq, other.inv_freq)
        return "" if same else "inv_freq of other values, expected those of the model"


@dataclass(frozen=True, eq=False)
class Plan:
    """How components are quantised at one ratio, see pykv.kvtc.coder.

    Attributes:
        widths: the numbers of components with 8, 7, ..., 1 bits, each a multiple of 32.
        steps: [C'] float32, of the first C' = sum(widths) components; the others are dropped.
        error: the norm of (row - decoded row) over that of (row - mean), both over all rows that
            the calibration held out.
    """

    widths: tuple[int, ...]
    steps: Any = field(repr=False)
    error: float

    @property
    def row_bytes(self) -> int:
        """Bytes of a coded row, a multiple of 4."""
        return coder.row_bytes(self.widths)


@dataclass(frozen=True, eq=False)
class Side:
    """Keys or values of a group of layers. A row is a token's [layer, head, dim], F elements.

    Forward: components = ((row - mean) @ W) @ basis, with W block-diagonal, a block for each head.
    Back: row = (components @ basis.T) @ W^-1 + mean.

    Attributes:
        mean: [F] float16.
        weights: [F / D, D, D] float16, symmetric: the blocks of W, for heads of D elements. An
            error of a head counts by the length of error @ weights. Eigenvalues are between
            LIGHTEST / 4 and HEAVIEST * sqrt(D).
        basis: [F, C] float16, orthonormal columns, by falling variance.
        plans: by ratio.
    """

    mean: Any = field(repr=False)
    weights: Any = field(repr=False)
    basis: Any = field(repr=False)
    plans: dict[int, Plan]


@dataclass(frozen=True, eq=False)
class Group:
    """The `layers` that share rows, and the sides `k` and `v`; keys are before their rotation."""

    layers: tuple[int, ...]
    k: Side
    v: Side


@dataclass(frozen=True, eq=False)
class Artefact:
    """What a calibration found.

    Attributes:
        model: the model of these rows.
        groups: every layer is in exactly one.
        texts: the calibration texts.
        sinks: the first tokens of a sequence, which stay float16.
        window: the last tokens of a sequence, stored as int8, rotated by a Hadamard matrix.
    """

    model: Fingerprint
    groups: tuple[Group, ...]
    texts: tuple[Text, ...] = ()
    sinks: int = SINKS
    window: int = WINDOW

    @property
    def ratios(self) -> tuple[int, ...]:
        """The ratios that have plans, ascending."""
        return tuple(self.groups[0].k.plans) if self.groups else ()

    def row_bytes(self, ratio: int) -> int:
        """Bytes of a token's coded keys and values in all layers.

        Raises:
            DtypeError: `ratio` is not a whole number.
            ParameterError: there is no plan for it; the text lists the ratios with plans.
        """
        ratio = self.check_ratio("Artefact.row_bytes", ratio)
        sides = [side for group in self.groups for side in (group.k, group.v)]
        return sum(side.plans[ratio].row_bytes for side in sides)

    def as_dict(self) -> dict[str, Any]:
        """Its facts without arrays, as JSON values."""
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

    def __repr__(self) -> str:
        ratios = ", ".join(map(str, self.ratios))
        return f'Artefact("{self.model.architecture}", ratios {ratios}, {self._source})'

    @property
    def _source(self) -> str:
        tokens = sum(text.tokens for text in self.texts)
        return f"{counted(tokens, 'token')} of {counted(len(self.texts), 'text')}"

    def as_text(self) -> str:
        """Bytes and held-out errors: a line for each ratio and group of layers."""
        lines = [f"{self.model.architecture}, {self._source}"]
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
        """Check a ratio for an op, and return it as an int.

        Raises:
            DtypeError: `ratio` is not a whole number.
            ParameterError: there is no plan for it; the text lists the ratios with plans.
        """
        whole = check_whole(op, "ratio", ratio, 1)
        if whole not in self.ratios:
            has = ", ".join(map(str, self.ratios))
            raise ParameterError(f"{op}: ratio is {whole}, expected one of {has}")
        return whole

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file atomically; an existing file is replaced.

        Raises:
            ParameterError: `path` is a folder, a pipe or a device, or a field of the artefact is
                invalid, see `problems`.
            DtypeError: `path` is not a path.
            OSError: the file cannot be written; a previous file is unchanged.
        """
        from pykv.kvtc import artefact_file

        artefact_file.write("Artefact.save", path, self)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Artefact:
        """Read a file of `save`. Arrays are read-only views of the file's bytes.

        Raises:
            FormatError: the file is no artefact, damaged, or of another version; the text names
                the field.
            ParameterError: `path` is a folder, a pipe or a device.
            DtypeError: `path` is not a path.
            OSError: the file cannot be read.
        """
        from pykv.kvtc import artefact_file

        return artefact_file.read("Artefact.load", path)


# --- What an artefact may hold --------------------------------------------------------------------


def problems(artefact: Artefact, *, lengths: bool = True) -> Iterator[tuple[str, Any, str]]:
    """Invalid fields of an artefact: name, value, and the expected value as text. Take only the
    first: the checks after it assume that it is valid.

    Args:
        artefact: with any fields.
        lengths: also check the lengths of basis columns, which reads all of the basis.
    """
    model, groups, texts = artefact.model, artefact.groups, artefact.texts
    for name, value, least in (
        *((name, getattr(model, name), 1) for name in ("layers", "kv_heads", "head_dim")),
        *((name, getattr(artefact, name), 0) for name in ("sinks", "window")),
        *(("groups", len(groups), 1), ("texts", len(texts), 0)),
    ):
        if not isinstance(value, int | np.integer) or not least <= value <= MOST:
            yield name, value, f"{least} to {MOST}"
    name = model.architecture
    if not isinstance(name, str) or not re.fullmatch("[ -~]{1,32}", name):
        yield "architecture", name, "1 to 32 printable ASCII characters"
    if model.pairing not in PAIRINGS:
        yield "pairing", model.pairing, f"one of {PAIRINGS}"
    if not _is_sha256(model.sha256):
        yield "sha256", model.sha256, "64 hexadecimal digits"
    inv_freq = model.inv_freq
    pairs = inv_freq.shape[-1] if isinstance(inv_freq, np.ndarray) and inv_freq.ndim else 0
    if not _is(inv_freq, np.float32, (model.layers, pairs)):
        yield "inv_freq", _shown(inv_freq), f"float32 [{model.layers}, pairs]"
    if 2 * pairs > model.head_dim:
        yield "inv_freq", f"{pairs} pairs", f"at most head_dim / 2 = {model.head_dim // 2}"
    if not (np.isfinite(inv_freq).all() and (inv_freq >= 0).all()):
        yield "inv_freq", "a value", "finite ones, not negative"
    of_groups = [list(group.layers) for group in groups]
    if sorted(i for layers in of_groups for i in layers) != list(range(model.layers)):
        yield "groups", of_groups, "each layer in one of them"
    if of_groups != [sorted(layers) for layers in of_groups]:
        yield "groups", of_groups, "rising layers"
    ratios = list(artefact.ratios)
    if not ratios or ratios != sorted(set(ratios)) or not 1 <= ratios[0] <= ratios[-1] <= MOST:
        yield "ratios", ratios, f"rising ones from 1 to {MOST}"
    for text in texts:
        if not (text.name.isprintable() and 0 < len(text.name.encode()) <= 96):
            yield "texts", text.name, "printable names of 1 to 96 bytes"
        if not 1 <= text.tokens < 2**64:
            yield "texts", text.tokens, "at least 1 token"
        if not _is_sha256(text.sha256):
            yield "texts", text.sha256, "64 hexadecimal digits"
    for group in groups:
        F = len(group.layers) * model.kv_heads * model.head_dim
        for side in (group.k, group.v):
            if list(side.plans) != ratios:
                yield "plans", list(side.plans), f"those of ratios {ratios}"
            yield from _problems_of_side(side, F, model.head_dim, lengths)
        for ratio in ratios:
            has = group.k.plans[ratio].row_bytes + group.v.plans[ratio].row_bytes
            if has * ratio > 4 * F:
                most = f"at most {4 * F // ratio} bytes of both at ratio {ratio}"
                yield "widths", f"{has} bytes a row", most


def _is_sha256(text: Any) -> bool:
    return isinstance(text, str) and bool(re.fullmatch("[0-9a-f]{64}", text))


def _is(x: Any, dtype: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(x, np.ndarray) and x.dtype == dtype and x.shape == shape


def _shown(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__


def _problems_of_side(side: Side, F: int, D: int, lengths: bool) -> Iterator[tuple[str, Any, str]]:
    basis, weights = side.basis, side.weights
    C = basis.shape[-1] if isinstance(basis, np.ndarray) and basis.ndim else 0
    for name, shape in (("mean", (F,)), ("weights", (F // D, D, D))):
        if not _is(x := getattr(side, name), np.float16, shape):
            yield name, _shown(x), f"float16 {list(shape)}"
    if not _is(basis, np.float16, (F, C)) or not 0 < C <= F:
        yield "basis", _shown(basis), f"float16 [{F}, C <= {F}]"
    for name in ("mean", "weights", "basis"):
        if not np.isfinite(getattr(side, name)).all():
            yield name, "a value", "finite ones"
    if (weights != weights.transpose(0, 2, 1)).any():
        yield "weights", "a matrix", "symmetric ones"
    least, most = LIGHTEST / 4, HEAVIEST * D**0.5
    values = np.linalg.eigvalsh(weights.astype(np.float64))
    if not ((values >= least) & (values <= most)).all():
        yield "weights", "an eigenvalue", f"{least} to {most:g}"
    if lengths:
        norms = np.einsum("fc,fc->c", basis, basis, dtype=np.float32)
        if not (abs(norms - 1) < 0.01).all():
            yield "basis", "a column", "columns of length 1"
    for plan in side.plans.values():
        counts, steps = plan.widths, plan.steps
        if len(counts) != len(coder.WIDTHS) or any(n % coder.GROUP or n < 0 for n in counts):
            yield "widths", counts, f"eight multiples of {coder.GROUP}"
        total = sum(counts)
        if not 0 < total <= C:
            yield "widths", counts, f"1 to {C} components"
        if not _is(steps, np.float32, (total,)):
            yield "steps", _shown(steps), f"float32 [{total}]"
        if not (np.isfinite(steps).all() and (steps > 0).all()):
            yield "steps", "a value", "positive finite ones"
        half = np.ldexp(0.5, coder.bits_of(counts).astype(int))
        if (half * steps > _LARGEST).any():
            expected = f"coefficients within float16, up to {_LARGEST}"
            yield "steps", f"up to {steps.max()}", expected
        if not 0 <= plan.error < np.inf:
            yield "error", plan.error, "a finite number"


def _ranges(layers: tuple[int, ...]) -> str:
    """Layers as text, such as "0-4, 6"."""
    runs: list[list[int]] = []
    for i in layers:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)
