from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shared.pipeline.errors import FractureSweepError, StoreUnavailable
from shared.pipeline.free_space import selected, smallest
from shared.pipeline.minio_store import MinioStore, StoreSettings
from tests.fixtures.s3 import S3Server

SEAWEED = 'SeaweedFS_volumeServer_resource{type="avail"}'
PAGE = """\
# TYPE SeaweedFS_volumeServer_resource gauge
SeaweedFS_volumeServer_resource{name="/data1",type="all"} 2.70553174016e+11
SeaweedFS_volumeServer_resource{name="/data1",type="avail"} 7.8476373248e+10
SeaweedFS_volumeServer_resource{name="/data2",type="avail"} 5e+09
SeaweedFS_volumeServer_resource{name="/data3",type="avail"} NaN
# TYPE minio_cluster_capacity_usable_free_bytes gauge
minio_cluster_capacity_usable_free_bytes{server="a:9000"} 1.5e+09
"""


@pytest.mark.parametrize(
    ("metric", "free"),
    [
        (SEAWEED, 5_000_000_000),
        ('SeaweedFS_volumeServer_resource{type="avail",name="/data1"}', 78_476_373_248),
        ("minio_cluster_capacity_usable_free_bytes", 1_500_000_000),
        ('SeaweedFS_volumeServer_resource{type="free"}', None),
        ("something_else", None),
    ],
)
def test_of_the_gauges_that_match_the_smallest_counts(metric: str, free: int | None) -> None:
    assert smallest(PAGE, selected(metric)) == free


@pytest.mark.parametrize("metric", ["", "{", "a b", "a{b}", "a\nb", "# a"])
def test_what_is_no_metric_is_one_sentence_that_names_the_setting(metric: str) -> None:
    with pytest.raises(FractureSweepError, match="S3_FREE_SPACE_METRIC"):
        selected(metric)


@contextmanager
def page(status: int, body: bytes) -> Iterator[str]:
    """A page that answers this; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()


def store(url: str | None, metric: str | None) -> MinioStore:
    return MinioStore(
        StoreSettings(
            endpoint="127.0.0.1:9",
            access_key="a",
            secret_key="b",  # type: ignore[arg-type]
            free_space_url=url,
            free_space_metric=metric,
        )
    )


def test_the_page_that_the_settings_name_is_read() -> None:
    with page(200, PAGE.encode()) as url:
        assert store(url, SEAWEED).free_bytes() == 5_000_000_000


def test_without_the_settings_the_room_is_not_known() -> None:
    assert store(None, None).free_bytes() is None


def test_one_of_the_settings_alone_is_refused() -> None:
    with pytest.raises(FractureSweepError, match="go together"):
        store("http://127.0.0.1:9/metrics", None)
    with pytest.raises(FractureSweepError, match="go together"):
        store(None, SEAWEED)


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (403, b"", "answers 403"),
        (200, b"<html>", "no Prometheus text"),
        (200, b"\xff\xfe", "no Prometheus text"),
        (200, b"other 1\n", "does not hold SeaweedFS_volumeServer_resource"),
    ],
)
def test_a_page_that_does_not_tell_is_an_outage_of_the_store(status: int, body: bytes, sentence: str) -> None:
    with page(status, body) as url, pytest.raises(StoreUnavailable, match=sentence):
        store(url, SEAWEED).free_bytes()


def test_a_page_that_is_not_there_is_an_outage_of_the_store() -> None:
    with page(200, b"") as url:
        pass

    with pytest.raises(StoreUnavailable, match="cannot be read"):
        store(url, SEAWEED).free_bytes()


@pytest.mark.s3
def test_a_real_server_tells_the_room_of_its_disk(s3_server: S3Server) -> None:
    here = s3_server.settings("free-space").model_copy(
        update={
            "free_space_url": f"http://127.0.0.1:{s3_server.port + 8}/metrics",
            "free_space_metric": SEAWEED,
        }
    )

    free = MinioStore(here).free_bytes()

    disk = shutil.disk_usage(s3_server.folder)
    assert free is not None
    assert 0.8 * disk.free - disk.total / 50 < free <= 1.2 * disk.free
