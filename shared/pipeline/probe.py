"""Asks the worker of this container whether it is ready: `python -m shared.pipeline.probe [PORT]`.

Docker's health check; it needs no curl in the image and imports nothing but the standard library.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

PORT = 8080
_SECONDS = 10


def ask(port: int, path: str = "/readyz") -> tuple[bool, str]:
    """Whether the worker on this port of the machine says yes, and what it says."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=_SECONDS) as answer:
            return True, answer.read().decode()
    except urllib.error.HTTPError as error:
        return False, error.read().decode()
    except OSError as error:
        return False, f"nothing answers on port {port} ({error})"


def main(arguments: list[str]) -> int:
    """Print what the worker says; 0 where it is ready, else 1."""
    ready, said = ask(int(arguments[0]) if arguments else PORT)
    sys.stdout.write(said + "\n")
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
