"""The rights of each user, as data and as the policies that are made of it."""

from __future__ import annotations

import re

import pytest

from shared.fracture import keys
from shared.fracture.access import (
    BROKER_RIGHTS,
    COLLECTOR,
    OPEN,
    STORE_RIGHTS,
    SUBMITTER,
    StoreRights,
    iam_policy,
    pattern,
)
from shared.fracture.topology import DICOM_INGEST, QUEUES, RECORDER, REPORT_GENERATOR, SERVICES, TELLS

IDS = ("a" * 64, "b" * 64)


def test_every_service_has_rights_of_its_own() -> None:
    assert set(SERVICES) <= set(STORE_RIGHTS)
    assert set(SERVICES) <= set(BROKER_RIGHTS)


@pytest.mark.parametrize("user", STORE_RIGHTS)
@pytest.mark.parametrize("prefix", keys.RESTRICTED)
def test_only_ingest_and_report_read_what_is_restricted(user: str, prefix: str) -> None:
    may = STORE_RIGHTS[user].allows("get", f"{prefix}x")

    uploads = user == SUBMITTER and prefix == keys.INBOX
    assert not may or user in (DICOM_INGEST, REPORT_GENERATOR) or uploads


@pytest.mark.parametrize("user", [user for user in STORE_RIGHTS if user != COLLECTOR])
def test_no_worker_deletes_what_was_written(user: str) -> None:
    rights = STORE_RIGHTS[user]

    assert [prefix for prefix in (*OPEN, "identities/", "named/") if rights.allows("delete", f"{prefix}x")] == []


def test_every_key_of_the_store_lies_below_a_prefix_that_somebody_writes() -> None:
    study, case = IDS
    written = (
        keys.volume(study, case),
        keys.manifest(study, case),
        keys.mask(study, case),
        keys.study_plans(study),
        keys.series_plans(study),
        keys.case_record(study, case),
        keys.hcr_features(study, case),
        keys.dtl_features(study, case),
        *(keys.outcome(kind, study, case) for kind in keys.OUTCOMES),
        keys.series_rejected(study, case),
        keys.series_dead_lettered("s", study, case),
        keys.report_dead_lettered("s", study),
        keys.dead_letter(study),
        keys.dead_letter_replay(study, 1),
        keys.report(study, case, "html"),
        keys.named_report(study, case, "html"),
        keys.worklists(study),
        keys.named_worklists(study),
        keys.sweep_plans(study),
        keys.sweep_of_study(study, case),
        keys.study_identities(study),
        keys.sweep_files(study),
        keys.inbox_submission(study),
        keys.PSEUDONYM_FINGERPRINT,
    )

    for key in written:
        assert [user for user, rights in STORE_RIGHTS.items() if rights.allows("put", key)], key


def test_a_pattern_matches_the_names_alone() -> None:
    own = re.compile(pattern(("deep-extractor", "deep-extractor.retry"), prefix="site."))

    assert own.match("site.deep-extractor.retry")
    assert not own.match("site.deep-extractorXretry")
    assert not own.match("site.deep-extractor.dead")
    assert not own.match("deep-extractor")
    assert not re.match(pattern(()), "anything")


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_publishes_its_own_facts_and_to_its_own_queues(service: str) -> None:
    tells = re.compile(pattern(BROKER_RIGHTS[service].tells))
    others = [queue for queue in QUEUES if queue not in SERVICES[service]]

    assert all(tells.match(fact) for fact in TELLS[service])
    assert [queue for queue in others if tells.match(queue)] == []
    assert [fact for fact in ("CaseReady", "SeriesStored") if tells.match(fact)] == [
        fact for fact in ("CaseReady", "SeriesStored") if fact in TELLS[service]
    ]


def test_the_recorder_reads_dead_letters_and_nothing_else() -> None:
    assert all(queue.endswith(".dead") for queue in BROKER_RIGHTS[RECORDER].reads)


def test_a_policy_names_prefixes_below_the_bucket() -> None:
    policy = iam_policy(StoreRights(reads=("cases/",), writes=("features/",)), "a-bucket")

    statements = {statement["Sid"]: statement for statement in policy["Statement"]}  # type: ignore[attr-defined]
    assert statements["Read"]["Resource"] == ["arn:aws:s3:::a-bucket/cases/*"]
    assert statements["Write"]["Resource"] == ["arn:aws:s3:::a-bucket/features/*", "arn:aws:s3:::a-bucket/probes/*"]
    assert statements["Delete"]["Resource"] == ["arn:aws:s3:::a-bucket/probes/*"]
    assert statements["List"]["Condition"] == {"StringLike": {"s3:prefix": ["cases/*", "probes/*"]}}
