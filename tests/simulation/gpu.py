"""A GPU that is none: what this project uses of CuPy's interface, over numpy, and stricter than a GPU would be.

The code that drives a GPU runs on it as it is, so mistakes show that a GPU would forgive now and then: fresh memory
is full of NaNs; a download holds NaNs until it is waited for; an array that one stream still works on cannot be
touched by another; arrays of the host are refused where CuPy would copy them. Memory is counted and runs out.

`tests/simulation/modules` has modules of the libraries' names; with that folder on PYTHONPATH they are found instead.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

TOTAL_BYTES = 2 << 30
ALIGNMENT = 512  # of CuPy's pool
GARBAGE = 0xFF  # NaN in every floating-point type
# Functions of numpy that CuPy has under the same name, as far as they are used.
FUNCTIONS = frozenset({"add", "concatenate", "isfinite", "sqrt", "subtract"})


class CUDARuntimeError(RuntimeError):
    """As cupy.cuda.runtime's."""


class CUDADriverError(RuntimeError):
    """As cupy.cuda.driver's."""


class OutOfMemoryError(MemoryError):
    """As cupy.cuda.memory's."""

    def __init__(self, size: int, total: int) -> None:
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes).")


class _Here(threading.local):
    """What this thread works with."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.allocators: list[Callable[[int], Memory]] = []


_here = _Here()


class Stream:
    """Work is done when it is asked for; what others may see of it before they wait is what is simulated."""

    _numbers = itertools.count(1)
    by_number: ClassVar[weakref.WeakValueDictionary[int, Stream]] = weakref.WeakValueDictionary()

    def __init__(self, non_blocking: bool = False) -> None:
        self.non_blocking = non_blocking
        self.ptr = next(self._numbers)
        self.asked = 0
        self.finished = 0
        self.capture: list[Callable[[Stream], None]] | None = None
        self._downloads: list[tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self._lock = threading.RLock()
        self.by_number[self.ptr] = self

    def __enter__(self) -> Stream:
        _here.streams.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _here.streams.pop()

    def ask(self) -> int:
        """One more thing to do; returns its number."""
        if self.capture is not None:
            raise CUDARuntimeError(
                "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing"
            )
        with self._lock:
            self.asked += 1
            return self.asked

    def finish(self, number: int) -> None:
        """Wait until that much is done."""
        with self._lock:
            self.finished = max(self.finished, number)
            for when, host, values in self._downloads:
                if when <= number:
                    host[...] = values
            self._downloads = [download for download in self._downloads if download[0] > number]

    def synchronize(self) -> None:
        """Wait for everything."""
        self.finish(self.asked)

    def record(self) -> Event:
        """An event after everything so far."""
        return Event(self, self.asked)

    def download(self, host: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> None:
        """Bring `values`, as they are now, to the host, where nobody can tell when they arrive."""
        host.reshape(-1).view(np.uint8)[...] = GARBAGE
        with self._lock:
            self._downloads.append((self.ask(), host, values.copy()))

    def begin_capture(self) -> None:
        """From now on kernels are recorded, not run."""
        if self.capture is not None:
            raise CUDARuntimeError("cudaErrorIllegalState: the stream is capturing already")
        self.capture = []

    def end_capture(self) -> Graph:
        """What was recorded."""
        if self.capture is None:
            raise RuntimeError("the stream is not capturing")
        recorded, self.capture = self.capture, None
        return Graph(recorded)

    def launch(self, kernel: Callable[[Stream], None]) -> None:
        """Run a kernel, or record it."""
        if self.capture is None:
            kernel(self)
        else:
            self.capture.append(kernel)


class Event:
    """A point in a stream's work."""

    def __init__(self, stream: Stream, number: int) -> None:
        self._stream = stream
        self._number = number

    def synchronize(self) -> None:
        """Wait until the stream got there."""
        self._stream.finish(self._number)


class Graph:
    """Recorded kernels, with the addresses that they were recorded with."""

    def __init__(self, kernels: list[Callable[[Stream], None]]) -> None:
        self._kernels = kernels

    def launch(self, stream: Stream) -> None:
        """Run them all."""
        for kernel in self._kernels:
            stream.launch(kernel)


DEFAULT_STREAM = Stream()


def current_stream() -> Stream:
    """The stream that this thread works on."""
    return _here.streams[-1] if _here.streams else DEFAULT_STREAM


class Memory:
    """One allocation. It goes back to its pool when nobody refers to it any more."""

    live: ClassVar[weakref.WeakValueDictionary[int, Memory]] = weakref.WeakValueDictionary()

    def __init__(self, raw: np.ndarray[Any, Any], size: int) -> None:
        start = -raw.ctypes.data % ALIGNMENT
        self.bytes = raw[start : start + size]
        self.bytes[...] = GARBAGE
        self.ptr = self.bytes.ctypes.data if size else 0
        self._last: tuple[Stream, int] | None = None
        if size:
            self.live[self.ptr] = self

    def use(self, stream: Stream) -> None:
        """A stream works on it. No other may, unless that was waited for."""
        if self._last is not None:
            other, number = self._last
            assert other is stream or number <= other.finished, "an array is used while another stream works on it"
        self._last = (stream, stream.ask())

    def hand_over(self) -> None:
        """What comes next is put in order by whoever asks for it, as DLPack does."""
        self._last = None


def use_memory(address: int, size: int, stream: Stream) -> np.ndarray[Any, Any]:
    """The bytes at an address, which have to lie within one allocation that is still there."""
    for memory in (reference() for reference in Memory.live.valuerefs()):  # a copy: other threads allocate meanwhile
        start = 0 if memory is None else memory.ptr
        if memory is not None and start <= address and address + size <= start + len(memory.bytes):
            memory.use(stream)
            return memory.bytes[address - start : address - start + size]
    raise AssertionError(f"no allocation that is still there holds {size} bytes at {address}")


class MemoryPool:
    """Keeps what was freed for later arrays of the same size on the same stream, as CuPy's does."""

    pools: ClassVar[weakref.WeakSet[MemoryPool]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], list[np.ndarray[Any, Any]]] = {}
        self._total = 0
        self._lock = threading.RLock()
        self.pools.add(self)

    def malloc(self, size: int) -> Memory:
        """Memory of that size."""
        rounded = -(-size // ALIGNMENT) * ALIGNMENT
        key = (current_stream().ptr, rounded)
        with self._lock:
            kept = self._kept.get(key)
            raw = kept.pop() if kept else self._take(rounded)
        memory = Memory(raw, rounded)
        weakref.finalize(memory, self._keep, key, raw).atexit = False
        return memory

    def free_bytes(self) -> int:
        """What is kept and not used."""
        with self._lock:
            return sum(size * len(kept) for (_, size), kept in self._kept.items())

    def total_bytes(self) -> int:
        """What was taken from the device."""
        return self._total

    def free_all_blocks(self) -> None:
        """Give what is kept back to the device."""
        with self._lock:
            self._total -= self.free_bytes()
            self._kept.clear()

    def _take(self, size: int) -> np.ndarray[Any, Any]:
        if size > memory_info()[0]:
            self.free_all_blocks()
        if size > memory_info()[0]:
            raise OutOfMemoryError(size, self._total)
        self._total += size
        return np.empty(size + ALIGNMENT, np.uint8)

    def _keep(self, key: tuple[int, int], raw: np.ndarray[Any, Any]) -> None:
        with self._lock:
            self._kept.setdefault(key, []).append(raw)


def memory_info() -> tuple[int, int]:
    """Free and total bytes of the device."""
    return TOTAL_BYTES - sum(pool.total_bytes() for pool in list(MemoryPool.pools)), TOTAL_BYTES


DEFAULT_POOL = MemoryPool()


@contextmanager
def using_allocator(allocator: Callable[[int], Memory]) -> Iterator[None]:
    """Arrays that this thread makes take their memory from there."""
    _here.allocators.append(allocator)
    try:
        yield
    finally:
        _here.allocators.pop()


class ndarray(NDArrayOperatorsMixin):
    """An array of the device."""

    def __init__(self, memory: Memory, values: np.ndarray[Any, Any]) -> None:
        self.data = memory if values.size == 0 else _Pointer(memory, values.ctypes.data)
        self._memory = memory
        self._values = values

    shape = property(lambda self: self._values.shape)
    dtype = property(lambda self: self._values.dtype)
    ndim = property(lambda self: self._values.ndim)
    size = property(lambda self: self._values.size)
    nbytes = property(lambda self: self._values.nbytes)
    flags = property(lambda self: self._values.flags)

    def use(self) -> np.ndarray[Any, Any]:
        """The values, for work on the current stream."""
        self._memory.use(current_stream())
        return self._values

    def hand_over(self) -> ndarray:
        """The same memory, for whatever stream comes next."""
        self._memory.hand_over()
        return ndarray(self._memory, self._values)

    def get(
        self, stream: Stream | None = None, out: np.ndarray[Any, Any] | None = None, blocking: bool = True
    ) -> np.ndarray[Any, Any]:
        """A copy on the host."""
        stream = stream or current_stream()
        self._memory.use(stream)
        host = np.empty(self.shape, self.dtype) if out is None else out
        assert host.shape == self.shape and host.dtype == self.dtype and host.flags.c_contiguous
        stream.download(host, self._values)
        if blocking:
            stream.synchronize()
        return host

    def astype(self, dtype: Any) -> ndarray:
        """A copy on the device, of another type."""
        return _made(self.use().astype(dtype))

    def copy(self) -> ndarray:
        """A copy on the device."""
        return _made(self.use())

    def reshape(self, *shape: int) -> ndarray:
        """A view, where it can be one."""
        return ndarray(self._memory, self._values.reshape(*shape))

    def mean(self, axis: int | None = None) -> ndarray:
        """Along an axis, or of all."""
        return _made(np.asarray(self.use().mean(axis=axis)))

    def max(self) -> ndarray:
        """The largest of all, NaN if any is: an array of one."""
        return _made(np.asarray(self.use().max()))

    def min(self) -> ndarray:
        """The smallest of all, NaN if any is: an array of one."""
        return _made(np.asarray(self.use().min()))

    def all(self) -> ndarray:
        """Whether all are true: an array of one."""
        return _made(np.asarray(self.use().all()))

    def __array__(self, *arguments: object, **settings: object) -> np.ndarray[Any, Any]:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = (), **settings: Any) -> Any:
        assert method == "__call__", method
        given = [_values(value) for value in inputs]
        if out:
            ufunc(*given, out=tuple(_values(array) for array in out), **settings)
            return out[0]
        return _made(ufunc(*given, **settings))

    def __array_function__(self, function: Any, *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} was given an array of the device")

    def __getitem__(self, index: Any) -> ndarray:
        indices = index if isinstance(index, tuple) else (index,)
        if any(isinstance(i, (ndarray, np.ndarray)) for i in indices):
            return _made(self.use()[tuple(_values(i) if isinstance(i, (ndarray, np.ndarray)) else i for i in indices)])
        return ndarray(self._memory, self._values[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.use()[index] = _values(value)

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[index] for index in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


class _Pointer:
    """Where an array begins."""

    def __init__(self, memory: Memory, address: int) -> None:
        self.memory = memory
        self.ptr = address


def _made(values: np.ndarray[Any, Any]) -> ndarray:
    """Values as a new array."""
    made = empty(values.shape, values.dtype)
    made.use()[...] = values
    return made


def _values(value: Any) -> Any:
    """What numpy computes with. Arrays of the host are refused."""
    if isinstance(value, ndarray):
        return value.use()
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError(f"Unsupported type {type(value)}")
    return value


def empty(shape: tuple[int, ...], dtype: Any) -> ndarray:
    """An array full of garbage."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = (_here.allocators[-1] if _here.allocators else DEFAULT_POOL.malloc)(size)
    return ndarray(memory, memory.bytes[:size].view(dtype).reshape(shape))


def asarray(values: Any, order: str = "C") -> ndarray:
    """An array of the device, from the host or as it is. The host's is copied at once."""
    if isinstance(values, ndarray):
        return ascontiguousarray(values)
    made = empty(np.shape(values), np.asarray(values).dtype)
    made.use()[...] = values
    made._memory.hand_over()
    return made


def ascontiguousarray(values: ndarray) -> ndarray:
    """The array itself, or a copy in order."""
    return values if values.flags.c_contiguous else values.copy()


def asnumpy(values: ndarray) -> np.ndarray[Any, Any]:
    """A copy on the host."""
    return values.get()


def from_dlpack(values: Any) -> ndarray:
    """An array that somebody else made."""
    if values.__dlpack_device__()[0] != 2:
        raise BufferError("CPU arrays cannot be directly imported to CuPy")
    assert isinstance(values, ndarray)
    return values.hand_over()


def function(name: str) -> Callable[..., Any]:
    """A function of numpy's, on arrays of the device."""
    if name not in FUNCTIONS:
        raise AttributeError(f"the simulated CuPy has no {name}; if CuPy has it, add it to FUNCTIONS")

    def call(*arguments: Any, **settings: Any) -> Any:
        if isinstance(getattr(np, name), np.ufunc):
            return getattr(np, name)(*arguments, **settings)
        return _made(getattr(np, name)([_values(value) for value in arguments[0]], **settings))

    return call


def empty_pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """As cupyx's: memory of the host that the device may write to."""
    return np.empty(shape, dtype)


class _Runtime:
    """As cupy.cuda.runtime."""

    CUDARuntimeError = CUDARuntimeError
    memGetInfo = staticmethod(memory_info)

    @staticmethod
    def getDeviceProperties(index: int) -> dict[str, Any]:
        """What is asked of them."""
        return {"name": b"simulated GPU", "major": 0, "minor": 0}

    @staticmethod
    def runtimeGetVersion() -> int:
        """Of CUDA."""
        return 13000


class Device:
    """There is one."""

    def __init__(self, index: int) -> None:
        self.id = index

    def __enter__(self) -> Device:
        if self.id:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def use(self) -> None:
        """Make it this thread's."""
        self.__enter__()


class _Errors:
    def __init__(self, **errors: type[Exception]) -> None:
        self.__dict__.update(errors)


class cuda:
    """As cupy.cuda."""

    Device = Device
    Stream = Stream
    MemoryPool = MemoryPool
    using_allocator = staticmethod(using_allocator)
    runtime = _Runtime
    memory = _Errors(OutOfMemoryError=OutOfMemoryError)
    driver = _Errors(CUDADriverError=CUDADriverError)


def read(address: int, size: int) -> bytes:
    """Bytes of an allocation, for who has checked that it is there."""
    return ctypes.string_at(address, size)
