"""The network of a run: where it starts, what it is fitted on, and what it hands to the later steps (METHOD 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.trainer.cohort_table import CohortTable
from services.trainer.fine_tuning import crossfit, fit_network
from services.trainer.models import LogitHead
from services.trainer.network import exported, network_of
from services.trainer.results import Epoch, NetworkRun
from services.trainer.selection import Matrix
from services.trainer.settings import NetworkSettings
from services.trainer.weights import Start

ImageFeatures = Callable[[bytes, NDArray[np.float32]], Matrix]
"""ONNX bytes and pictures (n, size, size) float32 to features (n, features), as the deep extractor computes them."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkStep:
    """`onnx` is the network that ships. `logit` (n training rows) and `head` are there in mode crossfit alone."""

    onnx: bytes
    head: LogitHead | None
    logit: Matrix | None
    run: NetworkRun


def network_step(
    training: CohortTable,
    settings: NetworkSettings,
    *,
    start: Start,
    seed: int,
    image_features: ImageFeatures,
    work: Path,
    progress: Progress | None = None,
) -> NetworkStep:
    """Fit the network on training rows as its mode says, and export it; FractureSweepError where it cannot be."""
    head: LogitHead | None = None
    logit: Matrix | None = None
    device, worst = "none (not fitted)", 0.0
    epochs: tuple[Epoch, ...] = ()
    state = start.state
    rows = (training.images, training.acute, training.patient)
    if settings.mode == "in_sample":
        fitted = fit_network(*rows, settings, seed=seed, start=start.state, work=work, progress=progress)
        state, device, epochs = fitted.backbone, fitted.device, fitted.epochs
    elif settings.mode == "crossfit":
        crossed = crossfit(
            *rows, settings, seed=seed, start=start.state, work=work, features=image_features, progress=progress
        )
        final = crossed.final
        state, device, epochs = final.backbone, final.device, crossed.epochs
        head, logit = LogitHead(weights=final.weight, bias=final.bias), crossed.out_of_fold_logit
        worst = crossed.onnx_largest_difference
    onnx, difference = exported(
        network_of(settings.architecture, state),
        size=settings.image_size,
        storage=settings.storage,
        pictures=training.images[:8],
    )
    return NetworkStep(
        onnx=onnx,
        head=head,
        logit=logit,
        run=NetworkRun(
            mode=settings.mode,
            architecture=settings.architecture,
            weights=start.words,
            device=device,
            epochs=epochs,
            onnx_largest_difference=max(worst, difference),
            components=0 if settings.mode == "crossfit" else settings.components,
        ),
    )
