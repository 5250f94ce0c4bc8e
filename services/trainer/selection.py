"""Which features stay: constant ones go, then all but one of every correlated group, then what LASSO sets to zero.

All of it sees training rows alone. ICC and perturbation, which come before, belong to the full training method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.linear_model import LassoCV
from sklearn.model_selection import GroupKFold

Matrix = NDArray[np.float64]

SPEARMAN_LIMIT: Final = 0.9
ALPHAS: Final = np.logspace(-3, 0, 50)
LEAST_COEFFICIENT: Final = 1e-6
_FOLDS: Final = 10


def varying(values: Matrix, names: Sequence[str]) -> tuple[str, ...]:
    """The names of the columns that are not constant (to twelve digits)."""
    largest = np.maximum(np.abs(values).max(axis=0), 1e-300)
    spread = (values / largest).std(axis=0)
    return tuple(name for name, deviation in zip(names, spread, strict=True) if deviation > 1e-12)


def spearman_filter(values: Matrix, names: Sequence[str], *, limit: float = SPEARMAN_LIMIT) -> tuple[str, ...]:
    """The names that stay when no two may have |rho| > limit, in the order of `names`.

    Greedy: the feature with the most partners among the survivors goes first; of equal ones that with the larger sum
    of |rho| over the survivors, then the later name. The columns are sorted by name first, so their order cannot
    change the result. `values` (n, features) without constant columns.
    """
    order = sorted(range(len(names)), key=lambda place: names[place])
    ordered = [names[place] for place in order]
    if len(set(ordered)) != len(ordered):
        raise ValueError("feature names stand twice")
    if len(ordered) < 2:
        return tuple(names)
    ranks = rankdata(values[:, order], axis=0)
    rho = np.round(np.abs(np.corrcoef(ranks, rowvar=False)), 12)
    np.fill_diagonal(rho, 0.0)
    linked = rho > limit
    alive = np.ones(len(ordered), dtype=bool)
    partners = linked.sum(axis=1)
    while partners[alive].max(initial=0) > 0:
        worst = np.flatnonzero(alive & (partners == partners[alive].max()))
        sums = np.round(rho[np.ix_(worst, np.flatnonzero(alive))].sum(axis=1), 9)
        goes = int(worst[np.flatnonzero(sums == sums.max())[-1]])
        alive[goes] = False
        partners -= linked[goes]
    kept = {name for name, stays in zip(ordered, alive, strict=True) if stays}
    return tuple(name for name in names if name in kept)


def standardisation(values: Matrix) -> tuple[Matrix, Matrix]:
    """Mean and SD of the columns; the SD of a constant column is 1."""
    deviation = values.std(axis=0)
    return values.mean(axis=0), np.where(deviation > 0, deviation, 1.0)


def lasso(
    values: Matrix, names: Sequence[str], acute: NDArray[np.int64], patient: NDArray[np.int64]
) -> tuple[str, ...]:
    """The names that LASSO keeps: least mean error over ten folds of patients, on standardised columns.

    Where that keeps nothing, what enters the path first is kept, so that a model always has an input.
    """
    mean, deviation = standardisation(values)
    z = (values - mean) / deviation
    folds = GroupKFold(n_splits=min(_FOLDS, len(np.unique(patient))))
    splits = list(folds.split(z, acute, groups=patient))
    target = acute.astype(np.float64)
    model = LassoCV(alphas=ALPHAS, cv=splits, max_iter=20_000, tol=1e-3, precompute=True).fit(z, target)
    kept = np.abs(model.coef_) > LEAST_COEFFICIENT
    if not kept.any():
        first = np.abs(z.T @ (target - target.mean())).argmax()
        kept[first] = True
    return tuple(name for name, stays in zip(names, kept, strict=True) if stays)
