"""FeaturesExtracted in, FractureClassified out: the case is scored when both of its vectors lie in the store.

Each extractor writes before it tells, so the second of the two messages always finds both; the first finds one and is
done. Told twice or both at once, the case is scored with equal results, and the record is written once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pydantic import BaseModel

from services.fusion_classifier.settings import FusionClassifierSettings
from shared.fracture import keys
from shared.fracture.bundle import Bundle
from shared.fracture.features import FeatureVector, NewerFeatures
from shared.fracture.messages import FACTS, CaseNotEvaluated, FeaturesExtracted, FractureClassified
from shared.fracture.records import CaseRecord, Classified, NotEvaluated, Warned
from shared.fracture.scoring import Classification, acquisition_warnings, score
from shared.fracture.topology import FUSION_CLASSIFIER
from shared.pipeline.errors import NewerSchema, NotInStore, Reject, Retry
from shared.pipeline.service import Service
from shared.pipeline.store import Store
from shared.records.archive import read_record, write_record
from shared.records.outcomes import case_ids, case_not_evaluated, rejecting

OUTSIDE_CODE: Final = "outside-training-range"


def build(*, store: Store, bundle: Bundle, settings: FusionClassifierSettings | None = None) -> Service:
    """The fusion classifier over a store and a bundle; BundleError where the bundle's classifiers cannot be run."""
    chosen = settings or FusionClassifierSettings()
    ready = bundle.running()

    def features_extracted(fact: BaseModel) -> Iterable[BaseModel]:
        if not isinstance(fact, FeaturesExtracted):
            raise TypeError(f"the fusion classifier handles FeaturesExtracted, not {type(fact).__name__}")
        return classify(fact, store=store, bundle=ready, settings=chosen)

    return Service(
        name=FUSION_CLASSIFIER,
        queues=(FUSION_CLASSIFIER,),
        messages=FACTS,
        handlers={FeaturesExtracted: features_extracted},
        rejected=rejecting(store, FUSION_CLASSIFIER),
    )


def classify(
    fact: FeaturesExtracted, *, store: Store, bundle: Bundle, settings: FusionClassifierSettings
) -> tuple[FractureClassified | CaseNotEvaluated, ...]:
    """What follows from one vector being there: nothing yet, or the case's terminal fact, its record stored before.

    Without a `bundle_id` (features made for training) nothing is to be scored. Retry: this worker holds another
    bundle. Reject: vectors that do not fit the bundle.
    """
    asked = fact.protocols
    if asked.bundle_id is None:
        return ()
    if asked != bundle.protocols:
        raise Retry("the case asks for another bundle than this worker's; start workers with the bundle of the sweep")
    told = _told_before(fact, store)
    if told:
        return told
    vectors = _vectors(fact, store)
    if vectors is None:
        return ()
    hcr, dtl = vectors
    case = _case_record(fact, store)
    try:
        result = score(bundle, hcr=hcr, dtl=dtl, age=case.demographics.age_years, sex=case.demographics.sex)
    except ValueError as error:
        raise Reject(f"the features do not fit the bundle: {error}") from None
    if result.outside_fraction > settings.max_outside_fraction:
        return (case_not_evaluated(store, fact, _too_strange(fact, result)),)
    record = Classified(
        case_id=fact.case_id,
        study_id=fact.study_id,
        series_id=fact.series_id,
        level=case.level,
        protocols=asked,
        # what this bundle does not have is not written, so that an older report-generator reads the rest
        classification=result.model_dump(mode="json", exclude_defaults=True),
        warnings=(*case.warnings, *acquisition_warnings(bundle, case.acquisition), *_strange(result, settings)),
    )
    write_record(store, keys.outcome("classified", asked.scope, fact.case_id), record)
    return (_classified(fact),)


def _told_before(fact: FeaturesExtracted, store: Store) -> tuple[FractureClassified | CaseNotEvaluated, ...]:
    """The terminal fact of a case that this service decided before; empty where it did not."""
    scope = fact.protocols.scope
    if store.exists(keys.outcome("classified", scope, fact.case_id)):
        return (_classified(fact),)
    if store.exists(keys.outcome("not-evaluated", scope, fact.case_id)):
        return (CaseNotEvaluated.model_validate(case_ids(fact)),)
    return ()


def _vectors(fact: FeaturesExtracted, store: Store) -> tuple[FeatureVector, FeatureVector] | None:
    """Both vectors, or None while one of them is not there."""
    found = []
    for key in (
        keys.hcr_features(fact.protocols.hcr_hash, fact.case_id),
        keys.dtl_features(fact.protocols.dtl_hash, fact.case_id),
    ):
        try:
            found.append(FeatureVector.from_bytes(store.get(key)))
        except NotInStore:
            return None
        except NewerFeatures as error:
            raise NewerSchema(f"{error}: upgrade this service, then replay the dead letter") from None
        except ValueError as error:
            raise Reject(f"a stored feature vector cannot be read: {error}") from None
    return found[0], found[1]


def _case_record(fact: FeaturesExtracted, store: Store) -> CaseRecord:
    try:
        return read_record(store, keys.case_record(fact.protocols.crop_hash, fact.case_id), CaseRecord)
    except NotInStore:
        raise Retry("the record of the case is not in the store") from None


def _too_strange(fact: FeaturesExtracted, result: Classification) -> NotEvaluated:
    return NotEvaluated(
        case_id=fact.case_id,
        kind="guard",
        service=FUSION_CLASSIFIER,
        reasons=(_strange_sentence(result),),
        codes=(OUTSIDE_CODE,),
    )


def _strange(result: Classification, settings: FusionClassifierSettings) -> tuple[Warned, ...]:
    if result.outside_fraction <= settings.warn_outside_fraction:
        return ()
    return (Warned(code=OUTSIDE_CODE, sentence=_strange_sentence(result)),)


def _strange_sentence(result: Classification) -> str:
    count, of = len(result.outside_range), result.selected_features
    return (
        f"{count} of {of} selected features lie outside the range seen in training: the model does not know such a case"
    )


def _classified(fact: FeaturesExtracted) -> FractureClassified:
    return FractureClassified.model_validate(case_ids(fact))
