"""What the report says in plain sentences: the summary of the run, and how much in-sample numbers flatter."""

from __future__ import annotations

from services.trainer.results import LABELS, MODELS, Evaluation, Judged, Optimism, PartName, RunResult


def auc_words(result: Judged, part: PartName) -> dict[str, str]:
    """AUC with its interval of each model on a part, in words, as far as it was scored."""
    words = {}
    for one in result.scores:
        auc = one.auc() if one.part == part else None
        if auc is not None:
            words[LABELS[one.model]] = f"{auc.value:.3f} (95 % interval {auc.low:.3f} to {auc.high:.3f})"
    return words


def summary(result: RunResult) -> str:
    """The run in two or three sentences."""
    rows = result.cohort
    acute, patients = sum(row.acute for row in rows), len({row.patient for row in rows})
    whose = "phantom patients" if result.phantom else "patients"
    first = (
        f"{len(rows)} fractured vertebrae of {patients} {whose} ({acute} acute, {len(rows) - acute} chronic), "
        f"preset {result.settings.preset}."
    )
    held_out = auc_words(result, "test")
    words = held_out or auc_words(result, "out_of_fold")
    if not words:
        return f"{first} No model was scored on rows that it was not fitted on."
    test = {row.patient for row in rows if row.part == "test"}
    where = (
        f"On {len(test)} {whose} that were held out"
        if held_out
        else "No patients were held out; on training patients that the models had not seen (out-of-fold)"
    )
    results = "; ".join(f"{label} {value}" for label, value in words.items())
    ending = " These are results on computer-made phantoms and have no clinical meaning." if result.phantom else ""
    return f"{first} {where}, the AUC was: {results}.{ending}"


def evaluation_summary(found: Evaluation) -> str:
    """An external validation in two or three sentences."""
    rows = found.cohort
    acute, patients = sum(row.acute for row in rows), len({row.patient for row in rows})
    whose = "phantom patients" if found.phantom else "patients"
    words = auc_words(found, "test")
    first = (
        f"{len(rows)} fractured vertebrae of {patients} {whose} ({acute} acute, {len(rows) - acute} chronic), scored "
        f"by the bundle {found.bundle['name']} {found.bundle['version']}; nothing was fitted on them."
    )
    results = "; ".join(f"{label} {value}" for label, value in words.items())
    second = f" The AUC was: {results}." if results else " No AUC can be given: too few of a class."
    open_ = f" {found.indeterminate} vertebrae are indeterminate (MRI recommended)." if found.indeterminate else ""
    ending = " These are results on computer-made phantoms and have no clinical meaning." if found.phantom else ""
    return first + second + open_ + ending


def optimism_warning(one: Optimism) -> str:
    """What to think of a model's in-sample number; "" where it does not flatter much."""
    if not one.flatters:
        return ""
    gap = one.in_sample - one.out_of_fold
    return (
        f"{LABELS[one.model]}: the AUC on its own training rows ({one.in_sample:.3f}) is {gap:.3f} above the one on "
        f"patients that it had not seen ({one.out_of_fold:.3f}). The first number says how well the model remembers, "
        "not how well it will do. Quote the out-of-fold"
        + ("" if one.held_out is None else " or held-out")
        + " number, never the in-sample one."
    )


def optimism_rows(result: RunResult) -> tuple[tuple[Optimism, str], ...]:
    """Each model's three numbers with the warning that belongs to them, in the order of the paper."""
    order = {model: place for place, model in enumerate(MODELS)}
    return tuple((one, optimism_warning(one)) for one in sorted(result.optimism, key=lambda each: order[each.model]))
