"""The compose file as it is shipped, brought up on a real engine, and what the tests do to it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr

from services.composition import pseudonyms_of, restricted
from services.settings import SecretSettings, Settings
from shared.fracture.ids import Pseudonyms
from shared.fracture.ledger import Ledger
from shared.fracture.topology import QUEUES, SERVICES
from shared.pipeline.errors import BrokerUnavailable, StoreUnavailable
from shared.pipeline.minio_store import MinioStore, StoreSettings
from shared.pipeline.rabbit_broker import BrokerSettings, RabbitBroker
from shared.pipeline.restricted_store import RestrictedStore
from shared.pipeline.store import Store
from shared.records.ledger import sweep_ledger

ROOT = Path(__file__).resolve().parents[2]
FILES = (ROOT / "docker-compose.yml", ROOT / "tests" / "compose" / "overlay.yml")
STAND_INS = {
    "BASE_IMAGE": "local/python:3.11",
    "RABBITMQ_IMAGE": "local/rabbitmq:4.0",
    "S3_IMAGE": "local/s3:4.48",
    "ORTHANC_IMAGE": "local/orthanc:1.12",
    "PROMETHEUS_IMAGE": "local/prometheus:2",
}
"""Images that a machine without a registry makes of Debian's packages; a variable that is set goes before them."""
WORKERS = tuple(SERVICES)
EVERY_QUEUE = tuple(f"{queue}{beside}" for queue in QUEUES for beside in ("", ".retry", ".dead"))


def run(*command: str, timeout: float = 900, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command with `more` in its environment; AssertionError with what it said where it failed."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **more},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done


def engine_answers() -> bool:
    """Whether there is a Docker engine with compose v2."""
    try:
        return all(run("docker", *what, check=False).returncode == 0 for what in (("info",), ("compose", "version")))
    except FileNotFoundError:
        return False


def images() -> dict[str, str]:
    """The stand-ins where they were made on this machine, and nothing else is asked for; else the file's defaults."""
    if run("docker", "image", "inspect", STAND_INS["BASE_IMAGE"], check=False).returncode:
        return {}
    if run("docker", "image", "inspect", STAND_INS["PROMETHEUS_IMAGE"], check=False).returncode:
        run(
            "docker",
            "build",
            "--build-arg",
            "BASE_IMAGE=local/debian:trixie",
            "--tag",
            STAND_INS["PROMETHEUS_IMAGE"],
            str(ROOT / "tests" / "compose" / "standins" / "prometheus"),
        )
    return {name: image for name, image in STAND_INS.items() if name not in os.environ}


@dataclass(kw_only=True)
class Stack:
    """One running project of the compose file."""

    project: str
    environment: Mapping[str, str]
    secrets: Path
    faults: Path
    more_files: list[Path] = field(default_factory=list)

    # -- docker --------------------------------------------------------------------------------------------------------
    def compose(self, *arguments: str, check: bool = True, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """`docker compose …` on this project."""
        files = [part for file in (*FILES, *self.more_files) for part in ("-f", str(file))]
        command = ("docker", "compose", *files, "-p", self.project, *arguments)
        return run(*command, timeout=timeout, check=check, **self.environment)

    def container(self, service: str) -> str:
        """The id of a service's container, running or not."""
        return self.compose("ps", "-aq", service).stdout.split()[0]

    def inspect(self, service: str) -> dict[str, object]:
        """What the engine knows of a service's container."""
        (found,) = json.loads(run("docker", "inspect", self.container(service)).stdout)
        assert isinstance(found, dict)
        return found

    def inside(self, service: str, code: str, *, check: bool = True) -> str:
        """Run Python inside a service's container, as the user that it runs under."""
        return run("docker", "exec", self.container(service), "python3", "-c", code, check=check).stdout

    def kill(self, service: str) -> None:
        """SIGKILL the worker inside its container, as a crash would; the engine starts the container again."""
        self.inside(service, KILL, check=False)

    def running(self, service: str) -> bool:
        """Whether its container runs and its health check says that it is ready."""
        state = self.inspect(service)["State"]
        assert isinstance(state, dict)
        return bool(state["Running"]) and state.get("Health", {}).get("Status", "healthy") == "healthy"

    def wait_ready(self, *services: str, seconds: float = 180) -> None:
        """Wait until these (all workers when none is named) are ready."""
        for service in services or WORKERS:
            until(lambda service=service: self.running(service), seconds, f"{service} to be ready")  # type: ignore[misc]

    # -- looking in ----------------------------------------------------------------------------------------------------
    def password(self, of: str, user: str) -> SecretStr:
        """The password of a user of `rabbitmq` or `s3`."""
        return SecretStr((self.secrets / of / user).read_text().strip())

    def broker_settings(self, user: str) -> BrokerSettings:
        """How a user reaches the broker from here."""
        return BrokerSettings(
            host="127.0.0.1",
            port=int(self.environment["TEST_AMQP_PORT"]),
            username=user,
            password=self.password("rabbitmq", user),
            declare_queues=False,
        )

    def store_settings(self, user: str) -> StoreSettings:
        """How a user reaches the store from here."""
        return StoreSettings(
            endpoint=f"127.0.0.1:{self.environment['TEST_S3_PORT']}",
            access_key=user,
            secret_key=self.password("s3", user),
            create_bucket=False,
            secure=False,
        )

    @property
    def settings(self) -> Settings:
        """The site's keys, for a run beside it with the same ids."""
        keys = {
            name: (self.secrets / f"{name.removesuffix('_key')}.key").read_text().strip()
            for name in ("pseudonym_key", "encryption_key")
        }
        return Settings(secrets=SecretSettings.model_validate(keys))

    def store(self) -> RestrictedStore:
        """The store, with all rights and the keys of the restricted prefixes."""
        return restricted(MinioStore(self.store_settings("admin")), self.settings)

    @property
    def pseudonyms(self) -> Pseudonyms:
        """Of the site."""
        return pseudonyms_of(self.settings)

    def ledger(self, sweep: str) -> Ledger | None:
        """The ledger of a sweep by its name."""
        return sweep_ledger(self.store(), self.pseudonyms.sweep_id(sweep))

    def depths(self) -> dict[str, int]:
        """Queue → messages ready in it, of those that hold any."""
        broker = RabbitBroker(self.broker_settings("operator"))
        try:
            return {queue: depth.ready for queue, depth in broker.depths(EVERY_QUEUE).items() if depth.ready}
        finally:
            broker.close()

    def results(self) -> int:
        """How many cases have a result."""
        return sum(1 for _ in self.store().keys("outcomes/classified/"))

    # -- working -------------------------------------------------------------------------------------------------------
    def submit(self, archive: Path, sweep: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Upload a folder, or a CSV of pairs with what lies beside it, as a person would."""
        folder, path = (archive, "/input") if archive.is_dir() else (archive.parent, f"/input/{archive.name}")
        mount = f"{folder}:/input:ro"
        return self.compose("run", "--rm", "-T", "-v", mount, "submit", path, "--sweep", sweep, check=check)

    def empty(self) -> None:
        """Remove everything from the store but what binds it to its keys."""
        store = self.store()
        for key in list(store.keys("")):
            if not key.startswith("site/"):
                store.delete(key)

    def finished(self, sweep: str, *, seconds: float) -> Ledger:
        """The ledger once nothing is pending; outages are waited for."""
        end = time.monotonic() + seconds
        last: Ledger | None = None
        while time.monotonic() < end:
            try:
                last = self.ledger(sweep)
            except (StoreUnavailable, BrokerUnavailable):
                last = None
            if last is not None and last.pending == 0 and last.files.found > 0:
                return last
            time.sleep(1.0)
        said = self.compose("logs", "--no-color", "--tail", "15", *WORKERS, check=False).stdout
        raise AssertionError(f"not finished in {seconds} s: {last and last.as_json()}\n{self.depths()}\n{said}")

    @contextmanager
    def poison(self, case_id: str) -> Iterator[None]:
        """The radiomics extractor dies on this case, until the block ends."""
        (self.faults / "poison").write_text(case_id + "\n")
        try:
            yield
        finally:
            (self.faults / "poison").unlink()


KILL = """
import os, signal
for pid in filter(str.isdigit, os.listdir('/proc')):
    try:
        command = open(f'/proc/{pid}/cmdline').read()
        parent = open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1]
    except OSError:
        continue
    if parent == '1' and ('service' in command):
        os.kill(int(pid), signal.SIGKILL)
"""
"""Kills what the container's init started: the worker; its own children go with the container."""


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for a condition; an outage on the way counts as not yet."""
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (StoreUnavailable, BrokerUnavailable):
            pass
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s in vain for {what}")
        time.sleep(0.5)


def objects(store: Store, *prefixes: str) -> dict[str, bytes]:
    """What lies under the prefixes."""
    return {key: store.get(key) for prefix in prefixes for key in store.keys(prefix)}
