"""What a training run found, as data (run.json): tables, figures and the report are drawn from this and nothing else.

No name, no path, no id of a patient: rows are numbered.
"""

from __future__ import annotations

from typing import Final, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from services.trainer.settings import ClassifierName, DtlMode, TrainingSettings
from services.trainer.statistics import Auc, auc_if_any
from shared.fracture.nomogram import NomogramModel

Branch = Literal["hcr", "dtl", "fusion"]
ModelName = Literal["radiomics", "dlr", "fusion", "dlrn"]
PartName = Literal["train", "out_of_fold", "test"]

MODELS: Final[tuple[ModelName, ...]] = ("radiomics", "dlr", "fusion", "dlrn")
LABELS: Final[dict[ModelName, str]] = {
    "radiomics": "Radiomics",
    "dlr": "DLR",
    "fusion": "Features Fusion",
    "dlrn": "DLRN (nomogram)",
}
"""As the paper calls them."""
MODEL_OF_BRANCH: Final[dict[Branch, ModelName]] = {"hcr": "radiomics", "dtl": "dlr", "fusion": "fusion"}

FLATTERING: Final = 0.05
"""An in-sample AUC above the out-of-fold one by more than this is said in words."""

Numbers = tuple[float, ...]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FlowStep(_Frozen):
    """How many were left after a step of the cohort's way, and why some went (reason → rows)."""

    step: str
    patients: int
    cases: int
    acute: int
    chronic: int
    left_out: dict[str, int] = {}


class Demographic(_Frozen):
    """One row of the cohort for Table 1; `part` is train or test."""

    patient: int
    part: Literal["train", "test"]
    acute: bool
    age: float
    male: bool
    level: str
    site: str


class IccValue(_Frozen):
    """ICC(2,1) with its 95 % interval."""

    value: float
    low: float
    high: float


class Repeatability(_Frozen):
    """Which features a repeated reading gives again; `features` in the order of the feature list."""

    method: Literal["masks", "perturbation", "none"]
    limit: float
    cases: dict[str, int]
    """Repeated cases by kind: intra, inter."""
    features: tuple[str, ...]
    intra: tuple[IccValue | None, ...] = ()
    inter: tuple[IccValue | None, ...] = ()
    kept: tuple[str, ...]


class Correlations(_Frozen):
    """Spearman's rho among some features: rho[i][j] between names i and j."""

    names: tuple[str, ...]
    rho: tuple[Numbers, ...]


class LassoPath(_Frozen):
    """A LASSO over its alphas (from large to small) on standardised columns named `names`.

    `coefficients[a][k]`: of name k at alpha a; `error_mean` and `error_se`: cross-validated error over the folds.
    """

    names: tuple[str, ...]
    alphas: Numbers
    coefficients: tuple[Numbers, ...]
    error_mean: Numbers
    error_se: Numbers
    error: Literal["mean squared error", "log loss"]
    chosen: int
    """The place of the alpha that was taken."""
    intercept: float


class SelectionStep(_Frozen):
    """A step of a selection, and the features that it left."""

    step: str
    features: tuple[str, ...]

    @property
    def left(self) -> int:
        """How many it left."""
        return len(self.features)


class Selection(_Frozen):
    """What one branch was cut down to. The first of the `steps` holds all that there were."""

    branch: Branch
    steps: tuple[SelectionStep, ...]
    correlations: Correlations | None
    """Among those that went into the LASSO (at most 60 of them), for the drawing."""
    lasso: LassoPath
    selected: tuple[str, ...]
    coefficients: Numbers
    """LASSO's, of `selected`, on standardised columns."""
    stability: dict[str, float]
    """Share of patient bootstraps in which a feature was selected, of all that ever were."""
    fallback: bool
    """LASSO kept nothing, and what enters the path first was taken."""


class GridPoint(_Frozen):
    """One point of a classifier's grid: mean and SD of the AUC over the folds."""

    classifier: ClassifierName
    parameters: dict[str, str | int | float | bool | None]
    auc_mean: float
    auc_sd: float


class Chosen(_Frozen):
    """The classifier of one branch, chosen by cross-validation on training rows."""

    branch: Branch
    grid: tuple[GridPoint, ...]
    winner: GridPoint
    platt_a: float
    platt_b: float
    onnx_largest_difference: float
    """Of calibrated probabilities over the training rows, between scikit-learn (or its like) and onnxruntime."""


class Scored(_Frozen):
    """The probabilities of one model on one part, row by row; `threshold` frozen on out-of-fold training scores."""

    model: ModelName
    part: PartName
    patient: tuple[int, ...]
    acute: tuple[int, ...]
    probability: Numbers
    threshold: float

    def auc(self) -> Auc | None:
        """The AUC with DeLong's interval; None with fewer than two of a class."""
        return auc_if_any(np.array(self.acute, dtype=np.int64), np.array(self.probability, dtype=np.float64))


class Judged(Protocol):
    """Something whose models were judged: a run, or an external validation."""

    @property
    def flow(self) -> tuple[FlowStep, ...]:
        """The cohort's way."""

    @property
    def cohort(self) -> tuple[Demographic, ...]:
        """The rows that were left."""

    @property
    def scores(self) -> tuple[Scored, ...]:
        """The scores of its models by part."""

    @property
    def phantom(self) -> bool:
        """Whether what is shown is to be called phantom."""


class Epoch(_Frozen):
    """One epoch of the fine-tuning; `inner_*` on patients of an inner fold."""

    fold: str
    """"all" or the number of the crossfit fold."""
    epoch: int
    head_rate: float
    backbone_rate: float
    loss: float
    inner_loss: float | None
    inner_auc: float | None


class NetworkRun(_Frozen):
    """What the network went through."""

    mode: DtlMode
    architecture: str
    weights: str
    """Where the start came from, in words: file name and SHA-256, phantom pre-training, or random."""
    device: str
    epochs: tuple[Epoch, ...]
    onnx_largest_difference: float
    components: int


class Optimism(_Frozen):
    """AUC on the rows that a model was fitted on, beside out-of-fold and held out."""

    model: ModelName
    in_sample: float
    out_of_fold: float
    held_out: float | None

    @property
    def flatters(self) -> bool:
        """The in-sample number lies far above the out-of-fold one."""
        return self.in_sample - self.out_of_fold > FLATTERING


class RandomNetwork(_Frozen):
    """AUC of DLR when its network is random and stays as it is: what a network that learned something lies above."""

    out_of_fold: float
    held_out: float | None


class RunResult(_Frozen):
    """run.json."""

    schema_version: Literal[1] = 1
    title: str
    phantom: bool
    settings: TrainingSettings
    seeds: dict[str, int]
    versions: dict[str, str]
    """Python, torch, scikit-learn, …; the bundle's id under `bundle_id`."""
    hashes: dict[str, str]
    """crop, hcr, dtl protocols, network file, feature list, cohort file: name → SHA-256."""
    machine: dict[str, str]
    seconds: dict[str, float]
    """By step."""
    flow: tuple[FlowStep, ...]
    cohort: tuple[Demographic, ...]
    repeatability: Repeatability
    selections: tuple[Selection, ...]
    network: NetworkRun
    classifiers: tuple[Chosen, ...]
    nomogram: NomogramModel
    scores: tuple[Scored, ...]
    """4 models x 3 parts (train: in-sample; out_of_fold; test)."""
    optimism: tuple[Optimism, ...]
    random_network: RandomNetwork | None = None
    """None where the network of the run is that network, or `network.random_line` is off."""
    conformal: dict[str, float]
    """alpha, and the largest accepted nonconformity of each class."""
    warnings: tuple[str, ...]

    def scored(self, model: ModelName, part: PartName) -> Scored:
        """The scores of a model on a part; KeyError where there are none."""
        for one in self.scores:
            if (one.model, one.part) == (model, part):
                return one
        raise KeyError(f"no scores of {model} on {part}")


class Evaluation(_Frozen):
    """evaluation.json: a bundle judged on a cohort that took no part in its training; nothing was fitted."""

    schema_version: Literal[1] = 1
    title: str
    phantom: bool
    """The cohort is one of phantoms, or the bundle was trained on such."""
    bundle: dict[str, str]
    """Its id, name, version, kind and preset."""
    seed: int
    bootstraps: int
    versions: dict[str, str]
    hashes: dict[str, str]
    flow: tuple[FlowStep, ...]
    cohort: tuple[Demographic, ...]
    """All of them of part test."""
    scores: tuple[Scored, ...]
    indeterminate: int
    """Vertebrae that the bundle's conformal limits leave open."""
    warnings: tuple[str, ...]
