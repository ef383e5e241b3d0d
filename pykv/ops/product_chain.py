"""Many products, one after another, in one cooperative launch: a program of phases.

Dimensions: T tokens, I features in, O features out of a product.
Kernel: kernels_cu/product_chain.cu; products are those of block_linear.multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda
from pykv.arrays import FLOATS, like, load_cupy, on_gpu
from pykv.errors import DeviceError, DtypeError, ParameterError, ShapeError, UnsupportedError
from pykv.ops import block_linear
from pykv.ops.block_linear import PLAIN, Options
from pykv.options import check_whole
from pykv.overlaps import place_of, share

OLDEST_SM = 70  # with acquire and release
_TOKENS = 8  # at most: those that share one reading of a matrix
_BLOCK = 128  # threads, as `gemv` has
_PHASE = np.dtype(  # as the kernel declares it
    [(name, np.uint64) for name in ("out", "x", "w", "bias", "norm")]
    + [(name, np.int64) for name in ("x_stride", "out_stride")]
    + [(name, np.int32) for name in ("T", "O", "I", "W", "parts", "accumulate", "gate", "stage")]
    + [("eps", np.float32), ("tiles", np.int32)]
)

VARIANTS: list[dict[str, Any]] = [
    dict(KIND=kind, X_T="float", B_T="float", BLOCK=_BLOCK, ROWS=rows, OUTS=outs)
    for kind, rows, outs in (("F16", 1, 4), ("F16", 8, 2), ("Q4_K", 1, 8))
]
VARIANTS_SMS = range(0)  # none at import: compiled by the first chain of a kind


class Product(NamedTuple):
    """`out = x @ w.T`, with what block_linear.multiply knows in front of it and behind it."""

    x: Any
    w: Any
    out: Any
    bias: Any = None
    norm: Any = None
    gate: str | None = None
    accumulate: bool = False
    eps: float = 1e-6


class ProductChain:
    """A function that does products in their order; each may read what others have written.

    Args:
        products: at least one; T is at most 8 and the same for all, as is the dtype of `x`, and
            that of biases. None writes its own x, or a matrix, bias or norm.
            Arrays are held, and calls see what they contain then.
        kind: of all matrices, as of block_linear.multiply.
        blocks: of the launch at most; None: as many as the GPU runs at once and have work.

    Raises:
        ShapeError, DtypeError, DeviceError, ParameterError, UnsupportedError: as
            block_linear.multiply; also where products differ in what they must share, or the GPU is
            older than sm_70.

    Attributes:
        stages: the number of each product's stage. All blocks of the launch wait for each other
            behind a stage; products of one stage need nothing of each other.

    Made on a GPU it synchronises once; a call only enqueues. Calls of one chain must not overlap:
    they share the counters by which blocks wait. Its blocks start when all of them have room:
    beside a kernel that stays on the GPU, such as a Mailbox's, it needs fewer `blocks`. While
    blocks wait for each other, the weights of the next product are on their way. Idea: the
    megakernels of HazyResearch and Cohere; barriers of a grid: Xiao and Feng, 2010.

    >>> x, y, z = (np.ones((1, 8), np.float32) for _ in range(3))
    >>> w = np.eye(8, dtype=np.float16)
    >>> Product = pykv.ops.product_chain.Product
    >>> twice = [Product(x, 2 * w, y), Product(y, 3 * w, z, accumulate=True)]
    >>> chain = pykv.ops.product_chain.ProductChain(twice, "F16")
    >>> chain()
    >>> float(z[0, 0]), chain.stages
    (7.0, [0, 1])
    """

    def __init__(
        self, products: Sequence[Product], kind: str, *, blocks: int | None = None
    ) -> None:
        if blocks is not None:
            check_whole(_OP, "blocks", blocks, 1)
        if not isinstance(products, (list, tuple)):
            raise DtypeError(f"{_OP}: products is a {type(products).__name__}, expected a list")
        self._products, self._kind = list(products), kind
        self._options = [_checked(product, kind) for product in self._products]
        _check_alike(self._products)
        self.stages = stages_of([_touched(product) for product in self._products])
        self._launch: cuda.Launch | None = None
        if on_gpu(self._products[0].x):
            self._prepare(blocks)

    def __call__(self, stream: Any = None) -> None:
        if self._launch is None:
            cuda.run_on_host(self._on_host, stream=stream)
        else:
            cuda.hold(self)  # whose arrays the program has the addresses of
            self._launch(self._arrays, stream)

    def _on_host(self) -> None:
        for p, options in zip(self._products, self._options, strict=True):
            reference(p, self._kind, options)

    def _prepare(self, blocks: int | None) -> None:
        """The launch and the program."""
        sm = cuda.current_sm()
        if sm < OLDEST_SM:
            raise UnsupportedError(
                f"{_OP}: the GPU is of sm_{sm}, expected sm_{OLDEST_SM} or newer"
            )
        products = self._products
        largest = max(products, key=lambda p: p.w.nbytes)
        rows, outs, *_ = block_linear.cut_of(largest.x, largest.w, self._kind)
        cuts = [block_linear.cut_of(p.x, p.w, self._kind, rows, outs) for p in products]
        program = np.zeros(len(products), _PHASE)
        for phase, p, cut, options, stage in zip(
            program, products, cuts, self._options, self.stages, strict=True
        ):
            for name in ("out", "x", "w", "bias", "norm"):
                array = getattr(p, name)
                phase[name] = 0 if array is None else array.data.ptr
            for name, value in block_linear.scalars_of(p.x, p.w, p.out, options, cut.parts).items():
                phase[name] = value
            phase["stage"], phase["tiles"] = stage, cut.tiles
        _check_program(program["stage"].tolist(), [_touched(p) for p in products])
        x = products[0].x
        words = like(x, (len(products), _PHASE.itemsize // 8), np.uint64)
        words.set(program.view(np.uint64).reshape(len(products), -1))
        counters = like(x, (2,), np.uint32)
        counters.fill(0)
        self._arrays = dict(program=words, counters=counters)
        load_cupy().cuda.get_current_stream().synchronize()  # calls may come on another stream

        bias = next((p.bias.dtype for p in products if p.bias is not None), FLOATS[0])
        defines = dict(KIND=self._kind, X_T=x.dtype, B_T=bias, BLOCK=_BLOCK, ROWS=rows, OUTS=outs)
        kernel = cuda.kernel("product_chain", "product_chain", **defines)
        shared = max(cut.shared_bytes for cut in cuts)
        most = min(
            cuda.cooperative_blocks(kernel, _BLOCK, shared),
            max(cut.tiles for cut in cuts),
            blocks or 2**31 - 1,
        )
        self._launch = cuda.Launch(
            kernel,
            most,
            _BLOCK,
            dict(phases=len(products)),
            shared_bytes=shared,
            cooperative=True,
        )


_OP = "product_chain.ProductChain"


def reference(product: Product, kind: str, options: Options) -> None:
    """One product, in NumPy."""
    p = product
    block_linear.reference(p.x, p.w, kind, p.bias, p.out, p.norm, options)


def _checked(product: Product, kind: str) -> Options:
    if not isinstance(product, Product):
        raise DtypeError(f"{_OP}: products has a {type(product).__name__}, expected Products")
    x, w, out, bias, norm, gate, accumulate, eps = product
    asked = Options(gate, eps, accumulate)
    if out is None:
        raise ParameterError(f"{_OP}: a product has no out, expected an array")
    dims, options = block_linear.checked(_OP, x, w, kind, bias, norm, out, asked)
    if not all(dims[letter] for letter in "TIO") or dims["T"] > _TOKENS:
        raise ShapeError(f"{_OP}: x has shape {x.shape}, expected 1 to {_TOKENS} tokens")
    return options


def _check_alike(products: list[Product]) -> None:
    """What all products of a chain must share."""
    if not products:
        raise ParameterError(f"{_OP}: products is empty, expected one or more")
    first = products[0]
    biases = {p.bias.dtype for p in products if p.bias is not None}
    if len(biases) > 1:
        raise DtypeError(f"{_OP}: biases have dtypes {biases}, expected one")
    for p in products:
        if len(p.x) != len(first.x):
            raise ShapeError(f"{_OP}: x has T={len(p.x)}, expected T={len(first.x)} as the first")
        if p.x.dtype != first.x.dtype:
            raise DtypeError(f"{_OP}: x has dtype {p.x.dtype}, expected {first.x.dtype}")
        if on_gpu(p.x) != on_gpu(first.x):
            raise DeviceError(f"{_OP}: products are of host and device, expected one")
    outs = [place_of(p.out) for p in products]
    for p in products:
        for name in ("w", "bias", "norm"):  # blocks read them before they wait
            array = getattr(p, name)
            place = None if array is None else place_of(array)
            if place is not None and any(share(place, out) for out in outs):
                raise ParameterError(f"{_OP}: a product writes {name}, expected arrays of its own")


# --- Who needs whom -------------------------------------------------------------------------------


class Touched(NamedTuple):
    """Where a phase reads, and where it writes: arrays of `overlaps.place_of`."""

    reads: list[Any]
    writes: list[Any]

    def conflicts(self, other: Touched) -> bool:
        """Whether their order matters."""
        pairs = [
            (w, r) for a, b in ((self, other), (other, self)) for w in a.writes for r in b.reads
        ]
        pairs += [(w, v) for w in self.writes for v in other.writes]
        return any(share(a, b) for a, b in pairs)


def stages_of(touched: Sequence[Touched]) -> list[int]:
    """The stage of each phase: as few as keep the order wherever it matters."""
    stages: list[int] = []
    begin = 0  # of the stage that grows
    for i, phase in enumerate(touched):
        stage = stages[-1] if stages else 0
        if any(phase.conflicts(touched[j]) for j in range(begin, i)):
            begin, stage = i, stage + 1
        stages.append(stage)
    return stages


def _check_program(stages: Sequence[int], touched: Sequence[Touched]) -> None:
    """Hold a program to what its kernel relies on: blocks that wait for a stage that never ends
    would spin for ever, and phases without a wait between would race.

    Raises:
        ParameterError: a stage is left out, or one of its phases needs another.
    """
    steps = [b - a for a, b in zip([0, *stages], stages, strict=False)]
    if stages[0] != 0 or not set(steps) <= {0, 1}:
        raise ParameterError(f"{_OP}: stages are {stages}, expected 0, 1, ... without a gap")
    for i in range(len(stages)):
        for j in range(i):
            if stages[i] == stages[j] and touched[i].conflicts(touched[j]):
                raise ParameterError(
                    f"{_OP}: phases {j} and {i} are of stage {stages[i]}, expected a wait between"
                )


def _touched(product: Product) -> Touched:
    p = product
    arrays = [place_of(array) for array in (p.x, p.w, p.bias, p.norm) if array is not None]
    return Touched(arrays, [place_of(p.out)])  # what `accumulate` reads of out it also writes


def has_kernel(kind: str) -> bool:
    """Whether the current GPU runs chains of a kind."""
    return kind in block_linear.KINDS and cuda.current_sm() >= OLDEST_SM


assert _PHASE.itemsize == 96 and set(PLAIN) <= set(block_linear.KINDS)
