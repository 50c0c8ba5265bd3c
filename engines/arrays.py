"""Where arrays live: numpy on the CPU, CuPy on a GPU, behind one small seam.

CuPy mirrors numpy's functions, so the runtime computes with `arrays.xp` and asks this class only for what differs:
allocation on the right device, the way to the host and back, the address that an engine binds, and waiting.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import EngineError, InvalidRequest, OutOfMemory, one_line

# A numpy or CuPy array; CuPy ships no types, so the seam between them cannot be typed more closely.
Array: TypeAlias = Any
HostArray: TypeAlias = npt.NDArray[Any]

NUMPY_DTYPES = {"fp32": "float32", "fp16": "float16", "int64": "int64", "uint8": "uint8", "bool": "bool"}
MEBI = 2**20


class Download(Protocol):
    """An array on its way to the host."""

    def wait(self) -> HostArray:
        """The array, once it is there; not to be written to."""


class Arrays:
    """Arrays of the CPU; the GPU's override what differs there.

    `device` is `"cpu"`, or `"cuda:N"`, whose `kind` is `"cuda"` and whose `index` is N. `xp` is the module (numpy or
    cupy) that computes on them. Everything that touches arrays of a GPU, `xp` included, happens inside `active()`.
    """

    kind = "cpu"
    index = 0
    xp: Any = np

    def __init__(self) -> None:
        self.device = "cpu"

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes the device, its stream and its memory pool those of this thread; leaving it waits for the device.

        Raises OutOfMemory, with the sizes, where memory runs out; what was allocated inside is then free again.
        """
        try:
            yield
        except MemoryError as error:
            raise OutOfMemory(f"device cpu: out of memory, {one_line(error)}; {_SMALLER}") from error

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """An uninitialised array; `dtype` is a manifest dtype such as `"fp16"`."""
        return self.xp.empty(shape, numpy_dtype(dtype))

    def from_host(self, values: HostArray) -> Array:
        """`values` as a C-contiguous array on the device; no copy where it already is one."""
        return np.ascontiguousarray(values)

    def to_host(self, values: Array) -> HostArray:
        """`values` as a numpy array; on the CPU the array itself, not a copy."""
        return values  # type: ignore[no-any-return]

    def start_download(self, values: Array) -> Download:
        """Begin to bring `values`, as they are when the device gets there, to the host; nothing waits for it.

        On the CPU it is the array itself: wait for it before you write to it.
        """
        return _Here(values)

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""

    def address(self, values: Array) -> int:
        """The address of the first element of a C-contiguous array."""
        assert values.flags.c_contiguous, "engines bind whole, C-contiguous arrays"
        return int(values.ctypes.data)

    def free_bytes(self) -> int | None:
        """Bytes that could be allocated now; None where that is not known."""
        return _available_memory(Path("/proc/meminfo"), CGROUP)

    def used_bytes(self) -> int | None:
        """The most bytes that arrays of this device have taken so far; None where that is not counted."""
        return None

    def trim(self) -> None:
        """Give memory that is kept for later arrays back to the device."""
        if _malloc_trim is not None:
            _malloc_trim(0)


class GpuArrays(Arrays):
    """Arrays of one NVIDIA GPU: one stream on which everything happens in order, and one pool of memory.

    The stream does not wait for the default stream of other libraries in the process, nor they for it; arrays handed
    over by DLPack are put in order by that protocol.
    """

    kind = "cuda"

    def __init__(self, index: int = 0) -> None:
        self.device = f"cuda:{index}"
        self.index = index
        self.xp = _cupy(index)
        self._device = self.xp.cuda.Device(index)
        with self._device:
            self.stream = self.xp.cuda.Stream(non_blocking=True)
        self._pool = self.xp.cuda.MemoryPool()

    @contextmanager
    def active(self) -> Iterator[None]:
        """See Arrays.active."""
        cuda = self.xp.cuda
        try:
            with self._device, cuda.using_allocator(self._pool.malloc), self.stream:
                try:
                    yield
                finally:
                    self.stream.synchronize()
        except cuda.memory.OutOfMemoryError as error:
            self.trim()
            free, total = self._memory()
            raise OutOfMemory(
                f"device {self.device}: out of memory, {one_line(error)}; {free // MEBI} of {total // MEBI} MiB are "
                f"free; {_SMALLER}"
            ) from error
        except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError) as error:  # the latter where kernels start
            raise EngineError(f"device {self.device}: {one_line(error)}") from error

    def from_host(self, values: HostArray) -> Array:
        """See Arrays.from_host."""
        return self.xp.asarray(values, order="C")

    def to_host(self, values: Array) -> HostArray:
        """See Arrays.to_host. Waits for what computes them."""
        return self.xp.asnumpy(values)  # type: ignore[no-any-return]

    def start_download(self, values: Array) -> Download:
        """See Arrays.start_download. The host's copy is pinned, so that the device writes it by itself."""
        import cupyx  # type: ignore[import-not-found, import-untyped, unused-ignore]

        host = cupyx.empty_pinned(values.shape, values.dtype)
        values.get(stream=self.stream, out=host, blocking=False)
        return _OnItsWay(host, self.stream.record())

    def synchronize(self) -> None:
        """See Arrays.synchronize."""
        self.stream.synchronize()

    def address(self, values: Array) -> int:
        """See Arrays.address."""
        assert values.flags.c_contiguous, "engines bind whole, C-contiguous arrays"
        return int(values.data.ptr)

    def free_bytes(self) -> int | None:
        """See Arrays.free_bytes."""
        with self._device:  # a pool counts what it has of the device at hand
            return self._memory()[0] + int(self._pool.free_bytes())

    def used_bytes(self) -> int | None:
        """See Arrays.used_bytes: the pool keeps what it once took, until it is trimmed."""
        with self._device:
            return int(self._pool.total_bytes())

    def trim(self) -> None:
        """See Arrays.trim."""
        with self._device:
            self.stream.synchronize()
            self._pool.free_all_blocks()

    def _memory(self) -> tuple[int, int]:
        with self._device:
            free, total = self.xp.cuda.runtime.memGetInfo()
        return int(free), int(total)


def parse_device(device: str) -> tuple[str, int]:
    """Kind and index of `"cpu"`, `"cuda"` or `"cuda:N"`. Raises InvalidRequest for anything else."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or device.startswith("cpu:"):
        raise InvalidRequest(f"device: got {device!r}, expected cpu, cuda or cuda:N")
    return kind, int(index or 0)


def create_arrays(device: str) -> Arrays:
    """Arrays of a device: `"cpu"`, `"cuda"` or `"cuda:N"`. Raises InvalidRequest, EngineError."""
    kind, index = parse_device(device)
    return Arrays() if kind == "cpu" else GpuArrays(index)


def select_device(device: str) -> None:
    """Make a GPU the one that this thread's calls of CUDA mean. Raises InvalidRequest, EngineError."""
    index = parse_device(device)[1]
    _cupy(index).cuda.Device(index).use()


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype of a manifest dtype. Raises EngineError for bf16 where ml_dtypes, which has it, is missing."""
    if dtype != "bf16":
        return np.dtype(NUMPY_DTYPES[dtype])
    try:
        import ml_dtypes  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise EngineError("dtype bf16: numpy has no such type without ml_dtypes; pip install ml_dtypes") from error
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def gpu_facts(device: str) -> dict[str, str]:
    """Name, compute capability and CUDA version of a GPU. Raises EngineError where there is none."""
    arrays = create_arrays(device)
    if arrays.kind != "cuda":
        raise InvalidRequest(f"device: got {device}, expected cuda or cuda:N")
    runtime = arrays.xp.cuda.runtime
    properties = runtime.getDeviceProperties(arrays.index)
    version = runtime.runtimeGetVersion()
    return {
        "gpu": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "cuda": f"{version // 1000}.{version % 1000 // 10}",
    }


class _Here:
    """On the CPU an array has no way to go."""

    def __init__(self, values: HostArray) -> None:
        self._values = values

    def wait(self) -> HostArray:
        return self._values


class _OnItsWay:
    """A pinned array that the device fills before it reaches an event."""

    def __init__(self, values: HostArray, event: Any) -> None:
        self._values = values
        self._event = event

    def wait(self) -> HostArray:
        self._event.synchronize()
        return self._values


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # of glibc
_SMALLER = "use fewer prompts at once, a smaller cache_memory, or low_memory"
CGROUP = Path("/sys/fs/cgroup")


def _available_memory(meminfo: Path, cgroup: Path) -> int | None:
    """What the system says is available, and no more than what the container may still take."""
    try:
        lines = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int((cgroup / "memory.max").read_text(encoding="utf-8"))
        used = int((cgroup / "memory.current").read_text(encoding="utf-8"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="utf-8").splitlines())
        used -= int(stat["inactive_file"])  # cached files, which make room when asked to
    except (OSError, KeyError, ValueError):  # no container, or one without a limit, which says "max"
        return available
    return min(available, max(0, limit - used))


def _cupy(index: int) -> Any:
    try:
        import cupy  # type: ignore[import-not-found, unused-ignore]

        with cupy.cuda.Device(index):  # the caller's device stays the one it was
            cupy.cuda.runtime.memGetInfo()
    except ImportError as error:
        raise EngineError(
            f"device cuda: CuPy is not installed ({one_line(error)}); install foresight-engines[cuda]"
        ) from error
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise EngineError(f"device cuda:{index}: not usable ({error}); use device cpu, or check the driver") from error
    return cupy
