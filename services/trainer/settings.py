"""Every step of the training as a named setting, and the two presets (METHOD 1 to 9).

`paper` does what is printed, where it can be followed honestly; `recommended` is what a site's own model is made with.
A settings file (TOML) names what differs from its preset; `TrainingSettings.of` says all faults at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.fracture.protocol import Preset, RoiKind

ClassifierName = Literal["svm", "knn", "decision-tree", "random-forest", "extra-trees", "xgboost", "lightgbm"]
CLASSIFIERS: Final[tuple[ClassifierName, ...]] = (
    "svm",
    "knn",
    "decision-tree",
    "random-forest",
    "extra-trees",
    "xgboost",
    "lightgbm",
)
DtlMode = Literal["in_sample", "crossfit", "frozen"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _none_in_words(cls, given: Any) -> Any:
        """TOML has no null: "none" stands for it where a setting may be none."""
        if not isinstance(given, dict):
            return given
        may_be_none = {name for name, of in cls.model_fields.items() if type(None) in get_args(of.annotation)}
        return {name: None if value == "none" and name in may_be_none else value for name, value in given.items()}


class SplitSettings(_Section):
    """Who is held out (METHOD 8); always whole patients."""

    by: Literal["random", "column", "site"] = Field(
        default="random",
        description="random: a stratified share of the patients; column: as the column `split` says; site: all rows of "
        "`test_site`.",
    )
    test_share: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.2, description="Share of the patients held out.")
    test_site: str | None = Field(default=None, description="The site that is held out with by = site.")


class HcrSettings(_Section):
    """Hand-crafted features (METHOD 2)."""

    features: Literal["paper", "paper+ngtdm"] = Field(default="paper", description="1,648 features, or 1,743.")
    image_types: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        default=None, description="Fewer image types than the list has, such as Original and LoG; none: all."
    )


class RepeatabilitySettings(_Section):
    """Which features a second reading gives again (METHOD 4)."""

    method: Literal["auto", "masks", "perturbation", "none"] = Field(
        default="auto", description="auto: by the columns mask2 and mask3 where they are, else by perturbed masks."
    )
    limit: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.8, description="Least ICC(2,1), intra and inter.")
    perturbed_cases: Annotated[int, Field(ge=5)] = Field(default=30, description="Training cases that are perturbed.")


class SelectionSettings(_Section):
    """From many features to few (METHOD 4)."""

    spearman_limit: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.9, description="No two features that stay correlate more than this (greedy)."
    )
    lasso: Literal["gaussian", "logistic"] = Field(default="gaussian", description="LASSO on 0 and 1, or logistic L1.")
    rule: Literal["min", "1se"] = Field(default="min", description="Alpha of least error, or one standard error on.")
    alphas: tuple[float, float, int] = Field(default=(-3.0, 0.0, 50), description="numpy.logspace of the alphas.")
    folds: Annotated[int, Field(ge=2)] = Field(default=10, description="Folds of patients of the LASSO's CV.")
    post_lasso_spearman: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="After the LASSO of HCR, of two that correlate more the smaller coefficient goes."
    )
    stability_bootstraps: Annotated[int, Field(ge=0)] = Field(
        default=100, description="Patient bootstraps over which the frequency of selection is counted."
    )


class NetworkSettings(_Section):
    """The network and its fine-tuning (METHOD 3)."""

    mode: DtlMode = Field(default="frozen", description="Which features the later steps are fitted on.")
    architecture: Literal["resnet50", "tiny"] = Field(default="resnet50", description="tiny is for tests.")
    weights: Path | None = Field(
        default=None, description="Transferred weights (.safetensors, or .pth of torchvision, loaded weights-only)."
    )
    weights_sha256: str | None = Field(default=None, description="What the SHA-256 of that file must be.")
    random_start: bool = Field(
        default=False, description="Without weights: start at random on purpose. It does not learn on small cohorts."
    )
    random_line: bool = Field(
        default=True, description="Beside DLR's result, the AUC of a random network that stays as it is."
    )
    image_size: Annotated[int, Field(ge=32, le=512)] = 64
    epochs: Annotated[int, Field(ge=1)] = 50
    batch: Annotated[int, Field(ge=2)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = Field(default=0.01, description="Of the head, cosine to 0.")
    backbone_factor: Annotated[float, Field(ge=0)] = Field(default=0.1, description="Of the backbone, times that.")
    frozen_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="Share of the epochs in which the backbone stands still, BatchNorm in eval."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    augmentation: bool = True
    patience: Annotated[int, Field(ge=1)] | None = Field(
        default=10, description="Epochs without a better inner-fold loss until it stops; none: never."
    )
    crossfit_folds: Annotated[int, Field(ge=2)] = 5
    components: Annotated[int, Field(ge=1)] = Field(default=100, description="PCA components of the features.")
    storage: Literal["float32", "int8"] = Field(default="float32", description="How the bundle keeps the weights.")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1)] = Field(default=1, description="Threads of torch; part of what repeats.")


class ClassifierSettings(_Section):
    """Seven classifiers, and how one of them is chosen (METHOD 5)."""

    names: Annotated[tuple[ClassifierName, ...], Field(min_length=1)] = CLASSIFIERS
    grid: Literal["full", "small"] = Field(default="full", description="At most 24 points each, or at most 2 (tests).")
    folds: Annotated[int, Field(ge=2)] = 5
    out_of_fold: Annotated[int, Field(ge=2)] = Field(
        default=10, description="Outer folds: calibration, threshold, nomogram and conformal limits rest on them."
    )
    score: Literal["lasso", "logistic"] = Field(
        default="logistic", description="The linear score of the nomogram: LASSO's own, or a ridge logistic refit."
    )
    conformal_alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.1


class StatisticsSettings(_Section):
    """How the results are judged (METHOD 7)."""

    bootstraps: Annotated[int, Field(ge=0)] = Field(default=2000, description="Patient-cluster bootstraps.")


class TrainingSettings(_Section):
    """All settings of a training run."""

    preset: Preset = "recommended"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 2023
    roi: RoiKind = "body"
    split: SplitSettings = SplitSettings()
    hcr: HcrSettings = HcrSettings()
    repeatability: RepeatabilitySettings = RepeatabilitySettings()
    selection: SelectionSettings = SelectionSettings()
    network: NetworkSettings = NetworkSettings()
    classifiers: ClassifierSettings = ClassifierSettings()
    statistics: StatisticsSettings = StatisticsSettings()

    @classmethod
    def of(cls, preset: Preset, changes: dict[str, Any] | None = None) -> TrainingSettings:
        """A preset with changes (nested, as a TOML file gives them); pydantic.ValidationError with all faults."""
        return cls.model_validate(_merged(_merged({"preset": preset}, PRESETS[preset]), changes or {}))


PRESETS: Final[dict[Preset, dict[str, Any]]] = {
    "paper": {
        "network": {"mode": "in_sample"},
        "selection": {"post_lasso_spearman": 0.5},
        "classifiers": {"score": "lasso"},
    },
    "recommended": {},
}
"""What a preset changes of the defaults; crop margin and picture box follow from its name (protocol.py)."""


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        below = merged.get(name)
        merged[name] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
