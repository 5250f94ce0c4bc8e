"""The three linear models of a bundle: HCR alone, DTL alone, and both fused before the last LASSO (METHOD 4 and 5).

HCR: constant, Spearman, LASSO. DTL: standardise, PCA, LASSO. Fusion: what both kept, together, LASSO again. Each ends
in a logistic regression whose mild L2 penalty is chosen by grouped cross-validation. Every step, standardising
included, is fitted on the rows that it is given and nothing else; out-of-fold scores repeat all of it in each fold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from services.trainer.selection import Matrix, lasso, spearman_filter, standardisation, varying
from shared.fracture.bundle import LinearModel, Models, Pca, evaluate
from shared.fracture.features import dtl_names

COMPONENTS: Final = 100
PENALTIES: Final[tuple[float, ...]] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_FOLDS: Final = 5


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Feature rows of cases: hcr (n, features) named by `hcr_names`, dtl (n, features), classes and patients."""

    hcr_names: tuple[str, ...]
    hcr: Matrix
    dtl: Matrix
    acute: NDArray[np.int64]
    patient: NDArray[np.int64]

    def part(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Rows:
        """Some of the rows."""
        return Rows(
            hcr_names=self.hcr_names,
            hcr=self.hcr[rows],
            dtl=self.dtl[rows],
            acute=self.acute[rows],
            patient=self.patient[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Linear scores and probabilities of cases, in the order of their rows."""

    hcr: Matrix
    dtl: Matrix
    fusion: Matrix
    fusion_probability: Matrix


def fit_pca(dtl: Matrix, *, components: int = COMPONENTS) -> Pca:
    """Standardise and project; full SVD, each component's largest weight positive so that signs are no accident."""
    mean, deviation = standardisation(dtl)
    _, _, right = np.linalg.svd((dtl - mean) / deviation, full_matrices=False)
    count = min(components, len(dtl) - 1, right.shape[0])
    rows = right[:count]
    rows = rows * np.sign(rows[np.arange(count), np.abs(rows).argmax(axis=1)])[:, None]
    return Pca(
        inputs=dtl_names(dtl.shape[1]),
        mean=tuple(float(value) for value in mean),
        sd=tuple(float(value) for value in deviation),
        names=tuple(f"pca_{place:03d}" for place in range(count)),
        components=tuple(tuple(float(value) for value in row) for row in rows),
    )


def projected(pca: Pca, dtl: Matrix) -> Matrix:
    """The components (n, components) of DTL rows."""
    z = (dtl - np.array(pca.mean)) / np.array(pca.sd)
    return np.asarray(z @ np.array(pca.components).T, dtype=np.float64)


def _logistic(z: Matrix, acute: NDArray[np.int64], penalty: float) -> LogisticRegression:
    return LogisticRegression(C=penalty, max_iter=5_000, tol=1e-8).fit(z, acute)


def fit_linear(
    values: Matrix, names: Sequence[str], acute: NDArray[np.int64], patient: NDArray[np.int64]
) -> LinearModel:
    """A logistic regression on standardised columns; the penalty of least grouped cross-validated log loss."""
    mean, deviation = standardisation(values)
    z = (values - mean) / deviation
    splits = list(GroupKFold(n_splits=_FOLDS).split(z, acute, groups=patient))
    losses = []
    for penalty in PENALTIES:
        errors = []
        for train, test in splits:
            if len(np.unique(acute[train])) < 2:
                continue
            fitted = _logistic(z[train], acute[train], penalty)
            sign = np.where(acute[test] == 1, -1.0, 1.0)
            score = z[test] @ fitted.coef_[0] + fitted.intercept_[0]
            errors.append(float(np.logaddexp(0.0, sign * score).mean()))
        losses.append(float(np.mean(errors)))
    model = _logistic(z, acute, PENALTIES[int(np.argmin(losses))])
    return LinearModel(
        inputs=tuple(names),
        mean=tuple(float(value) for value in mean),
        sd=tuple(float(value) for value in deviation),
        coef=tuple(float(value) for value in model.coef_[0]),
        intercept=float(model.intercept_[0]),
    )


def fit_models(rows: Rows) -> Models:
    """All three models from the rows given, with the PCA cut to the components that some model reads."""
    place = {name: n for n, name in enumerate(rows.hcr_names)}

    def hcr_columns(names: Sequence[str]) -> Matrix:
        return rows.hcr[:, [place[name] for name in names]]

    names = varying(rows.hcr, rows.hcr_names)
    names = spearman_filter(hcr_columns(names), names)
    kept_hcr = lasso(hcr_columns(names), names, rows.acute, rows.patient)
    pca = fit_pca(rows.dtl)
    components = projected(pca, rows.dtl)
    kept_dtl = lasso(components, pca.names, rows.acute, rows.patient)
    dtl_values = components[:, [pca.names.index(name) for name in kept_dtl]]
    both_values = np.hstack([hcr_columns(kept_hcr), dtl_values])
    both_names = (*kept_hcr, *kept_dtl)
    kept_both = lasso(both_values, both_names, rows.acute, rows.patient)
    fused = both_values[:, [both_names.index(name) for name in kept_both]]
    used = [n for n, name in enumerate(pca.names) if name in {*kept_dtl, *kept_both}]
    return Models(
        pca=pca.model_copy(
            update={
                "names": tuple(pca.names[n] for n in used),
                "components": tuple(pca.components[n] for n in used),
            }
        ),
        hcr=fit_linear(hcr_columns(kept_hcr), kept_hcr, rows.acute, rows.patient),
        dtl=fit_linear(dtl_values, kept_dtl, rows.acute, rows.patient),
        fusion=fit_linear(fused, kept_both, rows.acute, rows.patient),
    )


def score_rows(models: Models, rows: Rows) -> Scores:
    """What the models say of each row, by the arithmetic of the fusion classifier."""
    found = [
        evaluate(models, hcr=dict(zip(rows.hcr_names, map(float, hcr), strict=True)), dtl=dtl)
        for hcr, dtl in zip(rows.hcr, rows.dtl, strict=True)
    ]
    return Scores(
        hcr=np.array([one.hcr_score for one in found]),
        dtl=np.array([one.dtl_score for one in found]),
        fusion=np.array([one.fusion_score for one in found]),
        fusion_probability=np.array([one.fusion_probability for one in found]),
    )


def out_of_fold(
    rows: Rows, *, folds: int = 10, seed: int, progress: Callable[[int, int], None] | None = None
) -> Scores:
    """Scores of each row from models that never saw its patient, every step fitted anew in each fold."""
    parts = {name: np.full(len(rows.acute), np.nan) for name in ("hcr", "dtl", "fusion", "fusion_probability")}
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    for number, (train, test) in enumerate(splitter.split(rows.hcr, rows.acute, groups=rows.patient), start=1):
        scores = score_rows(fit_models(rows.part(train)), rows.part(test))
        for name, column in parts.items():
            column[test] = getattr(scores, name)
        if progress is not None:
            progress(number, folds)
    return Scores(**parts)
