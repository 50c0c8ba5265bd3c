"""Where arrays live: numpy on the CPU, CuPy on a GPU, behind one small seam.

CuPy mirrors numpy's functions, so the runtime computes with `arrays.xp` and asks this class only for what differs:
allocation on the right device, the way to the host and back, and the address that an engine binds.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import EngineError, InvalidRequest

# A numpy or CuPy array; CuPy ships no types, so the seam between them cannot be typed more closely.
Array: TypeAlias = Any
HostArray: TypeAlias = npt.NDArray[Any]

NUMPY_DTYPES = {"fp32": "float32", "fp16": "float16", "int64": "int64", "uint8": "uint8", "bool": "bool"}


class Arrays:
    """Arrays of one device.

    `device` is `"cpu"` or `"cuda"` / `"cuda:N"`. `xp` is the module (numpy or cupy) that computes on them.
    """

    def __init__(self, device: str = "cpu") -> None:
        kind, _, index = device.partition(":")
        if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
            raise InvalidRequest(f"device: got {device!r}, expected cpu, cuda or cuda:N")
        self.device = device
        self.kind = kind
        self.index = int(index or 0)
        self.xp: Any = np if kind == "cpu" else _cupy(self.index)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """An uninitialised array; `dtype` is a manifest dtype such as `"fp16"`."""
        return self.xp.empty(shape, numpy_dtype(dtype))

    def from_host(self, values: HostArray) -> Array:
        """`values` as a C-contiguous array on the device; no copy where it already is one."""
        return self.xp.ascontiguousarray(values) if self.kind == "cpu" else self.xp.asarray(values, order="C")

    def to_host(self, values: Array) -> HostArray:
        """`values` as a numpy array; on the CPU the array itself, not a copy."""
        return values if self.kind == "cpu" else self.xp.asnumpy(values)  # type: ignore[no-any-return]

    def address(self, values: Array) -> int:
        """The address of the first element of a C-contiguous array."""
        assert values.flags.c_contiguous, "engines bind whole, C-contiguous arrays"
        return int(values.ctypes.data if self.kind == "cpu" else values.data.ptr)

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.kind == "cuda":
            self.xp.cuda.get_current_stream().synchronize()


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype of a manifest dtype; bf16 has none."""
    if dtype not in NUMPY_DTYPES:
        raise EngineError(f"dtype {dtype}: numpy has no such type; export with --dtype fp32 or fp16 for this backend")
    return np.dtype(NUMPY_DTYPES[dtype])


def gpu_facts(device: str) -> dict[str, str]:
    """Name, compute capability and CUDA version of a GPU. Raises EngineError where there is none."""
    arrays = Arrays(device)
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


def _cupy(index: int) -> Any:
    try:
        import cupy  # type: ignore[import-not-found, unused-ignore]

        cupy.cuda.Device(index).use()
    except ImportError as error:
        raise EngineError("device cuda: CuPy is not installed; install foresight-engines[cuda]") from error
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise EngineError(
            f"device cuda:{index}: not usable ({error}); use --device cpu, or check the driver"
        ) from error
    return cupy
