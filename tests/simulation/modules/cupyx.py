"""Found as `cupyx` by those who have this folder on PYTHONPATH."""

from tests.simulation.gpu import empty_pinned

__all__ = ["empty_pinned"]
