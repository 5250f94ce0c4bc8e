"""How a model's scores are judged (METHOD 7): one module a question, each compared with R in the tests."""

from services.trainer.statistics.auc import (
    Auc,
    AucBootstrap,
    ComparedPair,
    PairedAuc,
    UnpairedAuc,
    auc_delong,
    bootstrap_auc_differences,
    bootstrap_aucs,
    compare_aucs,
    delong_test,
    delong_test_unpaired,
    holm,
)
from services.trainer.statistics.calibration import Calibration, CalibrationBin, brier, calibration, calibration_curve
from services.trainer.statistics.decision_curve import DecisionCurve, decision_curve, net_benefit, net_benefit_of_all
from services.trainer.statistics.group_tests import (
    GroupTest,
    Summary,
    counts_test,
    welch,
    welch_from_summaries,
)
from services.trainer.statistics.icc import Icc, icc_agreement, icc_consistency
from services.trainer.statistics.performance import (
    ConfusionTable,
    Performance,
    Proportion,
    confusion,
    performance,
    wilson,
    youden_threshold,
)

__all__ = [
    "Auc",
    "AucBootstrap",
    "Calibration",
    "CalibrationBin",
    "ComparedPair",
    "ConfusionTable",
    "DecisionCurve",
    "GroupTest",
    "Icc",
    "PairedAuc",
    "Performance",
    "Proportion",
    "Summary",
    "UnpairedAuc",
    "auc_delong",
    "bootstrap_auc_differences",
    "bootstrap_aucs",
    "brier",
    "calibration",
    "calibration_curve",
    "compare_aucs",
    "confusion",
    "counts_test",
    "decision_curve",
    "delong_test",
    "delong_test_unpaired",
    "holm",
    "icc_agreement",
    "icc_consistency",
    "net_benefit",
    "net_benefit_of_all",
    "performance",
    "welch",
    "welch_from_summaries",
    "wilson",
    "youden_threshold",
]
