"""The TRIPOD+AI checklist of a run: what the run itself knows, and what a person must still write.

Items and numbers after Collins et al., BMJ 2024;385:e078378, in our own short words. The run says only what stands in
its result; everything about people, places, dates and intentions stays open.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Final, Literal

from services.trainer.figures.figure_data import csv_cell
from services.trainer.figures.nomogram import formula
from services.trainer.results import FLATTERING, LABELS, MODEL_OF_BRANCH, RunResult, Scored
from shared.fracture.protocol import preset_box, preset_crop

State = Literal["filled", "in part", "open"]

OPEN: Final = "open: to be filled in by a person"
SOURCE: Final = "Collins GS et al. TRIPOD+AI statement. BMJ 2024;385:e078378, doi 10.1136/bmj-2023-078378"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One subitem of the checklist. `answer`: what the run knows; `person`: what somebody must add."""

    number: str
    section: str
    topic: str
    asks: str
    answer: str = ""
    person: str = ""

    @property
    def state(self) -> State:
        """Whether the run filled it in, filled it in in part, or left it open."""
        if not self.answer:
            return "open"
        return "in part" if self.person else "filled"


Answer = tuple[str, str]
"""What the run knows, and what a person must add ("" where nothing)."""

_ITEMS: Final[tuple[tuple[str, str, str, str], ...]] = (
    ("1", "Title", "Title", "Says that a prediction model is developed or evaluated, for whom, and for what outcome"),
    ("2", "Abstract", "Abstract", "Follows TRIPOD+AI for abstracts"),
    ("3a", "Introduction", "Background", "Healthcare context, why a model, and which models exist"),
    ("3b", "Introduction", "Background", "For whom, for what purpose in the care pathway, and who uses it"),
    ("3c", "Introduction", "Background", "Known health inequalities between groups of people"),
    ("4", "Introduction", "Objectives", "Aims: development, evaluation, or both"),
    ("5a", "Methods", "Data", "Sources of the data for development and evaluation, why these, how representative"),
    ("5b", "Methods", "Data", "Dates: first and last participant, end of follow-up"),
    ("6a", "Methods", "Participants", "Setting; number and place of centres"),
    ("6b", "Methods", "Participants", "Who could take part and who could not"),
    ("6c", "Methods", "Participants", "Treatments, and how they were handled"),
    ("7", "Methods", "Data preparation", "Pre-processing and quality checks, alike for all groups or not"),
    ("8a", "Methods", "Outcome", "Definition of the outcome, how and when it was assessed, and why this one"),
    ("8b", "Methods", "Outcome", "Who judged the outcome, where it takes judgement"),
    ("8c", "Methods", "Outcome", "Blinding of who judged the outcome"),
    ("9a", "Methods", "Predictors", "Choice of the first predictors, and any selection before the model"),
    ("9b", "Methods", "Predictors", "Definition of every predictor; how, when and how blinded it was measured"),
    ("9c", "Methods", "Predictors", "Who measured predictors that take judgement"),
    ("10", "Methods", "Sample size", "How the size was arrived at, and whether it suffices"),
    ("11", "Methods", "Missing data", "How missing data were handled, and why data were left out"),
    ("12a", "Methods", "Analysis", "Which data served which purpose; how they were parted"),
    ("12b", "Methods", "Analysis", "How predictors entered: form, scaling, transformation"),
    ("12c", "Methods", "Analysis", "Kind of model, all steps of building and tuning, internal validation"),
    ("12d", "Methods", "Analysis", "Differences between clusters such as hospitals: handled and measured"),
    ("12e", "Methods", "Analysis", "All measures and plots of performance; how models were compared"),
    ("12f", "Methods", "Analysis", "Updating of the model, such as recalibration"),
    ("12g", "Methods", "Analysis", "How predictions are computed"),
    ("13", "Methods", "Class imbalance", "Measures against imbalance, and recalibration after them"),
    ("14", "Methods", "Fairness", "What was done for fairness, and why"),
    ("15", "Methods", "Model output", "What the model gives; how thresholds were found"),
    ("16", "Methods", "Training and evaluation", "How development and evaluation data differ"),
    ("17", "Methods", "Ethics", "Ethics committee, and consent or its waiver"),
    ("18a", "Open science", "Funding", "Who paid, and their part in the study"),
    ("18b", "Open science", "Conflicts of interest", "Interests of the authors"),
    ("18c", "Open science", "Protocol", "Where the protocol is, or that there was none"),
    ("18d", "Open science", "Registration", "Where the study is registered, or that it is not"),
    ("18e", "Open science", "Data sharing", "Whether and how the data can be had"),
    ("18f", "Open science", "Code sharing", "Whether and how the code can be had"),
    ("19", "Patients and public", "Involvement", "How patients and the public took part, or that they did not"),
    ("20a", "Results", "Participants", "Flow of participants, with and without the outcome"),
    ("20b", "Results", "Participants", "Characteristics, dates, predictors, events, missing data"),
    ("20c", "Results", "Participants", "Evaluation data compared with development data"),
    ("21", "Results", "Model development", "Participants and events in each analysis"),
    ("22", "Results", "Model specification", "The whole model, so that others can use it, and limits of its use"),
    ("23a", "Results", "Performance", "Performance with intervals, also in subgroups"),
    ("23b", "Results", "Performance", "Differences in performance between clusters"),
    ("24", "Results", "Model updating", "The updated model and its performance"),
    ("25", "Discussion", "Interpretation", "What the results mean, fairness and earlier studies included"),
    ("26", "Discussion", "Limitations", "Limits of the study and what they do to the results"),
    ("27a", "Discussion", "Use in care", "What to do with poor or missing input"),
    ("27b", "Discussion", "Use in care", "What users must do, and what they must know"),
    ("27c", "Discussion", "Use in care", "Next steps, with applicability and generalisability in view"),
)


def checklist(result: RunResult) -> tuple[Item, ...]:
    """All 52 subitems of the 27 items, filled in from the result where it knows the answer."""
    answers = {**_data_answers(result), **_method_answers(result), **_result_answers(result)}
    return tuple(
        Item(
            number=number,
            section=section,
            topic=topic,
            asks=asks,
            answer=answers.get(number, ("", ""))[0],
            person=answers.get(number, ("", ""))[1],
        )
        for number, section, topic, asks in _ITEMS
    )


def count_sentence(items: tuple[Item, ...]) -> str:
    """How many subitems are filled in, in part, and open."""
    count = {state: sum(item.state == state for item in items) for state in ("filled", "in part", "open")}
    return (
        f"Of {len(items)} subitems {count['filled']} are filled in by the run, {count['in part']} in part, "
        f"and {count['open']} are open: they must be filled in by a person."
    )


def checklist_csv(items: tuple[Item, ...]) -> str:
    """As CSV; an open subitem says that a person must fill it in."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("item", "section", "topic", "asks", "state", "what the run knows", "what a person must add"))
    for item in items:
        cells = (item.number, item.section, item.topic, item.asks, item.state, item.answer or OPEN, item.person)
        writer.writerow(csv_cell(cell) for cell in cells)
    return text.getvalue()


def checklist_markdown(items: tuple[Item, ...]) -> str:
    """As a table in Markdown, with the count of open subitems above it."""
    lines = [
        "# TRIPOD+AI",
        "",
        count_sentence(items),
        "",
        "| item | asks | state | what the run knows | what a person must add |",
        "| --- | --- | --- | --- | --- |",
    ]
    for item in items:
        cells = (item.number, f"{item.topic}: {item.asks}", item.state, item.answer or OPEN, item.person)
        lines.append("| " + " | ".join(_markdown_cell(cell) for cell in cells) + " |")
    return "\n".join([*lines, "", f"After: {SOURCE}.", ""])


def _markdown_cell(text: str) -> str:
    for sign in ("\\", "|", "<", "*", "_", "`", "["):
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def _data_answers(result: RunResult) -> dict[str, Answer]:
    sites = len({row.site for row in result.cohort})
    reasons = [f"{reason}: {rows}" for step in result.flow for reason, rows in step.left_out.items()]
    crop = preset_crop(result.settings.preset, roi=result.settings.roi)
    rule, margin = preset_box(result.settings.preset)
    low, high = crop.window_hu
    counts = _counts(result)
    whose = "Computer-made phantom images, no patients" if result.phantom else "One table of vertebrae from CT"
    answers = {
        "1": (f"Title of the run: {result.title}", "Name target population and outcome in the study's title."),
        "4": (
            f"Development of a model{_held_out_words(result)}.",
            "State the clinical aim.",
        ),
        "5a": (
            f"{whose}; {sites} {'site' if sites == 1 else 'sites'}.",
            "" if result.phantom else "Say where the data come from, why these, and how representative they are.",
        ),
        "6a": (f"{sites} {'site' if sites == 1 else 'sites'} in the table.", "Setting and place of the centres."),
        "6b": (
            "Left out by the run: " + ("; ".join(reasons) or "nothing") + ".",
            "Criteria that were applied before the table was made.",
        ),
        "7": (
            f"CT clipped to {low} to {high} HU, {crop.spacing_mm:g} mm isotropic ({crop.image_interpolator} for the "
            f"image, {crop.mask_interpolator} for the mask), crop {crop.roi_margin_mm:g} mm around the "
            f"{'vertebral body' if crop.roi == 'body' else 'vertebra'}; sagittal picture in a {rule} box"
            + (f" with {margin:g} mm margin" if margin else "")
            + f", {result.settings.network.image_size} pixels wide. The same for every row.",
            "",
        ),
        "8a": (
            "Acute (1) or chronic (0) fracture of a vertebra, as the table says; a diagnosis, no time horizon.",
            "How and when acute and chronic were told apart (such as MRI), and why.",
        ),
        "10": (
            f"{counts}. No sample size was computed by the run.",
            "Why this size suffices for development and for evaluation.",
        ),
        "11": ("No value was imputed; rows that lack something are left out with their reason (cohort flow).", ""),
        "20a": (" → ".join(f"{step.step}: {step.cases} vertebrae" for step in result.flow) + f". {counts}.", ""),
        "20b": (
            "Table 1: age, sex, level and site by class.",
            "" if result.phantom else "Dates of the data and treatments.",
        ),
    }
    if result.phantom:
        answers["17"] = ("Not applicable: computer-made phantoms, no patients.", "")
    if any(row.part == "test" for row in result.cohort):
        answers["20c"] = ("Table 1 sets training and test rows side by side.", "")
        answers["16"] = (_split_words(result), "Differences in setting, criteria, outcome or predictors, if any.")
    return answers


def _method_answers(result: RunResult) -> dict[str, Answer]:
    settings = result.settings
    repeats = result.repeatability
    network = result.network
    classifiers = ", ".join(settings.classifiers.names)
    winners = "; ".join(
        f"{LABELS[MODEL_OF_BRANCH[each.branch]]}: {each.winner.classifier}" for each in result.classifiers
    )
    selection = "; ".join(
        f"{each.branch.upper()}: " + " → ".join(f"{one.step} {one.left}" for one in each.steps)
        for each in result.selections
    )
    sites = len({row.site for row in result.cohort})
    answers = {
        "9a": (
            f"{len(repeats.features):,} hand-crafted features and those of a network ({network.architecture}); age and "
            f"sex in the nomogram, taken as given. Selection on training rows: {selection}.",
            "",
        ),
        "9b": (
            "Every feature is defined by the protocols whose hashes stand in the report; the region is the "
            f"{'vertebral body' if settings.roi == 'body' else 'whole vertebra'}.",
            "Who drew the masks, when, and blinded to what.",
        ),
        "12a": (_split_words(result), ""),
        "12b": (
            "Linear on standardised columns (mean and SD of training rows); features of the network by "
            f"{network.components} principal components; age in years and sex as they are.",
            "",
        ),
        "12c": (
            f"LASSO ({settings.selection.lasso}, rule {settings.selection.rule}, {settings.selection.folds} folds of "
            f"patients), then one of {classifiers} by {settings.classifiers.folds}-fold cross-validation ({winners}), "
            f"Platt scaling; nomogram by logistic regression on out-of-fold scores. Internal validation: "
            f"{settings.classifiers.out_of_fold} outer folds of patients{_held_out_words(result)}. Network: "
            f"{network.mode}.",
            "",
        ),
        "12d": (
            f"{sites} {'site' if sites == 1 else 'sites'}; the run measured no differences between them"
            + (f", but holds out the site {settings.split.test_site}" if settings.split.by == "site" else "")
            + ".",
            "Whether clusters matter here, and what was done about them.",
        ),
        "12e": (
            "AUC with DeLong's interval"
            + (" and by bootstraps of patients" if settings.statistics.bootstraps else "")
            + ", paired comparison of the four models, accuracy, sensitivity, specificity, predictive values, F1, "
            "calibration, Brier score, decision curves.",
            "",
        ),
        "12f": ("None: Platt scaling belongs to development.", ""),
        "12g": (
            "By the bundle that the run wrote"
            + (f" (id {result.versions['bundle_id']})" if "bundle_id" in result.versions else "")
            + ": ONNX and JSON, with golden cases that are computed again at every load.",
            "",
        ),
        "13": (
            f"{_class_words(result)}. Folds keep the share of the classes"
            + ("" if network.mode == "frozen" else "; the network's loss weighs the classes")
            + "; no rows were drawn twice or left out for balance; Platt scaling follows.",
            "",
        ),
        "14": ("The run takes no measure for fairness.", "Whether one is needed, and results by group."),
        "15": (
            "A probability of an acute fracture, and acute or chronic by a threshold (Youden, out-of-fold training "
            f"scores, then frozen): {_threshold_words(result)}"
            + (
                f". Indeterminate by conformal sets at α {result.conformal['alpha']:g}"
                if "alpha" in result.conformal
                else ""
            )
            + ".",
            "",
        ),
        "18f": (
            "fracture-sweep"
            + (f" {result.versions['fracture-sweep']}" if "fracture-sweep" in result.versions else "")
            + "; versions and settings of this run are in the report.",
            "Where the code of the study can be had.",
        ),
    }
    if repeats.method == "masks":
        counts = ", ".join(f"{rows} {kind}" for kind, rows in repeats.cases.items())
        answers["9c"] = (f"Masks were drawn again in {counts} cases (ICC).", "Who drew them, and their experience.")
    return answers


def _result_answers(result: RunResult) -> dict[str, Answer]:
    performance = "; ".join(
        f"{LABELS[one.model]} {_auc_words(one)}" for one in result.scores if one.part == _judged(result)
    )
    flattered = [one for one in result.optimism if one.flatters]
    where = "held-out rows" if _judged(result) == "test" else "out-of-fold training rows"
    limits = [*result.warnings]
    if flattered:
        names = ", ".join(LABELS[one.model] for one in flattered)
        limits.append(f"in-sample AUC more than {FLATTERING} above the out-of-fold one: {names}")
    if _judged(result) != "test":
        limits.append("no rows were held out")
    if result.phantom:
        limits.append("phantoms: no clinical meaning")
    return {
        "21": (f"{_counts(result)}. {_analysis_words(result)}", ""),
        "22": (
            f"Nomogram: {formula(result.nomogram)}; everything else is in the bundle.",
            "Who may have and use the bundle.",
        ),
        "23a": (f"AUC (95 % interval) on {where}: {performance}.", "Results in subgroups."),
        "24": ("No updating was done.", ""),
        "26": ("Said by the run: " + ("; ".join(limits) or "no warning") + ".", "All other limits."),
        "27a": (
            "The scoring service refuses or flags poor input (missing mask, coarse slices, mask at the border, metal, "
            "values outside the training range) and says why.",
            "",
        ),
    }


def _judged(result: RunResult) -> Literal["test", "out_of_fold"]:
    return "test" if any(one.part == "test" for one in result.scores) else "out_of_fold"


def _auc_words(one: Scored) -> str:
    auc = one.auc()
    if auc is None:
        return "not computed (fewer than two cases of a class)"
    return f"{auc.value:.3f} ({auc.low:.3f} to {auc.high:.3f})"


def _counts(result: RunResult) -> str:
    words = []
    for part, title in (("train", "Training"), ("test", "test")):
        rows = [row for row in result.cohort if row.part == part]
        if rows:
            patients, acute = len({row.patient for row in rows}), sum(row.acute for row in rows)
            words.append(f"{title}: {patients} patients, {len(rows)} vertebrae, {acute} acute")
    return "; ".join(words)


def _class_words(result: RunResult) -> str:
    rows = [row.acute for row in result.cohort if row.part == "train"]
    return f"Training rows: {sum(rows)} acute, {len(rows) - sum(rows)} chronic"


def _held_out_words(result: RunResult) -> str:
    return ", evaluated on held-out patients" if _judged(result) == "test" else "; no patients were held out"


def _split_words(result: RunResult) -> str:
    split = result.settings.split
    how = {
        "random": f"a stratified random share ({split.test_share:g}) of the patients is held out",
        "column": "as a column of the table says",
        "site": f"all rows of the site {split.test_site} are held out",
    }[split.by]
    return f"Parted by patient: {how}. {_counts(result)}. Nothing was fitted on test rows."


def _analysis_words(result: RunResult) -> str:
    repeats = ", ".join(f"{rows} ({kind})" for kind, rows in result.repeatability.cases.items())
    folds = result.settings.classifiers
    return (
        f"Repeatability: {repeats or 'no'} cases; selection, tuning ({folds.folds} folds) and out-of-fold scores "
        f"({folds.out_of_fold} folds): all training rows."
    )


def _threshold_words(result: RunResult) -> str:
    thresholds = {LABELS[one.model]: one.threshold for one in result.scores}
    return ", ".join(f"{label} {value:.3f}" for label, value in thresholds.items())
