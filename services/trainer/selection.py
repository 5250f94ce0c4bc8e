"""Which features stay: constant ones go, then all but one of every correlated group, then what LASSO sets to zero.

All of it sees training rows alone, and the columns in the order of their names, so that their own order changes
nothing. What a repeated reading does not give again goes before (repeatability.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, LassoCV, LogisticRegression, lasso_path

from services.trainer.cohort_table import TooSmall
from services.trainer.folds import Folds, patient_folds
from services.trainer.results import Branch, Correlations, LassoPath, Selection, SelectionStep
from services.trainer.settings import SelectionSettings

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]

SPEARMAN_LIMIT: Final = 0.9
LEAST_COEFFICIENT: Final = 1e-6
SHOWN_CORRELATIONS: Final = 60
"""So many features at most are drawn in the figure of their correlations."""


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


@dataclass(frozen=True, kw_only=True, eq=False)
class LassoFit:
    """A LASSO at the alpha that cross-validation chose. `names` sorted; the arrays are over alphas or over names."""

    names: tuple[str, ...]
    alphas: Matrix
    error_mean: Matrix
    error_se: Matrix
    chosen: int
    coefficients: Matrix
    intercept: float
    fallback: bool
    """It kept nothing, so what enters the path first was taken, with its own least-squares coefficient."""

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of the coefficients that are not zero."""
        pairs = zip(self.names, self.coefficients, strict=True)
        return tuple(name for name, value in pairs if abs(value) > LEAST_COEFFICIENT)

    @property
    def coefficient(self) -> dict[str, float]:
        """The coefficients of what was kept."""
        pairs = zip(self.names, self.coefficients, strict=True)
        return {name: float(value) for name, value in pairs if abs(value) > LEAST_COEFFICIENT}


def alphas_of(settings: SelectionSettings) -> Matrix:
    """The alphas, from large to small."""
    low, high, count = settings.alphas
    return np.logspace(low, high, count)[::-1]


def fit_lasso(
    z: Matrix, names: Sequence[str], acute: Labels, patient: NDArray[np.int64], settings: SelectionSettings
) -> LassoFit:
    """LASSO on standardised columns z (n, names); the alpha by the settings' rule over folds of patients.

    Family gaussian: squared error on 0 and 1 (scikit-learn's alpha = glmnet's lambda). Family logistic: log loss.
    """
    order = sorted(range(len(names)), key=lambda place: names[place])
    ordered = np.asfortranarray(z[:, order])
    alphas = alphas_of(settings)
    splits = patient_folds(patient, settings.folds, step="LASSO")
    fit = _gaussian if settings.lasso == "gaussian" else _logistic_l1
    errors, fitted = fit(ordered, acute, splits, alphas)
    mean, se = errors.mean(axis=1), errors.std(axis=1, ddof=1) / np.sqrt(errors.shape[1])
    chosen = int(np.argmin(mean))
    if settings.rule == "1se":
        chosen = int(np.flatnonzero(mean <= mean[chosen] + se[chosen])[0])
    coefficients, intercept = fitted(chosen)
    fallback = not (np.abs(coefficients) > LEAST_COEFFICIENT).any()
    if fallback:
        along = ordered.T @ (acute - acute.mean())
        first = int(np.abs(along).argmax())
        coefficients = np.zeros(len(order))
        coefficients[first] = along[first] / max(float(ordered[:, first] @ ordered[:, first]), 1e-300)
    return LassoFit(
        names=tuple(names[place] for place in order),
        alphas=alphas,
        error_mean=mean,
        error_se=se,
        chosen=chosen,
        coefficients=coefficients,
        intercept=intercept,
        fallback=fallback,
    )


_Fitted = Callable[[int], tuple[Matrix, float]]
"""Coefficients and intercept on all rows at the alpha of this place."""


def _gaussian(z: Matrix, acute: Labels, splits: Folds, alphas: Matrix) -> tuple[Matrix, _Fitted]:
    target = acute.astype(np.float64)
    model = LassoCV(alphas=alphas, cv=splits, max_iter=20_000, tol=1e-4, precompute=True).fit(z, target)

    def at(place: int) -> tuple[Matrix, float]:
        one = Lasso(alpha=alphas[place], max_iter=50_000, tol=1e-7).fit(z, target)
        return np.asarray(one.coef_), float(one.intercept_)

    return np.asarray(model.mse_path_), at


def _at_alpha(z: Matrix, acute: Labels, alpha: float) -> LogisticRegression:
    """Logistic regression with an L1 penalty: glmnet's lambda = 1 / (n C)."""
    model = LogisticRegression(
        l1_ratio=1.0, C=1 / (len(z) * alpha), solver="saga", max_iter=2_000, tol=1e-4, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(z, acute)


def _logistic_l1(z: Matrix, acute: Labels, splits: Folds, alphas: Matrix) -> tuple[Matrix, _Fitted]:
    errors = np.empty((len(alphas), len(splits)))
    for fold, (train, test) in enumerate(splits):
        sign = np.where(acute[test] == 1, -1.0, 1.0)
        for place, alpha in enumerate(alphas):
            model = _at_alpha(z[train], acute[train], float(alpha))
            score = z[test] @ model.coef_[0] + model.intercept_[0]
            errors[place, fold] = np.logaddexp(0.0, sign * score).mean()

    def at(place: int) -> tuple[Matrix, float]:
        model = _at_alpha(z, acute, float(alphas[place]))
        return np.asarray(model.coef_[0]), float(model.intercept_[0])

    return errors, at


def without_correlated(
    values: Matrix, names: Sequence[str], coefficient: Mapping[str, float], *, limit: float
) -> tuple[str, ...]:
    """The names left when of two features with |rho| > limit that of the smaller |coefficient| goes (`paper`)."""
    if len(names) < 2:
        return tuple(names)
    rho = np.abs(np.corrcoef(rankdata(values, axis=0), rowvar=False))
    by_size = sorted(range(len(names)), key=lambda place: (-abs(coefficient[names[place]]), names[place]))
    kept: list[int] = []
    for place in by_size:
        if all(round(float(rho[place, other]), 12) <= limit for other in kept):
            kept.append(place)
    return tuple(names[place] for place in sorted(kept))


def stability(
    z: Matrix,
    names: Sequence[str],
    acute: Labels,
    patient: NDArray[np.int64],
    *,
    alpha: float,
    bootstraps: int,
    seed: int,
) -> dict[str, float]:
    """How often LASSO at `alpha` keeps a feature over bootstraps of whole patients; without those never kept."""
    order = sorted(range(len(names)), key=lambda place: names[place])
    numbers = np.unique(patient)
    rows_of = {int(number): np.flatnonzero(patient == number) for number in numbers}
    rng = np.random.default_rng(seed)
    counts = np.zeros(len(order))
    done = 0
    for _ in range(bootstraps):
        rows = np.concatenate([rows_of[int(number)] for number in rng.choice(numbers, size=len(numbers))])
        if len(np.unique(acute[rows])) < 2:
            continue
        target = acute[rows].astype(np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = Lasso(alpha=alpha, max_iter=5_000, tol=1e-3, precompute=True).fit(z[rows][:, order], target)
        counts += np.abs(model.coef_) > LEAST_COEFFICIENT
        done += 1
    return {names[place]: float(count / done) for place, count in zip(order, counts, strict=True) if count}


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """Named columns of rows: `values` (n, names), unstandardised."""

    names: tuple[str, ...]
    values: Matrix

    def of(self, names: Sequence[str]) -> Matrix:
        """Some columns, in the order asked for."""
        place = {name: n for n, name in enumerate(self.names)}
        return self.values[:, [place[name] for name in names]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Selected:
    """What one branch was cut down to, with the LASSO that did it; `steps` as in results.Selection."""

    branch: Branch
    steps: tuple[SelectionStep, ...]
    into_lasso: tuple[str, ...]
    lasso: LassoFit
    names: tuple[str, ...]


def select(
    branch: Branch, columns: Columns, acute: Labels, patient: NDArray[np.int64], settings: SelectionSettings
) -> Selected:
    """One branch's selection on training rows: constant, Spearman (hcr), LASSO, and `paper`'s step after it (hcr)."""
    start = Columns(names=tuple(sorted(columns.names)), values=columns.of(sorted(columns.names)))
    steps = [SelectionStep(step="all", features=start.names)]

    def left(step: str, features: tuple[str, ...]) -> None:
        steps.append(SelectionStep(step=step, features=features))

    names = varying(start.values, start.names)
    if not names:
        raise TooSmall(f"selection ({branch})", needs="a feature that is not constant", has="none")
    left("not constant", names)
    if branch == "hcr":
        names = spearman_filter(start.of(names), names, limit=settings.spearman_limit)
        left("Spearman", names)
    mean, deviation = standardisation(start.of(names))
    fit = fit_lasso((start.of(names) - mean) / deviation, names, acute, patient, settings)
    kept = fit.kept
    left("LASSO", kept)
    if branch == "hcr" and settings.post_lasso_spearman is not None:
        kept = without_correlated(start.of(kept), kept, fit.coefficient, limit=settings.post_lasso_spearman)
        left(f"Spearman {settings.post_lasso_spearman:g} after LASSO", kept)
    return Selected(branch=branch, steps=tuple(steps), into_lasso=names, lasso=fit, names=kept)


def recorded(
    selected: Selected,
    columns: Columns,
    acute: Labels,
    patient: NDArray[np.int64],
    settings: SelectionSettings,
    *,
    seed: int,
    before: Sequence[SelectionStep] = (),
) -> Selection:
    """A selection with its path, correlations and stability, for the report. `before`: the steps that came first."""
    values = columns.of(selected.into_lasso)
    mean, deviation = standardisation(values)
    z = (values - mean) / deviation
    fit = selected.lasso
    in_order = np.asfortranarray(columns_in(z, selected.into_lasso, fit.names))
    if settings.lasso == "gaussian":
        path = lasso_path(in_order, acute - acute.mean(), alphas=fit.alphas, tol=1e-6, max_iter=50_000)[1].T
    else:
        path = np.array([_at_alpha(in_order, acute, float(one)).coef_[0] for one in fit.alphas])
    alpha = float(fit.alphas[fit.chosen])
    return Selection(
        branch=selected.branch,
        steps=(*before, *(selected.steps[1:] if before else selected.steps)),
        correlations=_correlations(values, selected),
        lasso=LassoPath(
            names=fit.names,
            alphas=tuple(float(value) for value in fit.alphas),
            coefficients=tuple(tuple(float(value) for value in row) for row in path),
            error_mean=tuple(float(value) for value in fit.error_mean),
            error_se=tuple(float(value) for value in fit.error_se),
            error="mean squared error" if settings.lasso == "gaussian" else "log loss",
            chosen=fit.chosen,
            intercept=fit.intercept,
        ),
        selected=selected.names,
        coefficients=tuple(fit.coefficient[name] for name in selected.names),
        stability=stability(
            z,
            selected.into_lasso,
            acute,
            patient,
            alpha=alpha,
            bootstraps=settings.stability_bootstraps,
            seed=seed,
        ),
        fallback=fit.fallback,
    )


def columns_in(values: Matrix, names: Sequence[str], wanted: Sequence[str]) -> Matrix:
    """The columns of `values` in the order of `wanted`."""
    return Columns(names=tuple(names), values=values).of(wanted)


def _correlations(values: Matrix, selected: Selected) -> Correlations | None:
    """Among what went into the LASSO, the features of largest coefficient first, at most SHOWN_CORRELATIONS."""
    if len(selected.into_lasso) < 2:
        return None
    size = dict(zip(selected.lasso.names, np.abs(selected.lasso.coefficients), strict=True))
    shown = sorted(selected.into_lasso, key=lambda name: (-size[name], name))[:SHOWN_CORRELATIONS]
    rho = np.corrcoef(rankdata(columns_in(values, selected.into_lasso, shown), axis=0), rowvar=False)
    return Correlations(names=tuple(shown), rho=tuple(tuple(float(value) for value in row) for row in rho))
