"""Found as `cupy` by those who have this folder on PYTHONPATH."""

from typing import Any

from tests.simulation.gpu import (
    asarray,
    ascontiguousarray,
    asnumpy,
    cuda,
    empty,
    from_dlpack,
    function,
    ndarray,
)

__version__ = "0.simulated"
__all__ = ["asarray", "ascontiguousarray", "asnumpy", "cuda", "empty", "from_dlpack", "ndarray"]


def __getattr__(name: str) -> Any:
    return function(name)
