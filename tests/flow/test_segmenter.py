"""CT without masks through the whole embedded pipeline: bodies, levels, heights, the gate, scores, the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from typer.testing import CliRunner

from services.__main__ import app
from services.composition import bundle_of
from services.dicom_ingest.collected import CollectedMask, CollectedSeries, CollectedSlice
from services.embedded import Ran, run
from services.report_generator.export import export_sweep
from services.segmentation_by_hand import Vertebrae
from services.segmenter.segmentation import label_of
from services.segmenter.service import NO_MASK, built_in_of
from services.segmenter.settings import SegmenterSettings
from services.trainer.tiny_bundle import write_tiny_bundle
from shared.fracture.ids import Pseudonyms
from shared.fracture.ledger import StudyState
from shared.fracture.level_codes import BODY_SCT
from shared.fracture.records import CaseRecord, Demographics
from shared.fracture.volume import Mask, Volume, mask_from_sitk, to_sitk
from shared.records.archive import read_record
from shared.records.ledger import sweep_plan, sweep_states
from tests.fixtures.runs import PSEUDONYM_KEY, Place, place
from tests.fixtures.small_studies import SmallArchive
from tests.fixtures.spine_network import SOUND, ct_of, lumbar, write_hu_network
from tests.fixtures.spines import DrawnBody

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
LEVELS = ("T12", "L1", "L2", "L3", "L4", "L5")
WEDGED = DrawnBody(anterior=15, middle=20, posterior=26)
MILD = DrawnBody(anterior=20.6, middle=22.6, posterior=26)
SPINE = (SOUND, SOUND, WEDGED, SOUND, MILD, SOUND)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    write_hu_network(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that knows masks of this network."""
    made = built_in_of(SegmenterSettings(network=network)).note
    folder = tmp_path_factory.mktemp("bundle") / "bridged"
    write_tiny_bundle(folder, image_types="original", mask_sources=(made.source,))
    return folder


@pytest.fixture(scope="module")
def scan() -> Volume:
    drawn = ct_of(lumbar(bodies=SPINE), sacrum=True)
    grain = np.random.default_rng(1).normal(0, 8, drawn.voxels.shape)
    return Volume(voxels=(drawn.voxels + grain).astype(np.int16), geometry=drawn.geometry)


def series(scan: Volume, *, mask: CollectedMask | None = None) -> CollectedSeries:
    return CollectedSeries(
        series_instance_uid="1.9.1",
        modality="CT",
        instances=scan.geometry.shape_zyx[0],
        volume=scan,
        slices=tuple(
            CollectedSlice(sop_instance_uid=f"1.9.1.{n}", sop_class_uid=CT_IMAGE, position_mm=1.5 * n)
            for n in range(scan.geometry.shape_zyx[0])
        ),
        demographics=Demographics(age_years=71, sex="F"),
        mask=mask,
        description="CT",
        files=("scan.dcm",),
    )


def given_bodies(scan: Volume) -> CollectedMask:
    spine = lumbar(bodies=SPINE)
    table = np.array([0, *[label_of(level) for level in LEVELS]], dtype=np.uint8)
    return CollectedMask(
        source="dicom-seg",
        roi_kind="body",
        labels=Mask(voxels=table[spine.bodies], geometry=scan.geometry),
        levels={level: label_of(level) for level in LEVELS},
    )


def swept(here: Place, one: CollectedSeries) -> Ran:
    return run(
        SmallArchive((("1.9", (one,)),)),
        name="a sweep",
        settings=here.settings,
        store=here.store,
        pseudonyms=Pseudonyms(bytes.fromhex(PSEUDONYM_KEY)),
        bundle=bundle_of(here.settings),
    )


def study(here: Place, ran: Ran) -> StudyState:
    plan = sweep_plan(here.store, ran.sweep_id)
    assert plan is not None
    (state,) = sweep_states(here.store, plan).values()
    return state


def standing(state: StudyState) -> dict[str, str]:
    return {
        case.level: case.state(report_written=True) if case.outcome is None or not hasattr(case.outcome, "kind")
        else f"not evaluated: {case.outcome.kind}"
        for case in state.cases
        if not case.superseded
    }  # fmt: skip


def with_segmenter(folder: Path, bundle: Path, network: Path, **more: Any) -> Place:
    return place(
        folder, bundle, segmenter__source="built-in", segmenter__network=str(network), segmenter__threads="1", **more
    )


def test_a_study_without_masks_is_segmented_gated_scored_and_reported(
    tmp_path: Path, bundle: Path, network: Path, scan: Volume
) -> None:
    here = with_segmenter(tmp_path / "store", bundle, network)

    ran = swept(here, series(scan))

    state = study(here, ran)
    assert ran.ledger.exact
    assert ran.ledger.pending == 0
    assert standing(state) == dict.fromkeys(LEVELS, "not evaluated: not-fractured") | {
        "L2": "reported",
        "L4": "not evaluated: review",
    }
    (scored,) = (case for case in state.cases if case.level == "L2")
    crop = bundle_of(here.settings).manifest.crop.crop_hash
    record = read_record(here.store, f"cases/{crop}/{scored.case_id}/case.json", CaseRecord)
    assert record.mask_source == "automatic"
    assert record.fracture_basis.startswith("fracture by height loss, seen by no reader: height loss")
    page = here.store.get(f"reports/{state.study_id}/{state.report_id}.html").decode()
    assert "Levels counted from the sacrum" in page
    assert page.count('<img src="data:image/png;base64,') == 2
    assert "an acute fracture without height loss is not seen" in page
    assert "mild deformity" in page
    assert 'text-anchor="end">fracture by height loss, seen by no reader</text>' in page  # beside the axis
    assert "fracture given by the mask" not in page


def test_the_same_run_again_computes_nothing(tmp_path: Path, bundle: Path, network: Path, scan: Volume) -> None:
    here = with_segmenter(tmp_path / "store", bundle, network)
    swept(here, series(scan))
    before = here.objects("masks/", "cases/", "features/", "outcomes/", "reports/", "plans/")

    again = swept(here, series(scan))

    assert not again.computed
    assert here.objects("masks/", "cases/", "features/", "outcomes/", "reports/", "plans/") == before


def test_a_refusal_for_want_of_a_mask_does_not_outlive_the_setting_that_caused_it(
    tmp_path: Path, bundle: Path, network: Path, scan: Volume
) -> None:
    without = place(tmp_path / "store", bundle)
    refused = study(without, swept(without, series(scan)))
    assert [one.reasons for one in refused.series] == [(NO_MASK,)]

    here = with_segmenter(tmp_path / "store", bundle, network)
    state = study(here, swept(here, series(scan)))

    assert [one.state for one in state.series] == ["planned"]
    assert standing(state)["L2"] == "reported"
    assert not any(NO_MASK in case.reasons for case in state.cases)


def test_masks_that_come_later_supersede_the_automatic_ones(
    tmp_path: Path, bundle: Path, network: Path, scan: Volume
) -> None:
    here = with_segmenter(tmp_path / "store", bundle, network)
    first = study(here, swept(here, series(scan)))

    ran = swept(here, series(scan, mask=given_bodies(scan)))

    state = study(here, ran)
    assert ran.ledger.exact
    assert state.report_id != first.report_id
    assert standing(state) == dict.fromkeys(LEVELS, "reported")  # their author has chosen
    assert sum(case.superseded for case in state.cases) == len(first.cases)
    page = here.store.get(f"reports/{state.study_id}/{state.report_id}.html").decode()
    assert "Heights are shown and decide nothing" in page
    assert "measured: height loss" in page


def test_gate_all_keeps_vertebrae_of_given_masks_out_too(
    tmp_path: Path, bundle: Path, network: Path, scan: Volume
) -> None:
    here = with_segmenter(tmp_path / "store", bundle, network, segmenter__gate="all")

    state = study(here, swept(here, series(scan, mask=given_bodies(scan))))

    assert standing(state)["L2"] == "reported"
    assert standing(state)["L1"] == "not evaluated: not-fractured"


def test_a_bundle_that_does_not_know_these_masks_scores_none_of_them(
    tmp_path: Path, tiny_bundle: Path, bundle: Path, network: Path, scan: Volume
) -> None:
    here = with_segmenter(tmp_path / "store", tiny_bundle, network)

    state = study(here, swept(here, series(scan)))

    assert standing(state)["L2"] == "not evaluated: guard"
    (fractured,) = (case for case in state.cases if case.level == "L2")
    assert "the model was not fitted on masks of built-in by-hu 1" in fractured.reasons[0]
    assert "it knows: synthetic phantom" in fractured.reasons[0]
    assert standing(state)["L4"] == "not evaluated: review"  # what the gate says comes first
    bridged = with_segmenter(tmp_path / "store", bundle, network)
    assert standing(study(bridged, swept(bridged, series(scan))))["L2"] == "reported"


def test_bodies_whose_level_is_uncertain_are_scored_by_their_number_from_below(
    tmp_path: Path, bundle: Path, network: Path
) -> None:
    here = with_segmenter(tmp_path / "store", bundle, network)

    state = study(here, swept(here, series(ct_of(lumbar(bodies=SPINE)))))

    assert standing(state)["B04"] == "reported"
    page = here.store.get(f"reports/{state.study_id}/{state.report_id}.html").decode()
    assert "Levels are uncertain" in page
    assert "neither the sacrum nor which ribs are the last" in page


def test_the_masks_are_exported_and_go_back_as_dicom_seg_beside_the_named_report(
    tmp_path: Path, bundle: Path, network: Path, scan: Volume
) -> None:
    here = with_segmenter(tmp_path / "store", bundle, network, report_generator__named_reports="true")
    ran = swept(here, series(scan))

    export_sweep(here.store, ran.sweep_id, tmp_path / "out", named=True)

    (nifti,) = (tmp_path / "out").glob("reports/*/bodies-*.nii.gz")
    labels = mask_from_sitk(sitk.ReadImage(str(nifti)))
    assert labels.geometry.same_grid(scan.geometry)
    (path,) = (tmp_path / "out").glob("named/reports/*/bodies-*.dcm")
    seg = pydicom.dcmread(path)
    assert [BODY_SCT[item.SegmentedPropertyTypeCodeSequence[0].CodeValue] for item in seg.SegmentSequence] == list(
        LEVELS
    )
    frames = hd.seg.Segmentation.from_dataset(seg).get_pixels_by_source_instance(
        [f"1.9.1.{n}" for n in range(scan.geometry.shape_zyx[0])],
        combine_segments=True,
        assert_missing_frames_are_empty=True,
    )
    table = np.array([0, *[label_of(level) for level in LEVELS]], dtype=np.uint8)
    assert np.array_equal(table[frames], labels.voxels)
    assert not [key for key in here.store.keys("") if key.endswith(".dcm") and not key.startswith("named/")]


def test_headers_that_no_seg_can_be_made_of_cost_no_report(
    tmp_path: Path, bundle: Path, network: Path, scan: Volume, caplog: pytest.LogCaptureFixture
) -> None:
    here = with_segmenter(tmp_path / "store", bundle, network, report_generator__named_reports="true")
    one = series(scan)
    odd = replace(one, slices=tuple(replace(s, sop_class_uid="no UID at all") for s in one.slices))

    ran = swept(here, odd)

    assert ran.ledger.reports == ran.ledger.studies == 1
    assert not [key for key in here.store.keys("named/") if key.endswith(".dcm")]
    assert any("no DICOM SEG" in record.message for record in caplog.records)


# by hand ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def image(tmp_path: Path, scan: Volume) -> Path:
    path = tmp_path / "scan.nii.gz"
    sitk.WriteImage(to_sitk(scan), str(path), useCompression=True)
    return path


def test_one_image_is_segmented_by_hand(image: Path, tmp_path: Path, network: Path, scan: Volume) -> None:
    out = tmp_path / "out"

    ran = CliRunner().invoke(app, ["segment", str(image), "--out", str(out), "--network", str(network)])

    assert ran.exit_code == 0, ran.output
    assert {path.name for path in out.iterdir()} == {
        "bodies.nii.gz",
        "vertebrae.json",
        "spine-sagittal.png",
        "spine-coronal.png",
    }
    found = Vertebrae.model_validate_json((out / "vertebrae.json").read_bytes())
    assert {one.level: one.decision for one in found.findings} == dict.fromkeys(LEVELS, "not-fractured") | {
        "L2": "fractured",
        "L4": "review",
    }
    bodies = mask_from_sitk(sitk.ReadImage(str(out / "bodies.nii.gz")))
    assert bodies.geometry.same_grid(scan.geometry)
    drawn = lumbar(bodies=SPINE).bodies
    for number, level in enumerate(LEVELS, start=1):
        one, two = bodies.voxels == found.labels[level], drawn == number
        assert 2 * (one & two).sum() / (one.sum() + two.sum()) > 0.9
    assert "Research use only" in ran.output


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.nii.gz", "is not there"),
        ("scan.txt", "is no NIfTI file"),
        ("empty", "the folder holds no DICOM image"),
        ("broken.nii.gz", "cannot be segmented"),
    ],
)
def test_what_cannot_be_segmented_is_one_sentence(tmp_path: Path, network: Path, name: str, said: str) -> None:
    (tmp_path / "scan.txt").write_text("x")
    (tmp_path / "broken.nii.gz").write_bytes(b"x")
    (tmp_path / "empty").mkdir()

    ran = CliRunner().invoke(
        app, ["segment", str(tmp_path / name), "--out", str(tmp_path / "out"), "--network", str(network)]
    )

    assert ran.exit_code != 0
    assert said in str(ran.exception)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_network_is_named_with_its_setting(image: Path, tmp_path: Path) -> None:
    arguments = ["segment", str(image), "--out", str(tmp_path / "out"), "--network", str(tmp_path)]

    ran = CliRunner().invoke(app, arguments)

    assert f"segmenter.network: {tmp_path} holds no network.json" in str(ran.exception)
