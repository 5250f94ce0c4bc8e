import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.trainer.statistics.decision_curve import decision_curve, net_benefit, net_benefit_of_all
from services.trainer.statistics.performance import confusion

Patients = list[dict[str, str]]


@pytest.fixture
def patients(shared_data: Path) -> Patients:
    with (shared_data / "stats-dca" / "df_binary.csv").open() as stream:
        return list(csv.DictReader(stream))


def _column(patients: Patients, name: str) -> NDArray[np.float64]:
    return np.array([float(row[name]) for row in patients])


def _cancer(patients: Patients) -> NDArray[np.int64]:
    return np.array([row["cancer"] == "TRUE" for row in patients], dtype=np.int64)


@pytest.mark.shared_data
def test_the_net_benefits_written_down_from_dcurves(patients: Patients, shared_data: Path) -> None:
    reference: dict[str, Any] = json.loads((shared_data.parent / "reference" / "statistics.json").read_text())
    expected, labels = reference["dcurves_df_binary"], _cancer(patients)

    assert (len(labels), labels.mean()) == (expected["n"], pytest.approx(expected["prevalence"]))
    for name in ("cancerpredmarker", "famhistory"):
        thresholds = np.array([float(pt) for pt in expected[name]])
        got = net_benefit(labels, _column(patients, name), thresholds)
        assert got == pytest.approx(list(expected[name].values()), abs=5e-7), name
    thresholds = np.array([float(pt) for pt in expected["all"]])
    assert net_benefit_of_all(labels, thresholds) == pytest.approx(list(expected["all"].values()), abs=1e-12)


@pytest.mark.shared_data
def test_the_whole_curve_of_a_yes_or_no_marker_is_that_of_dcurves(patients: Patients, shared_data: Path) -> None:
    with (shared_data / "stats-dca" / "r_dca_famhistory.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["net_benefit"] not in ("", "NA")]

    # dcurves puts a threshold just above 0 in the place of 0, so that a marker of 0 is not acted on
    thresholds = np.maximum(np.arange(100) / 100, 1e-12)

    curve = decision_curve(_cancer(patients), _column(patients, "famhistory"), thresholds=thresholds)

    by_name = {"all": curve.treat_all, "none": curve.treat_none, "famhistory": curve.model}
    assert {row["variable"] for row in rows} == set(by_name)
    for row in rows:
        place = round(float(row["threshold"]) * 100)
        assert by_name[row["variable"]][place] == pytest.approx(float(row["net_benefit"]), abs=1e-10), row


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])), min_size=1, max_size=40),
    st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.9]), min_size=1, max_size=5),
)
def test_net_benefit_follows_the_table_and_never_passes_the_share_of_acute_cases(
    cases: list[tuple[int, float]], at: list[float]
) -> None:
    labels, probabilities = np.array([label for label, _ in cases]), np.array([p for _, p in cases])

    benefit = net_benefit(labels, probabilities, np.array(at))

    for pt, got in zip(at, benefit, strict=True):
        table = confusion(labels, probabilities >= pt)
        assert got == pytest.approx(table.tp / table.cases - table.fp / table.cases * pt / (1 - pt), abs=1e-12)
        assert got <= labels.mean() + 1e-12
        assert got >= -(1 - labels.mean()) * pt / (1 - pt) - 1e-12


def test_at_a_threshold_of_nought_all_are_treated_by_any_model() -> None:
    labels = np.array([0, 1, 1, 0])

    curve = decision_curve(labels, np.array([0.0, 0.3, 0.9, 0.1]), thresholds=np.array([0.0, 0.5]))

    assert curve.model.tolist() == [0.5, 0.25]
    assert curve.treat_all.tolist() == [0.5, 0.0]
    assert curve.treat_none.tolist() == [0.0, 0.0]


def test_what_has_no_net_benefit_is_refused() -> None:
    labels, probabilities = np.array([0, 1]), np.array([0.2, 0.8])

    with pytest.raises(ValueError, match="from 0 to below 1"):
        net_benefit(labels, probabilities, np.array([1.0]))
    with pytest.raises(ValueError, match="probabilities of 0 to 1"):
        net_benefit(labels, np.array([0.2, 8.0]), np.array([0.5]))
    with pytest.raises(ValueError, match="at least 1 case, got none"):
        net_benefit(labels[:0], probabilities[:0], np.array([0.5]))
