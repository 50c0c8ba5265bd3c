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
    "QueueFull": 1,
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


class Secretive:
    def __repr__(self) -> str:
        raise LookupError("not for you")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a dog", "'a dog'"),
        (3, "3"),
        (None, "None"),
        ("a" * 40, repr("a" * 40)),
        ("a" * 41, "'" + "a" * 40 + "…"),
        ("two\nlines", r"'two\nlines'"),
    ],
)
def test_what_a_caller_passed_is_quoted_as_python_writes_it(value: object, expected: str) -> None:
    assert errors.quoted(value) == expected


def test_what_cannot_be_quoted_is_named() -> None:
    assert "Secretive" in errors.quoted(Secretive())


@pytest.mark.parametrize(
    "value",
    ["\ud800" * 10**6, b"\0" * 10**6, list(range(10**6)), 10**5000, [["a" * 10**6] * 9] * 9, {"a" * 10**6: 1}],
    ids=lambda value: type(value).__name__,
)
def test_what_is_quoted_is_short(value: object) -> None:
    assert len(errors.quoted(value)) <= errors.QUOTED + 2
