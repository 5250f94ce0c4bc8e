"""How much room an S3 server has left. S3 has no call for it, so the server's own Prometheus page is read."""

from __future__ import annotations

import math

import urllib3
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from urllib3.exceptions import HTTPError

from shared.pipeline.errors import FractureSweepError, StoreUnavailable

_SECONDS = 10.0


def free_space_of(*, url: str | None, metric: str | None, http: urllib3.PoolManager) -> FreeSpace | None:
    """What the two settings name, or None where neither is set; FractureSweepError where they cannot be used."""
    if url is None and metric is None:
        return None
    if url is None or metric is None:
        raise FractureSweepError("S3_FREE_SPACE_URL and S3_FREE_SPACE_METRIC go together: set both, or neither")
    return FreeSpace(url=url, metric=metric, http=http)


class FreeSpace:
    """One gauge on one Prometheus page. `metric` is its name, with labels that must match or without."""

    def __init__(self, *, url: str, metric: str, http: urllib3.PoolManager) -> None:
        self._url = url
        self._metric = metric
        self._wanted = selected(metric)
        self._http = http

    def ask(self) -> int:
        """The free bytes; StoreUnavailable where the page cannot be read or does not hold the gauge."""
        where = "the page of the S3 server's free space (S3_FREE_SPACE_URL)"
        try:
            answer = self._http.request("GET", self._url, timeout=_SECONDS, retries=False)
        except HTTPError as error:
            raise StoreUnavailable(f"{where} cannot be read ({type(error).__name__})") from None
        if answer.status != 200:
            raise StoreUnavailable(f"{where} answers {answer.status}: is it public, and the address right?")
        try:
            found = smallest(answer.data.decode(), self._wanted)
        except ValueError:
            raise StoreUnavailable(f"{where} is no Prometheus text") from None
        if found is None:
            raise StoreUnavailable(f"{where} does not hold {self._metric} (S3_FREE_SPACE_METRIC)")
        return found


def selected(metric: str) -> Sample:
    """The name and labels that a metric's text asks for; FractureSweepError where it is none."""
    try:
        (family,) = text_string_to_metric_families(f"{metric.strip()} 0\n")
        (sample,) = family.samples
    except ValueError:
        raise FractureSweepError(
            f'S3_FREE_SPACE_METRIC is a name or name{{label="value"}}, not {metric!r}: see docs/back-pressure.md'
        ) from None
    return sample


def smallest(text: str, wanted: Sample) -> int | None:
    """The smallest value of the samples with this name and these labels, or None; ValueError for text that is none."""
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == wanted.name and wanted.labels.items() <= sample.labels.items() and math.isfinite(sample.value)
    ]
    return int(min(found)) if found else None
