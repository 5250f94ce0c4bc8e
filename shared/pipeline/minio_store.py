"""The store on an S3 server: MinIO, SeaweedFS, Ceph, AWS, whatever honours conditional writes.

An object is one PUT with `If-None-Match: *`, so that the server itself refuses a key that is taken. A server that does
not know this header overwrites in silence, therefore it is tried out before the first object is written, and such a
server is refused by name. Which layer retries what: urllib3 repeats a lost connection and a 5xx here, a few seconds
long; after that StoreUnavailable goes to the worker, which tells the message again later.
"""

from __future__ import annotations

import base64
import hashlib
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from urllib3.exceptions import HTTPError, MaxRetryError, ResponseError, SSLError

from shared.pipeline.errors import FractureSweepError, NotInStore, StoreFull, StoreUnavailable
from shared.pipeline.free_space import free_space_of
from shared.pipeline.store import Entry, check_key, check_prefix

T = TypeVar("T")

MAX_OBJECT_BYTES: Final = 5 * 1024**3
"""The most that one PUT may hold (Amazon S3 User Guide, "Uploading objects")."""

_LOOK_FIRST_BYTES = 1 << 20
"""From this size on it pays to ask whether the key is taken before sending."""

_ATTEMPTS = 8
_READ_ATTEMPTS = 3
_GONE = frozenset({"NoSuchKey", "NoSuchObject"})
_TAKEN = frozenset({"PreconditionFailed"})
_CONFLICT = frozenset({"ConditionalRequestConflict", "OperationAborted"})
_FULL = frozenset({"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "InsufficientStorage"})
_REFUSED = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled"})
_PROBES = "probes/"
_WRITER = "x-amz-meta-writer"
_SHA256 = "x-amz-meta-sha256"


class StoreSettings(BaseModel):
    """How to reach an S3 server."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    endpoint: str = Field(
        pattern=r"^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?$",
        json_schema_extra={"env": "S3_ENDPOINT", "allowed": "host or host:port, without http://"},
    )
    """The S3 server."""
    access_key: str = Field(min_length=1, json_schema_extra={"env": "S3_ACCESS_KEY"})
    """Its user, or access key id."""
    secret_key: SecretStr = Field(min_length=1, json_schema_extra={"env": "S3_SECRET_KEY"})
    """Its password, or secret access key."""
    bucket: str = Field(
        default="fracture-sweep",
        pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$",
        json_schema_extra={"env": "S3_BUCKET", "allowed": "3 to 63 of a-z, 0-9, '.' and '-'"},
    )
    """The bucket that holds all objects."""
    create_bucket: bool = Field(default=True, json_schema_extra={"env": "S3_CREATE_BUCKET"})
    """Whether the bucket is made when it is not there."""
    secure: bool = Field(default=True, json_schema_extra={"env": "S3_SECURE"})
    """Whether to speak TLS (https)."""
    region: str = Field(default="us-east-1", min_length=1, json_schema_extra={"env": "S3_REGION"})
    """The region; of weight with AWS alone."""
    ca_file: Path | None = Field(default=None, json_schema_extra={"env": "S3_CA_FILE"})
    """Certificates (PEM) to trust instead of the system's."""
    connect_timeout_seconds: float = Field(default=5.0, gt=0, json_schema_extra={"env": "S3_CONNECT_TIMEOUT_SECONDS"})
    """How long to wait for a connection."""
    read_timeout_seconds: float = Field(default=60.0, gt=0, json_schema_extra={"env": "S3_READ_TIMEOUT_SECONDS"})
    """How long to wait for each part of an answer."""
    retries: int = Field(default=4, ge=0, le=20, json_schema_extra={"env": "S3_RETRIES"})
    """How often a lost connection or a 5xx is tried again, with growing pauses."""
    free_space_url: str | None = Field(
        default=None, pattern=r"^https?://[^\s@]+$", json_schema_extra={"env": "S3_FREE_SPACE_URL"}
    )
    """Prometheus page that tells the server's free space, which S3 does not: of SeaweedFS the page of the volume server
    (http://host:port/metrics), of MinIO http://host:9000/minio/v2/metrics/cluster. None: back-pressure goes without."""
    free_space_metric: str | None = Field(default=None, json_schema_extra={"env": "S3_FREE_SPACE_METRIC"})
    """The gauge in bytes on that page, with labels or without; of several the smallest counts. SeaweedFS:
    SeaweedFS_volumeServer_resource{type="avail"}; MinIO: minio_cluster_capacity_usable_free_bytes."""


class MinioStore:
    """Objects in one bucket. Safe in threads; each process makes its own."""

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._bucket = settings.bucket
        if settings.ca_file is not None and not settings.ca_file.is_file():
            raise FractureSweepError(f"the certificates {settings.ca_file} (S3_CA_FILE) are not there")
        self._http = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=settings.connect_timeout_seconds, read=settings.read_timeout_seconds),
            maxsize=32,
            cert_reqs="CERT_REQUIRED",
            ca_certs=None if settings.ca_file is None else str(settings.ca_file),
            retries=urllib3.Retry(
                total=settings.retries, backoff_factor=0.2, backoff_max=5.0, status_forcelist=(500, 502, 503, 504)
            ),
        )
        self._minio = Minio(
            settings.endpoint,
            access_key=settings.access_key,
            secret_key=settings.secret_key.get_secret_value(),
            secure=settings.secure,
            region=settings.region,
            http_client=self._http,
        )
        self._free_space = free_space_of(
            url=settings.free_space_url, metric=settings.free_space_metric, http=self._http
        )
        self._probing = threading.Lock()
        self._probed = False

    def put(self, key: str, data: bytes) -> bool:
        """Write an object unless the key is taken: True when written now, False when it was there already."""
        check_key(key)
        if len(data) > MAX_OBJECT_BYTES:
            raise ValueError(f"an object has at most {MAX_OBJECT_BYTES} bytes, this one has {len(data)}")
        self._probe_once()
        if len(data) >= _LOOK_FIRST_BYTES and self.exists(key):
            return False
        return self._put(key, data)

    def get(self, key: str) -> bytes:
        """The object's bytes, compared with the SHA-256 they were written with; NotInStore where there is none."""
        check_key(key)
        damaged = False
        for attempt in range(_READ_ATTEMPTS):
            if attempt:
                _pause(attempt)
            with self._explained(key):
                response = self._minio.get_object(self._bucket, key)
            try:
                data: bytes = response.read()
            except HTTPError:  # broken off in the middle: urllib3 repeats only what failed before the first byte
                continue
            finally:
                response.close()
                response.release_conn()
            expected = response.headers.get(_SHA256)
            if expected is None or hashlib.sha256(data).hexdigest() == expected:
                return data
            damaged = True
        if damaged:
            raise StoreUnavailable(f"{self._name} gives back an object other than it was written: look at its disks")
        raise StoreUnavailable(f"{self._name} breaks off in the middle of an object")

    def exists(self, key: str) -> bool:
        """Whether an object lies under the key."""
        return self._writer_of(check_key(key)) is not None

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys that begin with the prefix, ascending, page by page."""
        return (entry.key for entry in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[Entry]:
        """What `keys` lists, each with its size and the time it was written."""
        check_prefix(prefix)
        return ascending(self._listed(prefix), folder=prefix.rpartition("/")[0], name_of=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""
        check_key(key)
        with self._explained(key):
            self._minio.remove_object(self._bucket, key)

    def free_bytes(self) -> int | None:
        """What the server's own page says is left, or None where no page is named (S3 itself does not tell)."""
        return None if self._free_space is None else self._free_space.ask()

    def check(self) -> None:
        """The bucket is there (made if need be) and the server keeps to conditional writes; else see the contract."""
        with self._explained(""):
            if not self._settings.create_bucket:
                # a user of least privilege may list below probes/, and not ask for the bucket itself
                next(iter(self._minio.list_objects(self._bucket, prefix=_PROBES)), None)
            elif not self._minio.bucket_exists(self._bucket):
                self._make_bucket()
        self._probe_once()

    # ----------------------------------------------------------------------------------------------------------------
    @property
    def _name(self) -> str:
        return f"the S3 server {self._settings.endpoint}"

    def _make_bucket(self) -> None:
        try:
            self._minio.make_bucket(self._bucket)
        except S3Error as error:
            if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):  # another worker was faster
                raise

    def _put(self, key: str, data: bytes) -> bool:
        writer = uuid.uuid4().hex
        for attempt in range(_ATTEMPTS):
            try:
                with self._explained(key):
                    self._conditional_put(key, data, writer)
                return True
            except _Taken:
                found = self._writer_of(key)
                if found is not None:
                    return found == writer  # ours, when urllib3 sent it twice and the first answer was lost
                if attempt:
                    raise ValueError("not a store key: one key is the folder of another") from None
            except _BrokenOff:
                # a server that refuses a long body early may close before we have read why
                found = self._writer_of(key)
                if found is not None:
                    return found == writer
                raise
            except _Conflict:
                pass
            _pause(attempt)
        raise StoreUnavailable(f"{self._name} reports a conflict on one key again and again")

    def _conditional_put(self, key: str, data: bytes, writer: str) -> str:
        """One PUT with If-None-Match; returns the server's name for itself.

        minio-py 7.2 has no public way: put_object() turns the condition into metadata and overwrites. A presigned URL
        would leave the header unsigned, so that a proxy that drops it goes unnoticed; here it is part of the signature.
        """
        response = self._minio._execute(
            "PUT",
            self._bucket,
            key,
            body=data,
            headers={
                "If-None-Match": "*",
                "Content-Type": "application/octet-stream",
                "Content-MD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode(),
                _WRITER: writer,
                _SHA256: hashlib.sha256(data).hexdigest(),
            },
            no_body_trace=True,
        )
        return str(response.headers.get("Server", "")).strip()

    def _writer_of(self, key: str) -> str | None:
        """Who wrote the object ('' where another program did), or None where there is none."""
        try:
            with self._explained(key):
                found = self._minio.stat_object(self._bucket, key)
        except NotInStore:
            return None
        metadata = {name.lower(): value for name, value in (found.metadata or {}).items()}
        return str(metadata.get(_WRITER, ""))

    def _probe_once(self) -> None:
        with self._probing:
            if not self._probed:
                self._probe()
                self._probed = True

    def _probe(self) -> None:
        key = f"{_PROBES}{uuid.uuid4().hex}"
        refusal = (
            "so two workers could overwrite each other: use a server with conditional writes (see docs/store.md), "
            "or a store folder"
        )
        with self._explained(key):
            try:
                server = self._conditional_put(key, b"first", "probe")
            except S3Error as error:
                if error.code in ("NotImplemented", "InvalidArgument", "InvalidRequest", "MethodNotAllowed"):
                    raise FractureSweepError(f"{self._name} refuses If-None-Match ({error.code}), {refusal}") from None
                raise
            try:
                self._conditional_put(key, b"second", "probe")
            except S3Error as error:
                if error.code not in _TAKEN:
                    raise
            else:
                said = f" ({server})" if server else ""
                raise FractureSweepError(f"{self._name}{said} ignores If-None-Match, {refusal}")
            finally:
                self._minio.remove_object(self._bucket, key)

    def _listed(self, prefix: str) -> Iterator[Entry]:
        with self._explained(""):
            found = self._minio.list_objects(self._bucket, prefix=prefix or None, recursive=True)
        while True:
            with self._explained(""):
                entry = next(found, None)
            if entry is None:
                return
            name = str(entry.object_name)
            if _is_key(name):
                # of an object whose time the server does not tell nobody can say that it is old
                yield Entry(name, int(entry.size or 0), (entry.last_modified or datetime.now(UTC)).astimezone(UTC))

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Errors of client and server in the body become the store's own. They never show a URL or its signature."""
        try:
            yield
        except S3Error as error:
            raise self._of_server(error, key) from None
        except MinioException as error:
            status = getattr(error, "status_code", None) or getattr(error, "_code", None) or type(error).__name__
            if status == 412:
                raise _Taken(f"{self._name} answers a precondition that was not set") from None
            if status == 507:
                raise StoreFull(f"{self._name} has no room") from None
            raise StoreUnavailable(f"{self._name} does not answer as S3 does ({status}): is it one?") from None
        except (HTTPError, OSError) as error:
            cause = error.reason if isinstance(error, MaxRetryError) and error.reason is not None else error
            why = str(cause) if isinstance(cause, ResponseError) else type(cause).__name__
            if isinstance(cause, SSLError):
                raise StoreUnavailable(
                    f"{self._name} gives no TLS connection that we trust: set S3_CA_FILE to its certificates, or "
                    "S3_SECURE=false where it speaks plain http"
                ) from None
            raise _BrokenOff(
                f"{self._name} cannot be reached ({why}): see that it runs and that S3_ENDPOINT and S3_SECURE are right"
            ) from None

    def _of_server(self, error: S3Error, key: str) -> Exception:
        code, status = error.code or "", error.response.status if error.response else 0
        if code in _GONE:
            return NotInStore(key)
        if code in _TAKEN or status == 412:
            return _Taken(f"{self._name} answers a precondition that was not set")
        if code in _CONFLICT:
            return _Conflict(f"{self._name} reports a conflict")
        if code in _FULL or status == 507:
            return StoreFull(f"{self._name} has no room ({code})")
        if code == "NoSuchBucket":
            return StoreUnavailable(
                f"{self._name} has no bucket {self._bucket} (S3_BUCKET): make it, or set S3_CREATE_BUCKET=true"
            )
        if code in _REFUSED:
            return StoreUnavailable(
                f"{self._name} refuses us ({code}): see S3_ACCESS_KEY, S3_SECRET_KEY and the rights on {self._bucket}"
            )
        if code == "RequestTimeTooSkewed":
            return StoreUnavailable(f"{self._name} and this machine disagree on the time: set the clocks")
        return StoreUnavailable(f"{self._name} answers {code or status}")


class _BrokenOff(StoreUnavailable):
    """The connection was lost and could not be made again."""


class _Taken(StoreUnavailable):
    """412: something lies under the key."""


class _Conflict(StoreUnavailable):
    """409: another writer is at it; ask again."""


def ascending(listed: Iterable[T], *, folder: str, name_of: Callable[[T], str] = str) -> Iterator[T]:
    """Keys in ascending order, out of a listing in that order or folder by folder (SeaweedFS: `a/b` before `a-b`).

    Or whatever has a key that `name_of` finds.

    Only names that begin with a folder's name and go on with `-` or `.` can be out of place, so no more than one folder
    (directly under `folder`) and those beside it are held back at a time.
    """
    start = len(folder) + 1 if folder else 0
    held: list[T] = []
    root = ""
    for one in listed:
        first = name_of(one)[start:].partition("/")[0]
        if held and not (first == root or first.startswith((root + "-", root + "."))):
            yield from sorted(held, key=name_of)
            held = []
        if not held:
            root = first
        held.append(one)
    yield from sorted(held, key=name_of)


def _is_key(name: str) -> bool:
    try:
        check_key(name)
    except ValueError:
        return False
    return True


def _pause(attempt: int) -> None:
    time.sleep(random.uniform(0.5, 1.0) * min(2.0, 0.05 * 2**attempt))  # noqa: S311  (spreads writers, no secret)
