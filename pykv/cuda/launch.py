"""Kernels and their launches, by name.

Only the .cu file declares a kernel's parameters: `kernel` reads their names, order and types there,
and `Launch` takes arrays and scalars by name. So host and kernel cannot disagree about the order,
and every number is passed at its declared width.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from pykv.cuda import driver
from pykv.cuda.calls import enqueue, is_preparing
from pykv.cuda.compiler import macros, source
from pykv.cuda.devices import current_arch
from pykv.errors import DtypeError, ParameterError, UnsupportedError, a_type

SCALARS: dict[str, type[Any]] = {  # allowed types of a kernel's scalars
    "int": np.int32,
    "u32": np.uint32,
    "i64": np.int64,
    "u64": np.uint64,
    "float": np.float32,
}

MOST_BLOCKS = 2**31 - 1, 65_535, 65_535  # of a grid, along x, y and z; the same on every GPU

_PARAMETERS = f"arrays first, then scalars of {', '.join(SCALARS)}"


class Signature(NamedTuple):
    """A kernel's parameters as its file declares them: arrays first, then scalars."""

    arrays: tuple[str, ...]
    scalars: dict[str, str]  # name to C type
    written: tuple[str, ...]  # the arrays whose parameters are not const


class Kernel(NamedTuple):
    """A kernel that is loaded: its name, the driver's handle and its parameters."""

    label: str
    handle: Any
    arrays: tuple[str, ...]
    scalars: dict[str, str]
    written: tuple[str, ...]


def kernel(stem: str, name: str, **defines: Any) -> Kernel:
    """The kernel `name` of kernels_cu/<stem>.cu for the current GPU; compiled at first use.

    Args:
        stem, name: of the file and the kernel.
        defines: `-D` macros: integers, type names such as "f16", or dtypes of float arrays.
    """
    return _kernel(driver, current_arch(), stem, name, **macros(defines))


@cache
def _kernel(driver: Any, arch: str, stem: str, name: str, **defines: int | str) -> Kernel:
    handle = driver.load(arch, stem, name, **defines)
    return Kernel(f"{stem}.cu {name}", handle, *signature(stem, name))


@cache
def signature(stem: str, name: str) -> Signature:
    """The parameters of a kernel.

    Raises:
        UnsupportedError: the file has no such kernel, or one with a scalar before an array, or with
            a scalar of a type outside of `SCALARS`.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", source(stem), flags=re.DOTALL)
    bounds = r"(?:__launch_bounds__\([^)]*\)\s*)?"
    head = rf"__global__\s+void\s+{bounds}{re.escape(name)}\s*\(([^)]*)\)"
    found = re.search(head, text)
    if not found:
        raise UnsupportedError(f"cuda.kernel: {stem}.cu has no kernel {name}")
    arrays: list[str] = []
    scalars: dict[str, str] = {}
    written: list[str] = []
    for declared in found[1].split(","):
        *words, parameter = declared.replace("*", " * ").split()
        c_type = " ".join(words)
        if "*" in words and not scalars:
            arrays.append(parameter)
            if "const" not in words[: words.index("*")]:
                written.append(parameter)
        elif c_type in SCALARS:
            scalars[parameter] = c_type
        else:
            wrong = f"cuda.kernel: {stem}.cu {name}: {parameter} is a {c_type}"
            raise UnsupportedError(f"{wrong}, expected {_PARAMETERS}")
    return Signature(tuple(arrays), scalars, tuple(written))


class Launch:
    """A kernel with its launch shape and scalars, for any arrays of one layout.

    Args:
        kernel: the result of `kernel`.
        grid, block: sizes in blocks and threads.
        scalars: plain numbers by the kernel's parameter names; passed as the types that the kernel
            declares.
        shared_bytes: dynamic shared memory of a block.
        cluster: cluster size in blocks, which must divide the grid; from sm_90 on.
        early: the kernel may start before the previous kernel of the stream has ended (programmatic
            dependent launch); it calls `await_previous` before it reads others' results, or writes.
            No effect below sm_90, or in a graph after a node that is not a kernel.
        cooperative: all blocks are resident at once, so that they may wait for each other; at most
            `cooperative_blocks`.

    Raises:
        ParameterError: a scalar is missing, unknown or beyond its type, or the cluster does not
            divide the grid.
        DtypeError: a scalar is no number, or no integer where the kernel takes one.
        UnsupportedError: the grid has more than MOST_BLOCKS.
        CudaError: the GPU has less shared memory.

    A call takes arrays by the kernel's parameter names (CuPy arrays, or None for a null pointer)
    and a stream, see `on_stream`. It enqueues the kernel without synchronising; while `prepare`
    records, it is recorded instead. The call raises:
        ParameterError: an array is missing or unknown.
        DtypeError: an argument is no array.
        CudaError: the driver refused the launch, or reports an earlier kernel's failure.
    """

    __slots__ = ("_config", "_scalars", "kernel")

    def __init__(
        self,
        kernel: Kernel,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        scalars: Mapping[str, Any] | None = None,
        *,
        shared_bytes: int = 0,
        cluster: tuple[int, ...] | None = None,
        early: bool = False,
        cooperative: bool = False,
    ) -> None:
        self.kernel = kernel
        self._scalars = driver.pack(_words(kernel, scalars or {}))
        sizes = grid if isinstance(grid, tuple) else (grid,)
        if any(size > most for size, most in zip(sizes, MOST_BLOCKS, strict=False)):
            raise UnsupportedError(
                f"cuda.Launch: {kernel.label}: grid is {sizes}, expected at most {MOST_BLOCKS}"
            )
        self._config = driver.configure(
            kernel.handle, grid, block, shared_bytes, cluster, early, cooperative
        )

    def __call__(self, arrays: Mapping[str, Any], stream: Any = None) -> None:
        kernel = self.kernel
        try:
            ordered = [arrays[name] for name in kernel.arrays]
        except KeyError:
            ordered = []
        if len(ordered) != len(arrays) or not ordered:
            raise _names_error(kernel, "arrays", arrays, kernel.arrays)
        if is_preparing():
            bound = driver.bind(kernel.handle, self._config, ordered, self._scalars)
            enqueue(bound, stream, (self, ordered))
        else:
            run = partial(driver.run, kernel.handle, self._config, ordered, self._scalars)
            enqueue(run, stream, (self, ordered))

    def run(self, arrays: Sequence[Any], offsets: Sequence[int] | None = None) -> None:
        """Enqueue the kernel on CuPy's current stream; no step that could be recorded.

        Args:
            arrays: in the kernel's order.
            offsets: bytes to add to their addresses; None: zeros.
        """
        driver.run(self.kernel.handle, self._config, arrays, self._scalars, offsets)


def _words(kernel: Kernel, scalars: Mapping[str, Any]) -> tuple[int, ...]:
    """Scalars in the kernel's order, of its types, each in the low bits of a word of 64."""
    if scalars.keys() != kernel.scalars.keys():
        raise _names_error(kernel, "scalars", scalars, kernel.scalars)
    typed = (_cast(kernel, name, c_type, scalars[name]) for name, c_type in kernel.scalars.items())
    return tuple(int.from_bytes(x.tobytes(), sys.byteorder) for x in typed)


def _cast(kernel: Kernel, name: str, c_type: str, value: Any) -> Any:
    """A number as the type that a kernel declares. NumPy's own conversions would silently truncate
    fractions, and turn None into NaN."""
    argument = f"cuda.Launch: {kernel.label}: {name}"
    try:
        if c_type != "float":
            return SCALARS[c_type](operator.index(value))
        if not isinstance(value, (float, int, np.floating, np.integer)):
            raise TypeError
        with np.errstate(over="raise"):
            return np.float32(value)
    except (OverflowError, FloatingPointError) as error:
        raise ParameterError(f"{argument} is {value}, expected what {c_type} holds") from error
    except (TypeError, ValueError) as error:
        raise DtypeError(f"{argument} is {a_type(value)}, expected {c_type}") from error


def _names_error(
    kernel: Kernel, what: str, given: Iterable[str], expected: Iterable[str]
) -> Exception:
    return ParameterError(
        f"cuda.Launch: {kernel.label} is given {what} {', '.join(given)}, expected "
        f"{', '.join(expected)}"
    )


def active_clusters(kernel: Kernel, block: int, cluster: tuple[int, ...], shared_bytes: int) -> int:
    """The number of clusters of a kernel's blocks that the current GPU runs at once."""
    return int(driver.active_clusters(kernel.handle, block, cluster, shared_bytes))


def cooperative_blocks(kernel: Kernel, block: int, shared_bytes: int = 0) -> int:
    """The number of a kernel's blocks that the current GPU runs at once, which may wait for each
    other in a cooperative launch."""
    return int(driver.cooperative_blocks(kernel.handle, block, shared_bytes))


def divisor(name: str, n: int) -> dict[str, int]:
    """The scalars with which a kernel divides by `n`, from 1 to 2^31 - 1: `name`, and `name`_magic
    and `name`_shift of kernels_cu/divide.cuh. Exact for dividends below 2^31."""
    shift = (n - 1).bit_length()
    return {name: n, f"{name}_magic": -(-(2 ** (31 + shift)) // n), f"{name}_shift": shift}
