"""The nomogram's regression: acute ~ age + sex + fusion score, without penalty (METHOD 6).

The score must be out-of-fold: with in-sample scores the calibration slope on new patients was 0.57 instead of one.

Where the inputs tell the training classes apart without an error, the likelihood has no maximum; then Firth's penalised
likelihood takes its place, which always has one. Source: Firth 1993; Heinze and Schemper 2002.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.fracture.nomogram import NomogramModel

_STEPS: Final = 100
_FIRTH_STEPS: Final = 500
_LEAST_SIZE: Final = 1e-10
SEPARATED: Final = (
    "Age, sex and fusion score tell the training classes apart without an error. The nomogram was fitted with Firth's "
    "penalised likelihood, since the plain one has no maximum; look whether the score is out-of-fold at all."
)


class SeparatedError(ValueError):
    """The inputs tell the classes apart without an error: the likelihood has no maximum."""


@dataclass(frozen=True, kw_only=True)
class FittedNomogram:
    """The nomogram, and what is to be said of how it came about."""

    model: NomogramModel
    notes: tuple[str, ...] = ()


def fit_logistic(values: NDArray[np.float64], outcome: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intercept and coefficients of an unpenalised logistic regression, by Newton's method.

    `values` (n, inputs). SeparatedError where it does not converge; ValueError of a constant column.
    """
    design = _Design.of(values)
    beta = np.zeros(design.x.shape[1])
    for _ in range(_STEPS):
        _, gradient, information = design.likelihood(beta, outcome)
        step = np.linalg.solve(information, gradient)
        beta = beta + step
        if np.abs(step).max() < 1e-12:
            return design.unscaled(beta)
    raise SeparatedError("the regression does not converge; can one input tell the classes apart alone?")


def fit_firth(values: NDArray[np.float64], outcome: NDArray[np.int64]) -> NDArray[np.float64]:
    """The same with Firth's penalty, half the logarithm of the information's determinant: it always has an answer.

    ValueError of a constant column, or where it does not converge.
    """
    design = _Design.of(values)
    beta = np.zeros(design.x.shape[1])
    for _ in range(_FIRTH_STEPS):
        probability, gradient, information = design.likelihood(beta, outcome)
        root = design.x * np.sqrt(probability * (1 - probability))[:, None]
        hat = np.einsum("ij,ji->i", root, np.linalg.solve(information, root.T))
        step = np.linalg.solve(information, gradient + design.x.T @ (hat * (0.5 - probability)))
        size, before = 1.0, design.penalised(beta, outcome)
        while size > _LEAST_SIZE and design.penalised(beta + size * step, outcome) < before:
            size /= 2
        beta = beta + size * step
        if np.abs(size * step).max() < 1e-9:
            return design.unscaled(beta)
    raise ValueError("the penalised regression does not converge")


@dataclass(frozen=True, kw_only=True)
class _Design:
    """Standardised columns (n, 1 + inputs), the first of ones."""

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> _Design:
        mean, deviation = values.mean(axis=0), values.std(axis=0)
        if not (deviation > 0).all():
            raise ValueError("a regression on a constant column has no answer")
        return cls(
            x=np.column_stack([np.ones(len(values)), (values - mean) / deviation]), mean=mean, deviation=deviation
        )

    def likelihood(
        self, beta: NDArray[np.float64], outcome: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Probabilities, gradient and information at `beta`."""
        probability = 1 / (1 + np.exp(-np.clip(self.x @ beta, -30, 30)))
        weight = np.maximum(probability * (1 - probability), 1e-12)
        return probability, self.x.T @ (outcome - probability), (self.x * weight[:, None]).T @ self.x

    def penalised(self, beta: NDArray[np.float64], outcome: NDArray[np.int64]) -> float:
        """The logarithm of Firth's penalised likelihood."""
        linear = self.x @ beta
        _, _, information = self.likelihood(beta, outcome)
        return float((outcome * linear - np.logaddexp(0.0, linear)).sum() + 0.5 * np.linalg.slogdet(information)[1])

    def unscaled(self, beta: NDArray[np.float64]) -> NDArray[np.float64]:
        """Intercept and coefficients for the columns as they came."""
        slopes = beta[1:] / self.deviation
        return np.concatenate([[beta[0] - float(slopes @ self.mean)], slopes])


def fit_nomogram(
    *,
    acute: NDArray[np.int64],
    age: NDArray[np.float64],
    male: NDArray[np.float64],
    score: NDArray[np.float64],
) -> FittedNomogram:
    """The nomogram of training cases (n,) with their out-of-fold fusion scores; ValueError of one age or score for all.

    In a cohort of one sex the sex is not read (its coefficient is 0), which the notes say.
    """
    notes = []
    columns = {"age": age, "score": score, "sex": male}
    if male.min() == male.max():
        del columns["sex"]
        notes.append("All training cases are of one sex, which the nomogram therefore does not read.")
    values = np.column_stack(list(columns.values()))
    try:
        beta = fit_logistic(values, acute)
    except SeparatedError:
        beta = fit_firth(values, acute)
        notes.append(SEPARATED)
    of = dict(zip(columns, map(float, beta[1:]), strict=True))
    return FittedNomogram(
        model=NomogramModel(
            intercept=float(beta[0]),
            beta_age=of["age"],
            beta_male=of.get("sex", 0.0),
            beta_score=of["score"],
            age_range=(float(age.min()), float(age.max())),
            score_range=(float(score.min()), float(score.max())),
        ),
        notes=tuple(notes),
    )
