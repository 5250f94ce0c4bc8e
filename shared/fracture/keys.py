"""Where everything lies in the store: keys derived from ids and versions, never from names.

A key is written once. `plans/…/<n>` and `worklists/…/<n>` are numbered revisions: the largest number is the newest.
`RESTRICTED` prefixes are encrypted at rest and readable by ingest and report-generator alone.
"""

from __future__ import annotations

from typing import Final, Literal

RESTRICTED: Final[tuple[str, ...]] = ("identities/", "inbox/", "named/")

Outcome = Literal["classified", "not-evaluated", "rejected", "dead-lettered"]
SpineView = Literal["sagittal", "coronal"]
SPINE_VIEWS: Final[tuple[SpineView, ...]] = ("sagittal", "coronal")

OUTCOMES: Final[tuple[Outcome, ...]] = ("classified", "not-evaluated", "rejected", "dead-lettered")
"""Terminal states of a case; where two records lie, the earlier in this order counts."""


# series -------------------------------------------------------------------------------------------------------------
def volume(series_id: str, image_hash: str) -> str:
    """The volume of a set of instances (NRRD, HU)."""
    return f"volumes/{series_id}/{image_hash}.nrrd"


def volume_record(series_id: str, image_hash: str) -> str:
    """What the volume was (records.VolumeRecord); it stays when the volume is dropped."""
    return f"volumes/{series_id}/{image_hash}.json"


def manifest(series_id: str, manifest_id: str) -> str:
    """One state of a series (records.SeriesManifest)."""
    return f"manifests/{series_id}/{manifest_id}.json"


def mask(series_id: str, mask_hash: str) -> str:
    """A label map on the volume's own grid (NRRD)."""
    return f"masks/{series_id}/{mask_hash}.nrrd"


def body_mask(series_id: str, mask_hash: str) -> str:
    """A mask of vertebral bodies on the same grid, by which whole vertebrae are cut (NRRD)."""
    return f"masks/{series_id}/{mask_hash}.bodies.nrrd"


def mask_record(series_id: str, mask_hash: str) -> str:
    """What the label map holds (records.MaskRecord)."""
    return f"masks/{series_id}/{mask_hash}.json"


def spine(series_id: str, spine_hash: str) -> str:
    """Levels, heights and the gate's decisions of a series under a mask (spine.record.SpineRecord)."""
    return f"masks/{series_id}/{spine_hash}.spine.json"


def spine_picture(series_id: str, spine_hash: str, view: SpineView) -> str:
    """The whole spine with its masks, levels and heights (PNG)."""
    return f"masks/{series_id}/{spine_hash}.{view}.png"


# plans --------------------------------------------------------------------------------------------------------------
STUDY_PLANS: Final = "plans/studies/"
SERIES_PLANS: Final = "plans/series/"


def study_plans(study_id: str) -> str:
    """The prefix of the revisions of a study's plan."""
    return f"{STUDY_PLANS}{study_id}/"


def series_plans(series_id: str) -> str:
    """The prefix of the revisions of a series' plan."""
    return f"{SERIES_PLANS}{series_id}/"


def revision(prefix: str, number: int) -> str:
    """The key of a numbered revision under a prefix that ends in a slash."""
    return f"{prefix}{number:08d}.json"


# cases --------------------------------------------------------------------------------------------------------------
def case_record(crop_hash: str, case_id: str) -> str:
    """What is known of a case before it is scored (records.CaseRecord)."""
    return f"cases/{crop_hash}/{case_id}/case.json"


def case_image(crop_hash: str, case_id: str) -> str:
    """The crop (NRRD, int16 HU, 1 mm)."""
    return f"cases/{crop_hash}/{case_id}/image.nrrd"


def case_mask(crop_hash: str, case_id: str) -> str:
    """The mask on the crop's grid (NRRD, uint8)."""
    return f"cases/{crop_hash}/{case_id}/mask.nrrd"


def hcr_features(hcr_hash: str, case_id: str) -> str:
    """Hand-crafted features of a case."""
    return f"features/hcr/{hcr_hash}/{case_id}.json"


def dtl_features(dtl_hash: str, case_id: str) -> str:
    """Deep transfer-learning features of a case."""
    return f"features/dtl/{dtl_hash}/{case_id}.json"


def outcome(kind: Outcome, scope: str, case_id: str) -> str:
    """The terminal record of a case under a bundle (Protocols.scope)."""
    return f"outcomes/{kind}/{scope}/{case_id}.json"


def series_rejected(series_id: str, manifest_id: str) -> str:
    """Why a series was refused (records.Rejection)."""
    return f"outcomes/series-rejected/{series_id}/{manifest_id}.json"


def series_dead_lettered(scope: str, series_id: str, manifest_id: str) -> str:
    """Why a series went to the dead letters (records.DeadLetterNote)."""
    return f"outcomes/series-dead-lettered/{scope}/{series_id}/{manifest_id}.json"


def report_dead_lettered(scope: str, study_id: str) -> str:
    """Why no report of a study could be written (records.DeadLetterNote); it counts while the report is missing."""
    return f"outcomes/report-dead-lettered/{scope}/{study_id}.json"


# dead letters -------------------------------------------------------------------------------------------------------
DEAD_LETTERS: Final = "dead-letters/"


def dead_letter(dead_letter_id: str) -> str:
    """One dead letter: the envelope and what is known of its end."""
    return f"{DEAD_LETTERS}{dead_letter_id}/letter.json"


def dead_letter_replay(dead_letter_id: str, number: int) -> str:
    """That a dead letter was published again."""
    return f"{DEAD_LETTERS}{dead_letter_id}/replay-{number:04d}.json"


# reports ------------------------------------------------------------------------------------------------------------
def report(study_id: str, report_id: str, suffix: Literal["html", "json"]) -> str:
    """A revision of a study's report, pseudonymous."""
    return f"reports/{study_id}/{report_id}.{suffix}"


def named_report(study_id: str, report_id: str, suffix: Literal["html", "json"]) -> str:
    """The same with name, id and accession number (setting named_reports)."""
    return f"named/reports/{study_id}/{report_id}.{suffix}"


def named_segmentation(study_id: str, report_id: str, series_id: str) -> str:
    """The automatic masks of a series as DICOM SEG: it carries the patient's name and UIDs, hence restricted."""
    return f"named/reports/{study_id}/{report_id}.{series_id}.seg.dcm"


def worklists(sweep_id: str) -> str:
    """The prefix of the revisions of a sweep's worklist: `<n>.json`, and `<n>.html`, `<n>.csv` beside it."""
    return f"worklists/{sweep_id}/"


def named_worklists(sweep_id: str) -> str:
    """The prefix of the named copies of a sweep's worklist: `<n>.html`, as numbered as the pseudonymous one."""
    return f"named/worklists/{sweep_id}/"


# sweeps -------------------------------------------------------------------------------------------------------------
SWEEPS: Final = "sweeps/"
SWEEPS_OF_STUDY: Final = "sweeps-of-study/"


def sweep_plans(sweep_id: str) -> str:
    """The prefix of the revisions of a sweep's plan (records.SweepPlan)."""
    return f"{SWEEPS}{sweep_id}/plan/"


def sweep_closed(sweep_id: str) -> str:
    """The prefix of the closings of a sweep."""
    return f"{SWEEPS}{sweep_id}/closed/"


def sweeps_of_study(study_id: str) -> str:
    """The prefix under which the sweeps that hold a study are marked."""
    return f"{SWEEPS_OF_STUDY}{study_id}/"


def sweep_of_study(study_id: str, sweep_id: str) -> str:
    """The mark that a sweep holds a study."""
    return f"{sweeps_of_study(study_id)}{sweep_id}"


def sweep_closing_told(sweep_id: str, revision: int) -> str:
    """The mark that a closing of a sweep was told."""
    return f"{sweep_closed(sweep_id)}{revision:08d}.told"


# restricted ---------------------------------------------------------------------------------------------------------
def study_identity(study_id: str, revision_hash: str) -> str:
    """Name, ids, accession number, dates and UIDs of a study, as the instances said."""
    return f"identities/studies/{study_id}/{revision_hash}.json"


def study_identities(study_id: str) -> str:
    """The prefix of a study's identities."""
    return f"identities/studies/{study_id}/"


def series_instances(series_id: str, image_hash: str) -> str:
    """SOP Instance UIDs and headers of the slices of a volume."""
    return f"identities/series/{series_id}/{image_hash}.json"


def sweep_identity(sweep_id: str) -> str:
    """A sweep's name as its owner gave it."""
    return f"identities/sweeps/{sweep_id}/name.json"


def sweep_files(sweep_id: str) -> str:
    """The prefix of the ledger of files of a sweep: each path with its series, or why it was ignored."""
    return f"identities/sweeps/{sweep_id}/files/"


INBOX: Final = "inbox/"


def inbox_files(submission_id: str) -> str:
    """The prefix of the uploaded files of a submission."""
    return f"{INBOX}{submission_id}/files/"


def inbox_file(submission_id: str, number: int) -> str:
    """One uploaded file of a submission."""
    return f"{inbox_files(submission_id)}{number:08d}"


def inbox_submission(submission_id: str) -> str:
    """The list of a submission's files, written last: without it a submission is not complete."""
    return f"{INBOX}{submission_id}/submission.json"


# site ---------------------------------------------------------------------------------------------------------------
PSEUDONYM_FINGERPRINT: Final = "site/pseudonym-key.json"
"""The fingerprint of the pseudonym key that this store's ids were made with."""
