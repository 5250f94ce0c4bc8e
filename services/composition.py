"""The one place that wires the parts: which settings, store and bundle make which service.

Each service is imported when it is built, so that a worker's image holds what that service needs and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from services.settings import Settings
from shared.fracture import keys
from shared.fracture.bundle import Bundle, load_bundle
from shared.fracture.bundle_files import BundleError
from shared.fracture.ids import KEY_BYTES, Pseudonyms
from shared.fracture.messages import Fact
from shared.fracture.records import Record
from shared.fracture.topology import (
    DEEP_EXTRACTOR,
    FUSION_CLASSIFIER,
    QUEUES,
    RADIOMICS_EXTRACTOR,
    REPORT_GENERATOR,
    RESAMPLER,
    SEGMENTER,
    SERVICES,
)
from shared.pipeline.broker import Broker
from shared.pipeline.envelope import Envelope
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.metrics import Metrics
from shared.pipeline.recorder import Recorder
from shared.pipeline.restricted_store import RestrictedStore
from shared.pipeline.service import Service
from shared.pipeline.store import Store
from shared.records.archive import find_record, write_record
from shared.records.outcomes import record_dead_letter

WORKERS: tuple[str, ...] = (
    SEGMENTER,
    RESAMPLER,
    RADIOMICS_EXTRACTOR,
    DEEP_EXTRACTOR,
    FUSION_CLASSIFIER,
    REPORT_GENERATOR,
)
"""The services that handle messages, in the pipeline's order (ingest and recorder have loops of their own)."""


class KeyFingerprint(Record):
    """Of the pseudonym key that a store's ids were made with."""

    fingerprint: str


def key_of(text: str, *, what: str) -> bytes:
    """The bytes of a key written as 64 hexadecimal digits; FractureSweepError where it is not."""
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise FractureSweepError(
            f"the {what} is not {2 * KEY_BYTES} hexadecimal digits: make one with `fracture-sweep keys`"
        )
    return key


def bundle_of(settings: Settings) -> Bundle:
    """The verified bundle of the settings; FractureSweepError where it is not to be used."""
    try:
        return load_bundle(settings.bundle.path)
    except BundleError as error:
        raise FractureSweepError(str(error)) from error


def pseudonyms_of(settings: Settings) -> Pseudonyms:
    """The site's pseudonyms; FractureSweepError where there is no key."""
    if settings.secrets.pseudonym_key is None:
        raise FractureSweepError(
            "no pseudonym key: make one with `fracture-sweep keys DIR` and name it in "
            "FRACTURE_SWEEP_SECRETS_PSEUDONYM_KEY_FILE"
        )
    return Pseudonyms(key_of(settings.secrets.pseudonym_key.get_secret_value(), what="pseudonym key"))


def restricted(store: Store, settings: Settings) -> RestrictedStore:
    """The store with its restricted prefixes encrypted; without a key they cannot be touched."""
    secret = settings.secrets.encryption_key
    key = None if secret is None else key_of(secret.get_secret_value(), what="encryption key")
    return RestrictedStore(store, keys.RESTRICTED, key)


def claim(store: Store, pseudonyms: Pseudonyms) -> None:
    """Bind a store to a pseudonym key at its first use; FractureSweepError where it was bound to another."""
    record = KeyFingerprint(fingerprint=pseudonyms.fingerprint)
    if write_record(store, keys.PSEUDONYM_FINGERPRINT, record):
        return
    found = find_record(store, keys.PSEUDONYM_FINGERPRINT, KeyFingerprint)
    if found != record:
        raise FractureSweepError(
            "this store was made with another pseudonym key: use that key, or a new store "
            "(with another key the same study would get a second id)"
        )


def teller(broker: Broker) -> Callable[[Fact], None]:
    """Publishes facts that follow from no message (of ingest)."""

    def tell(fact: Fact) -> None:
        envelope = Envelope.of(fact)
        broker.publish(envelope.message_type, envelope.to_bytes())

    return tell


def build_service(
    name: str, *, settings: Settings, store: Store, bundle: Callable[[], Bundle], metrics: Metrics
) -> Service:
    """One of WORKERS, with the bundle asked for only where it is needed; FractureSweepError where it cannot be."""
    match name:
        case "segmenter":
            from services.segmenter.service import build as build_segmenter

            return build_segmenter(
                store=store,
                settings=settings.segmenter,
                max_slice_spacing_mm=settings.resampler.max_spacing_mm,
                tolerance_mm=settings.resampler.spacing_tolerance_mm,
            )
        case "resampler":
            from services.resampler.service import build as build_resampler

            return build_resampler(store=store, bundle=bundle(), settings=settings.resampler)
        case "radiomics-extractor":
            from services.radiomics_extractor.service import build as build_radiomics

            return build_radiomics(store=store, bundle=bundle(), settings=settings.radiomics_extractor)
        case "deep-extractor":
            from services.deep_extractor.service import build as build_deep

            return build_deep(
                store=store, bundle=bundle(), settings=settings.deep_extractor, tell_device=metrics.device
            )
        case "fusion-classifier":
            from services.fusion_classifier.service import build as build_fusion

            return build_fusion(store=store, bundle=bundle(), settings=settings.fusion_classifier)
        case "report-generator":
            from services.report_generator.service import build as build_reports

            return build_reports(store=store, bundle=bundle(), settings=settings.report_generator)
        case _:
            raise no_such_service(name)


def no_such_service(name: str) -> FractureSweepError:
    """That no service has this name, with those that there are."""
    return FractureSweepError(f"no service is called {name!r}: there are {', '.join(SERVICES)}")


def build_recorder(*, store: Store, broker: Broker, metrics: Metrics) -> Recorder:
    """The recorder of every queue's dead letters."""
    return Recorder(broker, queues=tuple(QUEUES), record=partial(record_dead_letter, store), metrics=metrics)
