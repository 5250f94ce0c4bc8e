"""Makes a site's secrets, and the users of broker and store with the rights of `shared.fracture.access`.

Passwords are random, made once and never replaced; what follows from them (RabbitMQ's definitions, the S3 server's
identities and policies, Orthanc's configuration) is written anew at each call, so that an upgrade brings new rights
with it. The folder is closed (0700) and the files in it are open, since containers read them under another user.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from shared.fracture.access import BROKER_RIGHTS, STORE_RIGHTS, BrokerRights, iam_policy, pattern
from shared.fracture.topology import QUEUES
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.rabbit_broker import CONSUMER_TIMEOUT_SECONDS, EXCHANGE, queue_arguments
from shared.pipeline.secrets_files import SECRET_BYTES, keep_secret_text

ADMIN: Final = "admin"
"""Of RabbitMQ's management page, of the S3 server (makes the bucket) and of Orthanc; no service is it."""
KEYS: Final = ("pseudonym.key", "encryption.key")


def rabbitmq_definitions(
    passwords: Mapping[str, str], *, prefix: str = "", consumer_timeout_seconds: float = CONSUMER_TIMEOUT_SECONDS
) -> dict[str, object]:
    """RabbitMQ's definitions: exchange, every queue with its arguments and bindings, and a user each with its rights.

    `passwords` are of the users of BROKER_RIGHTS and, where it is among them, of ADMIN. A worker may configure nothing;
    it reads its own queues, and writes to the exchange alone, with its own routing keys alone (topic permissions).
    """
    exchange = prefix + EXCHANGE
    queues: list[dict[str, object]] = []
    bindings: list[dict[str, object]] = []
    for queue, message_types in QUEUES.items():
        made = queue_arguments(queue, prefix=prefix, consumer_timeout_seconds=consumer_timeout_seconds)
        for name, arguments in made.items():
            common = {"vhost": "/", "durable": True, "auto_delete": False}
            queues.append({"name": prefix + name, **common, "arguments": dict(arguments)})
            bindings.append(_binding(exchange, prefix + name, prefix + name))
        bindings += [_binding(exchange, prefix + queue, message_type) for message_type in message_types]
    users = [
        {
            "name": user,
            "password_hash": password_hash(password),
            "hashing_algorithm": "rabbit_password_hashing_sha256",
            "tags": "administrator" if user == ADMIN else "",
        }
        for user, password in passwords.items()
    ]
    permissions = [
        {"user": user, "vhost": "/", **_permissions(BROKER_RIGHTS.get(user), prefix=prefix)} for user in passwords
    ]
    topic_permissions = [
        {
            "user": user,
            "vhost": "/",
            "exchange": exchange,
            "write": _routing_keys(BROKER_RIGHTS[user], prefix=prefix),
            "read": "^$",
        }
        for user in passwords
        if user in BROKER_RIGHTS
    ]
    return {
        "vhosts": [{"name": "/"}],
        "users": users,
        "permissions": permissions,
        "topic_permissions": topic_permissions,
        "exchanges": [
            {
                "name": exchange,
                "vhost": "/",
                "type": "topic",
                "durable": True,
                "auto_delete": False,
                "internal": False,
                "arguments": {},
            }
        ],
        "queues": queues,
        "bindings": bindings,
    }


def _binding(exchange: str, queue: str, routing_key: str) -> dict[str, object]:
    return {
        "source": exchange,
        "vhost": "/",
        "destination": queue,
        "destination_type": "queue",
        "routing_key": routing_key,
        "arguments": {},
    }


def _permissions(rights: BrokerRights | None, *, prefix: str) -> dict[str, str]:
    if rights is None:
        return {"configure": ".*", "write": ".*", "read": ".*"}
    write = pattern((EXCHANGE,) if rights.tells else (), prefix=prefix)
    return {"configure": "^$", "write": write, "read": pattern(rights.reads, prefix=prefix)}


def _routing_keys(rights: BrokerRights, *, prefix: str) -> str:
    """Facts are told by their bare names, queues are called by their prefixed ones."""
    queues = tuple(prefix + key if key.partition(".")[0] in QUEUES else key for key in rights.tells)
    return pattern(queues)


def password_hash(password: str) -> str:
    """A password as RabbitMQ keeps it (its "Password hashing": base64 of salt and SHA-256 of salt and password).

    The salt follows from the password, so that the same password gives the same file; ours are random, 256 bits long.
    """
    salt = hashlib.sha256(b"salt" + password.encode()).digest()[:4]
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def seaweedfs_identities(secret_keys: Mapping[str, str], *, bucket: str) -> dict[str, object]:
    """SeaweedFS' S3 configuration: a user each with its IAM policy, and ADMIN with all rights."""
    identities: list[dict[str, object]] = []
    policies: list[dict[str, object]] = []
    for user, secret_key in secret_keys.items():
        identity: dict[str, object] = {
            "name": user,
            "credentials": [{"accessKey": user, "secretKey": secret_key}],
        }
        if user == ADMIN:
            identity["actions"] = ["Admin", "Read", "Write", "List", "Tagging"]
        else:
            identity["policyNames"] = [user]
            policies.append({"name": user, "content": json.dumps(iam_policy(STORE_RIGHTS[user], bucket))})
        identities.append(identity)
    return {"identities": identities, "policies": policies}


def orthanc_configuration(password: str) -> dict[str, object]:
    """Orthanc as PACS and receiver of results: a user of its own, DICOM and REST on the usual ports."""
    return {
        "Name": "fracture-sweep",
        "StorageDirectory": "/var/lib/orthanc/db",
        "IndexDirectory": "/var/lib/orthanc/db",
        "Plugins": ["/usr/share/orthanc/plugins", "/usr/local/share/orthanc/plugins"],
        "RemoteAccessAllowed": True,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {ADMIN: password},
        "HttpPort": 8042,
        "DicomAet": "ORTHANC",
        "DicomPort": 4242,
        "DicomCheckCalledAet": True,
        "OverwriteInstances": False,
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }


def write_secrets(folder: Path, *, bucket: str, random_text: Callable[[], str] | None = None) -> list[Path]:
    """Make what a site lacks of its secrets, and write what follows from them; returns every file, sorted.

    FractureSweepError where the folder cannot be written, or other users could look into it.
    """
    make = random_text or (lambda: secrets.token_hex(SECRET_BYTES))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            raise FractureSweepError(f"the folder of secrets {folder} is open to other users: chmod 700 {folder}")
    except OSError as error:
        raise FractureSweepError(f"the folder of secrets {folder} cannot be made: {error.strerror}") from None
    for name in KEYS:
        keep_secret_text(folder / name, make())
    broker = {user: keep_secret_text(folder / "rabbitmq" / user, make()) for user in (*BROKER_RIGHTS, ADMIN)}
    store = {user: keep_secret_text(folder / "s3" / user, make()) for user in (*STORE_RIGHTS, ADMIN)}
    orthanc = keep_secret_text(folder / "orthanc" / ADMIN, make())
    follows: dict[str, object] = {
        "rabbitmq/definitions.json": rabbitmq_definitions(broker),
        "s3/identities.json": seaweedfs_identities(store, bucket=bucket),
        "orthanc/orthanc.json": orthanc_configuration(orthanc),
        **{f"s3/policies/{user}.json": iam_policy(rights, bucket) for user, rights in STORE_RIGHTS.items()},
    }
    for name, document in follows.items():
        _write(folder / name, json.dumps(document, indent=2) + "\n")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write(path: Path, text: str) -> None:
    """Replace a file's content in place: a container that has it mounted sees the same file."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            path.chmod(0o644)
        path.write_text(text, encoding="utf-8")
        os.chmod(path, 0o444)
    except OSError as error:
        raise FractureSweepError(f"{path} cannot be written: {error.strerror}") from None
