"""May a bundle score automatic masks? The same vertebrae under given masks and under the segmenter's."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from typer.testing import CliRunner

from services import bridge
from services.__main__ import app
from services.automatic_masks import MaskedCohort, mask_cohort
from services.bridge import Bridge, FeatureAgreement, bridge_bundle
from services.dicom_ingest.settings import IngestSettings
from services.segmenter.segmentation import label_of
from services.segmenter.service import built_in_of
from services.segmenter.settings import SegmenterSettings
from services.trainer.tiny_bundle import write_tiny_bundle
from services.trainer.training import Silent
from services.training import Place
from shared.fracture.bundle import Bundle, load_bundle
from shared.fracture.ids import Pseudonyms
from shared.fracture.volume import Mask, Volume, mask_from_sitk, to_sitk
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.folder_store import FolderStore
from tests.fixtures.runs import PSEUDONYM_KEY, settings_with
from tests.fixtures.spine_network import ct_of, lumbar, write_hu_network
from tests.fixtures.spines import DrawnBody

LEVELS = ("T12", "L1", "L2", "L3", "L4", "L5")
PATIENTS = 8


def scan(number: int) -> tuple[Volume, Mask]:
    """Six bodies of sizes of their own, with noise; two levels wedged."""
    rng = np.random.default_rng(number)
    sizes = rng.uniform(22, 28, size=6)
    bodies = tuple(
        DrawnBody(anterior=size * (0.6 if place in (1, 4) else 1.0), middle=size * 0.9, posterior=size)
        for place, size in enumerate(sizes)
    )
    drawn = lumbar(bodies=bodies)
    clean = ct_of(drawn, sacrum=True)
    grain = rng.normal(0, 6 + 6 * (number % 3), clean.voxels.shape)
    table = np.array([0, *map(label_of, LEVELS)], dtype=np.uint8)
    return (
        Volume(voxels=(clean.voxels + grain).astype(np.int16), geometry=clean.geometry),
        Mask(voxels=table[drawn.bodies], geometry=clean.geometry),
    )


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    write_hu_network(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", image_types="original")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    rows = ["image,mask,labels,roi,levels,patient,age,sex,acute,site"]
    for number in range(PATIENTS):
        volume, mask = scan(number)
        sitk.WriteImage(to_sitk(volume), str(folder / f"{number}.nii.gz"), useCompression=True)
        sitk.WriteImage(to_sitk(mask), str(folder / f"{number}-mask.nii.gz"), useCompression=True)
        rows += [
            f"{number}.nii.gz,{number}-mask.nii.gz,verse,body,{level},P{number},{60 + number},F,{number % 2},PHANTOM-A"
            for level in LEVELS[1:]
        ]
    path = folder / "COHORT.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def studied(bundle: Bundle, cohort: Path, folder: Path, network: Path, *, version: str) -> Bridge:
    return bridge_bundle(bundle, cohort, version=version, place=place_in(folder, network), progress=Silent())


def masked(cohort: Path, folder: Path, network: Path, *, repeated: int = 2) -> MaskedCohort:
    return mask_cohort(
        cohort,
        folder,
        segmenter=SegmenterSettings(network=network, threads=1),
        ingest=IngestSettings(),
        repeated=repeated,
        processes=1,
        progress=Silent(),
    )


def place_in(folder: Path, network: Path) -> Place:
    store = FolderStore(folder / "store")
    return Place(
        app=settings_with(
            Path("deploy/bundles/demo"), segmenter__network=str(network), resampler__max_spacing_mm="3.0"
        ),
        pseudonyms=Pseudonyms(bytes.fromhex(PSEUDONYM_KEY)),
        store=store,
        out=folder,
        processes=1,
    )


@pytest.fixture(scope="module")
def bridged(
    cohort: Path, bundle: Bundle, network: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bridge, Path]:
    folder = tmp_path_factory.mktemp("bridge")
    found = studied(bundle, cohort, folder, network, version="1")
    return found, folder


def test_masks_under_which_every_feature_comes_out_alike_are_admitted(
    bridged: tuple[Bridge, Path], bundle: Bundle, network: Path
) -> None:
    found, folder = bridged
    source = built_in_of(SegmenterSettings(network=network)).note.source

    assert found.admitted, found.failing
    assert (found.rows, found.cases, found.not_found) == (5 * PATIENTS, 5 * PATIENTS, 0)
    assert found.mean_dice > 0.9
    assert {one.feature for one in found.features} == set(bundle.models.selected)
    new = load_bundle(folder / "bundle")
    assert new.manifest.mask_sources == (*bundle.manifest.mask_sources, source)
    assert new.manifest.version == "1"
    assert new.bundle_id != bundle.bundle_id
    assert new.file_bytes("models.json") == bundle.file_bytes("models.json")
    assert f"Bridged to masks of `{source}`" in new.model_card
    assert "PHANTOMS (no clinical meaning)" in new.model_card


def test_what_was_found_lies_beside_and_can_be_read_again(bridged: tuple[Bridge, Path]) -> None:
    found, folder = bridged

    assert Bridge.model_validate_json((folder / "bridge.json").read_bytes()) == found
    assert len((folder / "automatic.csv").read_text().splitlines()) == 1 + found.cases


def test_a_bundle_that_knows_the_masks_already_is_not_bridged_again(
    bridged: tuple[Bridge, Path], cohort: Path, network: Path
) -> None:
    _, folder = bridged
    again = load_bundle(folder / "bundle")

    with pytest.raises(FractureSweepError, match="knows masks of built-in by-hu"):
        studied(again, cohort, folder, network, version="2")


def test_a_feature_that_does_not_agree_keeps_the_masks_out(
    bridged: tuple[Bridge, Path], cohort: Path, bundle: Bundle, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = bridged
    before = (folder / "bundle" / "manifest.json").read_bytes()
    monkeypatch.setattr(bridge, "ADMITTED_FROM", 1.01)

    found = studied(bundle, cohort, folder, network, version="2")

    assert not found.admitted
    assert len(found.failing) == len(found.features)
    assert (folder / "bundle" / "manifest.json").read_bytes() == before


def test_too_few_vertebrae_are_no_study(tmp_path: Path, cohort: Path, bundle: Bundle, network: Path) -> None:
    short = cohort.with_name("SHORT.csv")
    short.write_text("\n".join(cohort.read_text().splitlines()[:11]) + "\n")

    with pytest.raises(FractureSweepError, match="needs 30 vertebrae under both masks; of 10 rows"):
        studied(bundle, short, tmp_path, network, version="1")


@pytest.mark.parametrize(("icc", "agrees"), [(0.8, True), (0.799, False), (None, False)])
def test_a_feature_agrees_from_the_limit_on(icc: float | None, agrees: bool) -> None:
    assert FeatureAgreement(feature="a", icc=icc, low=None, high=None).agrees == agrees


def test_the_same_version_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    arguments = ["bundle", "bridge", "deploy/bundles/demo", str(tmp_path / "none.csv"), "--out", str(tmp_path / "o")]

    ran = CliRunner().invoke(
        app, [*arguments, "--bundle-version", load_bundle(Path("deploy/bundles/demo")).manifest.version]
    )

    assert "is the bundle's own" in str(ran.exception)


# a cohort under automatic masks ---------------------------------------------------------------------------------------
def test_a_cohort_comes_out_under_automatic_masks_with_their_maker_named(
    cohort: Path, network: Path, tmp_path: Path
) -> None:
    settings = SegmenterSettings(network=network, threads=1)
    source = built_in_of(settings).note.source

    found = masked(cohort, tmp_path, network)

    with found.path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert (found.rows, found.found, len(rows)) == (5 * PATIENTS, 5 * PATIENTS, 5 * PATIENTS)
    assert {row["mask_source"] for row in rows} == {source}
    assert [bool(row["mask3"]) for row in rows] == [True] * 10 + [False] * (5 * PATIENTS - 10)
    assert [row["levels"] for row in rows[:5]] == list(LEVELS[1:])
    made = mask_from_sitk(sitk.ReadImage(str(tmp_path / rows[0]["mask"])))
    _, given = scan(0)
    assert set(np.unique(made.voxels).tolist()) == {0, *map(label_of, LEVELS[1:])}
    one, two = made.voxels == label_of("L3"), given.voxels == label_of("L3")
    assert 2 * (one & two).sum() / (one.sum() + two.sum()) > 0.9
    assert found.mean_dice > 0.9
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "masks").iterdir()}
    again = masked(cohort, tmp_path, network)
    assert again == found
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "masks").iterdir()} == before


def test_given_masks_that_the_columns_do_not_describe_are_no_second_reading(
    cohort: Path, network: Path, tmp_path: Path
) -> None:
    table = cohort.with_name("TABLE.csv")
    (cohort.parent / "own.json").write_text('{"20": "L1", "21": "L2", "22": "L3", "23": "L4", "24": "L5", "19": "T12"}')
    table.write_text(cohort.read_text().replace(",verse,", ",own.json,"))

    with pytest.raises(FractureSweepError, match="say --repeated 0"):
        masked(table, tmp_path, network)


def test_a_level_that_verse_has_no_value_for_costs_its_own_rows_alone(
    cohort: Path, network: Path, tmp_path: Path
) -> None:
    table = cohort.with_name("SACRAL.csv")
    (cohort.parent / "sacral.json").write_text('{"20": "L1", "21": "L2", "22": "L3", "23": "L4", "24": "S1"}')
    rows = cohort.read_text().replace(",verse,", ",sacral.json,").replace(",L5,", ",S1,").splitlines()
    table.write_text("\n".join(rows[:11]) + "\n")

    found = masked(table, tmp_path, network, repeated=0)

    assert (found.rows, found.found) == (10, 8)
