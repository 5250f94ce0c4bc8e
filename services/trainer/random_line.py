"""The line beside every result: DLR when its network learned nothing (METHOD 3).

A random network that stays as it is gives random projections of the picture, and size and shape alone tell acute from
chronic in some of them. What a network that learned something is worth is what DLR lies above this line.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from services.trainer.classifiers import fitted, search
from services.trainer.models import Rows, cut, fold_scores, mapped, outer_folds
from services.trainer.network import exported, random_network
from services.trainer.results import Branch, RandomNetwork
from services.trainer.settings import NetworkSettings, TrainingSettings
from services.trainer.statistics import auc_delong, auc_if_any

DTL: Final[Branch] = "dtl"


def has_line(settings: NetworkSettings) -> bool:
    """Whether a run shows the line: not where its own network is that random network."""
    itself = settings.weights is None and settings.random_start and settings.mode == "frozen"
    return settings.random_line and not itself


def random_onnx(settings: NetworkSettings, *, seed: int) -> bytes:
    """The random network of an architecture as ONNX."""
    onnx, _ = exported(random_network(settings.architecture, seed=seed), size=settings.image_size)
    return onnx


def random_line(rows: Rows, held: Rows, settings: TrainingSettings, *, processes: int = 1) -> RandomNetwork:
    """DLR on training rows whose `dtl` is the random network's, by the very steps of DLR; `held` rows may be none."""
    folds = outer_folds(rows, settings.classifiers.out_of_fold, seed=settings.seed)
    whole = cut(rows, settings, branches=(DTL,))
    z = whole.columns(rows)[DTL]
    _, winner = search(z, rows.acute, rows.patient, settings.classifiers, settings.seed)
    one = partial(fold_scores, rows=rows, settings=settings, winners={DTL: winner})
    raw = np.full(len(rows), np.nan)
    for fold in mapped(one, folds, processes):
        raw[fold.rows] = fold.raw[DTL]
    out_of_fold = auc_delong(rows.acute, raw).value
    if len(held) == 0:
        return RandomNetwork(out_of_fold=out_of_fold, held_out=None)
    classifier = fitted(winner, z, rows.acute, seed=settings.seed)
    found = auc_if_any(held.acute, classifier.score(whole.columns(held)[DTL]))
    return RandomNetwork(out_of_fold=out_of_fold, held_out=None if found is None else found.value)
