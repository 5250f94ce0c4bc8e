"""MODEL_CARD.md of a bundle, written from its metrics by code: no number in it is typed by hand.

It speaks of the training part alone, as the whole bundle does: what held-out patients said stands in the run's report.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from services.trainer.results import LABELS
from shared.fracture.bundle import BundleKind
from shared.fracture.bundle_notes import with_notes


def _interval(auc: Mapping[str, float]) -> str:
    return f"{auc['auc']:.3f} ({auc['low']:.3f} to {auc['high']:.3f})"


def _table(metrics: Mapping[str, Any]) -> str:
    rows = [
        "| model | AUC out-of-fold (95 % interval, DeLong) | on the rows it was fitted on | threshold |",
        "| --- | --- | --- | --- |",
    ]
    for name, label in LABELS.items():
        held, inside = metrics["out_of_fold"][name], metrics["in_sample"][name]
        rows.append(f"| {label} | {_interval(held)} | {inside['auc']:.3f} | {metrics['thresholds'][name]:.3f} |")
    if metrics["random_network"] is not None:
        line = metrics["random_network"]["out_of_fold"]
        rows.append(f"| {LABELS['dlr']}, its network random and not fitted | {line:.3f} | | |")
    return "\n".join(rows)


def _filled(text: str) -> str:
    """Paragraphs and list items at 120 columns; headings, tables and commands as they are."""
    paragraphs: list[list[str]] = []
    for line in text.splitlines():
        previous = paragraphs[-1][-1] if paragraphs else ""
        goes_on = (
            line and previous and not line.startswith(("#", "|", "`", "- ")) and not previous.startswith(("#", "|"))
        )
        if goes_on:
            paragraphs[-1].append(line)
        else:
            paragraphs.append([line])
    filled = []
    for lines in paragraphs:
        one = " ".join(part.strip() for part in lines)
        if one.startswith(("#", "|", "`")):
            filled.append(one)
        else:
            filled.append(textwrap.fill(one, 120, subsequent_indent="  " if one.startswith("- ") else ""))
    return "\n".join(filled) + "\n"


def _kept(chosen: Mapping[str, Any]) -> str:
    """What of single training cases lies in the bundle: these two classifiers keep rows."""
    names = sorted({one["classifier"] for one in chosen.values()} & {"svm", "knn"})
    if not names:
        return ""
    return (
        f"- The classifier {' and '.join(names)} keeps standardised selected features of training vertebrae inside the "
        "bundle. Whoever hands it on hands those on.\n"
    )


_PHANTOM = """**Trained on synthetic phantoms only. It has no clinical meaning, and no number on this page says anything
about patients.** Every result made with it carries that mark."""
_PHANTOM_USE = """To show and test the pipeline: installation, throughput, reports, monitoring. Not for diagnosis,
triage, research on patients, or as a starting point for a clinical model. A site or a research group trains its own
bundle."""
_SITE = """**For research use only. It is no medical device.** What it says of a case is no diagnosis."""
_SITE_USE = """To score fractured vertebrae of CT like those that it was trained on, in research. Before any other use
it has to be validated on the site's own patients (`fracture-sweep evaluate`)."""


def model_card(metrics: Mapping[str, Any], *, name: str, kind: BundleKind, notes: str = "") -> str:
    """The model card of a bundle from its metrics.json; `notes` is a text of its makers, put at the end as it is."""
    phantom = str(metrics["origin"]).startswith("synthetic phantoms")
    counts, network, repeat = metrics["counts"], metrics["network"], metrics["repeatability"]
    chosen, selected = metrics["classifiers"], metrics["selected"]
    mode = {
        "frozen": "It was not fitted on the labels; its features were standardised and projected (PCA).",
        "crossfit": "It was fine-tuned on the labels. In training the one number that went on was the logit of "
        "patients that a network never saw.",
        "in_sample": "It was fine-tuned on the labels, and its features of the very same rows went on: the numbers "
        "below, the out-of-fold ones too, are optimistic.",
    }[network["mode"]]
    lines = "\n".join(
        f"- {label}: {selected[branch]} features, {chosen[branch]['classifier']} "
        f"(cross-validated AUC {chosen[branch]['cross_validated_auc']:.3f} on training)."
        for branch, label in (("hcr", "Radiomics (HCR)"), ("dtl", "DLR (DTL)"), ("fusion", "Features Fusion"))
    )
    card = _filled(f"""# {name}: acute or chronic vertebral compression fracture{", on PHANTOMS" if phantom else ""}

{_PHANTOM if phantom else _SITE}

## Intended use
{_PHANTOM_USE if phantom else _SITE_USE}

## What it is
Kind {kind}, preset `{metrics["preset"]}`, after Zhang et al. 2023 (doi 10.1186/s12891-023-06281-5). Every setting
stands in `metrics.json`.

- Network: {network["architecture"]}, mode `{network["mode"]}`. Started from {network["weights"]}. {mode}
- Hand-crafted features: {repeat["of"]} by pyradiomics, {repeat["kept"]} of them repeatable (ICC at least
  {repeat["limit"]:g}; judged by: {repeat["method"]}).
{lines}
- A nomogram of age, sex and the out-of-fold fusion score.

## Training cohort
{counts["patients"]} {"phantom " if phantom else ""}patients with {counts["cases"]} fractured vertebrae
({counts["acute"]} acute, {counts["chronic"]} chronic). Held-out patients take no part in any number of this bundle;
what was found on them stands in the report of the run that made it.

## Results on the training cohort
{_table(metrics)}

Out-of-fold: selection, classifier and calibration were fitted anew without the patients that were scored. The intervals
treat vertebrae as independent, though some belong to one patient.

## Limits
- It knows nothing of other scanners, kernels and ages than those of its cohort (`distribution.json`, `manifest.json`).
- It says acute or chronic of a vertebra that somebody or something called fractured; it finds no fractures.
- A case that its conformal limits leave open is reported as indeterminate.
{_kept(chosen)}""")
    return with_notes(card, notes)
