"""Tables of solvers run in float64 with networks that know the distribution of the images."""

import math
from collections.abc import Callable

import numpy as np

from fastddpm.solvers import COLUMNS, Table

Array = np.ndarray


def run(table: Table, oracle: Callable[[Array, float], Array], x: Array, z: Array | None = None) -> list[Array]:
    """States before each row and after the last, as the fused step makes them from an oracle of x_0."""
    h1, h2, states = np.zeros_like(x), np.zeros_like(x), [x]
    for i, row in enumerate(table.rows):
        at = dict(zip(COLUMNS, row, strict=True))
        x_0 = oracle(x, table.alpha_bar[i])
        noise = 0 if z is None else at["F"] * z[i]
        x, h1, h2 = (
            at["C"] * x_0 + at["E"] * x + at["H"] * h1 + at["G"] * h2 + noise,
            at["P1"] * x_0 + at["Q1"] * x + at["R1"] * h1 + at["S1"] * h2,
            at["P2"] * x_0 + at["Q2"] * x + at["R2"] * h1 + at["S2"] * h2,
        )
        states.append(x)
    return states


def moments(table: Table, mean: float, variance: float, data_mean: float, deviation: float) -> tuple[float, float]:
    """Mean and variance of the result for a start of these moments, exactly, with the best network for Gaussian data.

    Its estimate is affine in x, and so is every row of a table.
    """
    m, covariance = np.array([mean, 0.0, 0.0]), np.diag([variance, 0.0, 0.0])
    for i, row in enumerate(table.rows):
        at = dict(zip(COLUMNS, row, strict=True))
        a = table.alpha_bar[i]
        gain = math.sqrt(a) * deviation**2 / (a * deviation**2 + 1 - a)
        offset = data_mean * (1 - gain * math.sqrt(a))
        by_x_0 = np.array([at["C"], at["P1"], at["P2"]])
        matrix = np.array(
            [[at[c] for c in names] for names in (("E", "H", "G"), ("Q1", "R1", "S1"), ("Q2", "R2", "S2"))]
        )
        matrix[:, 0] += gain * by_x_0
        m = matrix @ m + offset * by_x_0
        covariance = matrix @ covariance @ matrix.T
        covariance[0, 0] += at["F"] ** 2
    return float(m[0]), float(covariance[0, 0])
