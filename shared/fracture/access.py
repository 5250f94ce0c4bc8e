"""Who may touch what: the rights of each service on the store's prefixes and on the broker's routing keys.

Pure data beside `keys.py` and `topology.py`, from which it takes every name, so that policies made of it cannot drift
from what the services do: a test runs the whole pipeline with each service held to its line here, another tries on real
servers what each must not do. Reading is listing too. Nobody but the collector deletes what was written; nobody can
write over it either, since every write is conditional.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shared.fracture import topology
from shared.fracture.keys import DEAD_LETTERS, INBOX, RESTRICTED, SWEEPS

CASES: Final = "cases/"
CLASSIFIED: Final = "outcomes/classified/"
DEAD_CASES: Final = "outcomes/dead-lettered/"
DEAD_REPORTS: Final = "outcomes/report-dead-lettered/"
DEAD_SERIES: Final = "outcomes/series-dead-lettered/"
DTL: Final = "features/dtl/"
FEATURES: Final = "features/"
HCR: Final = "features/hcr/"
IDENTITIES: Final = "identities/"
MANIFESTS: Final = "manifests/"
MASKS: Final = "masks/"
NAMED: Final = "named/"
NOT_EVALUATED: Final = "outcomes/not-evaluated/"
OUTCOMES: Final = "outcomes/"
PLANS: Final = "plans/"
PROBES: Final = "probes/"
REJECTED_CASES: Final = "outcomes/rejected/"
REJECTED_SERIES: Final = "outcomes/series-rejected/"
REPORTS: Final = "reports/"
SERIES_PLANS: Final = "plans/series/"
SITE: Final = "site/"
STUDY_PLANS: Final = "plans/studies/"
SWEEPS_OF_STUDY: Final = "sweeps-of-study/"
VOLUMES: Final = "volumes/"
WORKLISTS: Final = "worklists/"

OPEN: Final = (
    CASES, DEAD_LETTERS, FEATURES, MANIFESTS, MASKS, OUTCOMES, PLANS, REPORTS, SITE, SWEEPS, SWEEPS_OF_STUDY, VOLUMES,
    WORKLISTS,
)  # fmt: skip
"""Every prefix that is not restricted."""

OPERATOR: Final = "operator"
"""Looks and replays (status, dead-letters, export); reads nothing restricted."""
SUBMITTER: Final = "submitter"
"""Uploads into the inbox, and reads nothing of what came of it."""
COLLECTOR: Final = "collector"
"""Removes what is past its age (gc); reads nothing restricted, but may list and delete it."""
EVERYTHING: Final = ""
"""The prefix of all keys: the collector looks at the whole store, so that nothing is overlooked."""


@dataclass(frozen=True, kw_only=True)
class StoreRights:
    """Prefixes that one user of the store reads (and lists), writes and deletes; `lists` alone shows names only."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()

    def allows(self, action: str, key: str) -> bool:
        """Whether `action` (get, list, put, delete) is allowed on a key or prefix."""
        allowed = {
            "get": self.reads,
            "list": (*self.reads, *self.lists, PROBES),
            "put": (*self.writes, PROBES),
            "delete": (*self.deletes, PROBES),
        }[action]
        return key.startswith(allowed)


STORE_RIGHTS: Final[Mapping[str, StoreRights]] = {
    topology.DICOM_INGEST: StoreRights(
        reads=(
            IDENTITIES, INBOX, MANIFESTS, MASKS, OUTCOMES, PLANS, REPORTS, SITE, SWEEPS, SWEEPS_OF_STUDY, VOLUMES,
        ),
        writes=(
            IDENTITIES, INBOX, MANIFESTS, MASKS, REJECTED_SERIES, SITE, STUDY_PLANS, SWEEPS, SWEEPS_OF_STUDY, VOLUMES,
        ),
        deletes=(INBOX,),
    ),
    topology.SEGMENTER: StoreRights(reads=(MANIFESTS, MASKS, VOLUMES), writes=(MASKS, REJECTED_SERIES)),
    topology.RESAMPLER: StoreRights(
        reads=(CASES, FEATURES, MANIFESTS, MASKS, OUTCOMES, SERIES_PLANS, VOLUMES),
        writes=(CASES, NOT_EVALUATED, REJECTED_CASES, REJECTED_SERIES, SERIES_PLANS),
    ),
    topology.RADIOMICS_EXTRACTOR: StoreRights(reads=(CASES, HCR, OUTCOMES), writes=(HCR, REJECTED_CASES)),
    topology.DEEP_EXTRACTOR: StoreRights(reads=(CASES, DTL, OUTCOMES), writes=(DTL, REJECTED_CASES)),
    topology.FUSION_CLASSIFIER: StoreRights(
        reads=(CASES, CLASSIFIED, FEATURES, NOT_EVALUATED), writes=(CLASSIFIED, NOT_EVALUATED, REJECTED_CASES)
    ),
    topology.REPORT_GENERATOR: StoreRights(
        reads=(
            CASES, IDENTITIES, MANIFESTS, MASKS, NAMED, OUTCOMES, PLANS, REPORTS, SITE, SWEEPS, SWEEPS_OF_STUDY,
            WORKLISTS,
        ),
        writes=(NAMED, REPORTS, SITE, WORKLISTS),
    ),
    topology.RECORDER: StoreRights(
        reads=(DEAD_CASES, DEAD_LETTERS, DEAD_REPORTS, DEAD_SERIES),
        writes=(DEAD_CASES, DEAD_LETTERS, DEAD_REPORTS, DEAD_SERIES),
    ),
    OPERATOR: StoreRights(reads=OPEN, writes=(DEAD_LETTERS,)),
    SUBMITTER: StoreRights(reads=(INBOX, SITE), writes=(INBOX, SITE)),
    COLLECTOR: StoreRights(
        reads=OPEN, lists=(EVERYTHING,), deletes=(*(prefix for prefix in OPEN if prefix != SITE), *RESTRICTED)
    ),
}  # fmt: skip
"""User of the store → what it may. All may write and delete below `probes/`, where each tries the server out."""


@dataclass(frozen=True, kw_only=True)
class BrokerRights:
    """Queues that one user of the broker reads, and routing keys that it may publish with."""

    reads: tuple[str, ...] = ()
    tells: tuple[str, ...] = ()


def _rights_of(service: str) -> BrokerRights:
    own = topology.SERVICES[service]
    beside = ("",) if service == topology.RECORDER else ("", ".retry", ".dead")
    queues = tuple(queue + suffix for queue in own for suffix in beside)
    return BrokerRights(reads=own, tells=(*topology.TELLS[service], *queues))


BROKER_RIGHTS: Final[Mapping[str, BrokerRights]] = {
    **{service: _rights_of(service) for service in topology.SERVICES},
    OPERATOR: BrokerRights(tells=tuple(topology.QUEUES)),
}
"""User of the broker → what it may. A worker's own queues are those it retries into and gives letters up to."""


def pattern(names: tuple[str, ...], *, prefix: str = "") -> str:
    """A regular expression (as RabbitMQ's permissions take it) that matches these names alone; none: nothing."""
    return "^(" + "|".join(re.escape(prefix + name) for name in names) + ")$" if names else "^$"


def iam_policy(rights: StoreRights, bucket: str) -> dict[str, object]:
    """The rights as an IAM policy document, the form that AWS, MinIO, SeaweedFS and Ceph share."""

    def objects(prefixes: tuple[str, ...]) -> list[str]:
        return [f"arn:aws:s3:::{bucket}/{prefix}*" for prefix in prefixes]

    listed = sorted({*rights.reads, *rights.lists, PROBES})
    read: dict[str, object] = {
        "Sid": "Read",
        "Effect": "Allow",
        "Action": ["s3:GetObject"],
        "Resource": objects(rights.reads),
    }
    below = {"Condition": {"StringLike": {"s3:prefix": [f"{prefix}*" for prefix in listed]}}}
    statements: list[dict[str, object]] = [
        {
            "Sid": "List",
            "Effect": "Allow",
            "Action": ["s3:ListBucket"],
            "Resource": [f"arn:aws:s3:::{bucket}"],
            **({} if EVERYTHING in listed else below),
        },
        {"Sid": "Write", "Effect": "Allow", "Action": ["s3:PutObject"], "Resource": objects((*rights.writes, PROBES))},
        {
            "Sid": "Delete",
            "Effect": "Allow",
            "Action": ["s3:DeleteObject"],
            "Resource": objects((*rights.deletes, PROBES)),
        },
    ]
    return {"Version": "2012-10-17", "Statement": [read, *statements] if rights.reads else statements}
