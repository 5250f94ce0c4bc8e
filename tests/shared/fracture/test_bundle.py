"""A bundle loads only when every byte is as the manifest says, and computes what its golden vectors say."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.fracture.bundle import (
    REQUIRED_FILES,
    LinearModel,
    Manifest,
    Models,
    Pca,
    Platt,
    load_bundle,
    manifest_bytes,
    manifest_digest,
)
from shared.fracture.bundle_files import BundleError
from shared.fracture.features import dtl_names
from tests.fixtures.small_bundle import (
    custom_network,
    external_network,
    reseal,
    small_files,
    small_manifest,
    small_models,
    small_network,
    write_small_bundle,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_small_bundle(tmp_path / "bundle")


def test_a_bundle_that_is_whole_loads(folder: Path) -> None:
    bundle = load_bundle(folder)

    assert bundle.bundle_id == bundle.manifest.bundle_id == manifest_digest(bundle.manifest)
    assert bundle.protocols.bundle_id == bundle.bundle_id
    assert bundle.protocols.dtl_hash == bundle.manifest.dtl.dtl_hash
    assert bundle.network_bytes() == (folder / "network.onnx").read_bytes()


@pytest.mark.parametrize("name", [*REQUIRED_FILES, "manifest.json"])
def test_a_changed_byte_in_any_file_refuses_to_load(folder: Path, name: str) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    places = sorted({0, len(data) // 3, len(data) // 2, len(data) - 1})

    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))

        with pytest.raises(BundleError):
            load_bundle(folder)


def test_every_flipped_byte_of_the_manifest_refuses_to_load(folder: Path) -> None:
    path = folder / "manifest.json"
    data = path.read_bytes()

    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])

        with pytest.raises(BundleError):
            load_bundle(folder)


@pytest.mark.parametrize("name", [*REQUIRED_FILES, "manifest.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()

    with pytest.raises(BundleError, match=name):
        load_bundle(folder)


def test_an_unlisted_file_is_named(folder: Path) -> None:
    (folder / "weights.pkl").write_bytes(b"x")

    with pytest.raises(BundleError, match=r"does not list: weights\.pkl"):
        load_bundle(folder)


def test_a_file_that_grew_is_named_with_its_sizes(folder: Path) -> None:
    path = folder / "MODEL_CARD.md"
    path.write_bytes(path.read_bytes() + b" ")

    with pytest.raises(BundleError, match=r"MODEL_CARD\.md has \d+ bytes where"):
        load_bundle(folder)


def test_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.md"
    shutil.move(folder / "MODEL_CARD.md", elsewhere)
    (folder / "MODEL_CARD.md").symlink_to(elsewhere)

    with pytest.raises(BundleError, match="link"):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["../outside.md", "/etc/passwd", "sub/file.md", "..", ""])
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    raw["files"][name] = raw["files"]["MODEL_CARD.md"]
    (folder / "manifest.json").write_text(json.dumps(raw))

    with pytest.raises(BundleError, match="does not fit its schema"):
        load_bundle(folder)


def test_an_unknown_schema_is_named(folder: Path) -> None:
    raw = json.loads((folder / "manifest.json").read_text()) | {"schema_version": 3}
    (folder / "manifest.json").write_text(json.dumps(raw))

    with pytest.raises(BundleError, match="schema 3 is unknown, this version reads 1 and 2"):
        load_bundle(folder)


def test_a_manifest_edited_with_care_does_not_keep_its_id(folder: Path) -> None:
    manifest = load_bundle(folder).manifest.model_copy(update={"threshold": 0.9})
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))

    with pytest.raises(BundleError, match="bundle_id does not fit"):
        load_bundle(folder)


def test_weights_outside_the_network_file_are_refused(folder: Path) -> None:
    (folder / "network.onnx").write_bytes(external_network())
    reseal(folder)

    with pytest.raises(BundleError, match="outside its own file"):
        load_bundle(folder)


def test_a_custom_operator_is_refused_by_its_domain(folder: Path) -> None:
    (folder / "network.onnx").write_bytes(custom_network())
    reseal(folder)

    with pytest.raises(BundleError, match=r"custom operators \(com\.example\)"):
        load_bundle(folder)


def test_a_network_that_is_no_onnx_is_refused(folder: Path) -> None:
    (folder / "network.onnx").write_bytes(b"\x80\x04not a network")
    reseal(folder)

    with pytest.raises(BundleError, match="not an ONNX model"):
        load_bundle(folder)


def test_golden_vectors_that_do_not_come_out_are_refused(tmp_path: Path) -> None:
    folder = write_small_bundle(tmp_path / "wrong", kind_of_golden="wrong")

    with pytest.raises(BundleError, match="golden vector 1 gives a fusion probability of"):
        load_bundle(folder)


def test_a_protocol_that_names_another_network_is_refused(tmp_path: Path) -> None:
    files = small_files()
    other = small_manifest({**files, "network.onnx": small_network(seed=9)})
    sealed = Manifest.seal(**{name: getattr(other, name) for name in _SEALED}, files=files)
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "manifest.json").write_bytes(manifest_bytes(sealed))

    with pytest.raises(BundleError, match=r"network\.onnx is not the file that the protocol names"):
        load_bundle(folder)


_SEALED = (
    "kind",
    "name",
    "version",
    "preset",
    "crop",
    "hcr",
    "dtl",
    "threshold",
    "training",
    "mask_sources",
)


def test_a_model_that_reads_an_unknown_feature_is_refused(folder: Path) -> None:
    models = small_models()
    changed = models.model_copy(
        update={"fusion": models.fusion.model_copy(update={"inputs": ("nowhere", "pca_000", "pca_001")})}
    )
    (folder / "models.json").write_text(changed.model_dump_json())
    reseal(folder)

    with pytest.raises(BundleError, match="features that nothing gives: nowhere"):
        load_bundle(folder)


def test_a_number_that_is_not_finite_is_refused(folder: Path) -> None:
    raw = json.loads((folder / "models.json").read_text())
    raw["fusion"]["intercept"] = float("nan")
    (folder / "models.json").write_text(json.dumps(raw))
    reseal(folder)

    with pytest.raises(BundleError, match=r"models\.json does not fit its schema: fusion\.intercept"):
        load_bundle(folder)


def test_a_folder_that_is_no_bundle_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="it has no manifest"):
        load_bundle(tmp_path)
    with pytest.raises(BundleError, match="there is no bundle folder"):
        load_bundle(tmp_path / "nothing")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(BundleError, match="is no zip that can be read"):
        load_bundle(tmp_path / "text.zip")


def test_a_zip_is_the_same_bundle_and_always_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(folder)
    first, second, third = (tmp_path / f"{name}.zip" for name in ("first", "second", "third"))
    bundle.pack(first)
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    bundle.pack(second)

    packed = load_bundle(first)
    packed.pack(third)

    assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    assert (packed.manifest, packed.metrics, packed.golden) == (bundle.manifest, bundle.metrics, bundle.golden)
    assert packed.network_bytes() == bundle.network_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.namelist() == sorted(["manifest.json", *bundle.manifest.files])


def zipped(folder: Path, path: Path, **changes: Callable[[zipfile.ZipFile, Path], None]) -> Path:
    """A zip of a bundle's files, each written by its change where there is one."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # of names that stand twice
        for file in sorted(folder.iterdir()):
            changes.get(file.stem, lambda into, one: into.write(one, one.name))(archive, file)
    return path


def as_link(archive: zipfile.ZipFile, file: Path) -> None:
    entry = zipfile.ZipInfo(file.name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(entry, "/etc/passwd")


def twice(archive: zipfile.ZipFile, file: Path) -> None:
    archive.write(file, file.name)
    archive.write(file, file.name)


def below(archive: zipfile.ZipFile, file: Path) -> None:
    archive.write(file, f"../{file.name}")


def bomb(archive: zipfile.ZipFile, file: Path) -> None:
    archive.writestr(file.name, b"0" * 50_000_000, compress_type=zipfile.ZIP_DEFLATED)


def left_out(archive: zipfile.ZipFile, file: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (as_link, "is a link"),
        (twice, "holds a name twice"),
        (below, "does not list: ../MODEL_CARD.md"),
        (bomb, "has 50000000 bytes where the manifest says"),
        (left_out, "the bundle lacks MODEL_CARD.md"),
    ],
)
def test_a_zip_that_is_not_what_its_manifest_says_is_refused(
    change: Callable[[zipfile.ZipFile, Path], None], sentence: str, folder: Path, tmp_path: Path
) -> None:
    path = zipped(folder, tmp_path / "bundle.zip", MODEL_CARD=change)

    with pytest.raises(BundleError, match=re.escape(sentence)):
        load_bundle(path)


def test_a_compressed_zip_is_read_and_one_that_is_damaged_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle.zip"
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    assert load_bundle(path).bundle_id == load_bundle(folder).bundle_id
    (card,) = [one for one in zipfile.ZipFile(path).infolist() if one.filename == "models.json"]
    data = bytearray(path.read_bytes())
    start = card.header_offset + 30 + len(card.filename)
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(bytes(data))

    with pytest.raises(BundleError, match=r"models\.json in 'bundle\.zip' cannot be read"):
        load_bundle(path)


def test_a_changed_byte_of_a_zip_refuses_to_load(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle.zip"
    load_bundle(folder).pack(path)
    data = path.read_bytes()
    entries = zipfile.ZipFile(path).infolist()
    for entry in entries:
        for place in (entry.header_offset, entry.header_offset + 30 + len(entry.filename), entry.header_offset + 27):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])

            with pytest.raises(BundleError):
                load_bundle(path)
    for length in range(0, len(data), 997):
        path.write_bytes(data[:length])

        with pytest.raises(BundleError):
            load_bundle(path)


def test_the_networks_bytes_are_verified_again_when_read(folder: Path) -> None:
    bundle = load_bundle(folder)
    (folder / "network.onnx").write_bytes(b"x" * bundle.manifest.files["network.onnx"].size)

    with pytest.raises(BundleError, match="was changed"):
        bundle.network_bytes()


def test_the_same_files_give_the_same_id() -> None:
    assert small_manifest(small_files()).bundle_id == small_manifest(small_files()).bundle_id


def test_a_component_is_the_projection_of_the_standardised_features() -> None:
    rng = np.random.default_rng(0)
    mean, sd, rows, x = rng.normal(size=5), rng.uniform(1, 2, size=5), rng.normal(size=(2, 5)), rng.normal(size=5)
    pca = Pca(
        inputs=dtl_names(5),
        mean=tuple(mean),
        sd=tuple(sd),
        names=("pca_000", "pca_004"),
        components=tuple(tuple(row) for row in rows),
    )

    got = pca.apply(x)

    assert list(got) == ["pca_000", "pca_004"]
    np.testing.assert_allclose(list(got.values()), rows @ ((x - mean) / sd), rtol=1e-12)


def test_a_linear_models_contributions_add_up_to_its_score() -> None:
    model = LinearModel(
        inputs=("a", "b"), mean=(1.0, 2.0), sd=(2.0, 4.0), coef=(3.0, -1.0), intercept=0.5, platt=Platt(a=2.0, b=-1.0)
    )

    score = model.score({"a": 3.0, "b": 10.0, "c": 7.0})

    assert score == pytest.approx(0.5 + 3.0 * 1.0 - 1.0 * 2.0)
    assert sum(model.contributions({"a": 3.0, "b": 10.0}).values()) + 0.5 == pytest.approx(score)
    assert model.probability(score) == pytest.approx(1 / (1 + np.exp(-(2.0 * score - 1.0))))


def test_a_standard_deviation_of_nought_is_refused() -> None:
    with pytest.raises(ValueError, match="above zero"):
        LinearModel(inputs=("a",), mean=(0.0,), sd=(0.0,), coef=(1.0,), intercept=0.0)


def test_models_may_read_only_what_is_theirs() -> None:
    models = small_models()

    with pytest.raises(ValueError, match="PCA does not give"):
        Models(pca=models.pca, hcr=models.hcr, dtl=models.hcr, fusion=models.fusion)
