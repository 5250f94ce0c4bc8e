"""The stack, brought up once for all tests of this folder by pytest-docker, and the run that it is compared with."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import SimpleITK as sitk

from services.composition import bundle_of, restricted
from services.embedded import Ran, run
from services.provisioning import write_secrets
from services.sources import source_of
from services.trainer.phantoms.archive import write_archive
from services.trainer.phantoms.cohort import draw_patient
from services.trainer.phantoms.rendering import render
from shared.fracture.volume import to_sitk
from shared.pipeline.folder_store import FolderStore
from shared.pipeline.store import Store
from tests.compose.stack import FILES, Stack, engine_answers, images
from tests.fixtures.rabbitmq import free_ports
from tests.fixtures.runs import settings_with

PATIENTS, FRACTURES = 16, 4
CASES = PATIENTS * FRACTURES
"""More than sixty, of patients with as many fractures as a phantom can have: little to upload, much to compute."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs an engine; its tests may take long, since the first builds the images."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.compose)
            item.add_marker(pytest.mark.timeout(2400))


TABLE: pytest.StashKey[list[object]] = pytest.StashKey()


@pytest.fixture(scope="session")
def chaos_table(pytestconfig: pytest.Config) -> list[object]:
    """What the tests of chaos measured, printed at the end."""
    return pytestconfig.stash.setdefault(TABLE, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table of docs/reliability.md."""
    rows = [vars(row) for row in config.stash.get(TABLE, [])]
    if not rows:
        return
    terminalreporter.section(f"chaos: seconds, {len(os.sched_getaffinity(0))} cores")
    terminalreporter.write_line("| disturbance | cases undone then | disturbed for | next result after | whole run |")
    terminalreporter.write_line("| --- | --- | --- | --- | --- |")
    for row in rows:
        times = " | ".join(f"{row[name]:.0f} s" for name in ("disturbed", "recovery", "whole"))
        terminalreporter.write_line(f"| {row['disturbance']} | {row['undone_before']} | {times} |")


@pytest.fixture(scope="session")
def engine() -> None:
    """A Docker engine with compose v2: a failure under CI where there is none, else one line."""
    if not engine_answers():
        said = "there is no Docker engine with compose v2: start one, and run `make test` again"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(f"CI must run this, and {said}")
        pytest.skip(f"LEFT OUT: {said}")


@pytest.fixture(scope="session")
def stack_environment(engine: None, tiny_bundle: Path) -> Iterator[dict[str, str]]:
    """What the compose file takes from the environment: images, secrets, ports and the tests' own folders."""
    first = free_ports(5)
    names = ("TEST_AMQP_PORT", "TEST_S3_PORT", "RABBITMQ_UI_PORT", "ORTHANC_UI_PORT", "PROMETHEUS_PORT")
    with tempfile.TemporaryDirectory(prefix="fracture-sweep-stack-") as folder:
        write_secrets(Path(folder) / "secrets", bucket="fracture-sweep")
        (Path(folder) / "faults").mkdir(mode=0o755)
        shutil.copy(Path(__file__).parent / "faults" / "launch.py", Path(folder) / "faults" / "launch.py")
        shutil.copytree(tiny_bundle, Path(folder) / "bundle")
        Path(folder).chmod(0o755)
        yield {
            **images(),
            **{name: str(first + number) for number, name in enumerate(names)},
            "SECRETS": str(Path(folder) / "secrets"),
            "TEST_BUNDLE": str(Path(folder) / "bundle"),
            "TEST_FAULTS": str(Path(folder) / "faults"),
            "VERSION": "test",
            "S3_MIN_FREE": "50MiB",
        }


@pytest.fixture(scope="session")
def docker_compose_project_name() -> str:
    """One name a run, so that two of them do not meet."""
    return f"fracture-sweep-test-{secrets.token_hex(4)}"


@pytest.fixture(scope="session")
def docker_compose_file(stack_environment: dict[str, str]) -> Iterator[list[str]]:
    """The file as it is shipped, and the tests' overlay; the engine's commands read our environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack_environment.items():
            patch.setenv(name, value)
        yield [str(file) for file in FILES]


@pytest.fixture(scope="session")
def docker_setup() -> list[str]:
    """The one command of the README."""
    return ["--profile tools build", "up -d --wait"]


@pytest.fixture(scope="session")
def docker_cleanup() -> list[str]:
    """Nothing is left behind; a worker in the midst of a case is not waited for."""
    return ["kill", "down -v --remove-orphans"]


@pytest.fixture(scope="session")
def stack(docker_services: object, docker_compose_project_name: str, stack_environment: dict[str, str]) -> Stack:
    """The running stack."""
    return Stack(
        project=docker_compose_project_name,
        environment=stack_environment,
        secrets=Path(stack_environment["SECRETS"]),
        faults=Path(stack_environment["TEST_FAULTS"]),
    )


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """An embedded run over an archive with the stack's own keys: the same ids, and the numbers to compare with."""

    archive: Path
    ran: Ran
    store: Store


def write_pairs(folder: Path, *, seed: int) -> Path:
    """Phantoms as a CSV of pairs (NIfTI)."""
    folder.mkdir()
    rows = ["image,mask,labels,roi,age,sex"]
    for index in range(PATIENTS):
        rendered = render(draw_patient(seed=seed, index=index, fractures=FRACTURES))
        for name, grid in (("image", rendered.volume), ("mask", rendered.masks[0])):
            sitk.WriteImage(to_sitk(grid), str(folder / f"{name}-{index}.nii.gz"))
        rows.append(f"image-{index}.nii.gz,mask-{index}.nii.gz,verse,body,{60 + index},{'FM'[index % 2]}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder / "pairs.csv"


def undisturbed(stack: Stack, folder: Path, bundle: Path, archive: Path) -> Undisturbed:
    """Run an archive embedded."""
    folder.chmod(0o755)
    settings = settings_with(bundle, segmenter__source="built-in")
    settings = settings.model_copy(update={"secrets": stack.settings.secrets})
    store = restricted(FolderStore(folder / "store"), settings)
    ran = run(
        source_of(archive, settings=settings),
        name="undisturbed",
        settings=settings,
        store=store,
        pseudonyms=stack.pseudonyms,
        bundle=bundle_of(settings),
    )
    return Undisturbed(archive=archive, ran=ran, store=store)


@pytest.fixture(scope="session")
def few(stack: Stack, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Four patients, in DICOM."""
    folder = tmp_path_factory.mktemp("few")
    write_archive(folder / "archive", patients=4, seed=5)
    return undisturbed(stack, folder, tiny_bundle, folder / "archive")


@pytest.fixture(scope="session")
def many(stack: Stack, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """More than sixty cases, as a CSV of pairs."""
    folder = tmp_path_factory.mktemp("many")
    made = undisturbed(stack, folder, tiny_bundle, write_pairs(folder / "pairs", seed=17))
    assert made.ran.ledger.cases.found == CASES
    return made
