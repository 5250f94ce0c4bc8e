"""CaseReady in, hand-crafted features out: written before they are told, and not computed twice."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version

import numpy as np
from pydantic import BaseModel

from services.radiomics_extractor.extraction import (
    DISTRIBUTION,
    ExtractionError,
    ParameterError,
    feature_names,
    hcr_protocol,
)
from services.radiomics_extractor.process_pool import ExtractionPool
from services.radiomics_extractor.settings import RadiomicsExtractorSettings
from shared.fracture import keys
from shared.fracture.bundle import Bundle
from shared.fracture.features import FeatureVector
from shared.fracture.ids import short
from shared.fracture.messages import FACTS, CaseReady, FeaturesExtracted
from shared.fracture.protocol import HcrProtocol
from shared.fracture.topology import RADIOMICS_EXTRACTOR
from shared.pipeline.errors import FractureSweepError, Reject, Retry
from shared.pipeline.service import Service
from shared.pipeline.store import Store
from shared.records.archive import crop_files
from shared.records.outcomes import case_ids, decided, rejecting


def build(*, store: Store, bundle: Bundle, settings: RadiomicsExtractorSettings | None = None) -> Service:
    """The radiomics extractor over a store, for the HCR protocol of a bundle; FractureSweepError where it cannot be."""
    try:
        parameters = bundle.pyradiomics_yaml.decode("utf-8")
    except UnicodeDecodeError:
        raise FractureSweepError("the bundle's pyradiomics.yaml is not UTF-8 text") from None
    return extractor_service(store=store, protocol=bundle.manifest.hcr, parameters=parameters, settings=settings)


def extractor_service(
    *,
    store: Store,
    protocol: HcrProtocol,
    parameters: str,
    settings: RadiomicsExtractorSettings | None = None,
    pool: ExtractionPool | None = None,
) -> Service:
    """The radiomics extractor over a store, for one protocol and its parameter file."""
    check_protocol(protocol, parameters)
    names = feature_names(parameters)
    processes = pool or ExtractionPool(parameters=parameters, settings=settings or RadiomicsExtractorSettings())

    def case_ready(fact: BaseModel) -> Iterable[BaseModel]:
        if not isinstance(fact, CaseReady):
            raise TypeError(f"the radiomics extractor handles CaseReady, not {type(fact).__name__}")
        return (extract_case(fact, store=store, protocol=protocol, names=names, pool=processes),)

    return Service(
        name=RADIOMICS_EXTRACTOR,
        queues=(RADIOMICS_EXTRACTOR,),
        messages=FACTS,
        handlers={CaseReady: case_ready},
        rejected=rejecting(store, RADIOMICS_EXTRACTOR),
        slots=processes.processes,
        ready=processes.check,
        close=processes.close,
    )


def check_protocol(protocol: HcrProtocol, parameters: str) -> None:
    """FractureSweepError where the pyradiomics of this machine would not give the features of the protocol."""
    try:
        here = hcr_protocol(parameters=parameters, crop_hash=protocol.crop_hash)
    except (ParameterError, ExtractionError) as error:
        raise FractureSweepError(f"the bundle's parameter file cannot be run: {error}") from None
    if here.parameters_sha256 != protocol.parameters_sha256:
        raise FractureSweepError("the bundle's parameter file is not the one that its HCR protocol names")
    if here.pyradiomics_version != protocol.pyradiomics_version:
        raise FractureSweepError(
            f"the bundle was fitted with pyradiomics {protocol.pyradiomics_version}, "
            f"{here.pyradiomics_version} is installed; install that version or use another bundle"
        )
    if here.feature_names_sha256 != protocol.feature_names_sha256:
        raise FractureSweepError(
            f"the installed pyradiomics gives another list of {len(feature_names(parameters))} features than the "
            "bundle was fitted on; install the version that it was fitted with"
        )


def extract_case(
    fact: CaseReady, *, store: Store, protocol: HcrProtocol, names: tuple[str, ...], pool: ExtractionPool
) -> FeaturesExtracted:
    """The features of one case are in the store when this returns, unless the case was decided before.

    Retry: another bundle, the crop is not there, the process died. Reject: the crop has no such features. OverBudget.
    """
    if fact.protocols.hcr_hash != protocol.hcr_hash or fact.protocols.crop_hash != protocol.crop_hash:
        raise Retry(
            f"the case asks for HCR protocol {short(fact.protocols.hcr_hash)}, this worker's bundle has "
            f"{short(protocol.hcr_hash)}; start workers with that bundle"
        )
    key = keys.hcr_features(protocol.hcr_hash, fact.case_id)
    if not store.exists(key) and not decided(store, fact.protocols.scope, fact.case_id):
        image, mask = crop_files(store, protocol.crop_hash, fact.case_id)
        try:
            features = pool.extract(image=image, mask=mask)
        except ExtractionError as error:
            raise Reject(str(error)) from None
        if tuple(features) != names:
            raise Reject(f"pyradiomics gave {len(features)} features of this crop instead of {len(names)}")
        vector = FeatureVector(
            kind="hcr",
            names=names,
            values=np.array(list(features.values()), dtype=np.float64),
            protocol_hash=protocol.hcr_hash,
            provenance={name: version(name) for name in (DISTRIBUTION, "SimpleITK", "numpy", "PyWavelets")},
        )
        store.put(key, vector.to_bytes())
    return FeaturesExtracted.model_validate({**case_ids(fact), "kind": "hcr"})
