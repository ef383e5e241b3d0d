"""The phases of a model's step, one after another, in one launch.

Dimensions: T tokens, one of each sequence; I features in, O features out of a product.
Kernel: kernels_cu/phase_program.cu; pykv/programs/phases.py has the phases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import FLOATS, like, on_gpu
from pykv.cuda.launch import SCALARS
from pykv.errors import (
    DeviceError,
    DtypeError,
    ParameterError,
    ShapeError,
    UnsupportedError,
    a_type,
)
from pykv.gemv_cuts import cut_of, most_outs
from pykv.ops import block_linear, paged_decode, paged_qkv
from pykv.options import check_whole
from pykv.overlaps import bytes_of, is_same, place_of, share
from pykv.programs.draw_phases import DRAW_PHASES
from pykv.programs.phases import (
    BLOCK,
    OPS,
    PHASES,
    Attention,
    Product,
    Record,
    Scratch,
    program_defines,
)
from pykv.programs.stages import check_stages, stages_of
from pykv.ranges import address_of
from pykv.specs import KVSpec

OLDEST_SM = 70  # with acquire and release
_TOKENS = 8  # limit of tokens, which share one reading of each matrix
_PHASE_BYTES = 528
_HEAD_BYTES = 16  # op, kind, stage and tiles, in front of the op's struct
_OP = "phase_program.PhaseProgram"

# The kernels that have the struct of an op as their parameters, and what it has behind them.
_STRUCT_OF: dict[str, Any] = dict(
    PRODUCT=("block_linear", "gemv", ("states", np.uint64), ("splits", np.int32)),
    EMBED=("block_rows", "block_rows"),
)
_ARGMAX = ("out", "logits", "keys"), [("V", np.int32), ("parts", np.int32)]
_DRAW = (
    ("out", "logits", "best", "temperature", "top_p", "min_p", "top_k", "seeds")
    + ("lengths", "origins", "bins", "sums", "kept", "counters"),
    [(name, np.int32) for name in ("V", "is_first", "by_mass", "round")],
)
# Of ops that no other kernel has: addresses, then numbers.
_STRUCTS: dict[str, tuple[tuple[str, ...], list[Any]]] = dict(
    ADD_NORM=(("x", "y", "norm"), [("I", np.int32), ("eps", np.float32)]),
    PEAKS=_ARGMAX,
    ARGMAX=_ARGMAX,
    ADJUST=(("out", "logits", "tallies", "penalties", "tokens", "biases"), [("V", np.int32)]),
    FILTER=_DRAW,
    DRAW=_DRAW,
    LOGPROBS=(
        ("out", "logits", "tokens", "best", "wanted", "sums", "keys", "counters"),
        [("V", np.int32), ("K", np.int32)],
    ),
)
_ATTENTION = dict(append=("paged_qkv", "paged_qkv"), attend=("paged_decode", "paged_decode"))


def _defines(kinds: Sequence[str], x: Any, bias: Any, rows: int, outs: int) -> dict[str, Any]:
    sizes = dict(BLOCK=BLOCK, ROWS=rows, OUTS=outs)
    return dict(KINDS=",".join(kinds), X_T=x, B_T=bias, **sizes)


def _of_cache(spec: KVSpec, HQ: int, H: int, D: int, F: int, **flags: Any) -> dict[str, Any]:
    """Defines of programs with a cache of float queries and 16 tokens a page."""
    defines = paged_qkv.defines_of(FLOATS[0], spec, HQ, H, D, 16, F, **flags)
    return program_defines(defines | dict(Q_T="float"), HQ // H)


VARIANTS: list[dict[str, Any]] = [
    *(
        _defines([kind], "float", "float", rows, outs)
        for kind, rows, outs in (("F16", 1, 2), ("F16", 8, 2), ("Q4_K", 1, 4))
    ),
    _defines(["F16"], "float", "float", 1, 2) | _of_cache(KVSpec(), 9, 3, 64, 32),
    _defines(["Q4_K", "Q6_K"], "float", "float", 1, 4)
    | _of_cache(KVSpec("int8", "int8"), 32, 8, 128, 64, HADAMARD=1),
]
VARIANTS_SMS = range(0)  # none at import: compiled by the first program of its kinds


class PhaseProgram:
    """A function that does phases in their order; each may read what others have written.

    Args:
        phases: at least one of pykv.programs.phases: Product, Embed, AddNorm, Attention, Argmax;
            or of pykv.programs.draw_phases: Adjust, Draw, Logprobs. T is at most 8 and the same for
            all, as is the dtype of inputs, with an attention float32, that of biases, and the kind
            of caches. None writes a matrix, bias, norm, page table or length. Arrays are held, and
            calls see what they contain then.
        blocks: of the launch at most; None: as many as the GPU runs at once and have work.

    Raises:
        ShapeError, DtypeError, DeviceError, ParameterError, UnsupportedError: as the ops that the
            phases stand for; also where phases differ in what they must share, the GPU is older
            than sm_70, or a CUDA graph is being captured.

    Attributes:
        stages: the number of each phase's stage; on a GPU an argmax counts as two phases, and so
            does attention of more query heads a KV head than a block serves; log probabilities as
            three, a draw as three and three for each of its filters. All blocks of the
            launch wait for each other behind a stage; phases of one stage need nothing of each
            other.

    Made on a GPU it synchronises once; a call only enqueues, and raises DeviceError where another
    GPU is the current one. Calls of one program must not overlap:
    they share the counters by which blocks wait. Its blocks start when all of them have room:
    beside a kernel that stays on the GPU, such as a Mailbox's, it needs fewer `blocks`. While
    blocks wait for each other, the weights of the next product are on their way. Idea: the
    megakernels of HazyResearch and Cohere; barriers of a grid: Xiao and Feng, 2010.

    >>> x, y, z = (np.ones((1, 8), np.float32) for _ in range(3))
    >>> w = np.eye(8, dtype=np.float16)
    >>> Product = pykv.programs.phases.Product
    >>> twice = [Product(x, 2 * w, "F16", y), Product(y, 3 * w, "F16", z, accumulate=True)]
    >>> program = pykv.ops.phase_program.PhaseProgram(twice)
    >>> program()
    >>> float(z[0, 0]), program.stages
    (7.0, [0, 1])
    """

    __reduce_ex__ = cuda.refuse_copy

    def __init__(self, phases: Sequence[Any], *, blocks: int | None = None) -> None:
        self._phases, blocks = checked(_OP, phases, blocks)
        self._launch: cuda.Launch | None = None
        if on_gpu(self._phases[0].inputs):
            self._packed = pack(_OP, self._phases)
            self.stages = self._packed.stages
            self._launch = self._packed.launch("phase_program", blocks)
        else:
            self.stages = stages_of([phase.touched() for phase in self._phases])

    def __call__(self, stream: Any = None) -> None:
        if self._launch is None:
            cuda.run_on_host(self._on_host, stream=stream)
        else:
            check_device(_OP, self._packed.device)
            cuda.hold(self)  # the program has only addresses of its arrays
            self._launch(self._packed.arrays, stream)

    def _on_host(self) -> None:
        for phase in self._phases:
            reference(phase)


class Packed(NamedTuple):
    """Phases as a GPU's kernels take them.

    Attributes:
        arrays: of the kernel: the phases and the counters of its blocks.
        scratch: what phases share, beside.
        stages: of the phases, as of PhaseProgram.
        tiles: of the phase that has most.
        defines: of the kernel.
        shared_bytes: of a block.
        device: the GPU that has them.
    """

    arrays: dict[str, Any]
    scratch: Scratch
    stages: list[int]
    tiles: int
    defines: dict[str, Any]
    shared_bytes: int
    device: int

    def launch(
        self,
        stem: str,
        blocks: int | None,
        scalars: Mapping[str, int] | None = None,
        **defines: Any,
    ) -> cuda.Launch:
        """Of the kernel of a file, with more scalars and defines than the phases have."""
        kernel = cuda.kernel(stem, stem, **self.defines, **defines)
        most = min(
            cuda.cooperative_blocks(kernel, BLOCK, self.shared_bytes),
            self.tiles,
            blocks or 2**31 - 1,
        )
        given = dict(phases=len(self.stages), **scalars or {})
        return cuda.Launch(
            kernel, most, BLOCK, given, shared_bytes=self.shared_bytes, cooperative=True
        )


def pack(op: str, phases: list[Any]) -> Packed:
    """What the kernels take of checked phases; waits until it is there, for any stream.

    Raises:
        UnsupportedError: the GPU is older than sm_70, or caches are of several kinds.
    """
    cuda.refuse_capture(op, "what it is made of is uploaded; make it before")
    sm = cuda.current_sm()
    if sm < OLDEST_SM:
        raise UnsupportedError(f"{op}: the GPU is of sm_{sm}, expected sm_{OLDEST_SM} or newer")
    kinds = sorted({p.kind for p in phases if hasattr(p, "kind")}) or ["F32"]
    rows, outs = _rows_and_outs(phases, kinds)
    scratch = _scratch(op, phases)
    records, shared = [], 0
    for p in phases:
        cut = None
        if isinstance(p, Product):
            cut = cut_of(p.x, p.w, p.kind, rows=rows, outs=outs, block=BLOCK)
            shared = max(shared, cut.shared_bytes)
        records += p.records(op, cut, scratch)
    stages = stages_of([record.touched for record in records])
    check_stages(op, stages, [record.touched for record in records])
    x = phases[0].inputs
    words = like(x, (len(records), _PHASE_BYTES // 8), np.uint64)
    words.set(_words(records, stages, kinds))
    counters = like(x, (2,), np.uint32)
    counters.fill(0)
    biases = [p.bias.dtype for p in phases if getattr(p, "bias", None) is not None]
    defines = _defines(kinds, x.dtype, (biases or [FLOATS[0]])[0], rows, outs)
    defines |= _cache_defines(op, phases)
    shared = max(shared, defines.get("ATTENTION_BYTES", 0))
    if any(isinstance(p, DRAW_PHASES) for p in phases):
        defines["DRAWS"] = 1
    tiles = max(1, *(record.tiles for record in records))
    arrays = dict(program=words, counters=counters)
    cuda.synchronize()
    return Packed(arrays, scratch, stages, tiles, defines, shared, cuda.current_device())


def check_device(op: str, device: int) -> None:
    """Whether the GPU on which a program was made is the current one."""
    if (current := cuda.current_device()) != device:
        raise DeviceError(
            f"{op}: GPU {current} is the current one, expected GPU {device}, on which the program "
            "was made"
        )


def reference(phase: Any) -> None:
    """One phase, in NumPy."""
    phase.run_alone()


def checked(op: str, phases: Any, blocks: int | None) -> tuple[list[Any], int | None]:
    """The phases of a program, and how many blocks its launch may have, as PhaseProgram says."""
    if blocks is not None:
        blocks = check_whole(op, "blocks", blocks, 1)
    if not isinstance(phases, (list, tuple)):
        raise DtypeError(f"{op}: phases is {a_type(phases)}, expected a list")
    for phase in phases:
        if not isinstance(phase, (*PHASES, *DRAW_PHASES)):
            raise DtypeError(f"{op}: phases has {a_type(phase)}, expected phases")
        phase.checked(op)
    _check_alike(op, list(phases))
    return list(phases), blocks


def _check_alike(op: str, phases: list[Any]) -> None:
    """What all phases of a program must share."""
    if not phases:
        raise ParameterError(f"{op}: phases is empty, expected one or more")
    first = phases[0].inputs
    for p in phases:
        x = p.inputs
        if not x.size or len(x) > _TOKENS:
            raise ShapeError(f"{op}: x has shape {x.shape}, expected 1 to {_TOKENS} tokens")
        if len(x) != len(first):
            raise ShapeError(f"{op}: x has T={len(x)}, expected T={len(first)} as the first")
        if x.dtype != first.dtype:
            raise DtypeError(f"{op}: x has dtype {x.dtype}, expected {first.dtype}")
        if on_gpu(x) != on_gpu(first):
            raise DeviceError(f"{op}: phases are of host and device, expected one")
    biases = {p.bias.dtype for p in phases if getattr(p, "bias", None) is not None}
    if len(biases) > 1:
        raise DtypeError(f"{op}: biases have dtypes {biases}, expected one")
    written = [rows for p in phases for rows in p.touched().writes]
    for p in phases:
        for name, array in p.constants().items():  # read ahead of the waits
            constant = place_of(array)
            if any(share(constant, rows) for rows in written):
                raise ParameterError(f"{op}: a phase writes {name}, expected arrays of its own")


def _rows_and_outs(phases: list[Any], kinds: list[str]) -> tuple[int, int]:
    """How all products are cut: as suits the largest, with no more rows of w than a warp may have
    of any kind."""
    products = [p for p in phases if isinstance(p, Product)]
    if not products:
        return 1, 2
    largest = max(products, key=lambda p: int(p.w.nbytes))
    rows, outs, *_ = cut_of(largest.x, largest.w, largest.kind, block=BLOCK)
    return rows, min(outs, *(most_outs(kind, rows) for kind in kinds))


def _scratch(op: str, phases: list[Any]) -> Scratch:
    x = phases[0].inputs
    states = max((p.workspace_size(op) for p in phases if isinstance(p, Attention)), default=0)
    keys = max((p.keys_size() for p in phases if hasattr(p, "keys_size")), default=0)
    scratch = Scratch(
        like(x, (states,), np.float32) if states else None,
        like(x, (keys,), np.uint64) if keys else None,
        _deferred(op, phases),
        [],
    )
    if states:
        scratch.workspace[: paged_decode.COUNTERS] = 0
    return scratch


def _deferred(op: str, phases: list[Any]) -> dict[int, int]:
    """Splits of each attention whose `out` products alone read, by its address. Several may have
    one `out`, as layers do, if all cut keys alike."""
    splits = {i: p.splits(op) for i, p in enumerate(phases) if isinstance(p, Attention)}
    outs = {address_of(phases[i].attend.out): bytes_of(phases[i].attend.out) for i in splits}
    deferred = {}
    for at, out in outs.items():
        of_out = {n for i, n in splits.items() if address_of(phases[i].attend.out) == at}
        if len(of_out) == 1 and of_out != {1} and _is_merged(phases, splits, out):
            deferred[at] = of_out.pop()
    return deferred


def _is_merged(phases: list[Any], splits: dict[int, int], out: Any) -> bool:
    """Whether products, at least one, alone read `out`, as it is, while the workspace has the parts
    that it is made of: those of the last attention that cut its keys."""
    is_read = has_parts = False
    for i, p in enumerate(phases):
        touched = p.touched()
        if any(share(rows, out) for rows in touched.reads):
            if not (has_parts and isinstance(p, Product) and is_same(bytes_of(p.x), out)):
                return False
            is_read = True
        is_written = any(share(rows, out) for rows in touched.writes)
        if i not in splits:
            if is_written:
                return False
        elif is_written or splits[i] > 1:
            has_parts = is_same(bytes_of(p.attend.out), out)
    return is_read


def _cache_defines(op: str, phases: list[Any]) -> dict[str, Any]:
    """Defines of the caches that phases append to and read.

    Raises:
        UnsupportedError: they are of several kinds.
    """
    defines: dict[str, Any] = {}
    for p in phases:
        if not isinstance(p, Attention):
            continue
        for name, value in p.defines(op).items():
            if defines.setdefault(name, value) != value:
                raise UnsupportedError(
                    f"{op}: phases have {name}={defines[name]} and {name}={value}, expected one"
                )
    defines.pop("BLOCK", None)
    return defines


def _struct_of(op: str) -> np.dtype[Any]:
    """How the kernel lays out what an op is told."""
    if op in _STRUCTS:
        arrays, scalars = _STRUCTS[op]
        return np.dtype([(name, np.uint64) for name in arrays] + scalars, align=True)
    if op in _STRUCT_OF:
        stem, name, *more = _STRUCT_OF[op]
        return np.dtype([*_parameters_of(stem, name), *more], align=True)
    structs = [
        (part, np.dtype(_parameters_of(*kernel), align=True)) for part, kernel in _ATTENTION.items()
    ]
    return np.dtype([*structs, ("merges", np.int32)], align=True)


def _parameters_of(stem: str, name: str) -> list[Any]:
    """The parameters of a kernel as members of a struct."""
    arrays, types, _ = cuda.signature(stem, name)
    scalars = [(scalar, SCALARS[c_type]) for scalar, c_type in types.items()]
    return [(array, np.uint64) for array in arrays] + scalars


def _words(records: list[Record], stages: list[int], kinds: list[str]) -> Any:
    """The program, [PHASES, words] uint64."""
    words = np.zeros((len(records), _PHASE_BYTES), np.uint8)
    for row, record, stage in zip(words, records, stages, strict=True):
        kind = kinds.index(record.kind) if record.kind else 0
        row[:_HEAD_BYTES].view(np.int32)[:] = OPS.index(record.op), kind, stage, record.tiles
        dtype = _struct_of(record.op)
        struct = row[_HEAD_BYTES : _HEAD_BYTES + dtype.itemsize].view(dtype)[0]
        _fill(struct, record.values)
    return words.view(np.uint64)


def _fill(struct: Any, values: dict[str, Any]) -> None:
    """Numbers, addresses of arrays, and structs of these, by their names."""
    for name in struct.dtype.names:
        value = values[name]
        if isinstance(value, dict):
            _fill(struct[name], value)
        else:
            struct[name] = _address(value) if struct.dtype[name] == np.uint64 else value


def _address(array: Any) -> int:
    return 0 if array is None else address_of(array)


def has_kernel(kind: str) -> bool:
    """Whether the current GPU runs programs with matrices of a kind."""
    return kind in block_linear.KINDS and cuda.current_sm() >= OLDEST_SM
