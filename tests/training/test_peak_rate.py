"""The rule of the automatic learning rate, by hand.

uv run pytest tests/training/test_peak_rate.py
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuning.training.peak_rate import automatic_rate


@pytest.mark.parametrize(
    ("hidden_size", "passes", "rate"),
    [
        (2560, 1.0, 3.1e-4),  # 0.225 ** 0.78 = 0.3124
        (576, 2.54, 9.8e-4),  # 2.5 / 2.54 = 0.984
        (576, 6.82, 3.7e-4),  # 2.5 / 6.82 = 0.367
        (256, 1.0, 1e-3),  # both at their ends
        (576, 2.5, 1e-3),
        (4096, 3.0, 1.8e-4),  # 0.2165 · 0.8333
        (4096, 0.01, 2.2e-4),
        (256, 25.0, 1e-4),
        (0, 1.0, 3.1e-4),  # not known: as 2,560
    ],
)
def test_the_rate_is_that_of_the_rule_and_a_tenth_for_all_weights(hidden_size, passes, rate):
    assert automatic_rate(hidden_size, passes, trains_all=False) == rate
    assert automatic_rate(hidden_size, passes, trains_all=True) == pytest.approx(rate / 10, rel=0)


@given(st.integers(1, 100_000), st.integers(1, 100_000), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_larger_models_and_more_passes_have_no_higher_rate(one, other, few, many):
    small, large, few, many = *sorted((one, other)), *sorted((few, many))
    rates = [
        automatic_rate(size, passes, trains_all=False)
        for size, passes in ((small, few), (small, many), (large, many))
    ]
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0 and rates[0] <= 1e-3
    assert all(float(f"{rate:.1e}") == rate for rate in rates), "two digits"
