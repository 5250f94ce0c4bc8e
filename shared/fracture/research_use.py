"""What stands on everything that a person may read as a result."""

from __future__ import annotations

from typing import Final

RESEARCH_USE: Final = "Research use only. Not a medical device; not for diagnosis or treatment."
