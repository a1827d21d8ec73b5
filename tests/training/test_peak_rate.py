"""The rule of the automatic learning rate, by hand.

uv run pytest tests/training/test_peak_rate.py
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuning.training.peak_rate import automatic_rate, more_teaches


@pytest.mark.parametrize(
    ("hidden_size", "passes", "tokens", "rate"),
    [
        (2560, 2.8, 2000, 3.1e-4),  # 0.225 ** 0.78 = 0.3124
        (2560, 1.0, 2000, 5e-4),  # at most 1.6 times that
        (576, 2.54, 1808, 1.1e-3),  # (2.8 / 2.54) ** 1.5 · 0.904 ** 0.5 = 1.1
        (576, 6.82, 1953, 2.6e-4),  # 0.4106 ** 1.5 · 0.9765 ** 0.5 = 0.26
        (576, 4.26, 306, 2.1e-4),  # 0.6573 ** 1.5 · 0.153 ** 0.5 = 0.2084
        (256, 1.0, 2000, 1.6e-3),  # both at their ends
        (256, 2.2, 2000, 1.4e-3),  # 1.2727 ** 1.5 = 1.436
        (576, 2.8, 2000, 1e-3),
        (4096, 3.0, 2000, 2.0e-4),  # 0.2165 · 0.9017
        (4096, 3.0, 8000, 3.5e-4),  # 0.2165 · 1.6, not 1.8
        (4096, 0.01, 2000, 3.5e-4),
        (256, 25.0, 2000, 1e-4),  # 0.0375, so a tenth
        (256, 25.0, 50, 1e-4),
        (0, 2.8, 2000, 3.1e-4),  # not known: as 2,560
    ],
)
def test_the_rate_is_that_of_the_rule_and_a_tenth_for_all_weights(
    hidden_size, passes, tokens, rate
):
    assert automatic_rate(hidden_size, passes, tokens, trains_all=False) == rate
    whole = automatic_rate(hidden_size, passes, tokens, trains_all=True)
    assert whole == pytest.approx(rate / 10, rel=0)


sizes, floats = st.integers(1, 100_000), st.floats(1e-3, 1e3)
pairs = st.tuples(sizes, sizes), st.tuples(floats, floats), st.tuples(floats, floats)


@given(*pairs)
def test_larger_models_more_passes_and_smaller_updates_have_no_higher_rate(hidden, passes, tokens):
    (small, large), (few, often), (less, more) = map(sorted, (hidden, passes, tokens))
    rates = [
        automatic_rate(*values, trains_all=False)
        for values in (
            (small, few, more),
            (small, few, less),
            (small, often, less),
            (large, often, less),
        )
    ]
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0 and rates[0] <= 1.6e-3
    assert all(float(f"{rate:.1e}") == rate for rate in rates), "two digits"


@given(floats, floats)
def test_more_passes_are_advised_only_where_they_do_not_lower_the_rate(passes, tokens):
    rate = automatic_rate(576, passes, tokens, trains_all=False)
    assert more_teaches(passes, tokens) in ([True, False] if rate == 1.6e-3 else [False])
    assert more_teaches(passes / 2, tokens) or rate < 1.6e-3
