"""What the processes of a cluster need to find the servers of the tests."""

from __future__ import annotations

import pytest

from shared.pipeline.minio_store import StoreSettings
from shared.pipeline.rabbit_broker import BrokerSettings
from tests.fixtures.rabbitmq import credentials


def environ_of_rabbitmq(settings: BrokerSettings) -> dict[str, str]:
    """The variables that name this broker."""
    if settings.url is not None:
        return {
            "FRACTURE_SWEEP_RABBITMQ_URL": settings.url.get_secret_value(),
            "FRACTURE_SWEEP_RABBITMQ_PREFIX": settings.prefix,
        }
    return {
        "RABBITMQ_HOST": settings.host,
        "RABBITMQ_PORT": str(settings.port),
        **credentials(settings),
        "RABBITMQ_VIRTUAL_HOST": settings.virtual_host,
        "FRACTURE_SWEEP_RABBITMQ_PREFIX": settings.prefix,
    }


@pytest.fixture
def rabbitmq_environ(rabbitmq: BrokerSettings) -> dict[str, str]:
    """The session's broker."""
    return environ_of_rabbitmq(rabbitmq)


@pytest.fixture
def s3_environ(s3_settings: StoreSettings) -> dict[str, str]:
    """A bucket of the test's own on the session's S3 server."""
    return {
        "S3_ENDPOINT": s3_settings.endpoint,
        "S3_ACCESS_KEY": s3_settings.access_key,
        "S3_SECRET_KEY": s3_settings.secret_key.get_secret_value(),
        "S3_BUCKET": s3_settings.bucket,
        "S3_SECURE": "false",
    }
