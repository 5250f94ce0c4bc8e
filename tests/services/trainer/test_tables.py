import csv
import io
from html.parser import HTMLParser
from typing import Literal

import numpy as np
import pytest

from services.trainer.results import (
    LABELS,
    MODELS,
    Chosen,
    Correlations,
    Demographic,
    FlowStep,
    GridPoint,
    LassoPath,
    ModelName,
    NetworkRun,
    PartName,
    RandomNetwork,
    Repeatability,
    RunResult,
    Scored,
    Selection,
    SelectionStep,
)
from services.trainer.settings import TrainingSettings
from services.trainer.statistics import auc_delong, bootstrap_aucs, delong_test, holm
from services.trainer.tables import NONE, Table, cohort_table, comparison_table, p_text, performance_table, tables
from shared.fracture.nomogram import NomogramModel


def _row(
    patient: int,
    part: Literal["train", "test"],
    acute: int,
    age: float,
    *,
    male: bool = False,
    level: str = "L1",
    site: str = "north",
) -> Demographic:
    return Demographic(patient=patient, part=part, acute=bool(acute), age=age, male=male, level=level, site=site)


def _cells(table: Table, label: str) -> dict[str, str]:
    (row,) = [row for row in table.rows if row[0] == label]
    return dict(zip(table.header, row, strict=True))


SMALL = (
    _row(1, "train", 1, 60, level="L1"),
    _row(1, "train", 0, 62, level="T12"),
    _row(1, "train", 0, 64, level="T12"),
    _row(2, "train", 0, 80, male=True, level="L1"),
    _row(3, "train", 1, 50, level="L2"),
    _row(4, "test", 0, 74, male=True, level="T8", site="south"),
    _row(5, "test", 1, 58, level="L1", site="south"),
)


def test_patients_and_vertebrae_are_counted_apart() -> None:
    table = cohort_table(SMALL, seed=1)

    assert list(_cells(table, "Patients, n").values())[1:] == ["5", "3", "2", "", "3", "2", ""]
    assert list(_cells(table, "Vertebrae, n").values())[1:] == ["7", "3", "4", "", "5", "2", ""]
    ages = _cells(table, "Age of patients, years, mean ± SD (range)")
    assert ages["All"] == "64.8 ± 12.1 (50 to 80)"
    assert ages["Acute"] == "56.7 ± 6.1 (50 to 62)"
    assert _cells(table, "Sex of patients, male, n")["Chronic"] == "2 (100.0 %)"
    assert any("1 patient has vertebrae of both classes" in note for note in table.notes)
    assert any("one age a patient" in note for note in table.notes)


def test_categories_sum_to_their_whole_and_levels_go_from_head_to_foot() -> None:
    table = cohort_table(SMALL, seed=1)

    levels = [row[0] for row in table.rows if row[0].startswith("Level")]
    assert levels == [f"Level of vertebrae, {level}, n" for level in ("T8", "T12", "L1", "L2")]
    for kind in ("Region", "Level", "Site"):
        for column in ("All", "Acute", "Chronic", "Training", "Test"):
            rows = [row[0] for row in table.rows if row[0].startswith(kind)]
            counts = [int(_cells(table, row)[column].split()[0]) for row in rows]
            assert sum(counts) == int(_cells(table, "Vertebrae, n")[column]), (kind, column)


def test_each_test_of_the_cohort_is_named() -> None:
    table = cohort_table(SMALL, seed=1)

    notes = "\n".join(table.notes)
    assert "Welch's t test: age (acute, chronic), age (training, test)." in notes
    assert "Fisher's exact test: sex (acute, chronic)" in notes
    assert "simulated tables: level (acute, chronic)" in notes
    assert "site (acute, chronic)" in notes


def test_what_cannot_be_tested_has_a_dash_and_its_reason() -> None:
    table = cohort_table([_row(n, "train", n % 2, 60 + n) for n in range(8)], seed=1)

    assert _cells(table, "Site of vertebrae, north, n")["p (acute, chronic)"] == NONE
    assert any(note.startswith("site, acute, chronic: no test, since") for note in table.notes)


def test_with_one_part_alone_no_column_stands_for_the_other() -> None:
    table = cohort_table([_row(n, "train", n % 2, 60 + n) for n in range(8)], seed=1)

    assert table.header == ("", "All", "Acute", "Chronic", "p (acute, chronic)")
    assert {len(row) for row in table.rows} == {5}
    assert not any("training, test" in note for note in table.notes)


def test_a_patient_in_two_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="patient 1 stands in two parts"):
        cohort_table([_row(1, "train", 1, 60), _row(1, "test", 0, 60)], seed=1)
    with pytest.raises(ValueError, match="at least 1 vertebra, got none"):
        cohort_table([], seed=1)


def _scores(
    seed: int, *, cases: int = 80, parts: tuple[PartName, ...] = ("train", "out_of_fold", "test")
) -> list[Scored]:
    rng = np.random.default_rng(seed)
    scores = []
    for part in parts:
        acute = rng.permutation(np.arange(cases) % 2)
        for strength, model in enumerate(MODELS):
            logit = (0.8 + 0.4 * strength) * (2 * acute - 1) + rng.standard_normal(cases)
            scores.append(_scored(model, part, acute.tolist(), (1 / (1 + np.exp(-logit))).tolist()))
    return scores


def _scored(model: ModelName, part: PartName, acute: list[int], probability: list[float]) -> Scored:
    return Scored(
        model=model,
        part=part,
        patient=tuple(n // 2 for n in range(len(acute))),
        acute=tuple(acute),
        probability=tuple(probability),
        threshold=0.5,
    )


def test_every_model_has_a_row_for_every_part_with_what_the_statistics_say() -> None:
    scores = _scores(1)

    table = performance_table(scores, resamples=50, seed=9)

    assert [row[0] for row in table.rows] == [LABELS[model] for model in MODELS for _ in range(3)]
    one = next(score for score in scores if (score.model, score.part) == ("fusion", "test"))
    cells = dict(zip(table.header, table.rows[8], strict=True))
    labels, probability = np.array(one.acute), np.array(one.probability)
    auc = auc_delong(labels, probability)
    drawn = bootstrap_aucs(labels, {"one": probability}, np.array(one.patient), resamples=50, seed=9)["one"]
    assert (cells["Model"], cells["Part"]) == (LABELS["fusion"], "Test")
    assert cells["AUC (95 % interval, DeLong)"] == f"{auc.value:.3f} ({auc.low:.3f} to {auc.high:.3f})"
    assert cells["95 % interval, patients drawn"] == f"{drawn.low:.3f} to {drawn.high:.3f}"
    right = ((probability >= 0.5) == (labels == 1)).mean()
    assert cells["ACC (95 % interval)"].startswith(f"{right:.3f} (")
    assert cells["Brier"] == f"{((probability - labels) ** 2).mean():.4f}"
    assert cells["Vertebrae (acute)"] == "80 (40)"


def test_the_golden_row_stands_in_the_table_as_in_the_paper() -> None:
    acute = [1] * 63 + [0] * 41
    probability = [0.9] * 56 + [0.1] * 7 + [0.2] * 29 + [0.8] * 12

    table = performance_table([_scored("dlr", "test", acute, probability)], resamples=0, seed=1)

    (row,) = table.rows
    cells = dict(zip(table.header, row, strict=True))
    shares = [cells[f"{name} (95 % interval)"].split()[0] for name in ("ACC", "SEN", "SPE", "F1")]
    assert shares == ["0.817", "0.889", "0.707", "0.855"]


def test_a_part_too_small_for_a_number_has_dashes_and_the_reason_once() -> None:
    scores = [_scored(model, "test", [1, 0, 0], [0.9, 0.2, 0.1]) for model in ("radiomics", "dlr")]

    table = performance_table(scores, resamples=20, seed=1)
    compared = comparison_table(scores, resamples=20, seed=1)

    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert cells["AUC (95 % interval, DeLong)"] == NONE
    assert cells["ACC (95 % interval)"].startswith("1.000 (")
    reasons = [note for note in table.notes if "got 1 acute and 2 chronic" in note and "an AUC" in note]
    assert reasons == [
        "Radiomics, Test; DLR, Test: an AUC with an interval needs at least 2 cases of each class, "
        "got 1 acute and 2 chronic."
    ]
    assert compared.rows == ()
    assert any("got 1 acute and 2 chronic" in note for note in compared.notes)


def test_a_model_that_calls_nothing_acute_has_no_ppv_and_says_so() -> None:
    table = performance_table([_scored("dlr", "test", [1, 0, 1, 0], [0.3, 0.2, 0.1, 0.4])], resamples=0, seed=1)

    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert cells["PPV (95 % interval)"] == NONE
    assert any("no vertebra was called acute" in note for note in table.notes)


def test_an_auc_without_a_width_is_not_left_without_a_word() -> None:
    table = performance_table([_scored("dlr", "train", [1, 1, 0, 0], [0.9, 0.8, 0.2, 0.1])], resamples=0, seed=1)

    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert cells["AUC (95 % interval, DeLong)"] == "1.000 (1.000 to 1.000)"
    assert cells["Calibration slope (95 % interval)"] == NONE
    assert any(note.startswith("DLR, Training, in-sample: the classes are fully apart") for note in table.notes)
    assert any("overlap, got classes fully apart" in note for note in table.notes)


def test_six_pairs_on_test_and_out_of_fold_with_holms_p_over_each_six() -> None:
    scores = _scores(2)

    table = comparison_table(scores, resamples=50, seed=1)

    assert [row[0] for row in table.rows] == ["Test"] * 6 + ["Training, out-of-fold"] * 6
    own = {one.model: np.array(one.probability) for one in scores if one.part == "test"}
    labels = np.array(next(one for one in scores if one.part == "test").acute)
    tests = [delong_test(labels, own[a], own[b]) for n, a in enumerate(MODELS) for b in MODELS[n + 1 :]]
    assert [row[-2] for row in table.rows[:6]] == [p_text(test.p) for test in tests]
    assert [row[-1] for row in table.rows[:6]] == [p_text(p) for p in holm([test.p for test in tests])]


def test_models_scored_on_different_cases_are_not_compared() -> None:
    scores = [_scored("dlr", "test", [1, 0, 1, 0], [0.1] * 4), _scored("dlrn", "test", [0, 1, 1, 0], [0.1] * 4)]

    with pytest.raises(ValueError, match="different cases of test"):
        comparison_table(scores, resamples=0, seed=1)


def test_a_run_without_a_test_set_has_the_rows_that_it_can_have() -> None:
    scores = _scores(3, parts=("train", "out_of_fold"))

    assert len(performance_table(scores, resamples=0, seed=1).rows) == 8
    assert len(comparison_table(scores, resamples=0, seed=1).rows) == 6


ODD = Table(
    name="odd",
    caption="50 % of A&B_1 <sites>",
    header=("site", "count"),
    rows=(
        ("<b>&\"'", "1"),
        ("=HYPERLINK(1)", "-0.012 (-0.1 to 0.1)"),
        ("-1+cmd", "-0.2 to -0.1"),
        ("a, b\\{~^#$", NONE),
    ),
    notes=("x_1 & <script>alert(1)</script>",),
)


def test_csv_comes_back_as_it_went_in_and_starts_no_formula() -> None:
    rows = list(csv.reader(io.StringIO(ODD.to_csv(), newline="")))

    assert rows[0] == ["site", "count"]
    assert rows[1] == ["<b>&\"'", "1"]
    assert rows[2] == ["'=HYPERLINK(1)", "-0.012 (-0.1 to 0.1)"]
    assert rows[3] == ["'-1+cmd", "-0.2 to -0.1"]
    assert rows[4] == ["a, b\\{~^#$", NONE]


def test_latex_is_escaped_and_has_a_cell_for_each_column() -> None:
    latex = ODD.to_latex()

    assert r"\caption{50 \% of A\&B\_1 \textless{}sites\textgreater{}}" in latex
    assert r"a, b\textbackslash{}\{\textasciitilde{}\textasciicircum{}\#\$ & -- \\" in latex
    assert [latex.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert latex.count(" & ") == 5
    assert r"x\_1 \& \textless{}script" in latex


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_html_holds_the_text_and_none_of_its_tags() -> None:
    reader = _Reader()

    reader.feed(ODD.to_html())

    assert "script" not in reader.tags
    assert "b" not in reader.tags
    text = "".join(reader.text)
    assert all(cell in text for row in ODD.rows for cell in row)
    assert ODD.notes[0] in text


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 columns, and a row of 1 cells"):
        Table(name="t", caption="", header=("a", "b"), rows=(("1",),))


def _run(phantom: bool) -> RunResult:
    point = GridPoint(classifier="svm", parameters={"C": 1.0}, auc_mean=0.8, auc_sd=0.1)
    lasso = LassoPath(
        names=("a",),
        alphas=(0.1,),
        coefficients=((0.5,),),
        error_mean=(0.2,),
        error_se=(0.01,),
        error="mean squared error",
        chosen=0,
        intercept=0.5,
    )
    return RunResult(
        title="a run",
        phantom=phantom,
        settings=TrainingSettings.of("recommended", {"statistics": {"bootstraps": 30}}),
        seeds={},
        versions={},
        hashes={},
        machine={},
        seconds={},
        flow=(FlowStep(step="read", patients=5, cases=7, acute=3, chronic=4),),
        cohort=SMALL,
        repeatability=Repeatability(method="none", limit=0.8, cases={}, features=("a",), kept=("a",)),
        selections=(
            Selection(
                branch="hcr",
                steps=(SelectionStep(step="all", features=("a",)),),
                correlations=Correlations(names=("a",), rho=((1.0,),)),
                lasso=lasso,
                selected=("a",),
                coefficients=(0.5,),
                stability={"a": 1.0},
                fallback=False,
            ),
        ),
        network=NetworkRun(
            mode="frozen",
            architecture="tiny",
            weights="random",
            device="cpu",
            epochs=(),
            onnx_largest_difference=0.0,
            components=2,
        ),
        classifiers=(
            Chosen(branch="hcr", grid=(point,), winner=point, platt_a=1.0, platt_b=0.0, onnx_largest_difference=0.0),
        ),
        nomogram=NomogramModel(
            intercept=0.0, beta_age=-0.05, beta_male=0.1, beta_score=1.0, age_range=(20, 90), score_range=(-2, 2)
        ),
        scores=tuple(_scores(4)),
        optimism=(),
        conformal={},
        warnings=(),
    )


def test_a_run_gives_three_tables_and_the_same_ones_from_its_json() -> None:
    run = _run(phantom=False)

    first, again = tables(run), tables(RunResult.model_validate_json(run.model_dump_json()))

    assert [table.name for table in first] == ["table1", "table2", "table3"]
    assert [table.to_latex() for table in first] == [table.to_latex() for table in again]
    assert "30 bootstraps that draw whole patients" in first[1].to_html()


@pytest.mark.parametrize("phantom", [True, False])
def test_tables_of_phantoms_say_so(phantom: bool) -> None:
    assert all(("PHANTOMS" in table.caption) == phantom for table in tables(_run(phantom)))


def test_the_random_network_stands_below_the_table_of_the_models() -> None:
    beside = RandomNetwork(out_of_fold=0.712, held_out=0.7)

    with_it = tables(_run(phantom=True).model_copy(update={"random_network": beside}))[1]

    note = "DLR with a random network that was not fitted, for comparison: AUC out-of-fold 0.712, test 0.700."
    assert note in with_it.notes
    assert note not in tables(_run(phantom=True))[1].notes
