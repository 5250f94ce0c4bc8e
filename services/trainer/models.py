"""The four models of the paper from training rows: Radiomics, DLR, Features Fusion, and the nomogram (METHOD 5, 6).

HCR: constant, Spearman, LASSO. DTL: standardise, PCA, LASSO (or one out-of-fold logit, `crossfit`). Fusion: what both
kept, together, LASSO again. Each branch then has a linear score, which the nomogram reads, and a classifier, whose
calibrated probability is the branch's answer. Everything that says how good they are, and every number that rests on
such scores (calibration, thresholds, nomogram, conformal limits), comes from folds in which all of this was repeated
without the patients that are scored. Only the choice of the classifier's parameters is made once, on all of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from services.trainer.classifiers import Fitted, fit_platt, fitted, search
from services.trainer.cohort_table import TooSmall
from services.trainer.folds import Folds, patient_folds, patients_by_class, stratified_folds
from services.trainer.nomogram_fitting import FittedNomogram, fit_nomogram
from services.trainer.results import MODEL_OF_BRANCH, Branch, GridPoint, ModelName
from services.trainer.selection import Columns, Labels, Matrix, Selected, select, standardisation
from services.trainer.settings import TrainingSettings
from services.trainer.statistics import youden_threshold
from shared.fracture.bundle import LinearModel, Pca, Platt
from shared.fracture.features import dtl_names
from shared.fracture.nomogram import NomogramModel, Sex, read_points
from shared.pipeline.errors import FractureSweepError

BRANCHES: Final[tuple[Branch, ...]] = ("hcr", "dtl", "fusion")
LOGIT: Final = "dtl_logit"
PENALTIES: Final[tuple[float, ...]] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Feature rows of n cases. `dtl` (n, features) of the network that ships.

    `logit` (n,), crossfit alone: of each case, from a network that never saw its patient; it stands for `dtl` then.
    """

    hcr: Columns
    dtl: Matrix
    logit: Matrix | None = None
    acute: Labels
    patient: NDArray[np.int64]
    age: Matrix
    male: Matrix

    def __len__(self) -> int:
        return len(self.acute)

    def part(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Rows:
        """Some of the rows."""
        return replace(
            self,
            hcr=Columns(names=self.hcr.names, values=self.hcr.values[rows]),
            dtl=self.dtl[rows],
            logit=None if self.logit is None else self.logit[rows],
            acute=self.acute[rows],
            patient=self.patient[rows],
            age=self.age[rows],
            male=self.male[rows],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitHead:
    """The logit of the network that ships, as a function of its features: weights (features,) and bias."""

    weights: Matrix
    bias: float

    @property
    def pca(self) -> Pca:
        """The same as the one component of a bundle's projection."""
        count = len(self.weights)
        return Pca(
            inputs=dtl_names(count),
            mean=(0.0,) * count,
            sd=(1.0,) * count,
            names=(LOGIT,),
            components=(tuple(float(value) for value in self.weights),),
            offset=(self.bias,),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """The features of all branches, selected on some rows, with their linear models."""

    pca: Pca
    selected: Mapping[Branch, Selected]
    linear: Mapping[Branch, LinearModel]

    def together(self, rows: Rows) -> Columns:
        """HCR and DTL columns of rows, unstandardised."""
        return _together(rows, self.pca)

    def columns(self, rows: Rows) -> dict[Branch, Matrix]:
        """The standardised selected columns of rows, by branch."""
        together = self.together(rows)
        found = {}
        for branch, model in self.linear.items():
            found[branch] = (together.of(model.inputs) - np.array(model.mean)) / np.array(model.sd)
        return found

    def scores(self, z: Mapping[Branch, Matrix]) -> dict[Branch, Matrix]:
        """The linear scores of standardised columns."""
        return {branch: z[branch] @ np.array(m.coef) + m.intercept for branch, m in self.linear.items()}


def _together(rows: Rows, pca: Pca) -> Columns:
    deep = rows.logit[:, None] if rows.logit is not None else projected(pca, rows.dtl)
    return Columns(names=(*rows.hcr.names, *pca.names), values=np.hstack([rows.hcr.values, deep]))


def fit_pca(dtl: Matrix, *, components: int) -> Pca:
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
    return np.asarray(z @ np.array(pca.components).T + (np.array(pca.offset) if pca.offset else 0.0))


def cut(
    rows: Rows, settings: TrainingSettings, *, head: LogitHead | None = None, branches: Sequence[Branch] = BRANCHES
) -> Cut:
    """Selection and linear models of branches, fitted on these rows. `head` where `rows.logit` stands for DTL."""
    pca = fit_pca(rows.dtl, components=settings.network.components) if head is None else head.pca
    together = _together(rows, pca)
    chosen: dict[Branch, Selected] = {}
    for branch in branches:
        if branch == "fusion":
            names = (*chosen["hcr"].names, *chosen["dtl"].names)
        else:
            names = rows.hcr.names if branch == "hcr" else pca.names
        of = Columns(names=names, values=together.of(names))
        chosen[branch] = select(branch, of, rows.acute, rows.patient, settings.selection)
    linear: dict[Branch, LinearModel] = {}
    for branch in branches:
        values = together.of(chosen[branch].names)
        linear[branch] = (
            _lasso_score(chosen[branch], values)
            if settings.classifiers.score == "lasso"
            else fit_linear(values, chosen[branch].names, rows.acute, rows.patient, folds=settings.classifiers.folds)
        )
    return Cut(pca=pca, selected=chosen, linear=linear)


def _lasso_score(selected: Selected, values: Matrix) -> LinearModel:
    """The rad-score as printed: LASSO's own intercept and coefficients."""
    mean, deviation = standardisation(values)
    return LinearModel(
        inputs=selected.names,
        mean=tuple(float(value) for value in mean),
        sd=tuple(float(value) for value in deviation),
        coef=tuple(selected.lasso.coefficient[name] for name in selected.names),
        intercept=selected.lasso.intercept,
        score_kind="lasso",
        platt=Platt(a=1.0, b=0.0),  # a bundle's probability is the classifier's
    )


def fit_linear(
    values: Matrix, names: Sequence[str], acute: Labels, patient: NDArray[np.int64], *, folds: int
) -> LinearModel:
    """A logistic regression on standardised columns; the ridge penalty of least grouped cross-validated log loss."""
    mean, deviation = standardisation(values)
    z = (values - mean) / deviation
    splits = patient_folds(patient, folds, step="linear score")
    losses = []
    for penalty in PENALTIES:
        errors = []
        for train, test in splits:
            if len(np.unique(acute[train])) < 2:
                continue
            model = _ridge(z[train], acute[train], penalty)
            sign = np.where(acute[test] == 1, -1.0, 1.0)
            score = z[test] @ model.coef_[0] + model.intercept_[0]
            errors.append(float(np.logaddexp(0.0, sign * score).mean()))
        losses.append(float(np.mean(errors)) if errors else np.inf)
    model = _ridge(z, acute, PENALTIES[int(np.argmin(losses))])
    return LinearModel(
        inputs=tuple(names),
        mean=tuple(float(value) for value in mean),
        sd=tuple(float(value) for value in deviation),
        coef=tuple(float(value) for value in model.coef_[0]),
        intercept=float(model.intercept_[0]),
    )


def _ridge(z: Matrix, acute: Labels, penalty: float) -> LogisticRegression:
    return LogisticRegression(C=penalty, solver="newton-cholesky", max_iter=200, tol=1e-9).fit(z, acute)


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldScores:
    """Of the left-out rows of one outer fold: linear scores and the classifiers' raw scores by branch."""

    rows: NDArray[np.intp]
    linear: Mapping[Branch, Matrix]
    raw: Mapping[Branch, Matrix]


def fold_scores(
    split: tuple[NDArray[np.intp], NDArray[np.intp]],
    *,
    rows: Rows,
    settings: TrainingSettings,
    winners: Mapping[Branch, GridPoint],
    head: LogitHead | None = None,
) -> FoldScores:
    """One outer fold: everything but the choice of the classifiers, `winners`, is fitted without the left-out rows."""
    train, left_out = split
    inside = rows.part(train)
    one = cut(inside, settings, head=head, branches=tuple(winners))
    z, z_out = one.columns(inside), one.columns(rows.part(left_out))
    raw = {}
    for branch, winner in winners.items():
        classifier = fitted(winner, z[branch], inside.acute, seed=settings.seed)
        raw[branch] = classifier.score(z_out[branch])
    return FoldScores(rows=left_out, linear=one.scores(z_out), raw=raw)


def outer_folds(rows: Rows, folds: int, *, seed: int) -> Folds:
    """Folds of whole patients with both classes in each; TooSmall where they cannot be had."""
    step = "out-of-fold scores"
    for name, there in zip(("acute", "chronic"), patients_by_class(rows.patient, rows.acute), strict=True):
        if there < folds:
            raise TooSmall(step, needs=f"{folds} patients with {name} fractures, one a fold", has=f"{there}")
    return stratified_folds(rows.patient, rows.acute, folds, seed=seed)


@dataclass(frozen=True, kw_only=True, eq=False)
class FourModels:
    """What training rows gave. Probabilities (n,) by model, over the training rows: in-sample, and out-of-fold."""

    cut: Cut
    grids: Mapping[Branch, tuple[GridPoint, ...]]
    winners: Mapping[Branch, GridPoint]
    classifiers: Mapping[Branch, Fitted]
    platt: Mapping[Branch, Platt]
    nomogram: NomogramModel
    nomogram_notes: tuple[str, ...]
    in_sample: Mapping[ModelName, Matrix]
    out_of_fold: Mapping[ModelName, Matrix]
    fold_score: Mapping[Branch, Matrix]
    """Out-of-fold linear scores; the nomogram stands on those of fusion."""
    thresholds: Mapping[ModelName, float]


def calibrated(platt: Platt, raw: Matrix) -> Matrix:
    """P(acute) of raw scores."""
    return np.asarray(1 / (1 + np.exp(-np.clip(platt.a * raw + platt.b, -700, 700))))


def nomogram_probability(model: NomogramModel, rows: Rows, score: Matrix) -> Matrix:
    """What the nomogram reads for each row."""
    sexes: list[Sex] = ["M" if male else "F" for male in rows.male]
    return np.array(
        [
            read_points(model, age=float(age), sex=sex, score=float(value)).probability
            for age, sex, value in zip(rows.age, sexes, score, strict=True)
        ]
    )


def fit_four_models(
    rows: Rows,
    settings: TrainingSettings,
    *,
    head: LogitHead | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> FourModels:
    """All four models from training rows alone; TooSmall where a step cannot be done with so few."""
    with threadpool_limits(limits=1):
        return _fit_four_models(rows, settings, head=head, processes=processes, progress=progress)


def _fit_four_models(
    rows: Rows,
    settings: TrainingSettings,
    *,
    head: LogitHead | None,
    processes: int,
    progress: Progress | None,
) -> FourModels:
    chosen = settings.classifiers
    folds = outer_folds(rows, chosen.out_of_fold, seed=settings.seed)
    whole = cut(rows, settings, head=head)
    z = whole.columns(rows)
    searched = partial(_searched, z=z, acute=rows.acute, patient=rows.patient, settings=settings)
    found = dict(zip(BRANCHES, mapped(searched, BRANCHES, processes), strict=True))
    winners = {branch: winner for branch, (_, winner) in found.items()}
    one = partial(fold_scores, rows=rows, settings=settings, head=head, winners=winners)
    linear = {branch: np.full(len(rows), np.nan) for branch in BRANCHES}
    raw = {branch: np.full(len(rows), np.nan) for branch in BRANCHES}
    for done, fold in enumerate(mapped(one, folds, processes), start=1):
        for branch in BRANCHES:
            linear[branch][fold.rows] = fold.linear[branch]
            raw[branch][fold.rows] = fold.raw[branch]
        if progress is not None:
            progress(done, len(folds))
    platt = {branch: fit_platt(raw[branch], rows.acute) for branch in BRANCHES}
    classifiers = {b: fitted(winners[b], z[b], rows.acute, seed=settings.seed) for b in BRANCHES}
    whole_nomogram = _nomogram(rows, linear["fusion"])
    nomogram = whole_nomogram.model
    held = {MODEL_OF_BRANCH[b]: _platt_out_of_fold(raw[b], rows.acute, folds) for b in BRANCHES}
    held["dlrn"] = _nomogram_out_of_fold(rows, linear["fusion"], folds)
    inside = {MODEL_OF_BRANCH[b]: calibrated(platt[b], classifiers[b].score(z[b])) for b in BRANCHES}
    inside["dlrn"] = nomogram_probability(nomogram, rows, whole.scores(z)["fusion"])
    # thresholds belong to the probabilities that the shipped calibration gives
    shipped = {MODEL_OF_BRANCH[b]: calibrated(platt[b], raw[b]) for b in BRANCHES}
    shipped["dlrn"] = nomogram_probability(nomogram, rows, linear["fusion"])
    return FourModels(
        cut=whole,
        grids={branch: grid for branch, (grid, _) in found.items()},
        winners=winners,
        classifiers=classifiers,
        platt=platt,
        nomogram=nomogram,
        nomogram_notes=whole_nomogram.notes,
        in_sample=inside,
        out_of_fold=held,
        fold_score=linear,
        thresholds={name: youden_threshold(rows.acute, values) for name, values in shipped.items()},
    )


Item = TypeVar("Item")
Answer = TypeVar("Answer")


def mapped(one: Callable[[Item], Answer], items: Sequence[Item], processes: int) -> Iterator[Answer]:
    """The answers in the order of the items, computed in so many processes."""
    if processes == 1:
        yield from map(one, items)
        return
    with ProcessPoolExecutor(
        max_workers=processes, mp_context=get_context("forkserver"), initializer=_one_thread
    ) as pool:
        yield from pool.map(one, items)


def _one_thread() -> None:
    """Linear algebra on one thread: its sums have the same order then, and processes do not wait for each other."""
    threadpool_limits(limits=1)


def _searched(
    branch: Branch,
    *,
    z: Mapping[Branch, Matrix],
    acute: Labels,
    patient: NDArray[np.int64],
    settings: TrainingSettings,
) -> tuple[tuple[GridPoint, ...], GridPoint]:
    return search(z[branch], acute, patient, settings.classifiers, settings.seed)


def _nomogram(rows: Rows, score: Matrix) -> FittedNomogram:
    try:
        return fit_nomogram(acute=rows.acute, age=rows.age, male=rows.male, score=score)
    except ValueError as error:
        raise FractureSweepError(
            f"the nomogram cannot be fitted on {len(rows)} training rows: {error}. More patients may help"
        ) from error


def _platt_out_of_fold(raw: Matrix, acute: Labels, folds: Folds) -> Matrix:
    """Probabilities whose calibration, too, was fitted without the rows of the fold."""
    found = np.full(len(raw), np.nan)
    for others, left_out in folds:
        found[left_out] = calibrated(fit_platt(raw[others], acute[others]), raw[left_out])
    return found


def _nomogram_out_of_fold(rows: Rows, score: Matrix, folds: Folds) -> Matrix:
    found = np.full(len(rows), np.nan)
    for others, left_out in folds:
        model = _nomogram(rows.part(others), score[others]).model
        found[left_out] = nomogram_probability(model, rows.part(left_out), score[left_out])
    return found
