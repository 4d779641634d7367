"""Numbers as people read them."""

import math


def number(value: float | None, digits: int = 4) -> str:
    """A number as people read it; a dash for none.

    >>> number(1234), number(0.0051432), number(1e-5), number(None)
    ('1,234', '0.005143', '1e-5', '-')
    """
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1e-4 <= abs(value) < 1e6:
        rounded = f"{value:.{digits}g}"
        return f"{float(rounded):,.0f}" if "e" in rounded else rounded
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def count(n: int, noun: str) -> str:
    """A number with its noun.

    >>> count(1, "sample"), count(1234, "sample")
    ('1 sample', '1,234 samples')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def correlation(spearman: float) -> str:
    """The rank correlation of two scores of the same samples, in words."""
    if math.isnan(spearman):
        return "no rank correlation, since in one of them all scores are the same"
    return f"a Spearman rank correlation of {spearman:.2f}"
