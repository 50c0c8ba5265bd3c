"""Found as `tensorrt_rtx` by those who have this folder on PYTHONPATH."""

from tests.simulation.compiler import *  # noqa: F403

__version__ = "1.7.simulated"
