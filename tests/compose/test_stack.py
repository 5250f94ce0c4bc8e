"""The stack as it is shipped: it comes up whole, does the work, and is closed where it should be."""

from __future__ import annotations

import json
import os
import socket
import urllib.request
from pathlib import Path

import pytest

from shared.fracture.topology import QUEUES, SERVICES
from shared.pipeline.errors import BrokerUnavailable, StoreUnavailable
from shared.pipeline.minio_store import MinioStore
from shared.pipeline.rabbit_broker import RabbitBroker
from tests.compose.conftest import Undisturbed
from tests.compose.stack import Stack, objects, run, until

OURS = (*SERVICES, "prepare-store")


def test_phantoms_get_the_same_ledger_features_and_probabilities_as_embedded(stack: Stack, few: Undisturbed) -> None:
    stack.empty()

    stack.submit(few.archive, "few")

    ledger = stack.finished("few", seconds=300)
    store = stack.store()
    assert ledger.exact
    assert ledger.cases.by_state == few.ran.ledger.cases.by_state
    assert ledger.series.by_state == few.ran.ledger.series.by_state
    assert ledger.files == few.ran.ledger.files
    for prefix in ("features/", "outcomes/classified/", "cases/"):
        assert objects(store, prefix) == objects(few.store, prefix)
    assert list(store.keys("inbox/")) == []
    assert stack.depths() == {}
    said = stack.compose("run", "--rm", "-T", "cli", "export", "--out", "/tmp/out").stdout
    assert "worklist (acute first)" in said
    assert f"({few.ran.ledger.reports} studies)" in said


def test_the_garbage_collector_looks_at_the_store_as_its_own_user(stack: Stack, few: Undisturbed) -> None:
    done = stack.compose("run", "--rm", "-T", "gc", "--dry-run")

    assert "nothing was deleted (--dry-run)" in done.stdout
    assert "results" in done.stdout


def test_the_linear_algebra_that_the_shell_names_is_the_containers(stack: Stack) -> None:
    names = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")

    inside = stack.inside("radiomics-extractor", f"import os; print([os.environ.get(name) for name in {names}])")

    assert inside.strip() == str([os.environ.get(name) for name in names])


def test_a_name_without_the_sites_key_is_refused_with_what_to_do(stack: Stack) -> None:
    done = stack.compose("run", "--rm", "-T", "cli", "status", "--watch", "few", check=False)

    assert done.returncode == 2
    assert "give the id" in done.stderr


def test_prometheus_scrapes_every_worker(stack: Stack) -> None:
    port = stack.environment["PROMETHEUS_PORT"]

    def targets() -> dict[str, str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/targets?state=active", timeout=10) as answer:
            found = json.load(answer)["data"]["activeTargets"]
        return {target["labels"].get("service", target["labels"]["job"]): target["health"] for target in found}

    wanted = {*SERVICES, "rabbitmq", "s3", "prometheus"}
    until(lambda: set(targets()) >= wanted and set(targets().values()) == {"up"}, 90, "every target to be up")


@pytest.mark.parametrize("service", SERVICES)
def test_a_worker_runs_with_as_little_as_it_can(stack: Stack, service: str) -> None:
    found = stack.inspect(service)
    host, config = found["HostConfig"], found["Config"]
    assert isinstance(host, dict)
    assert isinstance(config, dict)

    assert config["User"] == "10001:10001"
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert host["Init"]
    assert host["Memory"] > 0
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert not host["PortBindings"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    packages = stack.inside(
        service,
        "import importlib.util, shutil\n"
        "print([name for name in ('torch', 'torchvision', 'pip', 'setuptools') if importlib.util.find_spec(name)])\n"
        "print([name for name in ('gcc', 'cc', 'g++', 'make') if shutil.which(name)])",
    )
    assert packages.splitlines() == ["[]", "[]"]


TRY_TO_LEAVE = """
import socket
try:
    socket.create_connection(('{address}', 8042), timeout=3)
except OSError:
    print('no way out')
"""


def networks_of(stack: Stack, service: str) -> dict[str, dict[str, str]]:
    """The networks that a container is in."""
    found = stack.inspect(service)["NetworkSettings"]
    assert isinstance(found, dict)
    networks: dict[str, dict[str, str]] = found["Networks"]
    return networks


@pytest.mark.parametrize("service", SERVICES)
def test_a_worker_has_no_way_out(stack: Stack, service: str) -> None:
    (name,) = networks_of(stack, service)
    (network,) = json.loads(run("docker", "network", "inspect", name).stdout)
    elsewhere = networks_of(stack, "orthanc")[f"{stack.project}_people"]["IPAddress"]
    with socket.create_connection((elsewhere, 8042), timeout=5):
        pass  # from here it is reached

    said = stack.inside(service, TRY_TO_LEAVE.format(address=elsewhere))

    assert network["Internal"]
    assert said.strip() == "no way out"


def test_only_what_a_person_opens_is_published_and_on_loopback(stack: Stack) -> None:
    shipped = json.loads(
        run("docker", "compose", "-f", "docker-compose.yml", "config", "--format", "json", **stack.environment).stdout
    )

    published = {name: service["ports"] for name, service in shipped["services"].items() if service.get("ports")}
    assert set(published) == {"rabbitmq", "orthanc", "prometheus"}
    assert {port["host_ip"] for ports in published.values() for port in ports} == {"127.0.0.1"}


def test_the_s3_server_does_not_report_to_its_makers(stack: Stack) -> None:
    arguments = " ".join(stack.inspect("s3")["Args"])  # type: ignore[arg-type]
    log = run("docker", "logs", stack.container("s3"))

    assert "telemetry=false" in arguments
    assert "anonymous" not in log.stdout + log.stderr


def test_no_secret_is_in_an_argument_an_image_or_a_log(stack: Stack) -> None:
    secrets = [path.read_text().strip() for path in stack.secrets.rglob("*") if path.is_file() and not path.suffix]
    secrets += [path.read_text().strip() for path in stack.secrets.glob("*.key")]
    seen = [json.dumps(stack.inspect(service)) for service in (*OURS, "rabbitmq", "s3", "orthanc", "prometheus")]
    for service in OURS:
        image = str(stack.inspect(service)["Image"])
        seen.append(run("docker", "image", "inspect", image).stdout)
        seen.append(run("docker", "history", "--no-trunc", image).stdout)
    seen.append(stack.compose("logs", "--no-color").stdout)

    assert len(secrets) > 20
    assert [secret[:8] for secret in secrets if any(secret in text for text in seen)] == []


def test_only_services_that_need_them_hold_the_sites_keys(stack: Stack) -> None:
    having = {
        service
        for service in SERVICES
        if "True" in stack.inside(service, "import os; print(os.path.exists('/run/secrets/encryption.key'))")
    }

    assert having == {"dicom-ingest", "report-generator"}


@pytest.mark.parametrize("service", [name for name in SERVICES if name not in ("dicom-ingest", "report-generator")])
def test_the_store_of_the_stack_refuses_a_worker_what_is_not_its_own(stack: Stack, service: str) -> None:
    store = MinioStore(stack.store_settings(service))
    store.check()

    for key in ("identities/studies/x", "inbox/x", "named/x"):
        with pytest.raises(StoreUnavailable, match="AccessDenied"):
            store.get(key)
        with pytest.raises(StoreUnavailable, match="AccessDenied"):
            store.put(key, b"x")


@pytest.mark.parametrize("service", [name for name in SERVICES if name != "resampler"])
def test_the_broker_of_the_stack_refuses_a_worker_anothers_queue(stack: Stack, service: str) -> None:
    broker = RabbitBroker(stack.broker_settings(service))
    broker.declare(QUEUES)

    with pytest.raises(BrokerUnavailable, match="may not use"):
        broker.subscribe("resampler", prefetch=1)
    with pytest.raises(BrokerUnavailable, match="may not use"):
        broker.publish_to_queue("resampler", b"not mine")
    broker.close()


def test_the_broker_has_no_default_user(stack: Stack) -> None:
    guest = stack.broker_settings("operator").model_copy(
        update={"username": "guest", "password": type(stack.password("rabbitmq", "operator"))("guest")}
    )

    with pytest.raises(BrokerUnavailable, match="refused the user name or the password"):
        RabbitBroker(guest).check()


def test_the_compose_file_is_without_a_fault(stack: Stack) -> None:
    for more in ((), ("-f", "deploy/compose.gpu.yml")):
        command = ("docker", "compose", "-f", "docker-compose.yml", *more, "--profile", "tools", "config", "--quiet")
        done = run(*command, **stack.environment)
        assert done.stdout + done.stderr == ""


def test_the_gpu_overlay_differs_in_onnxruntime_alone(stack: Stack, tmp_path: Path) -> None:
    def services(*more: str) -> dict[str, dict[str, object]]:
        command = ("docker", "compose", "-f", "docker-compose.yml", *more, "config", "--format", "json")
        found: dict[str, dict[str, object]] = json.loads(run(*command, **stack.environment).stdout)["services"]
        return found

    plain, gpu = services(), services("-f", "deploy/compose.gpu.yml")

    assert [name for name in plain if plain[name] != gpu[name]] == ["deep-extractor"]
    changed = {key for key in gpu["deep-extractor"] if gpu["deep-extractor"][key] != plain["deep-extractor"].get(key)}
    assert changed == {"image", "build", "environment", "deploy"}
