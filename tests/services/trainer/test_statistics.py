import csv
from pathlib import Path

import numpy as np
import pytest

from services.trainer.statistics import auc_delong, confusion, delong_test, youden_threshold


@pytest.mark.shared_data
def test_auc_and_delong_agree_with_proc(shared_data: Path) -> None:
    with (shared_data / "stats-roc" / "aSAH.csv").open() as stream:
        cases = list(csv.DictReader(stream))
    labels = np.array([case["outcome"] == "Poor" for case in cases], dtype=np.int64)
    scores = {name: np.array([float(case[name]) for case in cases]) for name in ("wfns", "s100b", "ndka")}

    with (shared_data / "stats-roc" / "proc_reference.csv").open() as stream:
        reference = list(csv.DictReader(stream))

    for row in reference:
        first, what = scores[row["a"]], row["quantity"]
        if row["b"]:
            paired = delong_test(labels, first, scores[row["b"]])
            got = {
                "delong_Z": paired.z,
                "delong_p": paired.p,
                "delong_diff_ci_lo": paired.low,
                "delong_diff_ci_hi": paired.high,
            }[what]
        else:
            auc = auc_delong(labels, first)
            got = {"auc": auc.value, "ci95_lo_delong": auc.low, "ci95_hi_delong": auc.high}[what]
        assert got == pytest.approx(float(row["value"]), abs=max(float(row["tol"]), 1e-9)), row


def test_the_threshold_lies_halfway_between_the_classes_when_they_are_apart() -> None:
    labels = np.array([0, 0, 1, 1])

    threshold = youden_threshold(labels, np.array([0.1, 0.2, 0.6, 0.9]))

    assert threshold == pytest.approx(0.4)


def test_an_auc_needs_two_cases_of_each_class() -> None:
    with pytest.raises(ValueError, match="two cases of each class"):
        auc_delong(np.array([0, 0, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4]))


def test_every_case_is_counted_once() -> None:
    counts = confusion(np.array([1, 1, 0, 0, 0]), np.array([True, False, True, False, False]))

    assert counts == {"tp": 1, "fn": 1, "tn": 2, "fp": 1}
