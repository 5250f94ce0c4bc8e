"""Deep features of a cohort's cases, by the deep extractor's own batches and keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.cohort.rows import (
    Progress,
    silent,
)
from services.settings import Settings
from shared.fracture import keys
from shared.fracture.features import FeatureVector
from shared.fracture.ids import sha256_hex
from shared.fracture.messages import (
    CaseReady,
)
from shared.fracture.protocol import (
    DtlProtocol,
)
from shared.pipeline.errors import FractureSweepError, OverBudget, Reject, Retry
from shared.pipeline.store import Store


def deep_features(
    store: Store,
    ready: Sequence[CaseReady],
    *,
    network: bytes,
    protocol: DtlProtocol,
    app: Settings,
    progress: Progress = silent,
) -> NDArray[np.float64]:
    """The features (n, features) of cases by a network in ONNX, by the deep extractor's own batches and keys.

    Those that lie in the store already are not computed. FractureSweepError where a case has none.
    """
    from services.deep_extractor.network import Network
    from services.deep_extractor.service import extract_batch

    if sha256_hex(network) != protocol.network_sha256:
        raise ValueError("the protocol names another network than the one that is given")
    settings = app.deep_extractor
    loaded = Network(
        network,
        device=settings.device,
        intra_op_threads=settings.intra_op_threads,
        seconds=settings.batch_seconds,
    )
    values: list[NDArray[np.float64]] = []
    for start in range(0, len(ready), settings.batch_size):
        part = [
            one.model_copy(update={"protocols": one.protocols.model_copy(update={"dtl_hash": protocol.dtl_hash})})
            for one in ready[start : start + settings.batch_size]
        ]
        for answer in extract_batch(part, store=store, network=loaded, protocol=protocol):
            if isinstance(answer, FractureSweepError | Retry | Reject | OverBudget):
                raise FractureSweepError(f"the deep features of a case cannot be had: {answer}") from answer
            if isinstance(answer, Exception):
                raise answer
        for one in part:
            vector = FeatureVector.from_bytes(store.get(keys.dtl_features(protocol.dtl_hash, one.case_id)))
            values.append(vector.values)
        progress("deep features", len(values), len(ready))
    return np.stack(values) if values else np.empty((0, 0))
