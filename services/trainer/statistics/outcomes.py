"""The two arrays that every statistic of a model starts from: labels of 0 and 1, and one number a case."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Labels = NDArray[np.int64]


def check_outcomes(what: str, labels: Labels, *scores: Scores, of_each_class: int = 1) -> None:
    """ValueError that says what `what` needs and what there is, unless all is well.

    Labels (n,) of 0 and 1, scores (n,) finite, and at least `of_each_class` cases of each class.
    """
    if labels.ndim != 1 or any(one.shape != labels.shape for one in scores):
        shapes = ", ".join(str(one.shape) for one in (labels, *scores))
        raise ValueError(f"{what} needs labels and scores of one length, got shapes {shapes}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{what} needs labels of 0 and 1, got {np.unique(labels)[:5].tolist()}")
    for one in scores:
        if not np.isfinite(one).all():
            raise ValueError(f"{what} needs finite scores, got {int((~np.isfinite(one)).sum())} that are not")
    acute, chronic = int((labels == 1).sum()), int((labels == 0).sum())
    if min(acute, chronic) < of_each_class:
        cases = "case" if of_each_class == 1 else "cases"
        raise ValueError(
            f"{what} needs at least {of_each_class} {cases} of each class, got {acute} acute and {chronic} chronic"
        )


def check_probabilities(what: str, probabilities: Scores) -> None:
    """ValueError where a probability lies outside 0 to 1."""
    if len(probabilities) and not (probabilities.min() >= 0 and probabilities.max() <= 1):
        raise ValueError(
            f"{what} needs probabilities of 0 to 1, got {probabilities.min():g} to {probabilities.max():g}"
        )
