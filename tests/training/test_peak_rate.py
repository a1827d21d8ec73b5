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
        (2560, 1.0, 2000, 3.1e-4),  # 0.225 ** 0.78 = 0.3124
        (576, 2.54, 1808, 1.1e-3),  # (2000 / 1808) ** 0.7 = 1.073
        (576, 1.0, 1000, 1.6e-3),  # 2 ** 0.7 = 1.6245
        (576, 6.82, 1953, 3.6e-4),  # 0.5132 ** 1.5 · 0.9765 ** 0.5 = 0.3633
        (576, 4.26, 306, 2.9e-4),  # 0.8216 ** 1.5 · 0.153 ** 0.5 = 0.2913
        (576, 2.08, 517, 1.1e-3),  # 1.6827 ** 1.5 · 0.2585 ** 0.5 = 1.11
        (576, 1.07, 304, 2e-3),  # 2.307 and 3.74: 2
        (256, 1.0, 2000, 1e-3),  # both at their ends
        (576, 3.5, 2000, 1e-3),
        (4096, 3.0, 2000, 2.2e-4),  # 0.2165
        (4096, 4.0, 2000, 1.8e-4),  # 0.2165 · 0.8185
        (4096, 3.0, 8000, 2.2e-4),
        (4096, 0.01, 2000, 2.2e-4),
        (256, 25.0, 2000, 1e-4),  # 0.0375, so a tenth
        (256, 25.0, 50, 1e-4),
        (0, 1.0, 2000, 3.1e-4),  # not known: as 2,560
    ],
)
def test_the_rate_is_that_of_the_rule_and_a_tenth_for_all_weights(
    hidden_size, passes, tokens, rate
):
    assert automatic_rate(hidden_size, passes, tokens, trains_all=False) == rate
    whole = automatic_rate(hidden_size, passes, tokens, trains_all=True)
    assert whole == pytest.approx(rate / 10, rel=0)


sizes, floats = st.integers(1, 100_000), st.floats(1e-3, 1e3)
pairs = st.tuples(sizes, sizes), st.tuples(floats, floats)


@given(*pairs, floats)
def test_larger_models_and_more_passes_have_no_higher_rate(hidden, passes, tokens):
    (small, large), (few, often) = map(sorted, (hidden, passes))
    rates = [
        automatic_rate(*values, trains_all=False)
        for values in ((small, few, tokens), (small, often, tokens), (large, often, tokens))
    ]
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0 and rates[0] <= 2e-3
    assert all(float(f"{rate:.1e}") == rate for rate in rates), "two digits"


@given(floats, floats)
def test_more_passes_are_advised_only_where_they_do_not_lower_the_rate(passes, tokens):
    rate, fewer = (automatic_rate(576, p, tokens, trains_all=False) for p in (passes, passes / 2))
    assert fewer == rate or not more_teaches(passes, tokens)
    assert fewer > rate or more_teaches(passes / 2, tokens) or rate == 1e-4
