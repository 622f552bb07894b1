"""Comparison with recorded numbers."""

import numpy as np


def assert_close(found, expected, tolerance: float, what: str) -> None:
    difference = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
    assert difference.max() <= tolerance, f"{what}: off by {difference.max():.3g} > {tolerance}"
