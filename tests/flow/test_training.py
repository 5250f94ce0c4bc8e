"""From COHORT.csv to a report by the command that a research group types, and the bundle back in the nightly run."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import nibabel
import numpy as np
import pytest

from services.commands.training import training_settings
from services.composition import bundle_of, pseudonyms_of, restricted
from services.embedded import run as run_embedded
from services.settings import BundleSettings, SecretSettings, Settings
from services.sources import source_of
from services.trainer.results import MODELS, Evaluation, RunResult
from services.trainer.settings import CLASSIFIERS, TrainingSettings
from services.trainer.training import Silent
from services.training import Place, fit_cohort, judge_cohort, naming
from shared.fracture.bundle import load_bundle
from shared.fracture.records import Classified
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.folder_store import FolderStore
from shared.records.archive import find_record

pytestmark = [pytest.mark.trainer, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
PATIENTS = 60
TINY = {
    "hcr.image_types": '["Original", "LoG:3"]',
    "split.by": "column",
    "network.architecture": "tiny",
    "network.random_start": "true",
    "network.components": "20",
    "classifiers.grid": "small",
    "classifiers.out_of_fold": "5",
    "selection.stability_bootstraps": "10",
    "statistics.bootstraps": "100",
}
NAMING = naming(None, name="tiny", version="1", notes="")


def ended(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services", *arguments],
        cwd=ROOT,
        env={**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def command(*arguments: str, home: Path) -> str:
    done = ended(*arguments, home=home)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class Run:
    """A cohort and the run over it."""

    cohort: Path
    out: Path
    home: Path
    said: str

    @property
    def result(self) -> RunResult:
        return RunResult.model_validate_json((self.out / "run.json").read_text(encoding="utf-8"))

    @property
    def app(self) -> Settings:
        secrets = {
            name: (self.home / "fracture-sweep" / f"{name}.key").read_text().strip()
            for name in ("pseudonym", "encryption")
        }
        return Settings(
            secrets=SecretSettings.model_validate(
                {"pseudonym_key": secrets["pseudonym"], "encryption_key": secrets["encryption"]}
            )
        )

    def place(self, out: Path) -> Place:
        store = restricted(FolderStore(self.out / "store"), self.app)
        return Place(app=self.app, pseudonyms=pseudonyms_of(self.app), store=store, out=out, processes=1)


def arguments() -> list[str]:
    return [part for name, value in TINY.items() for part in ("--change", f"{name}={value}")]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("training")
    home, cohort, out = folder / "home", folder / "cohort", folder / "run"
    command("phantoms", "cohort", str(cohort), "--patients", str(PATIENTS), "--readers", "8", "--nifti", home=home)
    said = command("train", str(cohort / "COHORT.csv"), "--out", str(out), *arguments(), home=home)
    return Run(cohort=cohort / "COHORT.csv", out=out, home=home, said=said)


def test_sixty_phantom_patients_go_from_the_csv_to_a_report(ran: Run) -> None:
    result = ran.result

    assert result.phantom
    assert len({row.patient for row in result.cohort}) == PATIENTS
    assert {(one.model, one.part) for one in result.scores} == {
        (model, part) for model in MODELS for part in ("train", "out_of_fold", "test")
    }
    assert result.repeatability.method == "masks"
    assert not any("…" in one for one in result.warnings)  # whole sentences
    assert result.flow[0].cases == sum(1 for _ in csv.DictReader(ran.cohort.open()))
    assert len(result.repeatability.features) == 14 + 2 * (18 + 22 + 16 + 16 + 14)
    assert load_bundle(ran.out / "bundle").manifest.kind == "DEMO"
    assert all(label in ran.said for label in ("Radiomics", "DLR", "Features Fusion", "DLRN"))
    assert "AUC in-sample" in ran.said


def test_every_table_and_figure_is_there(ran: Run) -> None:
    tables = {file.name for file in (ran.out / "tables").iterdir()}
    figures = {file.name for file in (ran.out / "report" / "figures").iterdir()}

    assert tables == {f"table{number}.{ending}" for number in (1, 2, 3) for ending in ("csv", "tex", "html")}
    for name in ("roc", "calibration", "nomogram"):
        assert {f"{name}.svg", f"{name}.png", f"{name}.csv"} <= figures
    assert len([name for name in figures if name.endswith(".svg")]) >= 15


def test_the_report_stands_alone_and_says_phantom(ran: Run) -> None:
    page = (ran.out / "report" / "report.html").read_text(encoding="utf-8")
    wanted: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            for name, value in attrs:
                if name in ("src", "href") and value and not value.startswith(("#", "data:")):
                    wanted.append(value)

    Links().feed(page)

    assert wanted == []
    assert "PHANTOM" in page
    assert str(ran.out) not in page
    assert "PHANTOM-7-" not in page  # no patient of the CSV is named


def test_no_patient_and_no_path_of_the_cohort_stands_in_run_or_bundle(ran: Run) -> None:
    patients = {row["patient"] for row in csv.DictReader(ran.cohort.open())}

    for file in [ran.out / "run.json", *(ran.out / "bundle").iterdir(), *(ran.out / "tables").iterdir()]:
        text = file.read_bytes().decode("utf-8", errors="replace")
        assert not [patient for patient in patients if patient in text], file.name
        assert str(ran.cohort.parent) not in text, file.name


def test_the_same_command_goes_on_and_ends_the_same(ran: Run) -> None:
    features = ran.out / "store" / "features"
    before = {path: path.stat().st_mtime_ns for path in features.rglob("*") if path.is_file()}
    bundle = (ran.out / "bundle" / "manifest.json").read_bytes()

    command("train", str(ran.cohort), "--out", str(ran.out), *arguments(), home=ran.home)

    after = {path: path.stat().st_mtime_ns for path in features.rglob("*") if path.is_file()}
    assert after == before
    assert (ran.out / "bundle" / "manifest.json").read_bytes() == bundle


def test_a_bundle_judged_on_its_own_held_out_rows_gives_the_run_s_numbers(ran: Run, tmp_path: Path) -> None:
    held_out = held_out_csv(ran)

    command(
        "evaluate",
        str(ran.out / "bundle"),
        str(held_out),
        "--out",
        str(tmp_path / "e"),
        "--store",
        str(ran.out),
        home=ran.home,
    )

    found = Evaluation.model_validate_json((tmp_path / "e" / "evaluation.json").read_text(encoding="utf-8"))
    for one in found.scores:
        theirs = ran.result.scored(one.model, "test")
        assert sorted(one.probability) == pytest.approx(sorted(theirs.probability), abs=1e-12)
        assert one.threshold == theirs.threshold
    page = (tmp_path / "e" / "report" / "report.html").read_text(encoding="utf-8")
    assert "nothing was fitted" in page
    assert "PHANTOM" in page


def beside(ran: Run, name: str, rows: list[dict[str, str]]) -> Path:
    """Rows as a cohort of their own, beside the first: the paths in them are relative to it."""
    path = ran.cohort.with_name(name)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def held_out_csv(ran: Run) -> Path:
    """The test rows alone."""
    return beside(ran, "held-out.csv", [row for row in csv.DictReader(ran.cohort.open()) if row["split"] == "test"])


def test_other_images_labels_and_ages_of_held_out_patients_leave_the_bundle_s_bytes(ran: Run, tmp_path: Path) -> None:
    rows = list(csv.DictReader(ran.cohort.open()))
    folder = ran.cohort.parent
    (folder / "changed").mkdir()
    for row in rows:
        if row["split"] == "test":
            changed = f"changed/{row['image'].replace('/', '-')}"
            image = nibabel.nifti1.load(folder / row["image"])
            if not (folder / changed).exists():
                noisy = np.asanyarray(image.dataobj) // 2 + np.random.default_rng(1).integers(0, 90, image.shape)
                nibabel.nifti1.Nifti1Image(noisy.astype(np.int16), image.affine).to_filename(folder / changed)
            row.update(image=changed, acute=str(1 - int(row["acute"])), age=str(int(row["age"]) - 3))

    path = beside(ran, "changed.csv", rows)
    command("train", str(path), "--out", str(tmp_path), "--store", str(ran.out), *arguments(), home=ran.home)

    other = RunResult.model_validate_json((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert other.scored("radiomics", "test").probability != ran.result.scored("radiomics", "test").probability
    assert other.scored("dlr", "test").probability != ran.result.scored("dlr", "test").probability
    for file in sorted((ran.out / "bundle").iterdir()):
        assert (tmp_path / "bundle" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_paper_preset_on_phantoms_prints_its_optimism_beside_its_result(ran: Run, tmp_path: Path) -> None:
    rows = list(csv.DictReader(ran.cohort.open()))
    few = sorted({row["patient"] for row in rows})[:30]
    path = beside(ran, "thirty.csv", [row for row in rows if row["patient"] in few])
    quick = {
        "network.epochs": "4",
        "network.patience": '"none"',
        "classifiers.out_of_fold": "3",
        "classifiers.folds": "3",
    }
    changes = [part for name, value in quick.items() for part in ("--change", f"{name}={value}")]

    said = command(
        "train", str(path), "--out", str(tmp_path), "--preset", "paper", *arguments(), *changes, home=ran.home
    )

    result = RunResult.model_validate_json((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert (result.settings.preset, result.network.mode) == ("paper", "in_sample")
    for one in result.optimism:
        line = f"AUC in-sample {one.in_sample:.3f}, out-of-fold {one.out_of_fold:.3f}, held out {one.held_out:.3f}"
        assert line in said.replace("\n", " ")
    assert "DLR with a random network instead: AUC out-of-fold" in said
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "as the paper very likely did" in page


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_nightly_run_gives_the_probabilities_of_evaluate(name: str, ran: Run, tmp_path: Path) -> None:
    changes = {"classifiers": {"names": [name], "grid": "small", "out_of_fold": 5}}
    settings = TrainingSettings.of("recommended", _merged(ran.result.settings, changes))
    bundle = fit_cohort(
        ran.cohort,
        settings,
        place=ran.place(tmp_path / "run"),
        naming=NAMING,
        progress=Silent(),
    ).bundle
    found = judge_cohort(bundle, held_out_csv(ran), place=ran.place(tmp_path / "evaluated"), progress=Silent())

    nightly = nightly_probabilities(ran, bundle.folder, tmp_path)

    (fusion,) = [one for one in found.scores if one.model == "fusion"]
    (nomogram,) = [one for one in found.scores if one.model == "dlrn"]
    assert len(nightly) == len(fusion.probability)
    assert sorted(one for one, _ in nightly) == pytest.approx(sorted(fusion.probability), abs=1e-9)
    assert sorted(one for _, one in nightly) == pytest.approx(sorted(nomogram.probability), abs=1e-9)
    assert bundle.models.fusion.classifier is not None
    assert bundle.models.fusion.classifier.kind == name


def _merged(settings: TrainingSettings, changes: dict[str, dict[str, object]]) -> dict[str, object]:
    plain = settings.model_dump(mode="json", exclude={"preset"})
    return {**plain, **{section: {**plain[section], **values} for section, values in changes.items()}}


def nightly_probabilities(ran: Run, bundle: Path, folder: Path) -> list[tuple[float, float]]:
    """Fusion's and the nomogram's probability of every held-out vertebra, by the embedded nightly run."""
    columns = ("image", "mask", "labels", "roi", "study", "patient", "age", "sex", "levels")
    path = ran.cohort.with_name(f"nightly-{bundle.parent.parent.name}.csv")
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        together: dict[str, dict[str, str]] = {}
        for row in csv.DictReader(ran.cohort.open()):
            if row["split"] == "test":
                one = together.setdefault(row["image"], {**row, "levels": ""})
                one["levels"] = ";".join(filter(None, (one["levels"], row["levels"])))
        writer.writerows(together.values())
    app = ran.app.model_copy(update={"bundle": BundleSettings(path=bundle)})
    store = restricted(FolderStore(ran.out / "store"), app)
    loaded = bundle_of(app)
    done = run_embedded(
        source_of(path, settings=app),
        name=bundle.as_posix(),
        settings=app,
        store=store,
        pseudonyms=pseudonyms_of(app),
        bundle=loaded,
    )
    assert done.ledger.exact
    found = []
    for key in store.keys(f"outcomes/classified/{loaded.protocols.scope}/"):
        record = find_record(store, key, Classified)
        assert record is not None
        answer = record.classification
        nomogram = answer["nomogram"]
        assert isinstance(nomogram, dict)
        found.append((float(answer["probability"]), float(nomogram["probability"])))  # type: ignore[arg-type]
    return found


def test_a_cohort_with_faults_is_refused_before_anything_long_starts(ran: Run, tmp_path: Path) -> None:
    rows = list(csv.DictReader(ran.cohort.open()))
    rows[0]["acute"], rows[1]["age"], rows[2]["image"] = "2", "140", "not-there.nii.gz"
    path = ran.cohort.with_name("faulty.csv")
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    done = ended("train", str(path), "--out", str(tmp_path / "run"), *arguments(), home=ran.home)

    assert done.returncode == 2
    assert "faults" in done.stderr
    for part in ("line 2", "line 3", "line 4"):
        assert part in done.stderr
    assert not list((tmp_path / "run").rglob("*.nrrd"))


def test_the_template_is_printed() -> None:
    done = ended("train", "--template", home=Path("/nowhere"))

    assert done.stdout.startswith("image,mask,")
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize(
    ("preset", "changes", "sentence"),
    [
        ("none", [], "there is no preset 'none': there are paper, recommended"),
        ("paper", ["network.epochs=0", "nonsense.x=1"], "the training settings have 2 faults"),
        ("paper", ["network.epochs"], "--change takes NAME=VALUE"),
        ("paper", ["seed.below=1"], "seed: Input should be"),
        ("paper", ["seed=2", "seed.below=1"], "lies below a setting that is no section"),
    ],
)
def test_training_settings_that_do_not_hold_say_which(preset: str, changes: list[str], sentence: str) -> None:
    with pytest.raises(FractureSweepError, match=re.escape(sentence)):
        training_settings(preset, file=None, changes=changes)


def test_changes_lie_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    (tmp_path / "training.toml").write_text('[network]\nepochs = 7\nbatch = 8\n[selection]\nrule = "1se"\n')

    found = training_settings("paper", file=tmp_path / "training.toml", changes=["network.epochs=9", "roi=vertebra"])

    assert (found.network.epochs, found.network.batch, found.network.mode) == (9, 8, "in_sample")
    assert (found.selection.rule, found.roi, found.preset) == ("1se", "vertebra", "paper")


def test_what_may_be_none_is_switched_off_by_that_word() -> None:
    off = ["network.patience=none", 'selection.post_lasso_spearman="none"', "repeatability.method=none"]

    found = training_settings("paper", file=None, changes=off)

    assert (found.network.patience, found.selection.post_lasso_spearman) == (None, None)
    assert found.repeatability.method == "none"
    with pytest.raises(FractureSweepError, match=r"network\.epochs"):
        training_settings("paper", file=None, changes=["network.epochs=none"])


def test_a_kind_that_nobody_may_choose_is_refused() -> None:
    with pytest.raises(FractureSweepError, match="cannot be chosen"):
        naming("DEMO", name="x", version="1", notes="")


def test_without_weights_the_run_says_how_to_give_them(ran: Run, tmp_path: Path) -> None:
    no_start = [*arguments(), "--change", "network.random_start=false"]

    done = ended("train", str(ran.cohort), "--out", str(tmp_path), "--store", str(ran.out), *no_start, home=ran.home)

    assert done.returncode == 2
    assert "the network has no weights to start from" in done.stderr
