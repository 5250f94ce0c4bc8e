"""Settings and sentences of RabbitBroker; what it does against a server is in tests/contract/test_broker.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from shared.pipeline.errors import BrokerUnavailable, FractureSweepError
from shared.pipeline.rabbit_broker import BrokerSettings, RabbitBroker

USER = {"username": "a-user", "password": SecretStr("hush-hush")}


def test_there_is_no_default_user() -> None:
    with pytest.raises(FractureSweepError, match="set RABBITMQ_USERNAME and RABBITMQ_PASSWORD"):
        RabbitBroker(BrokerSettings(host="broker.example"))


def test_the_password_is_never_shown() -> None:
    settings = BrokerSettings(password=SecretStr("hush-hush"), url=SecretStr("amqp://u:hush-hush@host/"))

    assert "hush-hush" not in f"{settings!r}{settings.model_dump_json()}"


def test_an_address_takes_the_place_of_its_parts() -> None:
    parameters = BrokerSettings(url=SecretStr("amqp://u:p@broker.example:5673/site")).parameters()

    assert (parameters.host, parameters.port, parameters.virtual_host) == ("broker.example", 5673, "site")
    assert parameters.heartbeat == 30


def test_tls_checks_the_servers_name() -> None:
    parameters = BrokerSettings(host="broker.example", tls=True, **USER).parameters()

    assert parameters.ssl_options.server_hostname == "broker.example"
    assert parameters.ssl_options.context.check_hostname


def test_certificates_that_are_not_there_are_named(tmp_path: Path) -> None:
    settings = BrokerSettings(tls=True, tls_ca_file=tmp_path / "ca.pem", **USER)

    with pytest.raises(BrokerUnavailable, match=r"ca\.pem"):
        RabbitBroker(settings)


@pytest.mark.parametrize("prefix", ["a b", "x" * 65, "#"])
def test_a_prefix_that_is_no_name_is_refused(prefix: str) -> None:
    with pytest.raises(ValidationError):
        BrokerSettings(prefix=prefix)


def test_dead_letters_have_no_limit_and_return_names_follow_the_prefix() -> None:
    broker = RabbitBroker(BrokerSettings(prefix="site.", **USER))

    arguments = broker.queue_arguments("work")

    assert arguments["work.dead"]["x-delivery-limit"] > 1000
    assert arguments["work.retry"]["x-dead-letter-routing-key"] == "site.work"
    assert arguments["work"]["x-dead-letter-strategy"] == "at-least-once"
    assert arguments["work"]["x-consumer-timeout"] == 6 * 3600 * 1000
