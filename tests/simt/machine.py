"""Runs kernels_cu on the CPU: builds a kernel file with g++ and launches it on the SIMT machine.

`load`, `configure`, `pack`, `run`, `bind` and two counts are those of pykv.cuda.driver, for which
this module stands in. Compiled files are kept in the cache folder under a hash of all that went
into them. machine.cpp says what a kernel is held to.

PYKV_SIMT_SEED sets the order of blocks, warps and lanes; PYKV_ARCH the SM whose limits hold and
which __CUDA_ARCH__ names.
"""

import hashlib
import math
import os
import re
import shutil
import subprocess
import threading
from functools import cache, partial
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.lib.array_utils import byte_bounds

from pykv import cuda
from pykv.cache_folder import make_private
from pykv.errors import PykvError, a_type
from tests.simt import cupy

HERE = Path(__file__).parent
ARCH = os.environ.get("PYKV_ARCH", "sm_90").replace("compute_", "sm_")
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_CLUSTER = 8  # blocks of a cluster, unless a kernel asks for more; also of a cooperative grid
MAX_CLUSTER_THREADS = 1024  # the machine's own limit, in whole warps; also of a cooperative grid
STATIC_SHARED = 48 << 10
# Shared memory that a block may ask for (CUDA programming guide, compute capabilities).
SHARED = {70: 96, 75: 64, 80: 163, 90: 227, 100: 227}  # SM: KiB
SHARED |= dict.fromkeys((52, 60, 61), 48) | dict.fromkeys((86, 89, 120), 99)

# A parameter's type as the Itanium C++ ABI spells it, and the dtype that may be passed.
DTYPES = {
    "a": np.int8,
    "h": np.uint8,
    "t": np.uint16,
    "i": np.int32,
    "j": np.uint32,
    "x": np.int64,
    "y": np.uint64,
    "f": np.float32,
    "d": np.float64,
    "3f16": np.float16,
    "4bf16": ml_dtypes.bfloat16,
    "4e4m3": np.uint8,  # CuPy has no fp8 and int4
    "4e5m2": np.uint8,
    "2i4": np.uint8,
}
DECLARATIONS = """
struct Array { const char* name; char* begin; uint64_t bytes; int writable, shared, mapped; };
struct Launch {
    void (*call)(void**);
    void** values;
    uint32_t grid[3], block[3], cluster[3];
    struct Array* arrays;
    int num_arrays;
    char* dynamic_shared;
    int cooperative, early;
    uint64_t seed;
    char fault[1000];
    char module[1000];
    uint64_t offset;
};
int simt_run(struct Launch*);
"""
FLAGS = [
    *("-std=c++17", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"),
    *("-g1", "-gdwarf-4"),  # line numbers; only from DWARF 4 does addr2line read the names of #line
    "-fno-var-tracking",  # it takes half of a tensor-core kernel's build and serves only debuggers
    "-ffp-contract=off",
]
CHECKS = [
    # -O1 compiles a tensor-core kernel in twice the time and makes it 6 % faster.
    *("-Og", "-finline-functions-called-once", "-finline-small-functions"),
    "-fsanitize=thread",
    "-fsanitize=alignment,null,bounds,signed-integer-overflow,shift-exponent",
    "-fsanitize=integer-divide-by-zero,float-cast-overflow",
    "-Werror=uninitialized",
    *("-nostdlib", "-lgcc"),  # the machine brings C's and C++'s; the sanitizers' are not wanted
]

POISON = "-ftrivial-auto-var-init=pattern"  # fills local variables; g++ 12 and clang++ 16 have it
OWN_STATICS = "-fno-gnu-unique"  # else g++ lets libraries share the statics of inline functions

launched = set()  # (stem, kernel) of every launch so far
_lock = threading.Lock()  # there is one machine, which runs one launch at a time


class SimtError(PykvError):
    """A kernel did what no kernel may do, or was launched as none can be."""


@cache
def unavailable():
    """Why kernels cannot run here, or None."""
    try:
        import cffi  # noqa: F401
    except ImportError:
        return "cffi is not installed: pip install 'pykv-cuda[test]'"
    if _compiler() is None:
        return "there is no C++ compiler: install g++, or name one in CXX"
    if shutil.which("objdump") is None or shutil.which("addr2line") is None:
        return "objdump and addr2line are missing: install binutils"
    return None


@cache
def _compiler():
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


@cache
def version():
    """The first line of what the compiler says of itself."""
    done = subprocess.run([_compiler(), "--version"], capture_output=True, text=True)
    return done.stdout.partition("\n")[0]


@cache
def takes(flag):
    """Whether the compiler does. Without POISON, a local that is read before it is set goes unseen;
    clang++ has no OWN_STATICS and needs none."""
    command = [_compiler(), "-x", "c++", "-fsyntax-only", flag, "-"]
    return subprocess.run(command, input="", capture_output=True, text=True).returncode == 0


# --- Build ----------------------------------------------------------------------------------------


HEAD = r"__global__(\s+void\s+)(?:__launch_bounds__\(([^)]*)\))?(\s*(\w+)\s*\(([^)]*)\))"


def build(name, text, flags):
    """The shared library made of a C++ text, from the cache folder if it is there.

    What the preprocessor leaves of the text is the key: defines that change nothing share a
    library.
    """
    language = "c++"
    if "__global__" in text:
        text = f'#include "machine.hpp"\n{text}'
        text = _export_kernels(_run_compiler(name, language, text, ["-E", *FLAGS, *flags]))
        language = "c++-cpp-output"
        flags = [flag for flag in flags if flag[:2] not in ("-D", "-I")]
    parts = [version(), text, *FLAGS, *flags]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    library = cuda.cache_dir() / "simt" / f"{name}-{key}.so"
    make_private(library.parent)  # its files are executed
    if library.exists():
        return library
    scratch = library.with_suffix(f".{os.getpid()}")
    _run_compiler(name, language, text, ["-o", str(scratch), *FLAGS, *flags])
    os.replace(scratch, library)  # atomically, as another process may build the same
    return library


def _export_kernels(text):
    """The preprocessed text as C++, with functions that tell of its kernels and call them."""
    lines, names = [], []
    for _, bounds, _, kernel, listed in re.findall(HEAD, text):
        parameters = [re.search(r"\w+$", parameter.strip())[0] for parameter in listed.split(",")]
        names.append(" ".join([kernel, *parameters]))
        lines += [
            f"using Signature_{kernel} = decltype(simt::signature({kernel}));",
            f'extern "C" const char* simt_parameter_{kernel}(int i)',
            f"{{ return Signature_{kernel}::name(i); }}",
            f'extern "C" void simt_call_{kernel}(void** values)',
            f"{{ Signature_{kernel}::call({kernel}, values); }}",
            f'extern "C" int simt_max_threads_{kernel}() {{ return simt::max_threads({bounds}); }}',
        ]
    lines.append(f'extern "C" const char* simt_kernels() {{ return "{";".join(names)}"; }}')
    return re.sub(HEAD, r"\1\3", text) + "\n".join(lines)


def _run_compiler(name, language, text, flags):
    command = [_compiler(), "-x", language, "-", *flags]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise SimtError(f"{name} does not compile:\n{done.stderr}")
    return done.stdout


@cache
def _machine():
    """(cffi, the loaded machine). Global, because kernels take their built-ins from it."""
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(DECLARATIONS)
    library = build("machine", (HERE / "machine.cpp").read_text(), ["-O2"])
    return ffi, ffi.dlopen(str(library), ffi.RTLD_NOW | ffi.RTLD_GLOBAL)


@cache
def _library(stem, source, arch, macros):
    """A kernel file, built and loaded.

    Returns:
        (cffi, library, {kernel: names of its parameters}, [(owner, name, address, bytes)]): the
        last are its shared variables, whose owner is a kernel or a helper.
    """
    import cffi

    _machine()
    dynamic = r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];"
    text = re.sub(dynamic, r"\1* const \2 = (\1*)simt::dynamic_shared();", source)
    flags = [f"-I{HERE}", f"-D__CUDA_ARCH__={arch[3:]}0"]
    if arch == "sm_90":  # pykv compiles for it as sm_90a
        flags.append("-D__CUDA_ARCH_FEAT_SM90_ALL")
    flags += [f"-D{name}={value}" for name, value in macros]
    flags += [*CHECKS, *filter(takes, (POISON, OWN_STATICS))]
    path = build(stem, text, flags)

    ffi = cffi.FFI()
    ffi.cdef("const char* simt_kernels();")
    library = ffi.dlopen(str(path))
    rows = [row.split() for row in ffi.string(library.simt_kernels()).decode().split(";")]
    for name, *_ in rows:
        ffi.cdef(
            f"void simt_call_{name}(void**); const char* simt_parameter_{name}(int);"
            f"int simt_max_threads_{name}();"
        )
    symbols = subprocess.run(["objdump", "-t", path], capture_output=True, text=True).stdout
    at = int(re.search(r"^(\w+) .* simt_kernels$", symbols, re.MULTILINE)[1], 16)
    base = _address(ffi, library.simt_kernels) - at
    # Statics of a function, as the C++ ABI spells them: _ZZ6samplePiE1s is s of sample.
    pattern = r"^(\w+) .* simt_shared\s+(\w+) .*_ZZ(\d+)(\w+)E\d+(\w+?)(?:[._]\d+)*$"
    shared = [
        (owner[: int(length)], name, base + int(at, 16), int(size, 16))
        for at, size, length, owner, name in re.findall(pattern, symbols, re.MULTILINE)
    ]
    return ffi, library, {name: parameters for name, *parameters in rows}, shared


def _address(ffi, pointer):
    return int(ffi.cast("uintptr_t", pointer))


# --- Kernel and launch ----------------------------------------------------------------------------


class Kernel:
    """One kernel of a loaded library, and what it may be given."""

    def __init__(self, name, stem, *build):
        ffi, library, kernels, self.shared = _library(stem, *build)
        self.stem, self.name, self.label = stem, name, f"{stem}.cu {name}"
        self.call = _address(ffi, getattr(library, f"simt_call_{name}"))
        self.max_threads = getattr(library, f"simt_max_threads_{name}")()
        kind = getattr(library, f"simt_parameter_{name}")
        self.parameters = [  # (name, type)
            (parameter, ffi.string(kind(i)).decode()) for i, parameter in enumerate(kernels[name])
        ]
        # Shared variables of a helper count for every kernel, as its callers are not known.
        self.shared_bytes = sum(
            size for owner, _, _, size in self.shared if owner == name or owner not in kernels
        )


_kernel = cache(Kernel)


def load(arch, stem, name, **defines):
    """As pykv.cuda.driver.load."""
    macros = tuple(
        (key, str(value)) for key, value in sorted(cuda.compiler.macros(defines).items())
    )
    return _kernel(name, stem, cuda.source(stem), arch.replace("compute_", "sm_"), macros)


def configure(kernel, grid, block, shared_bytes, cluster, early=False, cooperative=False):
    """As pykv.cuda.driver.configure.

    Raises:
        SimtError: no kernel, or not this one, can be launched with such sizes.
    """
    grid, block = _three_sizes(grid), _three_sizes(block)
    _check_sizes(kernel, grid, block, shared_bytes)
    if cluster is not None:
        cluster = _three_sizes(cluster)
        _check_cluster(kernel, grid, block, cluster)
    if cooperative:
        most = cooperative_blocks(kernel, math.prod(block), shared_bytes)
        if cluster or math.prod(grid) > most:
            raise SimtError(
                f"{kernel.label}: a cooperative grid is {grid}, expected at most {most} blocks "
                f"here, with blocks of {block}, and no clusters"
            )
    early = early and int(ARCH[3:]) >= 90
    return grid, block, shared_bytes, cluster or (1, 1, 1), cooperative, early


def pack(words):
    """As pykv.cuda.driver.pack."""
    return words


def run(kernel, config, arrays, scalars, offsets=None):
    """As pykv.cuda.driver.run, with arrays of tests/simt/cupy.py."""
    if offsets is not None:
        kinds = [kind for _, kind in kernel.parameters]
        arrays = list(map(_from, arrays, offsets, kinds))
    bind(kernel, config, arrays, scalars)()


def bind(kernel, config, arrays, scalars):
    """As pykv.cuda.driver.bind."""
    kinds = [kind for _, kind in kernel.parameters]
    typed = map(_scalar, scalars, kinds[len(arrays) :])
    return partial(cupy.enqueue, _run, kernel, config, *arrays, *typed)


def _scalar(word, kind):
    """The scalar in the low bits of a word, of the type that a kernel declares."""
    return np.array([word], np.uint64).view(DTYPES[kind])[0]


def _from(array, offset, kind):
    """An array's bytes from an offset on, of the type that a kernel declares; all of one that is
    not contiguous."""
    if array is None or not array.flags.c_contiguous:
        return array
    dtype = np.dtype(DTYPES[kind.lstrip("PK")])
    count = (array.nbytes - offset) // dtype.itemsize
    return cupy.ndarray((count,), dtype, array.data + offset)


def launch(kernel, grid, block, *args, shared_bytes=0, cluster=None, **options):
    """Run a kernel that `load` returned, whatever its parameters are.

    Raises:
        SimtError: the sizes, the arguments or the kernel itself are at fault.
    """
    _run(kernel, configure(kernel, grid, block, shared_bytes, cluster, **options), *args)


def _run(kernel, config, *args):
    grid, block, shared_bytes, cluster, cooperative, early = config
    if len(args) != len(kernel.parameters):
        raise SimtError(f"{kernel.label} takes {len(kernel.parameters)} arguments, not {len(args)}")
    values, arrays = [], []
    for (name, kind), arg in zip(kernel.parameters, args, strict=True):
        values.append(_value(kernel.label, name, kind, arg))
        if isinstance(arg, cupy.ndarray):
            begin, end = byte_bounds(arg.host)
            # The host waits until other kernels end, so those may use plain accesses.
            is_mapped = cooperative and cupy.is_pinned(begin)
            arrays.append((name, begin, end, not kind.startswith("PK"), False, is_mapped))
            if arg.dtype == np.uint64 and not is_mapped:  # may be a table of addresses
                found = cupy.allocations_at(arg.host)
                arrays += [
                    (f"memory that {name} names", *bounds, True, False, False) for bounds in found
                ]
    dynamic = np.empty(shared_bytes + 1024, np.uint8)
    start = dynamic.ctypes.data + -dynamic.ctypes.data % 1024
    regions = [(name, at, at + size, True, True, False) for _, name, at, size in kernel.shared]
    regions += [("dynamic shared memory", start, start + shared_bytes, True, True, False)]
    regions += _joined(arrays)

    ffi, machine = _machine()
    names = [ffi.new("char[]", name.encode()) for name, *_ in regions]
    state = ffi.new("struct Launch*")
    state.call = ffi.cast("void (*)(void**)", kernel.call)
    pointers = ffi.new("void*[]", [ffi.cast("void*", value.ctypes.data) for value in values])
    table = ffi.new("struct Array[]", len(regions))
    state.values, state.arrays, state.num_arrays = pointers, table, len(regions)
    state.grid, state.block, state.cluster = grid, block, cluster
    state.dynamic_shared = ffi.cast("char*", start)
    state.cooperative, state.early = cooperative, early
    state.seed = int(os.environ.get("PYKV_SIMT_SEED", "0"))
    for to, name, (_, begin, end, *flags) in zip(table, names, regions, strict=True):
        to.name, to.begin, to.bytes = name, ffi.cast("char*", begin), end - begin
        to.writable, to.shared, to.mapped = flags
    kept = (names, table, pointers, values, dynamic, args)
    launched.add((kernel.stem, kernel.name))
    if cooperative and any(mapped for *_, mapped in regions):
        cupy.run_beside(partial(_finish, kernel, state, kept))  # while the host talks to it
    else:
        _finish(kernel, state, kept)


def _finish(kernel, state, kept):
    """Run what is prepared; `kept` is the memory that it touches."""
    ffi, machine = _machine()
    with _lock:
        failed = machine.simt_run(state)
    if failed < 0:
        raise MemoryError(f"{kernel.label}: no memory to watch its arrays")
    if failed:
        raise SimtError(f"{kernel.label}, {ffi.string(state.fault).decode()}{_place(ffi, state)}")


def active_clusters(kernel, block, cluster, shared_bytes):
    """As pykv.cuda.driver.active_clusters: two blocks an SM."""
    return 2 * cupy.NUM_SMS // math.prod(cluster)


def cooperative_blocks(kernel, block, shared_bytes):
    """As pykv.cuda.driver.cooperative_blocks: as many as the machine has threads for."""
    return min(MAX_CLUSTER, MAX_CLUSTER_THREADS // (-(-block // 32) * 32))


def _three_sizes(sizes):
    return (*np.atleast_1d(sizes).tolist(), 1, 1)[:3]


def _check_cluster(kernel, grid, block, cluster):
    expected = None
    if int(ARCH[3:]) < 90:
        expected = f"none on {ARCH}: sm_90 is the first with clusters"
    elif not all(size > 0 and n % size == 0 for n, size in zip(grid, cluster, strict=True)):
        expected = f"sizes that divide those of the grid, {grid}"
    elif math.prod(cluster) > MAX_CLUSTER:
        expected = f"at most {MAX_CLUSTER} blocks"
    elif math.prod(cluster) * -(-math.prod(block) // 32) * 32 > MAX_CLUSTER_THREADS:
        expected = f"at most {MAX_CLUSTER_THREADS} threads here, with blocks of {block}"
    if expected:
        raise SimtError(f"{kernel.label}: cluster is {cluster}, expected {expected}")


def _check_sizes(kernel, grid, block, shared_bytes):
    threads = math.prod(block)
    for what, sizes, limits in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
        if not all(0 < size <= limit for size, limit in zip(sizes, limits, strict=True)):
            raise SimtError(f"{kernel.label}: {what} is {sizes}, expected 1 to {limits}")
    if threads > kernel.max_threads:
        raise SimtError(
            f"{kernel.label}: block is {block}, expected at most {kernel.max_threads} threads"
        )
    static, limit = kernel.shared_bytes, SHARED[int(ARCH[3:])] << 10
    if static > STATIC_SHARED or static + shared_bytes > limit:
        raise SimtError(
            f"{kernel.label}: {static} bytes of static and {shared_bytes} of dynamic shared "
            f"memory, expected at most {STATIC_SHARED}, and {limit} in all on {ARCH}"
        )


def _value(label, name, kind, arg):
    """The bytes that a kernel's parameter receives, as an array of one element."""
    pointee = kind.removeprefix("P").removeprefix("K") if kind.startswith("P") else None
    wanted = np.dtype(DTYPES[pointee or kind])
    if pointee and arg is None:
        return np.zeros(1, np.uint64)
    if pointee and isinstance(arg, cupy.ndarray) and arg.dtype == wanted:
        return np.array([arg.data.ptr], np.uint64)
    if not pointee and isinstance(arg, np.generic) and arg.dtype == wanted:
        return np.array([arg])
    given = f"{a_type(arg)} of {getattr(arg, 'dtype', 'no dtype')}"
    expected = f"{'an array' if pointee else 'a scalar'} of {wanted}"
    raise SimtError(f"{label}: {name} is {given}, expected {expected}")


def _joined(arrays):
    """The same memory, with arrays that overlap made one."""
    joined = []
    for array in sorted(arrays, key=lambda array: array[1:3]):
        if joined and array[1] < joined[-1][2]:
            name, begin, end, writable, _, mapped = joined[-1]
            joined[-1] = (
                *(f"{name}, {array[0]}", begin, max(end, array[2]), writable or array[3], False),
                mapped,
            )
        else:
            joined.append(array)
    return joined


def _place(ffi, state):
    """The source lines of a fault's address, innermost first."""
    if state.module[0] == b"\0":
        return ""
    command = ["addr2line", "-i", "-e", ffi.string(state.module).decode(), hex(state.offset)]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    lines = [Path(line.split(" (")[0]).name for line in lines if "machine.hpp" not in line]
    return f" at {', called at '.join(lines)}"
