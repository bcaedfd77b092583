"""Figures are shown in one way."""

import pytest

from mmemb_benchmarks.results import digits


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.000123, "0.000123"),
        (0.00001234, "0.0000123"),
        (0.5, "0.5"),
        (9.999, "10"),
        (-9.994, "-9.99"),
        (123.4, "123"),
        (999.4, "999"),
        (999.6, "1000"),
        (12345, "12345"),
        (1e7, "10000000"),
    ],
)
def test_a_figure_has_three_digits_or_all_before_the_point_and_no_exponent(value: float, shown: str) -> None:
    assert digits(value) == shown
