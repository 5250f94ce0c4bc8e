"""The tables of a run, from run.json alone: the cohort, the four models, and the models against each other.

A table is text in cells, so that CSV, LaTeX and HTML say the same. What was done to get a number, and what could not
be computed and why, stands in its notes.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from services.trainer.results import (
    LABELS,
    MODELS,
    Demographic,
    Evaluation,
    ModelName,
    PartName,
    RandomNetwork,
    RunResult,
    Scored,
)
from services.trainer.statistics.auc import (
    AucBootstrap,
    auc_delong,
    bootstrap_auc_differences,
    bootstrap_aucs,
    compare_aucs,
)
from services.trainer.statistics.calibration import brier, calibration
from services.trainer.statistics.group_tests import GroupTest, counts_test, welch
from services.trainer.statistics.outcomes import Labels, Scores
from services.trainer.statistics.performance import Proportion, confusion, performance
from shared.fracture.levels import sort_key

PARTS: Final[Mapping[PartName, str]] = {
    "train": "Training, in-sample",
    "out_of_fold": "Training, out-of-fold",
    "test": "Test",
}
NONE: Final = "–"
"""What stands in a cell that has no number; a note says why."""

_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a spreadsheet takes for the start of a formula."""
_NUMBER: Final = re.compile(r"-?\d+(\.\d+)?( to -?\d+(\.\d+)?| \(-?\d+(\.\d+)? to -?\d+(\.\d+)?\))?")
"""A number, an interval, or a number with its interval: no formula, though it may start with a minus."""
_LATEX: Final = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "–": "--",
    "±": r"$\pm$",
    "−": "$-$",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table for people: `name` is a file's stem, every row has one cell a column of `header`."""

    name: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"{self.name} has {len(self.header)} columns, and a row of {len(row)} cells")

    def to_csv(self) -> str:
        """Header and rows (RFC 4180); no cell can start a spreadsheet's formula. Caption and notes stay out."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\r\n")
        writer.writerows(
            ["'" + cell if cell.startswith(_FORMULA) and not _NUMBER.fullmatch(cell) else cell for cell in row]
            for row in (self.header, *self.rows)
        )
        return stream.getvalue()

    def to_latex(self) -> str:
        """A floating table for \\usepackage{booktabs,graphicx}, scaled to the line where it is wider."""
        lines = [
            r"\begin{table}[htbp]",
            r"\centering",
            rf"\caption{{{_latex(self.caption)}}}",
            rf"\label{{tab:{self.name}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{'l' * len(self.header)}}}",
            r"\toprule",
            " & ".join(_latex(cell) for cell in self.header) + r" \\",
            r"\midrule",
            *(" & ".join(_latex(cell) for cell in row) + r" \\" for row in self.rows),
            r"\bottomrule",
            r"\end{tabular}}",
            *(rf"\par\footnotesize {_latex(note)}" for note in self.notes),
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """A <table> with its caption, and its notes in a list after it; all text escaped, no style."""
        head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in self.header)
        body = "\n".join(
            f'<tr><th scope="row">{html.escape(row[0])}</th>'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in self.rows
        )
        notes = "".join(f"<li>{html.escape(note)}</li>\n" for note in self.notes)
        return (
            f'<table id="{html.escape(self.name)}">\n<caption>{html.escape(self.caption)}</caption>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"
            + (f'<ul class="notes">\n{notes}</ul>\n' if notes else "")
        )


def p_text(p: float) -> str:
    """A p-value as it is printed: three digits, and never 0."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _interval(low: float, high: float, digits: int = 3) -> str:
    return f"{low:.{digits}f} to {high:.{digits}f}"


# Table 1: the cohort


@dataclass(frozen=True, kw_only=True)
class _Patient:
    """One patient for Table 1: acute when at least one vertebra is."""

    acute: bool
    both: bool
    part: Literal["train", "test"]
    age: float
    male: bool


_Group = Literal["all", "acute", "chronic", "train", "test"]
_GROUPS: Final[tuple[_Group, ...]] = ("all", "acute", "chronic", "train", "test")
_COLUMNS: Final = ("", "All", "Acute", "Chronic", "p (acute, chronic)", "Training", "Test", "p (training, test)")


def _belongs(one: _Patient | Demographic, group: _Group) -> bool:
    return {
        "all": True,
        "acute": one.acute,
        "chronic": not one.acute,
        "train": one.part == "train",
        "test": one.part == "test",
    }[group]


def _patients(cohort: Sequence[Demographic]) -> tuple[_Patient, ...]:
    rows: dict[int, list[Demographic]] = {}
    for row in cohort:
        rows.setdefault(row.patient, []).append(row)
    for number, own in rows.items():
        if len({row.part for row in own}) > 1 or len({row.male for row in own}) > 1:
            raise ValueError(f"patient {number} stands in two parts, or with two sexes")
    return tuple(
        _Patient(
            acute=any(row.acute for row in own),
            both=len({row.acute for row in own}) > 1,
            part=own[0].part,
            age=float(np.mean([row.age for row in own])),
            male=own[0].male,
        )
        for own in rows.values()
    )


def _share(count: int, of: int) -> str:
    return f"{count} ({100 * count / of:.1f} %)" if of else NONE


class _Rows:
    """The rows of Table 1 as they are written, with what was tested how."""

    def __init__(self, seed: int) -> None:
        self.rows: list[tuple[str, ...]] = []
        self.tests: dict[str, list[str]] = {}
        self.left_out: list[str] = []
        self.seed = seed

    def add(self, label: str, cells: Mapping[_Group, str], p: tuple[str, str] = ("", "")) -> None:
        """One row: five cells and two p-values."""
        in_order = [cells[group] for group in _GROUPS]
        self.rows.append((label, *in_order[:3], p[0], *in_order[3:], p[1]))

    def tested(self, what: str, pair: str, test: Callable[[], GroupTest]) -> str:
        """The p-value of a test, which is remembered for the notes; a dash where it cannot be done."""
        try:
            done = test()
        except ValueError as error:
            self.left_out.append(f"{what}, {pair}: no test, since {error}.")
            return NONE
        self.tests.setdefault(done.name, []).append(f"{what} ({pair})")
        return p_text(done.p)

    def counted(self, what: str, of: Mapping[_Group, Counter[str]]) -> tuple[str, str]:
        """Both p-values of a table of categories by group."""
        categories = sorted(of["all"])

        def p(first: _Group, second: _Group, pair: str) -> str:
            if first == "train" and not (of["train"] and of["test"]):
                return NONE
            counts = np.array([[of[group][one] for group in (first, second)] for one in categories], dtype=np.int64)
            return self.tested(what, pair, lambda: counts_test(counts, seed=self.seed))

        return p("acute", "chronic", "acute, chronic"), p("train", "test", "training, test")


def _region(level: str) -> str:
    return {"C": "Cervical", "T": "Thoracic", "L": "Lumbar", "S": "Sacral"}.get(level[:1], "Other")


def cohort_table(cohort: Sequence[Demographic], *, seed: int, phantom: bool = False) -> Table:
    """Table 1: patients (age, sex) and vertebrae (level, site) by class and by part; ages are of patients.

    A patient with at least one acute vertebra is an acute one. `seed` is that of the simulated p-values.
    """
    if not cohort:
        raise ValueError("a table of the cohort needs at least 1 vertebra, got none")
    patients = _patients(cohort)
    of: dict[_Group, list[_Patient]] = {g: [one for one in patients if _belongs(one, g)] for g in _GROUPS}
    own: dict[_Group, list[Demographic]] = {g: [one for one in cohort if _belongs(one, g)] for g in _GROUPS}
    table = _Rows(seed)

    table.add("Patients, n", {g: str(len(of[g])) for g in _GROUPS})
    ages = {g: np.array([one.age for one in of[g]]) for g in _GROUPS}
    table.add(
        "Age of patients, years, mean ± SD (range)",
        {g: _age(ages[g]) for g in _GROUPS},
        (
            table.tested("age", "acute, chronic", lambda: welch(ages["acute"], ages["chronic"])),
            table.tested("age", "training, test", lambda: welch(ages["train"], ages["test"]))
            if of["train"] and of["test"]
            else NONE,
        ),
    )
    sexes = {g: Counter("male" if one.male else "female" for one in of[g]) for g in _GROUPS}
    table.add(
        "Sex of patients, female, n",
        {g: _share(sexes[g]["female"], len(of[g])) for g in _GROUPS},
        table.counted("sex", sexes),
    )
    table.add("Sex of patients, male, n", {g: _share(sexes[g]["male"], len(of[g])) for g in _GROUPS})
    table.add("Vertebrae, n", {g: str(len(own[g])) for g in _GROUPS})
    table.add(
        "Vertebrae a patient, mean",
        {g: f"{len(own[g]) / len({row.patient for row in own[g]}):.2f}" if own[g] else NONE for g in _GROUPS},
    )
    from_head_to_foot = sorted({row.level for row in cohort}, key=sort_key)
    regions = {g: Counter(_region(row.level) for row in own[g]) for g in _GROUPS}
    _add_categories(table, "Region", regions, list(dict.fromkeys(_region(level) for level in from_head_to_foot)))
    levels = {g: Counter(row.level for row in own[g]) for g in _GROUPS}
    _add_categories(table, "Level", levels, from_head_to_foot)
    sites = {g: Counter(row.site or "not given" for row in own[g]) for g in _GROUPS}
    _add_categories(table, "Site", sites, sorted(sites["all"]))

    both = sum(one.both for one in patients)
    notes = [
        "Patients and vertebrae are counted apart. Age and sex are those of patients: one age a patient (the mean "
        "where several scans were read), not one a vertebra.",
        "A patient with at least one acute vertebra counts as acute, else as chronic; "
        f"{both} {'patient has' if both == 1 else 'patients have'} vertebrae of both classes.",
        "Vertebrae a patient: those of the column, over the patients who have at least one of them.",
        "Level, region and site are counted by vertebra; their tests take vertebrae as independent, which those of one "
        "patient are not.",
        *(f"{name}: {', '.join(what)}." for name, what in table.tests.items()),
        "All p-values are two-sided and not corrected for their number.",
        *table.left_out,
    ]
    caption = f"The cohort: {len(patients)} patients with {len(cohort)} fractured vertebrae"
    # with one part alone there is nothing to set beside it
    shown = len(_COLUMNS) if of["train"] and of["test"] else _COLUMNS.index("Training")
    return Table(
        name="table1",
        caption=_marked(caption, phantom),
        header=_COLUMNS[:shown],
        rows=tuple(row[:shown] for row in table.rows),
        notes=tuple(notes),
    )


def _age(ages: Scores) -> str:
    if len(ages) == 0:
        return NONE
    deviation = f"{ages.std(ddof=1):.1f}" if len(ages) > 1 else NONE
    return f"{ages.mean():.1f} ± {deviation} ({ages.min():.0f} to {ages.max():.0f})"


def _add_categories(table: _Rows, what: str, counts: Mapping[_Group, Counter[str]], in_order: Sequence[str]) -> None:
    p = table.counted(what.lower(), counts)
    for place, one in enumerate(in_order):
        cells = {g: _share(counts[g][one], counts[g].total()) for g in _GROUPS}
        table.add(f"{what} of vertebrae, {one}, n", cells, p if place == 0 else ("", ""))


def _marked(caption: str, phantom: bool) -> str:
    return f"{caption}. PHANTOMS, no clinical meaning." if phantom else f"{caption}."


# Table 2: the four models


_PERFORMANCE: Final = (
    "Model",
    "Part",
    "Vertebrae (acute)",
    "AUC (95 % interval, DeLong)",
    "95 % interval, patients drawn",
    "Threshold",
    "ACC (95 % interval)",
    "SEN (95 % interval)",
    "SPE (95 % interval)",
    "F1 (95 % interval)",
    "PPV (95 % interval)",
    "NPV (95 % interval)",
    "Brier",
    "Calibration slope (95 % interval)",
    "Calibration intercept (95 % interval)",
)


_APART: Final = "the classes are fully apart, so neither interval of the AUC has a width; that is no certainty"


def _arrays(one: Scored) -> tuple[Labels, Scores]:
    return np.array(one.acute, dtype=np.int64), np.array(one.probability, dtype=np.float64)


def _by_part(scores: Sequence[Scored]) -> dict[PartName, dict[ModelName, Scored]]:
    """The scores by part and model, in the order of the paper; parts whose models have other cases are refused."""
    parts: dict[PartName, dict[ModelName, Scored]] = {}
    for part in PARTS:
        found = {one.model: one for one in scores if one.part == part}
        if found:
            if len({(one.patient, one.acute) for one in found.values()}) > 1:
                raise ValueError(f"the models were scored on different cases of {part}")
            parts[part] = {model: found[model] for model in MODELS if model in found}
    return parts


def _proportion(found: Proportion | None) -> str:
    return NONE if found is None else f"{found.value:.3f} ({_interval(found.low, found.high)})"


class _Missing:
    """What could not be computed or read as usual, with each reason once."""

    def __init__(self) -> None:
        self.reasons: dict[str, list[str]] = {}

    def cells(self, where: str, make: Callable[[], tuple[str, ...]], columns: int) -> tuple[str, ...]:
        """What `make` gives, or dashes, and then the reason is kept."""
        try:
            return make()
        except ValueError as error:
            places = self.reasons.setdefault(str(error), [])
            if where not in places:
                places.append(where)
            return (NONE,) * columns

    def notes(self) -> tuple[str, ...]:
        """One note a reason."""
        return tuple(f"{'; '.join(places)}: {reason}." for reason, places in self.reasons.items())


def performance_table(
    scores: Sequence[Scored],
    *,
    resamples: int,
    seed: int,
    phantom: bool = False,
    random_network: RandomNetwork | None = None,
) -> Table:
    """Table 2: each model on training rows, out-of-fold and on the test set, at its frozen threshold.

    `resamples` and `seed` are those of the bootstrap over patients; with 0 resamples its column is empty.
    """
    parts, missing = _by_part(scores), _Missing()
    drawn = {part: _drawn(own, missing, part, resamples=resamples, seed=seed) for part, own in parts.items()}
    rows = [
        _performance_row(model, part, parts[part][model], drawn[part].get(model), missing)
        for model in MODELS
        for part in parts
        if model in parts[part]
    ]
    notes = (
        "Each row counts vertebrae. The threshold was set on out-of-fold training scores (largest sensitivity + "
        "specificity − 1) and is the same for all parts of a model; from it on a vertebra is called acute.",
        "Training, in-sample: scores of the rows that the model was fitted on, so optimistic. Training, out-of-fold: "
        "each patient scored by models that never saw them.",
        "Intervals of the AUC: DeLong, which takes vertebrae as independent; and "
        + (
            f"{resamples} bootstraps that draw whole patients (percentiles, seed {seed})."
            if resamples
            else "none over patients, since no bootstraps were asked for."
        ),
        "Intervals of ACC, SEN, SPE, PPV and NPV: Wilson. That of F1: Wilson's of TP / (TP + FN + FP), carried over by "
        "F1 = 2 J / (1 + J). These take vertebrae as independent.",
        "Calibration: logit P(acute) = intercept + slope · logit(probability), Wald intervals; perfect is slope 1, "
        "intercept 0.",
        *([] if random_network is None else [_beside(random_network)]),
        *missing.notes(),
    )
    return Table(
        name="table2",
        caption=_marked("How well the models tell acute from chronic fractures", phantom),
        header=_PERFORMANCE,
        rows=tuple(rows),
        notes=notes,
    )


def _beside(one: RandomNetwork) -> str:
    held = "" if one.held_out is None else f", test {one.held_out:.3f}"
    return (
        f"{LABELS['dlr']} with a random network that was not fitted, for comparison: AUC out-of-fold "
        f"{one.out_of_fold:.3f}{held}."
    )


def _drawn(
    own: Mapping[ModelName, Scored], missing: _Missing, part: PartName, *, resamples: int, seed: int
) -> Mapping[ModelName, AucBootstrap]:
    if resamples == 0:
        return {}
    first = next(iter(own.values()))
    scores = {str(model): _arrays(one)[1] for model, one in own.items()}
    try:
        found = bootstrap_aucs(
            _arrays(first)[0], scores, np.array(first.patient, dtype=np.int64), resamples=resamples, seed=seed
        )
    except ValueError as error:
        missing.reasons.setdefault(str(error), []).append(PARTS[part])
        return {}
    return {model: found[model] for model in own}


def _performance_row(
    model: ModelName, part: PartName, one: Scored, drawn: AucBootstrap | None, missing: _Missing
) -> tuple[str, ...]:
    labels, probabilities = _arrays(one)
    where = f"{LABELS[model]}, {PARTS[part]}"

    def of_auc() -> tuple[str, ...]:
        auc = auc_delong(labels, probabilities)
        if auc.variance == 0:
            missing.reasons.setdefault(_APART, []).append(where)
        return (f"{auc.value:.3f} ({_interval(auc.low, auc.high)})",)

    def of_table() -> tuple[str, ...]:
        found = performance(confusion(labels, probabilities >= one.threshold))
        shares = (found.accuracy, found.sensitivity, found.specificity, found.f1, found.ppv, found.npv)
        if found.ppv is None or found.npv is None:
            called = "acute" if found.ppv is None else "chronic"
            missing.reasons.setdefault(f"no vertebra was called {called}", []).append(where)
        return tuple(_proportion(share) for share in shares)

    def of_calibration() -> tuple[str, ...]:
        found = calibration(labels, probabilities)
        return (
            f"{found.slope:.3f} ({_interval(found.slope_low, found.slope_high)})",
            f"{found.intercept:.3f} ({_interval(found.intercept_low, found.intercept_high)})",
        )

    return (
        LABELS[model],
        PARTS[part],
        f"{len(labels)} ({int(labels.sum())})",
        *missing.cells(where, of_auc, 1),
        _interval(drawn.low, drawn.high) if drawn else NONE,
        f"{one.threshold:.4f}",
        *missing.cells(where, of_table, 6),
        *missing.cells(where, lambda: (f"{brier(labels, probabilities):.4f}",), 1),
        *missing.cells(where, of_calibration, 2),
    )


# Table 3: the models against each other


_COMPARISON: Final = (
    "Part",
    "First",
    "Second",
    "AUC, first",
    "AUC, second",
    "Difference (95 % interval, DeLong)",
    "95 % interval, patients drawn",
    "Z",
    "p",
    "p (Holm)",
)


def comparison_table(scores: Sequence[Scored], *, resamples: int, seed: int, phantom: bool = False) -> Table:
    """Table 3: each two models on the same vertebrae, test set first, then out-of-fold, by the paired DeLong test."""
    parts, missing = _by_part(scores), _Missing()
    rows: list[tuple[str, ...]] = []
    for part in ("test", "out_of_fold"):
        if part in parts and len(parts[part]) > 1:
            rows += _comparison_rows(part, parts[part], missing, resamples=resamples, seed=seed)
    notes = (
        "Paired DeLong test, two-sided; Holm's p over the pairs of one part. It takes vertebrae as independent.",
        f"Patients drawn: {resamples} bootstraps of whole patients, alike for all models (percentiles; seed {seed})."
        if resamples
        else "No bootstraps over patients were asked for.",
        "In-sample training scores are not compared: such a test would compare how far the models overfit.",
        *missing.notes(),
    )
    return Table(
        name="table3",
        caption=_marked("The models against each other (AUC, first minus second)", phantom),
        header=_COMPARISON,
        rows=tuple(rows),
        notes=notes,
    )


def _comparison_rows(
    part: PartName, own: Mapping[ModelName, Scored], missing: _Missing, *, resamples: int, seed: int
) -> list[tuple[str, ...]]:
    first = next(iter(own.values()))
    labels, patient = _arrays(first)[0], np.array(first.patient, dtype=np.int64)
    scores = {LABELS[model]: _arrays(one)[1] for model, one in own.items()}
    try:
        pairs = compare_aucs(labels, scores)
        aucs = {name: auc_delong(labels, one).value for name, one in scores.items()}
        drawn = bootstrap_auc_differences(labels, scores, patient, resamples=resamples, seed=seed) if resamples else {}
    except ValueError as error:
        missing.reasons.setdefault(str(error), []).append(PARTS[part])
        return []
    rows: list[tuple[str, ...]] = []
    for pair in pairs:
        test, over_patients = pair.test, drawn.get((pair.first, pair.second))
        rows.append(
            (
                PARTS[part],
                pair.first,
                pair.second,
                f"{aucs[pair.first]:.3f}",
                f"{aucs[pair.second]:.3f}",
                f"{test.difference:.3f} ({_interval(test.low, test.high)})",
                _interval(over_patients.low, over_patients.high) if over_patients else NONE,
                f"{test.z:.3f}",
                p_text(test.p),
                p_text(pair.p_holm),
            )
        )
    return rows


def tables(run: RunResult) -> tuple[Table, ...]:
    """Tables 1, 2 and 3 of a run; the same run gives the same text."""
    resamples, seed = run.settings.statistics.bootstraps, run.settings.seed
    return (
        cohort_table(run.cohort, seed=seed, phantom=run.phantom),
        performance_table(
            run.scores, resamples=resamples, seed=seed, phantom=run.phantom, random_network=run.random_network
        ),
        comparison_table(run.scores, resamples=resamples, seed=seed, phantom=run.phantom),
    )


def evaluation_tables(found: Evaluation) -> tuple[Table, ...]:
    """The same three tables of an external validation."""
    resamples, seed, phantom = found.bootstraps, found.seed, found.phantom
    return (
        cohort_table(found.cohort, seed=seed, phantom=phantom),
        performance_table(found.scores, resamples=resamples, seed=seed, phantom=phantom),
        comparison_table(found.scores, resamples=resamples, seed=seed, phantom=phantom),
    )
