"""The families of models, for tests and benchmarks: random checkpoints, published configurations, original code.

A family's file is called as its module in exporter/models, so the rows of exporter/registry.py find it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from foresight.exporter.registry import REGISTRY, find_model
from zoo.base import Family, Published

FAMILIES: dict[str, Family] = {
    name: import_module(f"zoo.{name}").FAMILY for name in dict.fromkeys(row.family for row in REGISTRY.values())
}
PUBLISHED: dict[str, Published] = {
    model: published for family in FAMILIES.values() for model, published in family.published.items()
}


def family_of(model: str) -> Family:
    """The family of a model by its name on the command line. Raises InvalidRequest."""
    return FAMILIES[find_model(model).family]


def write_published(model: str, folder: Path) -> Path:
    """Write a published model's configurations as a checkpoint without weights; returns its folder."""
    return PUBLISHED[model].write(folder)
