"""How many cases are under way, from how full the queues are: what back-pressure goes by. Pure.

It is an estimate on purpose: asking the store for each case would cost more than the work that it holds back. It never
says none while a message is counted by the broker, and each error is on one side:

- a series that waits for the segmenter or the resampler counts as one case, since its cases are not known yet;
- a case lies in the queues of both extractors at once: the longer of the two counts;
- each case is told to the fusion classifier twice: half of its queue counts, rounded up;
- a case that waits for its report is still under way.

RabbitMQ does not tell of messages that a worker holds, so those come on top there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from shared.fracture.topology import (
    DEEP_EXTRACTOR,
    FUSION_CLASSIFIER,
    RADIOMICS_EXTRACTOR,
    REPORT_GENERATOR,
    RESAMPLER,
    SEGMENTER,
)

RETRY: Final = ".retry"
"""Behind a queue's name: where its messages wait for their next attempt."""

_QUEUES: Final = (
    SEGMENTER,
    RESAMPLER,
    RADIOMICS_EXTRACTOR,
    DEEP_EXTRACTOR,
    FUSION_CLASSIFIER,
    REPORT_GENERATOR,
)

COUNTED: Final[tuple[str, ...]] = (*_QUEUES, *(queue + RETRY for queue in _QUEUES))
"""The queues whose depths `cases_under_way` looks at."""


def cases_under_way(messages: Mapping[str, int]) -> int:
    """How many cases are under way, from the messages (ready, held or delayed) in each queue; absent queues hold 0."""

    def waiting(queue: str) -> int:
        return messages.get(queue, 0) + messages.get(queue + RETRY, 0)

    return (
        waiting(SEGMENTER)
        + waiting(RESAMPLER)
        + max(waiting(RADIOMICS_EXTRACTOR), waiting(DEEP_EXTRACTOR))
        + (waiting(FUSION_CLASSIFIER) + 1) // 2
        + waiting(REPORT_GENERATOR)
    )
