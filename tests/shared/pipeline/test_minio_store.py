from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from shared.pipeline.errors import FractureSweepError, NotInStore, StoreFull, StoreUnavailable
from shared.pipeline.minio_store import MinioStore, StoreSettings, ascending
from tests.fixtures.s3 import S3Server


class FakeS3(ThreadingHTTPServer):
    """As little of S3 as the store needs, with faults to order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeS3Handler)
        self.objects: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.conditional = True
        self.fault: Callable[[FakeS3Handler, str], bool] = lambda _handler, _key: False
        """Answers a request itself and returns True, or leaves it and returns False."""
        self.requests: list[tuple[str, str, str]] = []

    def settings(self) -> StoreSettings:
        return settings_for(f"127.0.0.1:{self.server_address[1]}")


class FakeS3Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "OldS3/1.0", ""
    server: FakeS3

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, code: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message></Error>".encode()
        self.answer(status, body, {"Content-Type": "application/xml"})

    def handled(self) -> tuple[str, bytes] | None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        key = urlsplit(self.path).path.partition("/bucket")[2].strip("/")
        self.server.requests.append((self.command, key, self.headers.get("Authorization", "")))
        return None if self.server.fault(self, key) else (key, body)

    def do_PUT(self) -> None:
        if (request := self.handled()) is None:
            return
        key, body = request
        if key in self.server.objects and self.server.conditional and self.headers.get("If-None-Match") == "*":
            return self.error(412, "PreconditionFailed")
        self.store(key, body)
        return self.answer(200, headers={"ETag": '"x"'})

    def store(self, key: str, body: bytes) -> None:
        metadata = {k: v for k, v in self.headers.items() if k.lower().startswith("x-amz-meta-")}
        self.server.objects[key] = (body, metadata)

    def do_GET(self) -> None:
        if (request := self.handled()) is None:
            return
        if request[0] not in self.server.objects:
            return self.error(404, "NoSuchKey")
        body, metadata = self.server.objects[request[0]]
        self.answer(200, body, metadata)

    def do_HEAD(self) -> None:
        if (request := self.handled()) is None:
            return
        if not request[0]:
            return self.answer(200)
        if request[0] not in self.server.objects:
            return self.answer(404)
        body, metadata = self.server.objects[request[0]]
        return self.answer(200, headers={"Content-Length": str(len(body)), **metadata})

    def do_DELETE(self) -> None:
        if (request := self.handled()) is None:
            return
        self.server.objects.pop(request[0], None)
        self.answer(204)


def settings_for(endpoint: str, **more: object) -> StoreSettings:
    values = {"access_key": "a", "secret_key": SecretStr("sentinel-secret"), "bucket": "bucket", "secure": False}
    return StoreSettings.model_validate({"endpoint": endpoint, "retries": 2, **values, **more})


@pytest.fixture
def fake() -> Iterator[FakeS3]:
    with FakeS3() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def store(fake: FakeS3) -> MinioStore:
    store = MinioStore(fake.settings())
    store.check()
    return store


def times(count: int, act: Callable[[FakeS3Handler, str], object], *, method: str) -> Callable[..., bool]:
    """A fault for the first `count` requests of a method that have a key."""
    left = [count]

    def fault(handler: FakeS3Handler, key: str) -> bool:
        if handler.command != method or not key or left[0] == 0:
            return False
        left[0] -= 1
        act(handler, key)
        return True

    return fault


def hang_up(handler: FakeS3Handler, _key: str = "") -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


# conditional writes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("begin", [lambda store: store.check(), lambda store: store.put("a", b"x")])
def test_a_server_that_ignores_the_condition_is_refused_by_name(
    fake: FakeS3, begin: Callable[[MinioStore], object]
) -> None:
    fake.conditional = False

    with pytest.raises(FractureSweepError, match=r"OldS3/1.0\) ignores If-None-Match") as caught:
        begin(MinioStore(fake.settings()))

    assert not isinstance(caught.value, StoreUnavailable)
    assert fake.objects == {}


def test_a_server_that_does_not_know_the_condition_is_refused_by_name(fake: FakeS3) -> None:
    fake.fault = times(1, lambda handler, _: handler.error(501, "NotImplemented"), method="PUT")

    with pytest.raises(FractureSweepError, match=r"refuses If-None-Match \(NotImplemented\)"):
        MinioStore(fake.settings()).check()


def test_the_condition_is_part_of_the_signature(fake: FakeS3, store: MinioStore) -> None:
    store.put("a", b"x")

    signed = [authorization for method, key, authorization in fake.requests if (method, key) == ("PUT", "a")]
    assert len(signed) == 1
    assert "if-none-match" in signed[0]


def test_the_server_is_tried_out_once(fake: FakeS3, store: MinioStore) -> None:
    store.check()
    store.put("a", b"x")

    probes = [key for method, key, _ in fake.requests if method == "PUT" and key.startswith("probes/")]
    assert len(probes) == 2
    assert list(fake.objects) == ["a"]


def test_a_write_that_was_sent_twice_because_its_answer_was_lost_counts_as_won(fake: FakeS3, store: MinioStore) -> None:
    def store_and_hang_up(handler: FakeS3Handler, key: str) -> None:
        fake.objects[key] = (b"x", {k: v for k, v in handler.headers.items() if k.lower().startswith("x-amz-meta-")})
        hang_up(handler)

    fake.fault = times(1, store_and_hang_up, method="PUT")

    assert store.put("a", b"x") is True
    assert store.put("a", b"x") is False


@pytest.mark.parametrize(
    ("status", "code"), [(409, "ConditionalRequestConflict"), (503, "SlowDown"), (500, "InternalError")]
)
def test_a_conflict_or_a_busy_server_is_asked_again(fake: FakeS3, store: MinioStore, status: int, code: str) -> None:
    fake.fault = times(2, lambda handler, _: handler.error(status, code), method="PUT")

    assert store.put("a", b"x") is True
    assert fake.objects["a"][0] == b"x"


def test_an_object_that_is_there_is_not_sent_again_when_it_is_large(fake: FakeS3, store: MinioStore) -> None:
    data = bytes(1 << 20)
    store.put("a", data)
    fake.requests.clear()

    assert store.put("a", data) is False
    assert [method for method, _, _ in fake.requests] == ["HEAD"]


# reading -------------------------------------------------------------------------------------------------------------
def test_an_answer_that_breaks_off_is_read_again(fake: FakeS3, store: MinioStore) -> None:
    store.put("a", b"x" * 1000)

    def half(handler: FakeS3Handler, _key: str) -> None:
        handler.answer(200, b"x" * 500, {"Content-Length": "1000"})
        hang_up(handler)

    fake.fault = times(1, half, method="GET")

    assert store.get("a") == b"x" * 1000


def test_a_damaged_object_is_not_handed_out(fake: FakeS3, store: MinioStore) -> None:
    store.put("a", b"as it was")
    fake.objects["a"] = (b"damaged", fake.objects["a"][1])

    with pytest.raises(StoreUnavailable, match="other than it was written"):
        store.get("a")


def test_an_object_of_another_program_is_read_without_its_sum(fake: FakeS3, store: MinioStore) -> None:
    fake.objects["a"] = (b"by hand", {})

    assert store.get("a") == b"by hand"
    assert store.exists("a")
    assert store.put("a", b"x") is False


# what can be wrong ---------------------------------------------------------------------------------------------------
def test_a_server_without_room_asks_for_a_later_attempt(fake: FakeS3, store: MinioStore) -> None:
    fake.fault = times(1, lambda handler, _: handler.error(507, "XMinioStorageFull"), method="PUT")

    with pytest.raises(StoreFull, match="no room"):
        store.put("a", b"x")


def test_a_server_that_is_not_there_is_one_clear_sentence() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{nobody.getsockname()[1]}"
        store = MinioStore(settings_for(endpoint, retries=1))

        for use in (store.check, lambda: store.get("a"), lambda: store.put("a", b""), lambda: list(store.keys(""))):
            with pytest.raises(StoreUnavailable, match=f"{endpoint} cannot be reached") as caught:
                use()
            assert "\n" not in str(caught.value)
            assert "Signature" not in str(caught.value)


def test_a_server_that_is_no_s3_is_said_to_be_none(fake: FakeS3) -> None:
    def web_page(handler: FakeS3Handler, _key: str) -> bool:
        handler.answer(418, b"<html>tea</html>", {"Content-Type": "text/html"})
        return True

    fake.fault = web_page

    with pytest.raises(StoreUnavailable, match="is it one"):
        MinioStore(fake.settings()).put("a", b"x")


def test_tls_to_a_plain_server_says_which_settings_to_look_at(fake: FakeS3) -> None:
    store = MinioStore(settings_for(fake.settings().endpoint, secure=True, retries=0))

    with pytest.raises(StoreUnavailable, match="S3_SECURE"):
        store.check()


def test_certificates_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(FractureSweepError, match="S3_CA_FILE"):
        MinioStore(settings_for("localhost:1", ca_file=tmp_path / "none.pem"))


@pytest.mark.parametrize("endpoint", ["http://localhost:9000", "localhost/path", "", "a b", "host:port"])
def test_an_endpoint_is_host_and_port(endpoint: str) -> None:
    with pytest.raises(ValidationError):
        settings_for(endpoint)


def test_the_secret_key_is_not_shown() -> None:
    settings = settings_for("[::1]:9000")

    assert "sentinel" not in repr(settings) + str(settings) + settings.model_dump_json()


# a real server -------------------------------------------------------------------------------------------------------
@pytest.mark.s3
def test_wrong_credentials_are_said_to_be_wrong(s3_settings: StoreSettings) -> None:
    for wrong in ({"secret_key": SecretStr("wrong")}, {"access_key": "nobody"}):
        store = MinioStore(s3_settings.model_copy(update=wrong))

        with pytest.raises(StoreUnavailable, match="S3_ACCESS_KEY, S3_SECRET_KEY"):
            store.check()


@pytest.mark.s3
def test_a_missing_bucket_is_made_or_named(s3_settings: StoreSettings) -> None:
    careful = MinioStore(s3_settings.model_copy(update={"create_bucket": False}))

    with pytest.raises(StoreUnavailable, match=f"no bucket {s3_settings.bucket}"):
        careful.check()
    with pytest.raises(StoreUnavailable, match="no bucket"):
        careful.get("a")

    MinioStore(s3_settings).check()
    careful.check()


@pytest.mark.s3
def test_a_server_killed_and_started_again_has_kept_what_it_confirmed(private_s3_server: S3Server) -> None:
    store = MinioStore(private_s3_server.settings("bucket").model_copy(update={"retries": 0}))
    store.check()
    store.put("a", b"x" * 100_000)

    private_s3_server.kill()
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        store.put("b", b"")
    private_s3_server.start()

    assert hashlib.sha256(store.get("a")).digest() == hashlib.sha256(b"x" * 100_000).digest()
    assert store.put("a", b"other") is False
    assert store.put("b", b"") is True


@pytest.mark.s3
def test_a_server_that_does_not_answer_is_unavailable_and_later_not(private_s3_server: S3Server) -> None:
    hasty = {"retries": 0, "read_timeout_seconds": 0.3}
    store = MinioStore(private_s3_server.settings("bucket").model_copy(update=hasty))
    MinioStore(private_s3_server.settings("bucket")).check()

    private_s3_server.pause()
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        store.get("a")
    private_s3_server.resume()

    with pytest.raises(NotInStore):
        MinioStore(private_s3_server.settings("bucket")).get("a")


# order of listings ---------------------------------------------------------------------------------------------------
NAMES = st.lists(st.lists(st.from_regex(r"[ab-][ab.-]{0,3}", fullmatch=True), min_size=1, max_size=3), max_size=20)


@given(names=NAMES, below=st.booleans())
def test_a_listing_by_folders_comes_out_ascending(names: list[list[str]], below: bool) -> None:
    folder = "f/g" if below else ""
    keys = {"/".join([folder, *name] if below else name) for name in names}
    by_folder = sorted(keys, key=lambda key: key.split("/"))

    assert list(ascending(by_folder, folder=folder)) == sorted(keys)
    assert list(ascending(sorted(keys), folder=folder)) == sorted(keys)


def test_a_long_listing_is_not_held_back() -> None:
    taken = []

    def listing() -> Iterator[str]:
        for i in range(1000):
            taken.append(i)
            yield f"p/{i:04d}/x"

    first = next(ascending(listing(), folder="p"))

    assert first == "p/0000/x"
    assert len(taken) == 2
