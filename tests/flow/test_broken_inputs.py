"""A folder of broken inputs: each has its reason in the ledger, and costs only itself."""

from __future__ import annotations

import shutil
from pathlib import Path

from shared.fracture.records import FilesLedger, Rejection
from shared.records.archive import newest, read_record
from tests.fixtures.broken_dicom import make_broken_inputs
from tests.fixtures.runs import place


def test_each_broken_input_has_its_reason_and_good_studies_beside_it_are_reported(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    archive = tmp_path / "in"
    shutil.copytree(phantom_archive, archive / "good")
    expected = make_broken_inputs(archive / "broken")
    alone = place(tmp_path / "alone", tiny_bundle).run(phantom_archive)
    here = place(tmp_path / "store", tiny_bundle)

    ran = here.run(archive)

    assert len(expected) >= 30
    assert ran.ledger.exact
    assert ran.ledger.pending == 0
    assert ran.ledger.cases.by_state["reported"] == alone.ledger.cases.by_state["reported"]
    ledger = newest(here.store, f"identities/sweeps/{ran.sweep_id}/files/", FilesLedger)
    assert ledger is not None
    rejected = {
        key.split("/")[2]: read_record(here.store, key, Rejection).reasons
        for key in here.store.keys("outcomes/series-rejected/")
    }
    for path, reason in expected.items():
        lines = [one for one in ledger.files if f"{one.path}/".startswith(f"broken/{path}/")]
        reasons = [one.reason for one in lines if one.role == "ignored"]
        reasons += [why for one in lines for why in rejected.get(one.series_id or "", ())]
        assert any(reason in one for one in reasons), (path, reason, reasons)
