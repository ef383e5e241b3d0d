"""Kernel files to cubins: source, NVRTC, the cache folder, and the warm-up at import.

A kernel file of `kernels_cu` becomes one string (`source`) and one cubin for each SM and set of
defines (`compile`), kept on disk. No GPU is needed, and no CUDA context is created.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from pykv.arrays import FLOATS
from pykv.cache_folder import cache_dir, delete, make_private
from pykv.cuda.devices import load_core, split_arch
from pykv.errors import CompileError, DeviceError, UnsupportedError
from pykv.install import command

_PACKAGE = Path(__file__).resolve().parent.parent
# Inside the package when installed from a wheel, beside it in a checkout or editable install.
_PLACES = [folder / "kernels_cu" for folder in (_PACKAGE, _PACKAGE.parent)]
KERNELS = next(filter(Path.is_dir, _PLACES), _PLACES[0])
if not KERNELS.is_dir():
    raise ImportError(f"{KERNELS} is no folder: pykv does not run from a zip")


# Element type to its name in kernels_cu. Keyed by dtype: looking up dtype.name takes microseconds.
TYPE_NAMES = dict(zip(FLOATS, ("float", "f16", "bf16"), strict=True))

# --- Source and cubin -----------------------------------------------------------------------------


@cache
def source(stem: str) -> str:
    """The text of kernels_cu/<stem>.cu with the headers that it includes pasted in.

    Each header is pasted once, at its first include. `#line` directives keep the compiler's
    messages on the original file and line. The pasted text is complete, so the cache key covers all
    of it, no include path exists, and an edited header invalidates only the kernels that include
    it.
    """
    path = KERNELS / f"{stem}.cu"
    if not path.is_file():
        raise UnsupportedError(f"cuda.source: stem is {stem!r}, expected one of {stems()}")
    return "\n".join(_paste(path, set())) + "\n"


def _paste(path: Path, pasted: set[str]) -> list[str]:
    """The lines of a file, with those of its headers that are not in `pasted` so far."""
    lines = [f'#line 1 "{path.name}"']
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith('#include "'):
            name = line.split('"')[1]
            if name not in pasted:
                pasted.add(name)
                lines += _paste(KERNELS / name, pasted)
            line = f'#line {number + 1} "{path.name}"'
        lines.append(line)
    return lines


def stems() -> list[str]:
    """The names of all kernel files."""
    return sorted(path.stem for path in KERNELS.glob("*.cu"))


def macros(defines: dict[str, Any], arch: str = "sm_0") -> dict[str, int | str]:
    """Defines for the compiler, for one SM: replaces dtypes of float arrays by their names in
    kernels_cu, and functions of `by_sm` by their values."""
    given = {name: x(split_arch(arch)[1]) if callable(x) else x for name, x in defines.items()}
    return {name: TYPE_NAMES[x] if isinstance(x, np.dtype) else x for name, x in given.items()}


def by_sm(make: Callable[..., dict[str, int]], *args: Any) -> dict[str, Callable[[int], int]]:
    """Defines `make(sm, *args)` for an SM to be known later, for `VARIANTS`."""

    def value(name: str, sm: int) -> int:
        return make(sm, *args)[name]

    return {name: partial(value, name) for name in make(90, *args)}


def compile(stem: str, arch: str, **defines: Any) -> Any:
    """The cubin or PTX of kernels_cu/<stem>.cu for one SM and one set of defines.

    Args:
        stem: name of the kernel file.
        arch: "sm_75" and the like for a cubin, "compute_75" and the like for PTX, which the
            driver turns into code for the GPU it finds. No GPU is needed.
        defines: `-D` macros; an integer, a type name such as "f16", a dtype of float arrays, or a
            function of `by_sm`.

    Returns:
        cuda.core.ObjectCode, from the cache folder if that holds an intact copy.

    Raises:
        ParameterError: `arch` is malformed.
        UnsupportedError: this NVRTC cannot target the SM.
        CompileError: NVRTC refused the source.
        DeviceError: cuda.core or NVRTC is not installed.
    """
    ObjectCode = load_core().ObjectCode
    kind, _ = split_arch(arch)
    defines = macros(defines, arch)
    key, options = _key(stem, arch, defines)
    code = _load(key)
    if code is None:
        _check_arch(arch, f"{stem}.cu with {defines}")
        try:
            code = (_make_ptx if kind == "compute" else _make_cubin)(source(stem), options)
        except CompileError as error:
            raise CompileError(f"{stem}.cu for {arch} with {defines}:\n{error}") from error
        _store(key, code)
    return (ObjectCode.from_ptx if kind == "compute" else ObjectCode.from_cubin)(code, name=stem)


def _make_cubin(text: str, options: Any) -> bytes:
    from cuda.core import Program

    try:
        return bytes(Program(text, "c++", options).compile("cubin").code)
    except Exception as error:
        if type(error).__name__ != "NVRTCError":  # cuda.core does not export the class
            raise
        raise CompileError(str(error)) from error


def _make_ptx(text: str, options: Any) -> bytes:
    """PTX through NVRTC's own functions, because `Program` needs the driver to make PTX."""
    nvrtc = _nvrtc()
    program = nvrtc.nvrtcCreateProgram(text.encode(), options.name.encode(), 0, [], [])[1]
    arguments = options.as_bytes("nvrtc")
    (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
    refused = status != nvrtc.nvrtcResult.NVRTC_SUCCESS
    answer = "ProgramLog" if refused else "PTX"
    content = bytearray(getattr(nvrtc, f"nvrtcGet{answer}Size")(program)[1])
    getattr(nvrtc, f"nvrtcGet{answer}")(program, content)
    nvrtc.nvrtcDestroyProgram(program)
    if refused:
        raise CompileError(content.rstrip(b"\0").decode())
    return bytes(content)


def _key(stem: str, arch: str, defines: dict[str, Any]) -> tuple[bytes, Any]:
    """The cache key, from source, SM, defines and NVRTC version; and the compiler's options.

    The key of PTX leaves out the version, so that a cache folder can supply PTX for an SM that the
    present NVRTC no longer targets.
    """
    from cuda.core import ProgramOptions
    from cuda.core.utils import make_program_cache_key

    text = source(stem)
    defined = [(name, str(value)) for name, value in sorted(macros(defines, arch).items())]
    options = ProgramOptions(
        name=f"{stem}.cu",
        arch="sm_90a" if arch == "sm_90" else arch,  # sm_90a adds wgmma; the same GPUs run it
        std="c++17",
        lineinfo=True,  # profilers name the source line; the code is the same
        define_macro=defined or None,
    )
    if split_arch(arch)[0] == "compute":
        return hashlib.sha256(repr((text, arch, defined)).encode()).digest(), options
    key = make_program_cache_key(code=text, code_type="c++", options=options, target_type="cubin")
    return key, options


# SMs that the oldest supported NVRTC does not target: the first version that does.
_SINCE = {100: "12.8", 103: "12.9", 110: "13.0", 120: "12.8", 121: "12.9"}


def _check_arch(arch: str, wanted: str = "the kernels") -> None:
    known, (kind, number) = _targets(), split_arch(arch)
    if number in known:
        return
    advice = (
        f"expected NVRTC {_SINCE[number]} or newer"
        if number in _SINCE
        else "expected a newer NVRTC"
    )
    if number < 75 and min(known) >= 75:
        advice = f"install the CUDA 12 packages instead: {command('cu12')}"
    if kind == "compute":
        advice += f", or bring PTX of {wanted} in {cubin_dir()}, as tools/make_ptx.py does"
    raise UnsupportedError(
        f"cuda.compile: arch is {arch}, but NVRTC {nvrtc_version()} targets "
        f"sm_{min(known)} to sm_{max(known)}: {advice}"
    )


@cache
def _targets() -> tuple[int, ...]:
    return tuple(_nvrtc().nvrtcGetSupportedArchs()[1])


def nvrtc_version() -> str:
    """The version of the NVRTC library that is loaded, such as "13.5"."""
    return "{}.{}".format(*_nvrtc().nvrtcVersion()[1:])


@cache
def _nvrtc() -> Any:
    """The bindings of NVRTC, after a check that its library is present."""
    from cuda.bindings import nvrtc
    from cuda.pathfinder import DynamicLibNotFoundError

    try:
        nvrtc.nvrtcVersion()
    except DynamicLibNotFoundError as error:
        raise DeviceError(f"the NVRTC library is missing: {command('cu13')} (or [cu12])") from error
    return nvrtc


# --- Cache of cubins ------------------------------------------------------------------------------

_memory: dict[bytes, bytes] = {}  # cubins that could not be stored in the cache folder


@cache
def _store_at(path: Path) -> Any:
    """The store in a folder.

    Raises:
        OSError: the folder cannot be made or opened, or others can write to it: cubins are code,
            and their checksums have no key.
    """
    from cuda.core.utils import FileStreamProgramCache

    make_private(path)
    return FileStreamProgramCache(path)


def _load(key: bytes) -> bytes | None:
    """A cubin from the cache folder, if its checksum matches; deletes a damaged one."""
    if key in _memory:
        return _memory[key]
    try:
        store = _store_at(cubin_dir())
        entry = store.get(key)
    except OSError:
        return None
    if entry is None:
        return None
    cubin, digest = entry[:-32], entry[-32:]
    if hashlib.sha256(cubin).digest() == digest:
        return bytes(cubin)
    with suppress(OSError, KeyError):
        del store[key]
    return None


def _store(key: bytes, cubin: bytes) -> None:
    """Store a cubin, followed by its SHA-256, which tools that read ELF files ignore."""
    try:
        _store_at(cubin_dir())[key] = cubin + hashlib.sha256(cubin).digest()
    except OSError as error:
        is_first = not _memory
        _memory[key] = cubin
        if is_first:
            warnings.warn(
                f"pykv cannot keep compiled kernels in {error.filename or cubin_dir()} "
                f"({error.strerror}); they are compiled again in every process. Set "
                "PYKV_CACHE_DIR to a folder that you alone can write",
                RuntimeWarning,
                stacklevel=2,
            )


def cubin_dir() -> Path:
    """The part of the cache folder that holds cubins."""
    return cache_dir() / "cubin"


def clear_cubins() -> int:
    """Delete all compiled kernels and return the bytes freed; other files stay."""
    freed = delete(cubins())
    emptied = [*cubin_dir().glob("entries/[0-9a-f][0-9a-f]"), cubin_dir() / "entries"]
    for folder in (*emptied, cubin_dir() / "tmp", cubin_dir()):
        with suppress(OSError):  # the folder is absent or still holds files
            folder.rmdir()
    _store_at.cache_clear()
    _memory.clear()
    return freed


def cubins() -> list[Path]:
    """The files of the cache folder that hold compiled kernels: complete entries, which cuda.core
    names by SHA-256, and files whose write was interrupted."""
    names = ("entries/[0-9a-f][0-9a-f]/*", "tmp/entry-*")
    paths = [path for name in names for path in cubin_dir().glob(name)]
    entry = re.compile(r"[0-9a-f]{62}|entry-\w+")
    return [path for path in paths if entry.fullmatch(path.name) and not path.is_symlink()]


# --- Warm-up --------------------------------------------------------------------------------------


def variants(arch: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Every (stem, defines) that the ops declare as `VARIANTS`: the usual specialisations.

    Args:
        arch: leave out ops whose `VARIANTS_SMS` lacks this SM: they do not run there, or compile
            at their first call; None: all.
    """
    from importlib import import_module

    sm = None if arch is None else split_arch(arch)[1]
    ops = {stem: import_module(f"pykv.ops.{stem}") for stem in stems()}
    return [
        (stem, defines)
        for stem, op in ops.items()
        if sm is None or sm in getattr(op, "VARIANTS_SMS", (sm,))
        for defines in op.VARIANTS
    ]


def warmup(archs: list[str], *, force: bool = False) -> int:
    """Compile the variants that the cache folder lacks, in parallel, and return their number.

    Reports on stderr that it compiles, on a terminal with a counter. With `force` a failure raises;
    otherwise it becomes one warning, so that `import pykv` works on a GPU that NVRTC cannot target.
    """
    jobs = [(arch, stem, defines) for arch in archs for stem, defines in variants(arch)]
    started = done = 0
    what = f"pykv: compiling kernels for {', '.join(archs)}"
    try:
        missing = [job for job in jobs if not is_cached(*job)]
        started = len(missing)
        if missing:
            _say(f"{what}: {started} in all", to_terminal=False)
            missing.sort(key=lambda job: -len(source(job[1])))  # start the longest compiles first
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for _ in pool.map(lambda job: compile(job[1], job[0], **job[2]), missing):
                    done += 1
                    _say(f"{what}: {done}/{started}", to_terminal=True, end="\r")
    except (UnsupportedError, CompileError, DeviceError) as error:
        if force:
            raise
        warnings.warn(f"pykv cannot compile its kernels: {error}", RuntimeWarning, stacklevel=2)
    finally:
        if started:
            _say("", to_terminal=True)
    return done


def is_cached(arch: str, stem: str, defines: dict[str, Any]) -> bool:
    """Whether the cache holds an intact cubin."""
    _check_arch(arch)
    return _load(_key(stem, arch, defines)[0]) is not None


def _say(text: str, *, to_terminal: bool, end: str = "\n") -> None:
    """Write to stderr only if it is a terminal, or only if it is not: logs get no counters."""
    if sys.stderr and sys.stderr.isatty() == to_terminal:
        print(text, end=end, file=sys.stderr, flush=True)
