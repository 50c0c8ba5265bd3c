"""The exception tree is the one its module draws."""

from __future__ import annotations

import inspect
import re

import pytest

import foresight
from foresight.engines import errors

CODES = {
    "ForesightError": 1,
    "InvalidRequest": 2,
    "BundleError": 3,
    "IntegrityError": 4,
    "CheckpointError": 1,
    "ExportError": 1,
    "EngineError": 1,
    "OutOfMemory": 1,
    "OutputError": 1,
    "Cancelled": 1,
}


def test_the_tree_is_complete() -> None:
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert classes == set(CODES)


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_every_error_has_its_exit_code_and_is_public(name: str, code: int) -> None:
    error = getattr(foresight, name)
    assert issubclass(error, foresight.ForesightError)
    assert error.exit_code == code


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_the_docstring_draws_every_error_with_its_exit_code(name: str, code: int) -> None:
    assert re.search(rf"{name} +(exit code )?{code}:", errors.__doc__ or "")


def test_an_invalid_request_is_a_value_error() -> None:
    assert issubclass(errors.InvalidRequest, ValueError)
