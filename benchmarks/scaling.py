"""How the distributed system scales on one machine, and what broker and store cost: the same phantoms, run in turn.

Three runs over one archive: the compose stack with one radiomics container, with two (one extraction process each), and
the embedded run with as many processes as there are cores. Prints cases a minute of each (from the first case under way
to the last report), and the CPU time of RabbitMQ and of the S3 server a case, from their containers' own accounts.

    python benchmarks/scaling.py --patients 12

It needs Docker with compose v2, builds the images where they are not there, and takes `*_IMAGE` and BASE_IMAGE from the
environment as docker-compose.yml does. Its own project, secrets and volumes are removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from services.composition import bundle_of, restricted
from services.embedded import run as run_embedded
from services.provisioning import write_secrets
from services.settings import SecretSettings, Settings
from services.sources import source_of
from services.trainer.phantoms.archive import write_archive
from shared.fracture.ids import Pseudonyms
from shared.pipeline.folder_store import FolderStore

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "fracture-sweep-benchmark"
CPU_ACCOUNTS = ("/sys/fs/cgroup/cpu.stat", "/sys/fs/cgroup/cpuacct/cpuacct.usage")
OVERLAY = """
services:
  radiomics-extractor: {environment: {FRACTURE_SWEEP_RADIOMICS_EXTRACTOR_PROCESSES: "1"}}
  dicom-ingest: {environment: {FRACTURE_SWEEP_INBOX_POLL_SECONDS: "0.5", FRACTURE_SWEEP_INBOX_CLOSE_SECONDS: "1"}}
  rabbitmq: {ports: !override []}
  orthanc: {ports: !override []}
  prometheus: {ports: !override []}
"""


class Compose:
    """The stack of this benchmark."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "overlay.yml").write_text(OVERLAY)
        self._environment = {**os.environ, "SECRETS": str(folder / "secrets"), "VERSION": "benchmark"}

    def __call__(self, *arguments: str) -> str:
        """`docker compose …`; what it printed."""
        files = ("-f", str(ROOT / "docker-compose.yml"), "-f", str(self._folder / "overlay.yml"))
        done = subprocess.run(
            ("docker", "compose", *files, "-p", PROJECT, *arguments),
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout

    def cpu_seconds(self, service: str) -> float:
        """CPU time of a service's container since it was started."""
        text = self("exec", "-T", service, "sh", "-c", f"cat {' '.join(CPU_ACCOUNTS)} 2>/dev/null || true").split()
        if "usage_usec" in text:
            return int(text[text.index("usage_usec") + 1]) / 1e6
        return int(text[0]) / 1e9

    def cases(self) -> int:
        """The cases found by the one sweep."""
        (ledger,) = json.loads(self("run", "--rm", "-T", "cli", "status", "--json"))
        return int(ledger["cases"]["found"])


def distributed(compose: Compose, archive: Path, *, extractors: int) -> dict[str, float]:
    """One run over an empty stack."""
    compose("down", "--volumes", "--remove-orphans")
    compose("up", "-d", "--wait", "--scale", f"radiomics-extractor={extractors}")
    before = {service: compose.cpu_seconds(service) for service in ("rabbitmq", "s3")}
    compose("run", "--rm", "-T", "-v", f"{archive}:/input:ro", "submit", "/input", "--sweep", "benchmark")
    start = time.perf_counter()
    compose("run", "--rm", "-T", "cli", "status", "--watch")  # one process, which reads what is new
    seconds = time.perf_counter() - start
    cases = compose.cases()
    own = {service: compose.cpu_seconds(service) - before[service] for service in before}
    return {
        "cases": cases,
        "seconds": round(seconds, 1),
        "cases a minute": round(60 * cases / seconds, 1),
        **{f"CPU seconds of {service} a case": round(spent / cases, 3) for service, spent in own.items()},
        "share of wall time x cores in broker and store": round(sum(own.values()) / seconds / cores(), 3),
    }


def embedded(archive: Path, folder: Path) -> dict[str, float]:
    """The same archive in one process tree on this machine."""
    key = bytes(32).hex()
    settings = Settings(secrets=SecretSettings.model_validate({"pseudonym_key": key, "encryption_key": key}))
    start = time.perf_counter()
    ran = run_embedded(
        source_of(archive, settings=settings),
        name="benchmark",
        settings=settings,
        store=restricted(FolderStore(folder / "store"), settings),
        pseudonyms=Pseudonyms(bytes(32)),
        bundle=bundle_of(settings),
    )
    seconds = time.perf_counter() - start
    cases = ran.ledger.cases.found
    return {"cases": cases, "seconds": round(seconds, 1), "cases a minute": round(60 * cases / seconds, 1)}


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def main() -> None:
    """Run all three and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fracture-sweep-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_secrets(folder / "secrets", bucket="fracture-sweep")
        write_archive(folder / "archive", patients=arguments.patients, seed=arguments.seed)
        compose = Compose(folder)
        figures: dict[str, dict[str, float]] = {}
        try:
            compose("--profile", "tools", "build", "--quiet")
            for extractors in (1, 2):
                figures[f"{extractors} extractor containers"] = distributed(
                    compose, folder / "archive", extractors=extractors
                )
        finally:
            compose("down", "--volumes", "--remove-orphans")
        figures["embedded"] = embedded(folder / "archive", folder)
    one, two = (figures[f"{number} extractor containers"]["cases a minute"] for number in (1, 2))
    print(
        json.dumps(
            {
                "cores": cores(),
                "phantom patients": arguments.patients,
                **figures,
                "two containers against one": round(two / one, 2),
                "two containers against embedded": round(two / figures["embedded"]["cases a minute"], 2),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
