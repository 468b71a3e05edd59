from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msq.errors import UsageError
from msq.extract.sampling import sample_indices

# What the authors' code gives for (n, T).
OFFICIAL = {
    (5, 16): [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4],
    (30, 16): [0, 2, 4, 6, 8, 10, 12, 14, 15, 17, 19, 21, 23, 25, 27, 29],
    (41, 16): [1, 3, 6, 8, 11, 13, 16, 18, 21, 24, 26, 29, 31, 34, 36, 39],
    (300, 16): [9, 27, 46, 65, 84, 102, 121, 140, 159, 177, 196, 215, 234, 252, 271, 290],
}


@pytest.mark.parametrize(("case", "expected"), OFFICIAL.items(), ids=str)
def test_the_official_policy_gives_the_frames_of_the_authors_code(
    case: tuple[int, int], expected: list[int]
) -> None:
    assert sample_indices(*case, "official").tolist() == expected


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ((1, 4), [0, 0, 0, 0]),
        ((2, 4), [0, 0, 1, 1]),
        ((4, 4), [0, 1, 2, 3]),
        ((10, 3), [1, 5, 8]),
        ((300, 1), [150]),
    ],
)
def test_the_uniform_policy_takes_the_middle_of_equal_pieces(
    case: tuple[int, int], expected: list[int]
) -> None:
    assert sample_indices(*case).tolist() == expected


@given(n=st.integers(1, 5000), t=st.integers(1, 64))
def test_uniform_indices_are_those_of_the_printed_formula(n: int, t: int) -> None:
    assert sample_indices(n, t).tolist() == [min(int((k + 0.5) * n / t), n - 1) for k in range(t)]


@given(
    n=st.integers(1, 5000), t=st.integers(1, 64), policy=st.sampled_from(["uniform", "official"])
)
def test_indices_are_ascending_and_inside_the_clip(n: int, t: int, policy: str) -> None:
    indices = sample_indices(n, t, policy)
    assert indices.dtype == np.int64
    assert indices.shape == (t,)
    assert indices.min() >= 0
    assert indices.max() < n
    assert (np.diff(indices) >= (1 if n > t else 0)).all()


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="uniform, official; found 'random'"):
        sample_indices(10, 4, "random")


@pytest.mark.parametrize("case", [(0, 16), (10, 0)])
def test_no_frames_are_refused_and_not_indexed_with_minus_one(case: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        sample_indices(*case)
