"""As much of CuPy as pykv's ops and their tests use, over host memory.

Like CuPy's, its arrays do not turn into NumPy's unasked: an op that mixes the two fails here as it
would on a GPU. What `empty` returns is poisoned.
"""

import math
import threading
import time
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import ml_dtypes
import numpy as np
from numpy.lib.array_utils import byte_bounds

DEVICE = 1000  # an ordinal that no GPU has, since pykv keeps facts by ordinal
OTHER = DEVICE + 1  # a second GPU, whose memory is what was allocated while it was the current one
NUM_SMS = 16
ALIGNMENT = 256  # cudaMalloc aligns to so many bytes
GUARD = 1 << 16  # bytes between arrays, so that an overflow does not hit the next one
_live = weakref.WeakValueDictionary()  # (first address, end) of each allocation to its memory


class MemoryPointer:
    """The address of a NumPy array, or one within it, that keeps the memory alive."""

    def __init__(self, host):
        self.host = host
        self.ptr = host.ctypes.data if host.size or host.base is not None else 0

    @property
    def device_id(self):
        return device_of(self.ptr)

    @property
    def mem(self):
        """The allocation, which is not told from what lies within it."""
        return self

    def __add__(self, offset):
        return MemoryPointer(self.bytes()[offset:])

    def bytes(self):
        """From the first element on, those between rows with gaps included."""
        if self.host.flags.c_contiguous:
            return self.host.reshape(-1).view(np.uint8)
        size = byte_bounds(self.host)[1] - self.ptr
        return np.lib.stride_tricks.as_strided(self.host[..., :1].view(np.uint8), (size,), (1,))

    def memset_async(self, value, nbytes):
        enqueue(self.bytes().__setitem__, slice(nbytes), value)


class ndarray:
    """A device array; `host` is the NumPy array behind it."""

    __array_ufunc__ = None  # NumPy then leaves mixed arithmetic to this class, which refuses it

    def __init__(self, host, dtype=None, memptr=None, strides=None):
        """Around a NumPy array, or as CuPy's: a shape, and the memory from where on it lies."""
        at = None if memptr is None else memptr.bytes()
        self.host = host if at is None else np.ndarray(host, dtype, at, strides=strides)

    @property
    def data(self):
        return MemoryPointer(self.host)

    def get(self, stream=None):
        _refuse_capture("get")
        return self.host.copy()

    def set(self, values, stream=None):
        """As CuPy's, which neither converts nor broadcasts, and waits unless a stream is given."""
        if stream is None:
            _refuse_capture("set")
        if not isinstance(values, np.ndarray) or values.dtype != self.dtype:
            raise TypeError(f"set of {values!r}, expected a NumPy array of {self.dtype}")
        if values.shape != self.shape:
            raise ValueError(f"set of shape {values.shape}, expected {self.shape}")
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("set of an array with gaps")
        self.host[...] = values

    def fill(self, value):
        enqueue(self.host.fill, value or 0)  # CuPy fills +0 where it is given -0

    def __array__(self, *args, **kwargs):
        raise TypeError("a device array becomes a NumPy array by .get() alone")

    def __getattr__(self, name):
        if name.startswith("__"):  # else NumPy would find the host's __array_interface__
            raise AttributeError(name)
        return _device(getattr(self.host, name))

    def __getitem__(self, key):
        return _device(self.host[_host(key)])

    def __setitem__(self, key, value):
        enqueue(self.host.__setitem__, _host(key), _host(value))

    def __len__(self):
        return len(self.host)

    def __bool__(self):
        _refuse_capture("bool")
        return bool(self.host)


def _refuse_capture(name):
    """Raise where CuPy would wait for a stream that is being captured."""
    if Stream.captured is not None:
        raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {name}")


def _operator(name):
    return lambda self, *others: _device(getattr(self.host, name)(*_host(others)))


def _in_place(name):
    def change(self, other):
        enqueue(getattr(self.host, name), _host(other))
        return self

    return change


_BINARY = "or xor lshift rshift add sub mul truediv floordiv mod pow and"
OPERATORS = f"{_BINARY} neg invert eq ne lt gt ge".split()
for _name in OPERATORS:
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))
for _name in _BINARY.split():
    setattr(ndarray, f"__i{_name}__", _in_place(f"__i{_name}__"))


def _host(x):
    if isinstance(x, tuple):
        return tuple(map(_host, x))
    if isinstance(x, np.ndarray):
        raise TypeError("a NumPy array beside a device array")
    return x.host if isinstance(x, ndarray) else x


def _device(x):
    """Arrays become device arrays; functions become such that take and return them."""
    if isinstance(x, np.ndarray | np.generic):
        x = np.asarray(x)
        # New memory gets its guard; sparse giants have a mapping of their own.
        return array(x) if x.flags.owndata and x.nbytes < 1 << 24 else ndarray(x)
    if not callable(x) or isinstance(x, type):
        return x
    return lambda *args, **options: _device(
        x(*_host(args), **{name: _host(option) for name, option in options.items()})
    )


def __getattr__(name):
    """All else is NumPy's."""
    return _device(getattr(np, name))


def asarray(x, dtype=None):
    if isinstance(x, ndarray):
        return x if dtype is None else x.astype(dtype, copy=False)
    return array(x, dtype)


def array(x, dtype=None):
    x = np.asarray(x.host if isinstance(x, ndarray) else x, dtype)
    made = empty(x.shape, x.dtype)
    made.host[...] = x
    return made


def _allocate(size):
    return np.empty(size, np.uint8)


def empty(shape, dtype=np.float32):
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return ndarray(np.empty(shape, dtype))  # an empty array has no memory and no address
    memory = _allocate(nbytes + 2 * GUARD + ALIGNMENT)
    start = GUARD + -(memory.ctypes.data + GUARD) % ALIGNMENT
    inside = memory[start : start + nbytes]
    inside.fill(0xFF)  # NaN in every float type
    bounds = inside.ctypes.data, inside.ctypes.data + nbytes
    _live[bounds] = memory
    if Device.current == DEVICE:
        _elsewhere.pop(bounds, None)
    else:
        _elsewhere[bounds] = Device.current
    return ndarray(inside.view(dtype).reshape(shape))


_elsewhere = {}  # bounds of allocations that are on another GPU than DEVICE; some may be gone


def device_of(address):
    """The GPU whose memory an address is."""
    if not _elsewhere:
        return DEVICE
    found = allocations_at(np.array([address], np.uint64))
    return _elsewhere.get(found[0], DEVICE) if found else DEVICE


def allocations_at(addresses):
    """(first address, end) of every live allocation that one of the addresses lies in."""
    bounds = [(0, 0), *sorted(_live.data)]  # of `data`, while threads allocate
    bounds = np.array(bounds, np.uint64)  # (0, 0) contains no address
    found = np.searchsorted(bounds[:, 0], addresses.reshape(-1), "right").astype(np.int64) - 1
    inside = addresses.reshape(-1) < bounds[found, 1]
    return [tuple(map(int, bounds[i])) for i in np.unique(found[inside])]


_pinned = weakref.WeakValueDictionary()  # like _live, for the host's pinned memory


def _pin(size):
    memory = empty(size, np.uint8).host
    bounds = memory.ctypes.data, memory.ctypes.data + size
    _pinned[bounds] = _live[bounds]
    return memory


def is_pinned(address):
    """Whether it lies in pinned memory, which the host may touch while a kernel does."""
    return any(first <= address < end for first, end in list(_pinned))


_registered = {}  # address -> other memory that was page-locked


def _register(address, size, flags):
    if any(address < at + len(x) and at < address + size for at, x in _registered.items()):
        raise CUDARuntimeError("cudaErrorHostMemoryAlreadyRegistered")
    memory = _at(address, (size,), np.uint8, (1,))
    _registered[address] = _live[address, address + size] = memory


def _unregister(address):
    if _registered.pop(address, None) is None:
        raise CUDARuntimeError("cudaErrorHostMemoryNotRegistered")


# --- Kernels that run while the host goes on ------------------------------------------------------


def run_beside(work):
    """Run a kernel in a thread; `synchronize` of the current stream waits for it and raises what it
    raised, where there is none that of any."""
    errors = []

    def run():
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()  # first: a finalizer may synchronise at any point
    beside = Stream.within[-1].beside if Stream.within else Stream.of_none
    beside.append((thread, errors))


# --- Memory by its address, and cuBLAS ------------------------------------------------------------


def _at(address, shape, dtype, strides):
    """The array at an address, strides in elements."""
    import cffi

    ffi = cffi.FFI()
    dtype = np.dtype(dtype)
    count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    memory = ffi.buffer(ffi.cast("char*", address), count * dtype.itemsize)
    strides = [stride * dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(np.frombuffer(memory, dtype), shape, strides)


def copy_bytes(to, at, size):
    """Copy between two addresses; the ranges may overlap."""
    _at(to, (size,), np.uint8, (1,))[...] = _at(at, (size,), np.uint8, (1,))


def _gemm_ex(
    handle, op_a, op_b, m, n, k, alpha, a, type_a, lda, b, type_b, ldb, beta, c, type_c, ldc, *rest
):
    """c = alpha * a.T @ b + beta * c, or of a itself, column-major; b is not transposed."""
    assert op_b == cublas.CUBLAS_OP_N
    steps = (lda, 1) if op_a == cublas.CUBLAS_OP_T else (1, lda)
    alpha, beta = (_at(scalar, (1,), np.float32, (1,))[0] for scalar in (alpha, beta))
    a, b = _at(a, (m, k), TYPES[type_a], steps), _at(b, (n, k), TYPES[type_b], (ldb, 1))
    c = _at(c, (n, m), TYPES[type_c], (ldc, 1))
    product = alpha * (b.astype(np.float64) @ a.T.astype(np.float64))
    c[...] = (product + (beta * c.astype(np.float64) if beta else 0)).astype(c.dtype)


def _attributes(address):
    """Memory that no array here holds is what a GPU calls pageable."""
    known = len(allocations_at(np.array([address], np.uint64))) > 0
    # cudaMemoryTypeDevice, cudaMemoryTypeUnregistered
    return SimpleNamespace(type=2 if known else 0, device=device_of(address))


class CUDARuntimeError(RuntimeError):
    """Raised for host memory alone."""


def enqueue(work, *args, **options):
    """Do it, or while a stream is being captured, keep it for the graph."""
    if Stream.captured is None:
        work(*args, **options)
    else:
        Stream.captured.append(partial(work, *args, **options))


class _PerThread(type):
    """Each thread has a current GPU of its own."""

    _of_thread = threading.local()

    @property
    def current(cls):
        return getattr(cls._of_thread, "ordinal", DEVICE)

    @current.setter
    def current(cls, ordinal):
        cls._of_thread.ordinal = ordinal


class Device(metaclass=_PerThread):
    """A GPU, which a context makes the current one."""

    attributes = {"MultiProcessorCount": NUM_SMS}

    def __init__(self, ordinal=DEVICE):
        self.ordinals = [ordinal]

    def __enter__(self):
        self.ordinals.append(Device.current)
        Device.current = self.ordinals[0]
        return self

    def __exit__(self, *error):
        Device.current = self.ordinals.pop()


class Stream:
    """As much of a stream as capturing into a graph needs."""

    captured = None  # the work recorded so far, while a stream is being captured
    within = []  # streams of the `with` statements around
    of_none = []  # as `beside`, of kernels that were launched outside of them

    def __init__(self, non_blocking=False):
        assert non_blocking  # since the legacy default stream cannot be captured
        self.beside = []  # threads that run kernels, each with what it raised

    def __enter__(self):
        Stream.within.append(self)
        return self

    def __exit__(self, *error):
        Stream.within.pop()

    def begin_capture(self):
        Stream.captured = []

    def end_capture(self):
        calls, Stream.captured = Stream.captured, None
        return SimpleNamespace(launch=lambda: [call() for call in calls])

    def wait_event(self, event):
        pass

    def synchronize(self):
        for beside in (self.beside, Stream.of_none):
            while beside:
                thread, errors = beside.pop()
                thread.join()
                if errors:
                    raise errors[0]

    @property
    def done(self):
        runs = any(thread.is_alive() for thread, _ in self.beside + Stream.of_none)
        if runs:
            time.sleep(0.001)  # a host that asks over and over would take the kernel's core
        return not runs


class Event:
    """Everything is done when the call returns, so every event has happened."""

    ptr, done = 0, True

    def __init__(self, disable_timing=False):
        pass

    def record(self, stream):
        pass

    def synchronize(self):
        pass


TYPES = {0: np.float32, 2: np.float16, 14: ml_dtypes.bfloat16}  # cudaDataType
cublas = SimpleNamespace(
    CUBLAS_OP_N=0,
    CUBLAS_OP_T=1,
    CUBLAS_POINTER_MODE_HOST=0,
    CUBLAS_POINTER_MODE_DEVICE=1,
    CUBLAS_COMPUTE_32F=68,
    CUBLAS_GEMM_DEFAULT=-1,
    getMathMode=lambda handle: 0,
    setMathMode=lambda handle, mode: None,
    setPointerMode=lambda handle, mode: None,
    gemmEx=_gemm_ex,
)


def get_default_memory_pool():
    return SimpleNamespace(free_bytes=lambda: 0, free_all_blocks=lambda: None)


cuda = SimpleNamespace(
    alloc_pinned_memory=_pin,
    PinnedMemory=lambda size: empty(size, np.uint8).host,
    PinnedMemoryPointer=lambda memory, offset: memory[offset:],
    cublas=cublas,
    device=SimpleNamespace(get_cublas_handle=lambda: 0),
    get_current_stream=lambda: SimpleNamespace(
        ptr=int(Stream.captured is not None),
        synchronize=lambda: None,
        wait_event=lambda event: None,
    ),
    Event=Event,
    Stream=Stream,
    # Memory that another array holds and keeps alive: pinned memory of the host.
    UnownedMemory=lambda address, nbytes, owner, device: _at(address, (nbytes,), np.uint8, (1,)),
    MemoryPointer=lambda memory, offset: MemoryPointer(memory[offset:]),
    MemoryPool=lambda allocate: SimpleNamespace(malloc=None),  # freed memory is not reused here
    using_allocator=lambda malloc: nullcontext(),
    get_elapsed_time=lambda started, finished: 0.001,  # milliseconds
    runtime=SimpleNamespace(
        getDevice=lambda: Device.current,
        getDeviceCount=lambda: 1,
        memGetInfo=lambda: (16 << 30, 16 << 30),
        deviceGetAttribute=lambda attribute, device: 0,
        cudaDevAttrPageableMemoryAccess=88,
        pointerGetAttributes=_attributes,
        hostRegister=_register,
        hostUnregister=_unregister,
        memoryTypeUnregistered=0,
        memoryTypeHost=1,
        memoryTypeDevice=2,
        memcpyAsync=lambda dst, src, size, kind, stream: copy_bytes(dst, src, size),
        streamIsCapturing=lambda stream: Stream.captured is not None,
        eventRecord=lambda event, stream: None,
        eventQuery=lambda event: 0,
        CUDARuntimeError=CUDARuntimeError,
    ),
    Device=Device,
)
