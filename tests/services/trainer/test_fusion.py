import numpy as np
import pytest

from services.trainer.fusion import Rows, fit_models, fit_pca, out_of_fold, projected, score_rows
from services.trainer.nomogram_fitting import fit_logistic, fit_nomogram
from services.trainer.statistics import auc_delong


def _rows(seed: int, *, signal: float, cases: int = 70) -> Rows:
    rng = np.random.default_rng(seed)
    patient = np.arange(cases) // 2
    acute = rng.integers(0, 2, size=cases)
    hcr = rng.standard_normal((cases, 10)) * 10.0 ** rng.integers(-2, 6, size=10)
    hcr[:, 3] += signal * acute * hcr[:, 3].std()
    dtl = rng.standard_normal((cases, 15))
    dtl[:, :6] += signal * acute[:, None]
    return Rows(hcr_names=tuple(f"h{n:02d}" for n in range(10)), hcr=hcr, dtl=dtl, acute=acute, patient=patient)


def test_what_tells_the_classes_apart_is_found_out_of_fold() -> None:
    rows = _rows(1, signal=1.5)

    scores = out_of_fold(rows, folds=3, seed=0)

    assert auc_delong(rows.acute, scores.fusion).value > 0.75
    assert np.isfinite(scores.hcr).all()


def test_permuted_labels_tell_nothing() -> None:
    aucs = [
        auc_delong(rows.acute, out_of_fold(rows, folds=3, seed=0).fusion).value
        for rows in (_rows(seed, signal=0.0) for seed in (1, 2))
    ]

    assert 0.35 < np.mean(aucs) < 0.65


def test_an_out_of_fold_score_does_not_see_its_own_patient() -> None:
    rows = _rows(2, signal=1.0)
    turned = rows.acute.copy()
    turned[rows.patient == 7] = 1 - turned[rows.patient == 7]
    others = rows.patient != 7

    models = fit_models(rows.part(others))
    changed = Rows(hcr_names=rows.hcr_names, hcr=rows.hcr, dtl=rows.dtl, acute=turned, patient=rows.patient)
    again = fit_models(changed.part(others))

    assert score_rows(models, rows).fusion == pytest.approx(score_rows(again, changed).fusion, abs=0)


def test_the_pca_in_the_bundle_is_the_pca_of_the_training_rows() -> None:
    dtl = np.random.default_rng(3).standard_normal((20, 30)) * np.linspace(0.1, 5, 30)

    pca = fit_pca(dtl, components=8)

    components = projected(pca, dtl)
    covariance = np.cov(components, rowvar=False)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-9
    assert list(np.diag(covariance)) == sorted(np.diag(covariance), reverse=True)
    assert pca.apply(dtl[4])["pca_002"] == pytest.approx(components[4, 2])


def test_the_unpenalised_regression_solves_its_score_equations() -> None:
    rng = np.random.default_rng(4)
    values = rng.standard_normal((200, 2)) * [10, 0.1] + [60, 0]
    outcome = (rng.random(200) < 1 / (1 + np.exp(-(values[:, 0] - 60) / 10))).astype(np.int64)

    beta = fit_logistic(values, outcome)

    residual = outcome - 1 / (1 + np.exp(-(beta[0] + values @ beta[1:])))
    assert abs(residual.sum()) < 1e-6
    assert np.abs(values.T @ residual).max() < 1e-5


def test_the_nomogram_keeps_the_ranges_of_its_data() -> None:
    rng = np.random.default_rng(5)
    age, score = rng.uniform(45, 90, 120), rng.standard_normal(120)
    acute = (rng.random(120) < 1 / (1 + np.exp(-score))).astype(np.int64)

    model = fit_nomogram(acute=acute, age=age, male=(np.arange(120) % 2).astype(float), score=score)

    assert model.age_range == (age.min(), age.max())
    assert model.beta_score > 0
