"""Starts the radiomics extractor as it is, but for a fault: it dies on the cases that /faults/poison names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from services.__main__ import main
from services.radiomics_extractor import service

POISON = Path("/faults/poison")
extract_case = service.extract_case


def dying(fact: Any, **more: Any) -> Any:
    if POISON.exists() and fact.case_id in POISON.read_text().split():
        os._exit(137)
    return extract_case(fact, **more)


service.extract_case = dying
if __name__ == "__main__":  # the extraction processes import this file too
    main()
