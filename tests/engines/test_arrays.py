"""The seam between numpy and CuPy, on the side that every machine has."""

from __future__ import annotations

import numpy as np
import pytest

from foresight.engines.arrays import NUMPY_DTYPES, Arrays, numpy_dtype


def test_a_contiguous_host_array_is_taken_as_it_is() -> None:
    given = np.zeros((2, 3), np.float32)
    assert Arrays().from_host(given) is given


def test_a_view_is_made_contiguous() -> None:
    taken = Arrays().from_host(np.arange(6).reshape(2, 3).T)
    assert taken.flags.c_contiguous and taken.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_the_address_is_that_of_the_first_element() -> None:
    given = np.zeros((4, 3), np.float32)
    assert Arrays().address(given[1:]) == Arrays().address(given) + 12


def test_what_is_not_contiguous_has_no_address() -> None:
    with pytest.raises(AssertionError, match="contiguous"):
        Arrays().address(np.zeros((4, 3))[:, :2])


@pytest.mark.parametrize(("dtype", "name"), NUMPY_DTYPES.items())
def test_manifest_dtypes_are_numpy_dtypes(dtype: str, name: str) -> None:
    assert numpy_dtype(dtype) == np.dtype(name)
