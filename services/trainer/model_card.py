"""MODEL_CARD.md of the demonstration bundle, written from the metrics by code: no number in it is typed by hand."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, Final

_LINES: Final = (
    ("hcr", "HCR alone (radiomics)"),
    ("dtl", "DTL alone (pre-trained network)"),
    ("fusion", "Fusion of HCR and DTL"),
    ("nomogram", "Nomogram (age, sex, fusion score)"),
    ("random_dtl", "DTL alone, randomly initialised network"),
    ("random_fusion", "Fusion with the randomly initialised network"),
)


def _interval(auc: Mapping[str, float]) -> str:
    return f"{auc['auc']:.3f} ({auc['low']:.3f} to {auc['high']:.3f})"


def _table(metrics: Mapping[str, Any]) -> str:
    rows = ["| model | held-out AUC (95 % interval, DeLong) | training, out-of-fold |", "| --- | --- | --- |"]
    for key, label in _LINES:
        rows.append(f"| {label} | {_interval(metrics['held_out'][key])} | {_interval(metrics['out_of_fold'][key])} |")
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


def model_card(metrics: Mapping[str, Any]) -> str:
    """The model card of a demonstration bundle from its metrics.json."""
    cohort, pretraining, at = metrics["cohort"], metrics["pretraining"], metrics["at_threshold"]
    compute, selected = metrics["compute"], metrics["selected"]
    return _filled(f"""# Demonstration bundle: acute or chronic vertebral compression fracture, on PHANTOMS

**Trained and tested on synthetic phantoms only. It has no clinical meaning, and no number on this page says anything
about patients.** Every result made with it carries that mark.

## Intended use
To show and test the pipeline: installation, throughput, reports, monitoring. Not for diagnosis, triage, research on
patients, or as a starting point for a clinical model. A site or a research group trains its own bundle.

## What it is
- A ResNet50 of one input channel, weights int8 with one scale an output channel, computed in float32; 2,048 pooled
  features of a 64 x 64 sagittal picture (preset `{metrics["preset"]}`). The features that the classifiers were fitted
  on come out of that same ONNX file.
- {metrics["hcr_features"]} hand-crafted features by pyradiomics, {metrics["training_hcr_varying"]} of which vary in
  training.
- Selection on training patients only: Spearman |rho| > 0.9, LASSO; PCA of the network's features, LASSO; both fused,
  LASSO, logistic regression. Selected: {selected["hcr"]} HCR, {selected["dtl"]} DTL components,
  {selected["fusion"]} fused.
- A nomogram of age, sex and the out-of-fold fusion score.

## Cohort
{cohort["patients"]} phantom patients with {cohort["cases"]} fractured vertebrae ({cohort["acute"]} acute,
{cohort["chronic"]} chronic), kappa {cohort["kappa"]:g}, seed {cohort["seed"]}; split by patient, stratified, with seed
{cohort["split_seed"]}: {cohort["training_patients"]} patients ({cohort["training_cases"]} vertebrae) for training,
{cohort["test_patients"]} patients ({cohort["test_cases"]} vertebrae) held out.
Neither the split nor any seed was searched for.

## Pre-training of the network
From a random start, {pretraining["steps"]} steps of {pretraining["batch"]} pictures on {pretraining["pictures"]}
phantom slabs of another seed ({pretraining["seed"]}), mode `frozen`: the network never saw the label acute or
chronic. **Its
targets were {", ".join(pretraining["targets"])}.** The slabs were drawn at kappa 0, where the
signs are equally frequent in both classes; but the same signs make the classes of the cohort, so this network knows
beforehand what matters in a phantom. That is a help that no real cohort gives. The lines with a randomly initialised
network show what is left without it.

## Results on phantoms
{_table(metrics)}

At the threshold {metrics["threshold"]:.4f} (Youden, on out-of-fold training scores), held out: {at["tp"]} true and
{at["fp"]} false acute, {at["tn"]} true and {at["fn"]} false chronic: accuracy {at["accuracy"]:.3f}, sensitivity
{at["sensitivity"]:.3f}, specificity {at["specificity"]:.3f}. The held-out set is small, and the intervals treat
vertebrae as independent, though some belong to one patient.

While the generator was written, its signs were made clearer twice, to come near the AUC that METHOD.md asks for; that
was judged by cross-validation over phantoms of the cohort's seed. So the height of these numbers is set by the
generator, not found. No model, threshold, split or seed was chosen by the held-out patients.

## Limits
The class is made by the generator from the signs that its tables name. Real fractures differ in every respect. The
network was shown phantoms alone. Ages, scanners and kernels are those of the generator's tables.

## How it was made
`{metrics["command"]}`

{compute["processors"]} processor cores, no GPU; about {compute["hours"]:g} h, of which the network's pre-training
took the largest part. Python {compute["python"]}, torch {compute["torch"]}, scikit-learn {compute["scikit_learn"]},
pyradiomics {metrics["pyradiomics"]}.
""")
