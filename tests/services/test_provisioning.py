"""Secrets of a site, and users with the least rights: what each must not do is tried, and refused by the servers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest
from pydantic import SecretStr

from services.provisioning import ADMIN, rabbitmq_definitions, seaweedfs_identities, write_secrets
from shared.fracture.access import BROKER_RIGHTS, STORE_RIGHTS
from shared.fracture.topology import DICOM_INGEST, EXCHANGE, QUEUES, SERVICES, TELLS
from shared.pipeline.errors import BrokerUnavailable, FractureSweepError, StoreUnavailable
from shared.pipeline.minio_store import MinioStore
from shared.pipeline.rabbit_broker import EXCHANGE as BROKERS_EXCHANGE
from shared.pipeline.rabbit_broker import RabbitBroker
from tests.fixtures.rabbitmq import RabbitNode
from tests.fixtures.s3 import S3Server, new_s3_server

BUCKET = "least-privilege"


def test_secrets_are_made_once_and_closed_to_others(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"

    first = {path: path.read_bytes() for path in write_secrets(folder, bucket=BUCKET)}
    second = {path: path.read_bytes() for path in write_secrets(folder, bucket=BUCKET)}

    assert first == second
    assert folder.stat().st_mode & 0o777 == 0o700
    passwords = [path.read_text() for path in first if path.suffix != ".json"]
    assert len(passwords) == len(set(passwords)) == 2 + len(BROKER_RIGHTS) + len(STORE_RIGHTS) + 3


def test_no_password_stands_in_rabbitmqs_definitions(tmp_path: Path) -> None:
    write_secrets(tmp_path / "s", bucket=BUCKET)

    definitions = (tmp_path / "s" / "rabbitmq" / "definitions.json").read_text()
    for user in (*BROKER_RIGHTS, ADMIN):
        assert (tmp_path / "s" / "rabbitmq" / user).read_text().strip() not in definitions


def test_a_folder_that_others_can_look_into_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o755)

    with pytest.raises(FractureSweepError, match="chmod 700"):
        write_secrets(tmp_path / "open", bucket=BUCKET)


def test_the_definitions_hold_every_queue_and_binding_of_the_topology() -> None:
    definitions = json.loads(json.dumps(rabbitmq_definitions({ADMIN: "a"}, prefix="site.")))

    assert EXCHANGE == BROKERS_EXCHANGE
    assert {queue["name"] for queue in definitions["queues"]} == {
        f"site.{queue}{beside}" for queue in QUEUES for beside in ("", ".retry", ".dead")
    }
    facts = {(b["destination"], b["routing_key"]) for b in definitions["bindings"] if b["routing_key"][0].isupper()}
    assert facts == {(f"site.{queue}", fact) for queue, told in QUEUES.items() for fact in told}


# -- RabbitMQ ----------------------------------------------------------------------------------------------------------
PASSWORDS = {user: f"password-of-{user}" for user in (*BROKER_RIGHTS, ADMIN)}


@pytest.fixture(scope="module")
def node(rabbitmq_package: None) -> Iterator[RabbitNode]:
    """A RabbitMQ that knows our users and their rights, and nobody else."""
    with tempfile.TemporaryDirectory(prefix="rabbitmq-", ignore_cleanup_errors=True) as folder:
        definitions = Path(folder) / "definitions.json"
        definitions.write_text(json.dumps(rabbitmq_definitions(PASSWORDS)))
        node = RabbitNode(Path(folder), definitions=definitions, user=ADMIN, password=PASSWORDS[ADMIN])
        try:
            node.start()
            yield node
        finally:
            node.end()


def broker_of(node: RabbitNode, user: str) -> RabbitBroker:
    password = SecretStr(PASSWORDS[user])
    more = {"username": user, "password": password, "declare_queues": False, "confirm_timeout_seconds": 10.0}
    return RabbitBroker(node.settings.model_copy(update=more))


@pytest.mark.rabbitmq
@pytest.mark.parametrize("service", SERVICES)
def test_a_worker_can_do_its_work_with_its_rights(node: RabbitNode, service: str) -> None:
    broker = broker_of(node, service)
    broker.declare(QUEUES)

    for fact in TELLS[service]:
        broker.publish(fact, b"told")
    for queue in SERVICES[service]:
        own = queue.removesuffix(".dead")
        broker.publish_to_queue(queue, b"again")
        if own == queue:
            broker.publish_to_queue(queue, b"later", delay_seconds=0.05)
            broker.publish_to_queue(f"{queue}.dead", b"given up")
        subscription = broker.subscribe(queue, prefetch=100)
        bodies = set()
        while (delivery := subscription.receive(2.0)) is not None:
            bodies.add(delivery.body)
            delivery.ack()
        subscription.close()
        assert {b"again", b"later"} - ({b"later"} if own != queue else set()) <= bodies
    broker.close()


@pytest.mark.rabbitmq
@pytest.mark.parametrize("service", SERVICES)
def test_a_worker_cannot_read_or_write_another_services_queue(node: RabbitNode, service: str) -> None:
    broker = broker_of(node, service)
    every = [name for queue in QUEUES for name in (queue, f"{queue}.dead")]

    for queue in every:
        if queue not in BROKER_RIGHTS[service].reads:
            with pytest.raises(BrokerUnavailable, match="may not use"):
                broker.subscribe(queue, prefetch=1)
        if queue not in BROKER_RIGHTS[service].tells:
            with pytest.raises(BrokerUnavailable, match="may not use"):
                broker.publish_to_queue(queue, b"not mine")
    for fact in {fact for told in QUEUES.values() for fact in told} - set(TELLS[service]):
        with pytest.raises(BrokerUnavailable, match="may not use"):
            broker.publish(fact, b"not mine to tell")
    broker.close()


@pytest.mark.rabbitmq
@pytest.mark.parametrize("service", SERVICES)
def test_a_worker_cannot_change_the_topology_or_go_round_the_exchange(node: RabbitNode, service: str) -> None:
    user = {"username": service, "password": SecretStr(PASSWORDS[service])}
    connection = pika.BlockingConnection(node.settings.model_copy(update=user).parameters())

    def refused(call: str, *arguments: object, **named: object) -> bool:
        channel = connection.channel()
        channel.confirm_delivery()
        try:
            getattr(channel, call)(*arguments, **named)
        except pika.exceptions.ChannelClosedByBroker as error:
            return bool(error.reply_code == 403)
        return False

    assert refused("queue_declare", "a-new-queue", durable=True)
    assert refused("queue_delete", "resampler")
    assert refused("queue_purge", "resampler" if service != "resampler" else "segmenter")
    assert refused("exchange_delete", EXCHANGE)
    assert refused("queue_bind", "resampler", EXCHANGE, "CaseReady")
    assert refused("basic_publish", "", "resampler", b"by the default exchange")
    connection.close()


@pytest.mark.rabbitmq
def test_queues_that_are_not_there_are_missed_at_the_start(node: RabbitNode) -> None:
    broker = broker_of(node, DICOM_INGEST)

    with pytest.raises(BrokerUnavailable, match=r"no-such-queue.* is not there: load the definitions"):
        broker.declare({"no-such-queue": ("Told",)})
    broker.close()


# -- S3 ----------------------------------------------------------------------------------------------------------------
SECRET_KEYS = {user: f"secret-key-of-{user}" for user in (*STORE_RIGHTS, ADMIN)}
EVERYWHERE = sorted({prefix for rights in STORE_RIGHTS.values() for prefix in (*rights.reads, *rights.writes)})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server that knows our users and their rights; one object lies under every prefix."""
    identities = seaweedfs_identities(SECRET_KEYS, bucket=BUCKET)
    server = new_s3_server(tmp_path_factory.mktemp("s3") / "server", identities)
    admin = store_of(server, ADMIN, create_bucket=True)
    admin.check()
    for prefix in EVERYWHERE:
        admin.put(f"{prefix}there", b"an object")
    yield server
    server.kill()


def store_of(server: S3Server, user: str, *, create_bucket: bool = False) -> MinioStore:
    settings = server.settings(BUCKET).model_copy(
        update={
            "access_key": user,
            "secret_key": SecretStr(SECRET_KEYS[user]),
            "create_bucket": create_bucket,
            "retries": 0,
        }
    )
    return MinioStore(settings)


@pytest.mark.s3
@pytest.mark.parametrize("user", STORE_RIGHTS)
def test_the_server_allows_a_user_its_prefixes_and_refuses_all_others(server: S3Server, user: str) -> None:
    store, rights = store_of(server, user), STORE_RIGHTS[user]
    store.check()

    def allowed(call: str, *arguments: object) -> bool:
        try:
            result = getattr(store, call)(*arguments)
            if call == "keys":
                list(result)
        except StoreUnavailable as error:
            if "AccessDenied" not in str(error):
                raise
            return False
        return True

    for prefix in EVERYWHERE:
        assert allowed("get", f"{prefix}there") == rights.allows("get", prefix), f"get {prefix}"
        assert allowed("keys", prefix) == rights.allows("list", prefix), f"list {prefix}"
        if rights.allows("get", prefix) or not rights.allows("put", prefix):
            assert allowed("put", f"{prefix}by-{user}", b"new") == rights.allows("put", prefix), f"put {prefix}"
        if not rights.allows("delete", prefix):
            assert not allowed("delete", f"{prefix}there"), f"delete {prefix}"
    assert allowed("keys", "") == rights.allows("list", ""), "list the whole store"


@pytest.mark.s3
@pytest.mark.parametrize("service", [name for name in SERVICES if name not in ("dicom-ingest", "report-generator")])
def test_identities_are_closed_to_every_other_service(server: S3Server, service: str) -> None:
    store = store_of(server, service)

    with pytest.raises(StoreUnavailable, match="AccessDenied"):
        store.get("identities/there")
    with pytest.raises(StoreUnavailable, match="AccessDenied"):
        list(store.keys("identities/"))
    with pytest.raises(StoreUnavailable, match="AccessDenied"):
        store.put("identities/mine", b"x")


@pytest.mark.s3
def test_a_bucket_that_is_not_there_is_named(server: S3Server) -> None:
    settings = server.settings("no-such-bucket").model_copy(
        update={"access_key": ADMIN, "secret_key": SecretStr(SECRET_KEYS[ADMIN]), "create_bucket": False}
    )

    with pytest.raises(StoreUnavailable, match="has no bucket no-such-bucket"):
        MinioStore(settings).check()
