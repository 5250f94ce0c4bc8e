"""Asks the worker of this container whether it is ready: `python3 -IS probe.py [PORT]`.

Docker's health check, every few seconds in every container: so it imports a socket and nothing else (15 ms, where
urllib's import alone takes ten times that), and the image needs no curl.
"""

from __future__ import annotations

import socket
import sys

PORT = 8080
_SECONDS = 10.0


def ask(port: int, path: str = "/readyz") -> tuple[bool, str]:
    """Whether the worker on this port of the machine says yes, and what it says."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_SECONDS) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            answer = b""
            while part := connection.recv(65536):
                answer += part
    except OSError as error:
        return False, f"nothing answers on port {port} ({error})"
    head, _, body = answer.decode(errors="replace").partition("\r\n\r\n")
    return head.split(" ")[1:2] == ["200"], body


def main(arguments: list[str]) -> int:
    """Print what the worker says; 0 where it is ready, else 1."""
    ready, said = ask(int(arguments[0]) if arguments else PORT)
    sys.stdout.write(said + "\n")
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
