"""What the figures of the selection show, against what the run says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from matplotlib.collections import LineCollection

from services.trainer.figures.feature_counts import feature_counts
from services.trainer.figures.feature_names import feature_class, feature_label
from services.trainer.figures.icc_scatter import draw_icc_scatter, icc_scatter
from services.trainer.figures.importance import draw_importance, importance
from services.trainer.figures.lasso import draw_lasso_path, lasso_error, lasso_path
from services.trainer.figures.spearman_clusters import spearman_clusters
from services.trainer.figures.stability import stability
from services.trainer.figures.training_curves import training_curves
from services.trainer.results import Correlations
from tests.fixtures.run_results import full_result

RESULT = full_result()
HCR, DTL, FUSION = RESULT.selections


@pytest.mark.parametrize(
    ("name", "kind", "label"),
    [
        ("original_shape_Flatness", "shape", "Shape Flatness"),
        ("wavelet-HLL_glcm_Correlation", "glcm", "GLCM Correlation · wavelet HLL"),
        ("log-sigma-2-0-mm-3D_ngtdm_Busyness", "ngtdm", "NGTDM Busyness · LoG 2.0 mm"),
        ("pca_004", "DTL", "DTL component 5"),
        ("dtl_logit", "DTL", "dtl_logit"),
    ],
)
def test_a_feature_is_named_by_its_class(name: str, kind: str, label: str) -> None:
    assert (feature_class(name), feature_label(name)) == (kind, label)


def test_features_are_counted_by_class_at_each_step() -> None:
    data = feature_counts(RESULT).data

    first = data.where(branch="hcr", step="all")
    assert dict(zip(first.texts("class"), first.numbers("features"), strict=True)) == {
        "shape": 14,
        "firstorder": 342,
        "glcm": 418,
        "glrlm": 304,
        "glszm": 304,
        "gldm": 266,
    }
    for selection in RESULT.selections:
        for one in selection.steps:
            assert data.where(branch=selection.branch, step=one.step).numbers("features").sum() == one.left
    last = data.where(branch="fusion", step="LASSO")
    expected = Counter(feature_class(name) for name in FUSION.selected)
    assert dict(zip(last.texts("class"), last.numbers("features"), strict=True)) == expected


def test_a_feature_is_shown_as_kept_where_both_readings_are_at_the_limit() -> None:
    figure = icc_scatter(RESULT)
    intra, inter = figure.data.numbers("intra"), figure.data.numbers("inter")

    axes = draw_icc_scatter(figure.data, phantom=True).axes[0]

    with np.errstate(invalid="ignore"):
        expected = (intra >= 0.8) & (inter >= 0.8)
    np.testing.assert_array_equal(figure.data.flags("kept"), expected)
    points = {str(line.get_label()).split()[0]: len(line.get_xdata()) for line in axes.lines}
    assert points["kept"] == len(RESULT.repeatability.kept)
    assert points["kept"] + points["dropped"] == int((~np.isnan(intra) & ~np.isnan(inter)).sum())
    assert "5 have no ICC" in figure.caption


def test_clusters_put_features_that_correlate_beside_each_other() -> None:
    names = ("a", "x", "b", "y", "c")
    group = np.array([0, 1, 0, 1, 0])
    rho = np.where(group[:, None] == group[None, :], -0.9, 0.1)
    np.fill_diagonal(rho, 1.0)
    correlations = Correlations(names=names, rho=tuple(tuple(row) for row in rho.tolist()))
    selection = HCR.model_copy(update={"correlations": correlations})

    data = spearman_clusters(RESULT, selection).data

    drawn = "".join(name for _, name in sorted(zip(data.numbers("place"), names, strict=True)))
    assert sorted((sorted(drawn[:3]), sorted(drawn[3:]))) == [["a", "b", "c"], ["x", "y"]] or sorted(
        (sorted(drawn[:2]), sorted(drawn[2:]))
    ) == [["a", "b", "c"], ["x", "y"]]
    assert data.numbers("rho x").tolist() == [0.1, 1.0, 0.1, -0.9, 0.1]


@pytest.mark.parametrize("selection", RESULT.selections, ids=lambda each: each.branch)
def test_the_path_draws_every_coefficient_and_colours_those_that_stay(selection) -> None:  # type: ignore[no-untyped-def]
    figure = lasso_path(RESULT, selection)

    axes = draw_lasso_path(figure.data, phantom=True).axes[0]

    lines = {
        each.get_label(): len(each.get_segments()) for each in axes.collections if isinstance(each, LineCollection)
    }
    stay = sum(value != 0 for value in selection.lasso.coefficients[selection.lasso.chosen])
    assert sum(lines.values()) == len(selection.lasso.names)
    assert lines.get("HCR", 0) + lines.get("DTL", 0) == stay == len(selection.selected)
    name = selection.selected[0]
    place = selection.lasso.names.index(name)
    assert figure.data.numbers(name).tolist() == [row[place] for row in selection.lasso.coefficients]


def test_the_error_curve_says_which_alpha_was_taken_and_how_many_features_stay() -> None:
    data = lasso_error(RESULT, DTL).data

    chosen = data.where(chosen=True)
    assert len(chosen) == 1
    assert chosen.numbers("alpha")[0] == DTL.lasso.alphas[DTL.lasso.chosen]
    assert chosen.numbers("error_mean")[0] == min(DTL.lasso.error_mean)
    assert chosen.numbers("features")[0] == 50


def test_importance_shows_the_thirty_largest_coefficients() -> None:
    figure = importance(RESULT, FUSION)

    bars = draw_importance(figure.data, phantom=True).axes[0].patches

    largest = sorted(FUSION.coefficients, key=abs, reverse=True)[:30]
    assert [bar.get_width() for bar in bars] == largest == figure.data.numbers("coefficient").tolist()


def test_stability_shows_the_most_frequent_features_and_whether_they_were_selected() -> None:
    data = stability(RESULT, HCR).data

    frequency = data.numbers("frequency")
    assert frequency.tolist() == sorted(HCR.stability.values(), reverse=True)[:30]
    assert all(HCR.stability[name] == value for name, value in zip(data.texts("feature"), frequency, strict=True))
    assert data.flags("selected").tolist() == [name in HCR.selected for name in data.texts("feature")]


def test_training_curves_hold_every_epoch() -> None:
    data = training_curves(RESULT).data

    assert len(data) == len(RESULT.network.epochs) == 200
    assert data.where(fold="all").numbers("loss").tolist() == [
        epoch.loss for epoch in RESULT.network.epochs if epoch.fold == "all"
    ]
