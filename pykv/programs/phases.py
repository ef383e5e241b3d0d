"""Phases of a program: what each reads and writes, its check, the op that does it alone, and what
kernels_cu/phase_program.cuh is told of it.

Dimensions: T tokens, one of each sequence; the others as of the op that a phase stands for.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from pykv import attention, cuda
from pykv.arrays import FLOAT32, FLOATS, INT32, VECTOR_BYTES, like
from pykv.checker import checker
from pykv.errors import DtypeError, ParameterError, ShapeError, a_type
from pykv.gemv_cuts import Cut
from pykv.ops import (
    activation,
    block_linear,
    block_rows,
    paged_decode,
    paged_decode_mma,
    paged_qkv,
    sample,
)
from pykv.ops.norm import rms_norm
from pykv.options import check_number
from pykv.overlaps import bytes_of, check_apart, place_of
from pykv.planes import PLAIN
from pykv.programs.stages import Touched
from pykv.ranges import address_of
from pykv.specs import POOLS, KVSpec, spec_of

OPS = (  # as in the kernel
    *("PRODUCT", "EMBED", "ADD_NORM", "APPEND", "ATTEND", "PEAKS", "ARGMAX"),
    *("ADJUST", "FILTER", "DRAW", "LOGPROBS"),  # of draw_phases
)
BLOCK = 256  # threads
_PARTS = 64  # of a row of logits, whose largest are compared then
_SPLIT_KEYS = 128  # fewest keys of a split, where some sequence can have as many


class Record(NamedTuple):
    """What the kernel is told of a phase, or of a half of one.

    Attributes:
        op: one of `OPS`.
        kind: of its matrix, if it has one.
        tiles: that blocks take in turn.
        values: arrays or numbers of the op's struct, by name; of attention two such structs.
        touched: what it reads and writes.
    """

    op: str
    kind: str | None
    tiles: int
    values: dict[str, Any]
    touched: Touched


class Scratch(NamedTuple):
    """Arrays that phases of a program share on a GPU."""

    workspace: Any  # float32, for states of attention whose keys are split
    keys: Any  # uint64, a largest logit with its token
    deferred: dict[int, int]  # splits of attention that products merge, by the address of its `out`
    own: list[Any]  # of single phases

    def zeros(self, x: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array of a phase's own, on the device of `x`."""
        array = like(x, shape, dtype)
        array.fill(0)
        self.own.append(array)
        return array


class Product(NamedTuple):
    """`out = x @ w.T`, with what block_linear.multiply knows in front of it and behind it. Whether
    x must be `exact` counts in a launch of its own alone: programs keep its bits."""

    x: Any
    w: Any
    kind: str
    out: Any
    bias: Any = None
    norm: Any = None
    gate: str | None = None
    accumulate: bool = False
    eps: float = 1e-6
    exact: bool = True

    @property
    def inputs(self) -> Any:
        return self.x

    def constants(self) -> dict[str, Any]:
        """What blocks read before they wait, by name."""
        given = dict(w=self.w, bias=self.bias, norm=self.norm)
        return {name: array for name, array in given.items() if array is not None}

    def checked(self, op: str) -> block_linear.Options:
        asked = block_linear.Options(self.gate, self.eps, self.accumulate, exact=self.exact)
        if self.out is None:
            raise ParameterError(f"{op}: a product has no out, expected an array")
        given = self.x, self.w, self.kind, self.bias, self.norm, self.out
        return block_linear.checked(op, *given, asked)[1]

    def touched(self) -> Touched:
        # With `accumulate` out is read as well; that it is written is all that counts.
        return Touched(
            [place_of(x) for x in (self.x, *self.constants().values())], [place_of(self.out)]
        )

    def run_alone(self) -> None:
        given = self._asdict()
        arrays = [given.pop(name) for name in ("x", "w", "kind")]
        block_linear.multiply(*arrays, early=True, **given)

    def records(self, op: str, cut: Cut, scratch: Scratch) -> list[Record]:
        values = {name: getattr(self, name) for name in ("out", "x", "w", "bias", "norm")}
        options = self.checked(op)
        values |= block_linear.scalars_of(self.x, self.w, self.out, options, cut)
        touched, splits = self.touched(), scratch.deferred.get(address_of(self.x), 0)
        values |= dict(states=None, splits=splits)
        if splits:
            states = scratch.workspace[paged_decode.COUNTERS :]
            values["states"] = states
            touched.reads.append(bytes_of(states))
        return [Record("PRODUCT", self.kind, cut.tiles, values, touched)]


class Embed(NamedTuple):
    """Rows of a table times `scale`, as of activation.embed and block_rows.take."""

    ids: Any
    w: Any
    kind: str
    out: Any
    scale: float = 1.0

    @property
    def inputs(self) -> Any:
        return self.out

    def constants(self) -> dict[str, Any]:
        return dict(w=self.w)

    def checked(self, op: str) -> None:
        block_rows.check_kind(op, self.kind, block_linear.KINDS)
        check_number(op, "scale", self.scale)
        dims = _embed_checker(op, PLAIN.get(self.kind))(self.ids, self.w, self.out)
        if self.kind not in PLAIN:
            block_rows.check_row(op, self.kind, "out", dims["I"], dims["W"])

    def touched(self) -> Touched:
        return Touched([place_of(self.ids), place_of(self.w)], [place_of(self.out)])

    def run_alone(self) -> None:
        if self.kind in PLAIN:
            activation.embed(self.w, self.ids, scale=self.scale, out=self.out)
        else:
            I = self.out.shape[1]
            block_rows.take(self.w, self.kind, I, self.ids, scale=self.scale, out=self.out)

    def records(self, op: str, cut: Any, scratch: Scratch) -> list[Record]:
        (T, I), (O, _) = self.out.shape, self.w.shape
        values = dict(out=self.out, w=self.w, ids=self.ids, O=O, I=I, scale=self.scale)
        values |= dict(W=self.w.shape[1] * self.w.itemsize)
        return [Record("EMBED", self.kind, T * -(-I // (4 * BLOCK)), values, self.touched())]


@cache
def _embed_checker(op: str, dtype: Any) -> Any:
    w = ("O I", (dtype,)) if dtype else ("O W", (np.dtype(np.uint8),))
    return checker(op, ("out",), ids=("T", INT32), w=w, out=("T I", (np.dtype(np.float32),)))


class AddNorm(NamedTuple):
    """`x += y / sqrt(mean(y**2) + eps) * norm`, row by row: norm.rms_norm, then activation.add."""

    x: Any
    y: Any
    norm: Any
    eps: float = 1e-6

    @property
    def inputs(self) -> Any:
        return self.y

    def constants(self) -> dict[str, Any]:
        return dict(norm=self.norm)

    def checked(self, op: str) -> None:
        dims = _add_norm_checker(op)(self.x, self.y, self.norm)
        if dims["I"] % 4:
            raise ShapeError(f"{op}: y has I={dims['I']}, expected a multiple of 4")
        check_number(op, "eps", self.eps, positive=True)
        check_apart(op, dict(x=self.x), dict(y=self.y))

    def touched(self) -> Touched:
        return Touched([place_of(self.y), place_of(self.norm)], [place_of(self.x)])

    def run_alone(self) -> None:
        activation.add(self.x, rms_norm(self.y, self.norm, eps=self.eps))

    def records(self, op: str, cut: Any, scratch: Scratch) -> list[Record]:
        T, I = self.y.shape
        values = self._asdict() | dict(I=I)
        return [Record("ADD_NORM", None, T, values, self.touched())]


@cache
def _add_norm_checker(op: str) -> Any:
    rules = dict(x=("T I", FLOATS), y=("T I", "x"), norm=("I", FLOAT32, VECTOR_BYTES))
    return checker(op, ("x",), **rules)


class Append(NamedTuple):
    """A projection to queries and new rows of a cache, as of paged_qkv.append."""

    qkv: Any
    k_pool: Any
    v_pool: Any
    slots: Any
    q_out: Any
    positions: Any = None
    inv_freq: Any = None
    pairing: str = "half"
    q_norm: Any = None
    k_norm: Any = None
    eps: float = 1e-6
    hadamard: bool = False
    k_scales: Any = None
    v_scales: Any = None
    spec: KVSpec | str | None = None

    def arrays(self) -> dict[str, Any]:
        names = ("q_out", *POOLS, "qkv", "slots", "positions", "inv_freq", "q_norm", "k_norm")
        return {name: getattr(self, name) for name in names}


class Attend(NamedTuple):
    """Attention of the last query of each sequence over its pages, as of paged_decode.decode."""

    q: Any
    k_pool: Any
    v_pool: Any
    page_table: Any
    lengths: Any
    out: Any
    k_scales: Any = None
    v_scales: Any = None
    spec: KVSpec | str | None = None
    scale: float | None = None
    window: int | None = None
    logits_soft_cap: float | None = None

    def arrays(self) -> dict[str, Any]:
        names = ("out", "q", *POOLS, "page_table", "lengths")
        return {name: getattr(self, name) for name in names}


class Attention(NamedTuple):
    """An append, then attention of its queries over the same pools.

    A slot is that of the sequence's last key, as `lengths` and `page_table` say, which no other
    sequence of the step reads, or is negative: on a GPU the block with the last keys of a head
    writes it, while others read what comes before. What the append's `q_out` holds behind it is
    nobody's to read: a kernel that does both at once leaves it as it is. So is `out` behind a
    program in which products read it, and nothing else: they make it of its parts.
    """

    append: Append
    attend: Attend

    @property
    def inputs(self) -> Any:
        return self.append.qkv

    def constants(self) -> dict[str, Any]:
        return dict(page_table=self.attend.page_table, lengths=self.attend.lengths)

    def checked(self, op: str) -> _Checked:
        append, attend = self
        for part, kind in ((append, Append), (attend, Attend)):
            if not isinstance(part, kind):
                name = kind.__name__
                raise DtypeError(f"{op}: an attention has {a_type(part)}, expected {name}")
        for array, name in ((append.q_out, "q_out"), (attend.out, "out")):
            if array is None:
                raise ParameterError(f"{op}: an attention has no {name}, expected an array")
        if attend.q is not append.q_out:
            raise ParameterError(f"{op}: an attention has another q, expected its append's q_out")
        for name in POOLS:
            if getattr(append, name) is not getattr(attend, name):
                raise ParameterError(f"{op}: an attention has two {name}, expected one")
        pools = [getattr(append, name) for name in POOLS]
        spec, read_as = (spec_of(op, part.spec, *pools) for part in self)
        if read_as != spec:
            raise ParameterError(
                f"{op}: an attention reads {read_as}, expected its append's {spec}"
            )
        options = spec, append.pairing, append.eps, append.hadamard
        of_append = paged_qkv.checked(op, append.arrays(), *options)
        if append.qkv.dtype != FLOATS[0]:  # products do not round what they merge
            raise DtypeError(f"{op}: qkv has dtype {append.qkv.dtype}, expected {FLOATS[0]}")
        dims = paged_decode.sizes_of(spec, attend.arrays())
        asked = attend.scale, attend.window, attend.logits_soft_cap
        scores = attention.check_options(op, dims, *asked, True)
        return _Checked(of_append[0], of_append[2], dims, spec, scores)

    def touched(self) -> Touched:
        append, attend = self
        given = append.arrays() | attend.arrays()
        writes = [given.pop(name) for name in ("q_out", "out", *POOLS)]
        reads = [x for name, x in given.items() if x is not None and name != "q"]
        return Touched([bytes_of(x) for x in reads], [bytes_of(x) for x in writes if x is not None])

    def run_alone(self) -> None:
        paged_qkv.append(**self.append._asdict())
        paged_decode.decode(**self.attend._asdict())

    def defines(self, op: str) -> dict[str, Any]:
        """Of the kernel, for its cache."""
        of_append, options, _, spec, scores = checked = self.checked(op)
        arrays = self.append.arrays()
        defines = paged_qkv.kernel_arguments(of_append, arrays, options)[0]
        defines |= attention.kernel_defines(spec, scores, self.attend.arrays())
        rows = paged_decode.tile_rows(checked.sizes)
        return program_defines(defines, rows)

    def splits(self, op: str) -> int:
        """Into how many parts keys are cut."""
        return self._splits(self.checked(op))[1]

    def _splits(self, checked: _Checked) -> tuple[int, int]:
        """Tiles of query rows, and into how many parts their keys are cut: one for each block that
        may run beside the others, as long as it has keys."""
        sizes = checked.sizes
        tiles = sizes.B * sizes.H * -(-sizes.rows // paged_decode.tile_rows(sizes))
        keys = min(sizes.capacity, int(checked.scores.scalars["window"]))
        num_sms = cuda.num_sms(self.append.qkv.data.device_id)
        splits = max(1, min(-(-2 * num_sms // tiles), -(-keys // _SPLIT_KEYS)))
        return tiles, splits if tiles <= paged_decode.COUNTERS else 1

    def workspace_size(self, op: str) -> int:
        """Elements of scratch memory that it needs."""
        checked = self.checked(op)
        sizes, (_, splits) = checked.sizes, self._splits(checked)
        states = sizes.B * sizes.HQ * splits * (sizes.D + 2)
        return paged_decode.COUNTERS + states if splits > 1 else 0

    def records(self, op: str, cut: Any, scratch: Scratch) -> list[Record]:
        checked = self.checked(op)
        of_append, options, dims, spec, scores = checked
        sizes, (tiles, splits) = checked.sizes, self._splits(checked)
        defines, scalars = paged_qkv.kernel_arguments(of_append, self.append.arrays(), options)
        append = self.append.arrays() | scalars
        absent = dict.fromkeys(("lse", "alibi_slopes", "sinks", "tree", "key_positions"))
        attend = self.attend.arrays() | absent | dict(workspace=scratch.workspace)
        attend |= paged_decode.kernel_arguments(self.attend.arrays(), dims, spec, scores, "e")[1]
        attend |= dict(HQ=sizes.HQ, H=sizes.H, P=sizes.P, split_keys=0, splits=splits)
        values: dict[str, Any] = dict(append=append, attend=attend)
        values["merges"] = splits > 1 and address_of(self.attend.out) not in scratch.deferred
        touched = self.touched()
        if splits > 1:
            touched.writes.append(bytes_of(scratch.workspace))
        last = Record("ATTEND", None, tiles * splits, values, touched)
        groups, G = BLOCK // defines["LANES"], sizes.HQ // sizes.H
        if paged_decode.tile_rows(sizes) >= G and groups >= G + 2:  # AT_ONCE, in the kernel
            return [last]
        heads = sizes.HQ + 2 * sizes.H
        return [Record("APPEND", None, sizes.B * -(-heads // groups), values, touched), last]


def program_defines(of_cache: dict[str, Any], rows: int) -> dict[str, Any]:
    """The defines of a program with a cache; a block serves so many query rows at a time."""
    D, lanes, pairs = (of_cache[name] for name in ("HEAD_DIM", "LANES", "PAIRS"))
    floats = (BLOCK // 32 + 1) * rows * (D + 2)  # sums of each warp, queries
    floats += BLOCK // lanes * D + 2 * pairs  # rows that lanes exchange, rotations
    sizes = dict(BLOCK=BLOCK, QUERY_ROWS=rows, COUNTERS=paged_decode.COUNTERS)
    return of_cache | sizes | dict(ATTENTION_BYTES=4 * floats + 64)  # and what alignment takes


class _Checked(NamedTuple):
    """The sizes and options of an attention's append, then its own."""

    of_append: Any
    options: paged_qkv.Options
    dims: Any
    spec: KVSpec
    scores: attention.Scores

    @property
    def sizes(self) -> paged_decode_mma.Sizes:
        return paged_decode_mma.Sizes(
            self.dims["B"], 1, *(self.dims[letter] for letter in ("HQ", "H", "D", "P", "M"))
        )


class Argmax(NamedTuple):
    """The index of the largest logit of each row, as of sample.argmax."""

    logits: Any
    out: Any

    @property
    def inputs(self) -> Any:
        return self.logits

    def constants(self) -> dict[str, Any]:
        return {}

    def checked(self, op: str) -> Any:
        if self.out is None:
            raise ParameterError(f"{op}: an argmax has no out, expected an array")
        return sample.check_argmax(op, self.logits, self.out)

    def touched(self) -> Touched:
        return Touched([bytes_of(self.logits)], [bytes_of(self.out)])

    def run_alone(self) -> None:
        sample.argmax(self.logits, out=self.out)

    def keys_size(self) -> int:
        """Keys of scratch memory that it needs."""
        return len(self.logits) * _PARTS

    def records(self, op: str, cut: Any, scratch: Scratch) -> list[Record]:
        T, V = self.logits.shape
        values = dict(out=self.out, logits=self.logits, keys=scratch.keys, V=V, parts=_PARTS)
        touched, keys = self.touched(), [bytes_of(scratch.keys)]
        return [
            Record("PEAKS", None, T * _PARTS, values, touched._replace(writes=keys)),
            Record("ARGMAX", None, T, values, touched._replace(reads=keys)),
        ]


PHASES = Product, Embed, AddNorm, Attention, Argmax
