"""A series is the union of its durable instances: late slices join those that are stored already.

Pure. Slices that a delivery lacks are taken out of the stored volume, plane by plane, and the whole is put in order
along the normal again; where the planes do not make one even stack the reasons say so.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from services.dicom_ingest.collected import CollectedMask, CollectedSeries, CollectedSlice
from shared.fracture.records import SeriesIdentity
from shared.fracture.volume import Geometry, Mask, Volume

_SPACING_TOLERANCE = 0.05
"""Of the slice spacing: how far a plane may lie from its even place."""


def united(series: CollectedSeries, *, durable: SeriesIdentity, volume: Volume) -> CollectedSeries:
    """The series with the planes of `volume` (whose UIDs are `durable`'s, in order) that it lacks."""
    if series.volume is None:
        return series
    new, old = series.volume, volume
    if not _same_stack(new.geometry, old.geometry):
        return replace(
            series,
            volume=None,
            reasons=("late slices with another matrix, spacing or orientation than the slices that came before",),
        )
    have = {s.sop_instance_uid for s in series.slices}
    normal = np.asarray(new.geometry.direction_zyx)[:, 0]
    planes = [
        (float(normal @ new.geometry.world_zyx(np.array([[k, 0.0, 0.0]]))[0]), new.voxels[k], s)
        for k, s in enumerate(series.slices)
    ]
    for stored in durable.slices:
        if stored.sop_instance_uid in have:
            continue
        position = float(normal @ old.geometry.world_zyx(np.array([[stored.index, 0.0, 0.0]]))[0])
        slice_ = CollectedSlice(
            sop_instance_uid=stored.sop_instance_uid, sop_class_uid=stored.sop_class_uid, position_mm=position
        )
        planes.append((position, old.voxels[stored.index], slice_))
    planes.sort(key=lambda plane: plane[0])
    positions = np.array([plane[0] for plane in planes])
    gaps = np.diff(positions)
    spacing = float(np.median(gaps))
    if spacing <= 0 or np.abs(gaps - spacing).max() > _SPACING_TOLERANCE * spacing:
        return replace(
            series,
            volume=None,
            slices=tuple(plane[2] for plane in planes),
            instances=len(planes),
            reasons=("the slices that came now and before do not make one even stack (missing or repeated positions)",),
        )
    first = new.geometry if planes[0][2].sop_instance_uid in have else old.geometry
    origin = _origin_of_plane(first, positions[0], normal)
    geometry = Geometry(
        shape_zyx=(len(planes), new.geometry.shape_zyx[1], new.geometry.shape_zyx[2]),
        spacing_zyx=(spacing, *new.geometry.spacing_zyx[1:]),
        origin_zyx=origin,
        direction_zyx=new.geometry.direction_zyx,
    )
    order = {s.sop_instance_uid: index for index, s in enumerate(series.slices)}
    places = [order.get(plane[2].sop_instance_uid) for plane in planes]
    return replace(
        series,
        volume=Volume(voxels=np.stack([plane[1] for plane in planes]), geometry=geometry),
        slices=tuple(plane[2] for plane in planes),
        instances=len(planes),
        mask=None if series.mask is None else _spread(series.mask, places=places, geometry=geometry),
    )


def _spread(mask: CollectedMask, *, places: list[int | None], geometry: Geometry) -> CollectedMask:
    """The mask on the united grid: `places` says which of its planes lies at each new plane, None where none does."""

    def on_grid(grid: Mask) -> Mask:
        voxels = np.zeros(geometry.shape_zyx, dtype=grid.voxels.dtype)
        for plane, place in enumerate(places):
            if place is not None:
                voxels[plane] = grid.voxels[place]
        return Mask(voxels=voxels, geometry=geometry)

    return replace(mask, labels=on_grid(mask.labels), body=None if mask.body is None else on_grid(mask.body))


def covers(new: Geometry, old: Geometry) -> bool:
    """Whether a stack has a plane wherever another one has: then nothing of that one is lost without it."""
    if not _same_stack(new, old):
        return False
    first_and_last = np.array([[0.0, 0.0, 0.0], [old.shape_zyx[0] - 1.0, 0.0, 0.0]])
    places = new.index_zyx(old.world_zyx(first_and_last))
    planes = np.round(places[:, 0])
    on_a_plane = np.abs(places[:, 0] - planes).max() <= _SPACING_TOLERANCE
    inside = planes.min() >= 0 and planes.max() <= new.shape_zyx[0] - 1
    return bool(on_a_plane and inside and np.abs(places[:, 1:]).max() <= _SPACING_TOLERANCE)


def _same_stack(one: Geometry, other: Geometry) -> bool:
    return (
        one.shape_zyx[1:] == other.shape_zyx[1:]
        and np.allclose(one.spacing_zyx[1:], other.spacing_zyx[1:], atol=1e-4)
        and np.allclose(one.direction_zyx, other.direction_zyx, atol=1e-3)
        and abs(one.spacing_zyx[0] - other.spacing_zyx[0]) <= _SPACING_TOLERANCE * other.spacing_zyx[0]
    )


def _origin_of_plane(
    geometry: Geometry, position: float, normal: np.ndarray[tuple[int, ...], np.dtype[np.float64]]
) -> tuple[float, float, float]:
    origin = np.asarray(geometry.origin_zyx, dtype=np.float64)
    moved = origin + normal * (position - float(normal @ origin))
    return (float(moved[0]), float(moved[1]), float(moved[2]))
