"""CaseReady in, deep features out: what waits is taken as one batch, in which each case stands and falls alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from services.deep_extractor.network import Network, check_golden
from services.deep_extractor.settings import DeepExtractorSettings
from shared.fracture import keys
from shared.fracture.bundle import Bundle
from shared.fracture.crop import MAX_CROP_VOXELS
from shared.fracture.features import FeatureVector, dtl_names
from shared.fracture.messages import FACTS, CaseReady, FeaturesExtracted
from shared.fracture.protocol import DtlProtocol
from shared.fracture.sagittal import sagittal_image
from shared.fracture.topology import DEEP_EXTRACTOR
from shared.fracture.volume import TooLarge, mask_from_nrrd, volume_from_nrrd
from shared.pipeline.errors import FractureSweepError, OverBudget, Reject, Retry
from shared.pipeline.service import Batch, Service
from shared.pipeline.store import Store
from shared.records.archive import crop_files
from shared.records.outcomes import case_ids, decided, rejecting

_log = logging.getLogger(__name__)

Answer = Iterable[BaseModel] | Exception


def load_network(bundle: Bundle, settings: DeepExtractorSettings) -> Network:
    """The bundle's network on the device of the settings, after its golden image came out right."""
    network = Network(
        bundle.network_bytes(),
        device=settings.device,
        intra_op_threads=settings.intra_op_threads,
        seconds=settings.batch_seconds,
    )
    try:
        difference = check_golden(network, bundle.golden.image)
    except OverBudget as error:
        raise FractureSweepError(f"{error} on the golden image; raise deep_extractor.batch_seconds") from None
    _log.info("network loaded: provider %s, golden image differs by %.2g", network.provider, difference)
    return network


def build(
    *,
    store: Store,
    bundle: Bundle,
    settings: DeepExtractorSettings | None = None,
    tell_device: Callable[[str, str], None] | None = None,
) -> Service:
    """The deep extractor over a store and a bundle.

    `tell_device` is told (service, device really got), for the metric. FractureSweepError at once where the network
    cannot be loaded, the device was demanded and is not there, or the golden image does not come out.
    """
    chosen = settings or DeepExtractorSettings()
    network = load_network(bundle, chosen)
    if tell_device is not None:
        tell_device(DEEP_EXTRACTOR, network.device)
    return deep_service(store=store, network=network, protocol=bundle.manifest.dtl, settings=chosen)


def deep_service(
    *, store: Store, network: Network, protocol: DtlProtocol, settings: DeepExtractorSettings | None = None
) -> Service:
    """The deep extractor over a store, for a loaded network and its protocol."""
    chosen = settings or DeepExtractorSettings()

    def cases_ready(facts: Sequence[BaseModel]) -> Sequence[Answer]:
        return extract_batch(facts, store=store, network=network, protocol=protocol)

    return Service(
        name=DEEP_EXTRACTOR,
        queues=(DEEP_EXTRACTOR,),
        messages=FACTS,
        batches={CaseReady: Batch(handler=cases_ready, size=chosen.batch_size, wait_seconds=chosen.batch_wait_seconds)},
        rejected=rejecting(store, DEEP_EXTRACTOR),
    )


def extract_batch(facts: Sequence[BaseModel], *, store: Store, network: Network, protocol: DtlProtocol) -> list[Answer]:
    """What follows from each CaseReady, in the same order; features that are there already are told, not computed."""
    answers: dict[int, Answer] = {}
    pictures: dict[int, NDArray[np.float32]] = {}
    for place, fact in enumerate(facts):
        try:
            ready = _case(fact, protocol)
            there = store.exists(keys.dtl_features(protocol.dtl_hash, ready.case_id))
            if there or decided(store, ready.protocols.scope, ready.case_id):
                answers[place] = (_extracted(ready),)
            else:
                pictures[place] = picture_of(store, ready, protocol)
        except Exception as error:  # its own case's alone; the worker interprets it
            answers[place] = error
    for place, result in _run(network, pictures).items():
        try:
            ready = _case(facts[place], protocol)
            vector = _vector(result, network=network, protocol=protocol)
            store.put(keys.dtl_features(protocol.dtl_hash, ready.case_id), vector.to_bytes())
            answers[place] = (_extracted(ready),)
        except Exception as error:  # its own case's alone; the worker interprets it
            answers[place] = error
    return [answers[place] for place in range(len(facts))]


def picture_of(store: Store, ready: CaseReady, protocol: DtlProtocol) -> NDArray[np.float32]:
    """The network's input for a case. Retry: the crop is not there. Reject: it cannot be used. OverBudget: too big."""
    image, mask = crop_files(store, protocol.crop_hash, ready.case_id)
    try:
        volume = volume_from_nrrd(image, max_voxels=MAX_CROP_VOXELS)
        roi = mask_from_nrrd(mask, max_voxels=MAX_CROP_VOXELS)
    except TooLarge as error:
        raise OverBudget(f"the stored crop of the case is too large: {error}") from None
    except (RuntimeError, ValueError):
        raise Reject("the stored crop of the case cannot be read; delete it and sweep the series again") from None
    try:
        return sagittal_image(volume, roi, box=protocol.box, box_margin_mm=protocol.box_margin_mm, size=protocol.size)
    except ValueError as error:
        raise Reject(str(error)) from None


def _case(fact: BaseModel, protocol: DtlProtocol) -> CaseReady:
    if not isinstance(fact, CaseReady):
        raise TypeError(f"the deep extractor handles CaseReady, not {type(fact).__name__}")
    if fact.protocols.dtl_hash != protocol.dtl_hash or fact.protocols.crop_hash != protocol.crop_hash:
        raise Retry("the case asks for another DTL protocol than this worker's bundle; start workers with that bundle")
    return fact


def _run(network: Network, pictures: dict[int, NDArray[np.float32]]) -> dict[int, NDArray[np.float64] | Exception]:
    """Features by place. Where a run of several fails, each runs alone, so that the failure falls on its cause."""
    if not pictures:
        return {}
    places = list(pictures)
    try:
        return dict(zip(places, network.features([pictures[place] for place in places]), strict=True))
    except Exception as error:  # onnxruntime's exceptions have no public base
        if len(places) == 1:
            return {places[0]: error}
    return {place: result for one in places for place, result in _run(network, {one: pictures[one]}).items()}


def _vector(result: NDArray[np.float64] | Exception, *, network: Network, protocol: DtlProtocol) -> FeatureVector:
    if isinstance(result, OverBudget):
        raise result
    if isinstance(result, Exception):
        raise RuntimeError(f"the network failed on the case ({type(result).__name__})") from result
    try:
        return FeatureVector(
            kind="dtl",
            names=dtl_names(result.size),
            values=result,
            protocol_hash=protocol.dtl_hash,
            provenance=network.provenance,
        )
    except ValueError as error:
        raise Reject(f"the network's answer cannot be used: {error}") from None


def _extracted(ready: CaseReady) -> FeaturesExtracted:
    return FeaturesExtracted.model_validate({**case_ids(ready), "kind": "dtl"})
