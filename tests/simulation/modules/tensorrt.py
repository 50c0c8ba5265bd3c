"""Found as `tensorrt` by those who have this folder on PYTHONPATH."""

from tests.simulation.compiler import *  # noqa: F403

__version__ = "11.0.simulated"
