from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from hypothesis import given
from hypothesis import strategies as st

from services.dicom_ingest.collected import CollectedSeries, CollectedSlice
from services.dicom_ingest.folder import scan_folder
from services.dicom_ingest.headers import MaskObject
from services.dicom_ingest.mask_choice import (
    Claim,
    SeriesReference,
    StudyMasks,
    choose,
    masks_of_series,
    rank_of,
    reference_of,
    series_of,
)
from shared.fracture.uids import deterministic_uid
from shared.fracture.volume import Volume
from tests.fixtures.mask_objects import (
    FRAME_OF_REFERENCE,
    SERIES,
    axial_frames,
    grid,
    rtstruct,
    save,
    seg,
    segment,
)

GRID = grid(shape=(10, 12, 11))
OTHER_SERIES = "1.2.3.4.601"


def block(low: int, high: int) -> np.ndarray[Any, Any]:
    voxels = np.zeros(GRID.shape_zyx, dtype=np.uint8)
    voxels[low:high, 2:8, 2:8] = 1
    return voxels


def seg_of(levels: dict[str, tuple[int, int]], **options: Any) -> pydicom.Dataset:
    frames, items = [], []
    for number, (level, (low, high)) in enumerate(levels.items(), start=1):
        frames.extend(axial_frames(number, block(low, high), GRID))
        items.append(segment(number, label=f"{level} body"))
    return seg(frames, items, **options)


def rt_of(levels: dict[str, tuple[int, int]], **options: Any) -> pydicom.Dataset:
    rois = []
    for level, (low, high) in levels.items():
        corners = [[1.5, 1.5], [1.5, 7.5], [7.5, 7.5], [7.5, 1.5]]
        contours = [GRID.world_zyx(np.array([[float(k), *c] for c in corners])) for k in range(low, high)]
        rois.append((f"{level} body", contours))
    return rtstruct(rois, **options)


def objects(tmp_path: Path, *datasets: pydicom.Dataset) -> list[MaskObject]:
    for n, ds in enumerate(datasets):
        save(ds, tmp_path / f"{n}.dcm")
    return sorted(scan_folder(tmp_path).mask_objects, key=lambda one: one.path.name)


def collected(series: str = SERIES, *, frame: str = FRAME_OF_REFERENCE, first: int = 1) -> CollectedSeries:
    slices = tuple(
        CollectedSlice(sop_instance_uid=f"1.2.3.9.{first + k}", sop_class_uid="", position_mm=2.5 * k)
        for k in range(10)
    )
    return CollectedSeries(
        series_instance_uid=series,
        modality="CT",
        instances=10,
        volume=Volume(voxels=np.zeros(GRID.shape_zyx, np.int16), geometry=GRID),
        slices=slices,
        frame_of_reference_uid=frame,
    )


def test_masks_of_different_levels_become_one_map(tmp_path: Path) -> None:
    found = objects(tmp_path, seg_of({"L1": (1, 3)}), rt_of({"L2": (4, 6), "Heart": (7, 8)}))

    mask, faults = masks_of_series(collected(), found)

    assert mask is not None
    assert list(mask.levels) == ["L1", "L2"]
    assert mask.roi_kind == "body"
    assert not mask.others
    assert not faults
    assert np.array_equal(mask.labels.voxels == mask.levels["L2"], block(4, 6) > 0)


def test_a_seg_wins_over_a_newer_rtstruct_which_is_listed(tmp_path: Path) -> None:
    found = objects(
        tmp_path, seg_of({"L1": (1, 3)}, written="20200101000000"), rt_of({"L1": (1, 5)}, written="20260101000000")
    )

    mask, _ = masks_of_series(collected(), found)

    assert mask is not None
    assert mask.source == "dicom-seg"
    assert int(np.count_nonzero(mask.labels.voxels)) == 2 * 36
    assert mask.others == ("RTSTRUCT: L1",)


def test_the_newest_seg_wins_level_by_level(tmp_path: Path) -> None:
    old = seg_of({"L1": (1, 3), "L2": (4, 6)}, written="20200101000000")
    new = seg_of({"L1": (1, 4)}, written="20200101000001")

    mask, _ = masks_of_series(collected(), objects(tmp_path, old, new))

    assert mask is not None
    assert int(np.count_nonzero(mask.labels.voxels == mask.levels["L1"])) == 3 * 36
    assert int(np.count_nonzero(mask.labels.voxels == mask.levels["L2"])) == 2 * 36
    assert mask.others == ("DICOM SEG: L1",)


def test_two_masks_of_equal_rank_refuse_their_level_alone(tmp_path: Path) -> None:
    found = objects(tmp_path, seg_of({"L1": (1, 3), "L2": (4, 6)}), seg_of({"L1": (1, 4)}))

    mask, _ = masks_of_series(collected(), found)

    assert mask is not None
    assert mask.refused == {"L1": "two masks for L1"}
    assert list(mask.levels) == ["L2"]


def test_the_same_object_sent_twice_is_one_mask(tmp_path: Path) -> None:
    ds = seg_of({"L1": (1, 3)})
    (one,) = objects(tmp_path, ds)

    mask, faults = masks_of_series(collected(), [one, one])

    assert mask is not None
    assert not mask.refused
    assert not faults


def test_a_mask_belongs_to_the_series_that_it_references(tmp_path: Path) -> None:
    first, second = collected(), collected(OTHER_SERIES, first=100)
    found = objects(tmp_path, seg_of({"L1": (1, 3)}, series=OTHER_SERIES))
    masks = StudyMasks(found, [reference_of(first), reference_of(second)])

    nothing, faults = masks.of_series(first)
    mask, none = masks.of_series(second)

    assert nothing is None
    assert faults == ("a mask of the study (DICOM SEG) belongs to another series",)
    assert mask is not None
    assert not none


def test_one_level_of_a_frame_of_reference_is_one_case_in_the_study(tmp_path: Path) -> None:
    first, second = collected(), collected(OTHER_SERIES, first=100)
    old = seg_of({"L1": (1, 3), "L2": (4, 6)}, written="20200101000000")
    new = seg_of({"L1": (1, 3)}, series=OTHER_SERIES, written="20210101000000")
    masks = StudyMasks(objects(tmp_path, old, new), [reference_of(first), reference_of(second)])

    older, faults = masks.of_series(first)
    newer, _ = masks.of_series(second)

    assert older is not None
    assert newer is not None
    assert list(older.levels) == ["L2"]
    assert list(newer.levels) == ["L1"]
    assert faults == ("taken from a mask of another series of the study: L1",)
    assert newer.others == ("DICOM SEG, of another series: L1",)


def test_equal_masks_with_two_series_are_refused_once(tmp_path: Path) -> None:
    first, second = collected(), collected(OTHER_SERIES, first=100)
    found = objects(tmp_path, seg_of({"L1": (1, 3)}), seg_of({"L1": (1, 3)}, series=OTHER_SERIES))
    masks = StudyMasks(found, [reference_of(first), reference_of(second)])

    one, _ = masks.of_series(first)
    two, faults = masks.of_series(second)

    assert one is not None
    assert one.refused == {"L1": "two masks for L1"}
    assert two is None
    assert "two masks for L1, one of them with another series" in faults


def test_a_mask_without_references_goes_where_frame_and_geometry_fit(tmp_path: Path) -> None:
    found = objects(tmp_path, seg_of({"L1": (1, 3)}, series=None))

    mask, _ = masks_of_series(collected(), found)
    elsewhere, faults = masks_of_series(collected(frame="1.2.77"), found)

    assert mask is not None
    assert elsewhere is None
    assert faults == ("a mask of the study (DICOM SEG) belongs to another frame of reference",)


def test_a_broken_mask_leaves_its_levels_to_the_others(tmp_path: Path) -> None:
    broken = seg_of({"L1": (1, 3)}, written="20260101000000")
    broken.FrameOfReferenceUID = "1.2.3"

    mask, faults = masks_of_series(collected(), objects(tmp_path, broken, rt_of({"L1": (1, 3)})))

    assert mask is not None
    assert list(mask.levels) == ["L1"]
    assert faults == ("a mask in another frame of reference",)


def test_masks_without_vertebrae_say_so_without_their_texts(tmp_path: Path) -> None:
    ds = seg(axial_frames(1, block(1, 3), GRID), [segment(1, label="SENTINEL liver")])

    mask, faults = masks_of_series(collected(), objects(tmp_path, ds))

    assert mask is None
    assert faults == ("the DICOM SEG holds no vertebra: none of its 1 segments names one by code or name",)


def test_whether_bodies_or_vertebrae_is_a_setting_where_nothing_says_it(tmp_path: Path) -> None:
    ds = seg(axial_frames(1, block(1, 3), GRID), [segment(1, label="L1")])
    found = objects(tmp_path, ds)

    refused, faults = masks_of_series(collected(), found)
    mask, _ = masks_of_series(collected(), found, seg_roi="vertebra")

    assert refused is None
    assert "seg_roi" in faults[0]
    assert mask is not None
    assert mask.roi_kind == "vertebra"


def test_our_own_objects_that_come_back_are_no_masks(tmp_path: Path) -> None:
    ds = seg_of({"L1": (1, 3)})
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = deterministic_uid("seg", "x")

    mask, faults = masks_of_series(collected(), objects(tmp_path, ds))

    assert mask is None
    assert faults == ("objects that this pipeline made are ignored as masks",)


def test_nothing_of_a_choice_identifies_anyone(tmp_path: Path) -> None:
    found = objects(tmp_path, seg_of({"L1": (1, 3)}), rt_of({"L1": (1, 3)}), seg_of({"L2": (1, 3)}, series="1.2.88"))

    mask, faults = masks_of_series(collected(), found)

    assert mask is not None
    told = str((mask.others, mask.refused, mask.warnings, mask.unknown_labels, faults))
    for sentinel in ("SENTINEL", "1.2.3", "1.2.88", str(tmp_path)):
        assert sentinel not in told


def test_instances_decide_before_the_series_uid() -> None:
    two = [
        SeriesReference(series_instance_uid="1", frame_of_reference_uid="f", sop_instance_uids=frozenset({"a", "b"})),
        SeriesReference(series_instance_uid="2", frame_of_reference_uid="f", sop_instance_uids=frozenset({"c"})),
    ]

    def mask(**fields: Any) -> Any:
        known = {"referenced_sop_instance_uids": (), "referenced_series_uids": (), "frame_of_reference_uids": ("f",)}
        return type("Mask", (), {**known, **fields})()

    assert series_of(mask(referenced_sop_instance_uids=("c",), referenced_series_uids=("1",)), two) == (1,)
    assert series_of(mask(referenced_series_uids=("2",)), two) == (1,)
    assert series_of(mask(referenced_series_uids=("9",)), two) == ()
    assert series_of(mask(), two) == (0, 1)
    assert series_of(mask(), []) == ()


_CLAIMS = st.lists(
    st.builds(
        Claim,
        level=st.sampled_from(["T12", "L1", "L2"]),
        mask=st.integers(0, 4),
        series=st.integers(0, 1),
        rank=st.tuples(st.integers(0, 1), st.sampled_from(["", "2020", "2021"])),
    ),
    max_size=12,
)


@given(claims=_CLAIMS, seed=st.randoms())
def test_a_choice_does_not_depend_on_the_order_and_takes_each_level_once(claims: list[Claim], seed: Any) -> None:
    shuffled = list(claims)
    seed.shuffle(shuffled)

    one, two = choose(claims), choose(shuffled)

    assert (one.taken, one.tied) == (two.taken, two.tied)
    assert set(one.taken) | set(one.tied) == {claim.level for claim in claims}
    assert not set(one.taken) & set(one.tied)
    for level, claim in one.taken.items():
        assert claim.rank == max(c.rank for c in claims if c.level == level)


def test_times_of_any_precision_are_ordered() -> None:
    seg_times = ["", "20200101", "20200101120000", "20200101120000.5", "20200102"]

    ranks = [rank_of("dicom-seg", written) for written in seg_times]

    assert ranks == sorted(ranks)
    assert rank_of("rtstruct", "20990101") < ranks[0]
