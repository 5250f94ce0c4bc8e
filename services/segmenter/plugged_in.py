"""A hospital's own segmentation tool, as a command: CT as NIfTI in, label NIfTI out, in a process of its own.

A declaration (TOML) says how it is called, where its labels lie and what they mean. The command sees an image without
a header that could name anybody, a folder that goes with it, and the environment that the declaration gives; what it
writes to standard error goes into the log, never into a record. Its limits of time and memory are the declaration's.

    name = "totalsegmentator"
    version = "2.18.0"                                    # or version_command = ["…"], whose output it is
    command = ["TotalSegmentator", "-i", "{image}", "-o", "{output}", "-ml", "-ta", "total", "-d", "cpu"]
    labels = "totalseg"                                   # totalseg, verse, or a table of value = level
    roi = "vertebra"                                      # what a label holds: body or vertebra
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import SimpleITK as sitk
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.fracture.faults import faults_of
from shared.fracture.ids import digest
from shared.fracture.levels import KNOWN_TABLES, ORDER, LevelTable
from shared.fracture.protocol import RoiKind
from shared.fracture.spine.record import SegmenterNote
from shared.fracture.volume import Mask, Volume, mask_from_sitk, to_sitk
from shared.pipeline.errors import FractureSweepError, OverBudget

IMAGE: Final = "image.nii.gz"
OUTPUT: Final = "output.nii.gz"
VERSION_SECONDS: Final = 60.0
KEPT_LINES: Final = 20
"""Of what a command that failed wrote to standard error, how much goes into the log."""
_GIB: Final = 2**30
_LARGEST_DECLARATION: Final = 100_000
_LARGEST_LABEL: Final = 65535

LOG = logging.getLogger("fracture_sweep.segmenter")


class CommandRefused(ValueError):
    """A command gave no usable mask; the text says why, in words without identifiers."""


class KnownFailure(BaseModel):
    """A text of a command's output that says why it failed, and the reason to give for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contains: Annotated[str, Field(min_length=1)]
    reason: Annotated[str, Field(min_length=1)]


class Declaration(BaseModel):
    """How a command is called and what it gives. `{image}`, `{output}` and `{work}` are filled in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    version: str = ""
    version_command: tuple[str, ...] = ()
    command: Annotated[tuple[str, ...], Field(min_length=1)]
    image: Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")] = IMAGE
    """Where the image is put, below the working folder."""
    output: Annotated[str, Field(pattern=r"^[\w*][\w.*-]*(/[\w*][\w.*-]*)*$")] = OUTPUT
    """Where the command leaves its label map, below the working folder; `*` stands for anything in a name."""
    labels: Literal["totalseg", "verse"] | dict[str, str]
    others: tuple[tuple[int, int], ...] = ()
    """Ranges of values (first, last) that are known and no vertebra, beside those that `labels` knows."""
    roi: RoiKind
    seconds: Annotated[float, Field(gt=0)] = 1500.0
    """Below the broker's consumer timeout, which is half an hour unless it is set."""
    memory_gib: Annotated[float, Field(ge=0)] = 0.0
    """Address space of the command, and of each process that it starts; 0 sets no limit."""
    environment: dict[str, str] = {}
    """Over what the worker has of PATH, HOME, LANG and the variables that name threads and devices."""
    failures: tuple[KnownFailure, ...] = ()

    @cached_property
    def table(self) -> LevelTable:
        """Which value is which level, and the values that are known and no vertebra."""
        if isinstance(self.labels, str):
            known = KNOWN_TABLES[self.labels]
        else:
            known = LevelTable(
                levels={int(value): level for value, level in self.labels.items() if level},
                others=frozenset(int(value) for value, level in self.labels.items() if not level),
            )
        more = frozenset(value for first, last in self.others for value in range(first, min(last, _LARGEST_LABEL) + 1))
        return LevelTable(levels=known.levels, others=known.others | more)


class PluggedIn(BaseModel):
    """A declaration that was looked at: its tool is there and has a version."""

    model_config = ConfigDict(frozen=True)

    declaration: Declaration
    note: SegmenterNote


def read_declaration(path: Path) -> Declaration:
    """The declaration in a TOML file. FractureSweepError with all its faults."""
    try:
        if path.stat().st_size > _LARGEST_DECLARATION:
            raise FractureSweepError(f"{path} is too large for a declaration")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise FractureSweepError(f"{path} cannot be read: segmenter.command names the TOML file of a command") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FractureSweepError(f"{path} is no TOML: {error}") from None
    try:
        found = Declaration.model_validate(content)
    except ValidationError as error:
        raise FractureSweepError(f"{path}: {faults_of(error, whole='declaration')}") from None
    faults = _faults(found)
    if faults:
        raise FractureSweepError(f"{path}: {'; '.join(faults)}")
    return found


def _faults(declaration: Declaration) -> list[str]:
    faults = []
    if bool(declaration.version) == bool(declaration.version_command):
        faults.append("give a version, or a version_command whose output is one")
    writes = any("{output}" in part or "{work}" in part for part in declaration.command)
    if not writes and "*" not in declaration.output:
        faults.append("command: no part names {output} (or {work}), so its label map could not be found")
    if not any("{image}" in part or "{work}" in part for part in declaration.command):
        faults.append("command: no part names {image} (or {work})")
    if isinstance(declaration.labels, dict):
        for value, level in declaration.labels.items():
            if not value.isdigit() or not 1 <= int(value) <= _LARGEST_LABEL:
                faults.append(f"labels: {value!r} is no label value")
            if level and level not in ORDER:
                faults.append(f"labels: {level!r} is no level (C1 to S1, or nothing for what is no vertebra)")
        named = [level for level in declaration.labels.values() if level]
        faults += [f"labels: {level} has two values" for level in sorted({n for n in named if named.count(n) > 1})]
        if not named:
            faults.append("labels: no value is a vertebra")
    return faults


def plug_in(declaration: Declaration) -> PluggedIn:
    """Look whether the tool of a declaration is there, and which version it is. FractureSweepError where not."""
    tool = declaration.command[0]
    if shutil.which(tool, path=_environment(declaration).get("PATH")) is None:
        raise FractureSweepError(
            f"the segmenter's command {declaration.name!r} is not there: no program {tool!r} on PATH"
        )
    version = declaration.version or _version(declaration)
    text = declaration.model_dump(mode="json", exclude={"seconds", "memory_gib", "failures", "environment"})
    note = SegmenterNote(kind="command", name=declaration.name, version=version, sha256=digest(text))
    return PluggedIn(declaration=declaration, note=note)


def _version(declaration: Declaration) -> str:
    try:
        ran = subprocess.run(  # noqa: S603 - the declaration is the site's own, and no shell reads it
            declaration.version_command,
            env=_environment(declaration),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=VERSION_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FractureSweepError(
            f"the version of the segmenter's command {declaration.name!r} cannot be had ({type(error).__name__})"
        ) from None
    first = ran.stdout.decode("utf-8", errors="replace").strip().splitlines()
    if ran.returncode != 0 or not first:
        raise FractureSweepError(
            f"the version_command of {declaration.name!r} ended with exit code {ran.returncode} and said nothing"
            if not first
            else f"the version_command of {declaration.name!r} ended with exit code {ran.returncode}"
        )
    return first[0][:100]


_PASSED_ON: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def _environment(declaration: Declaration) -> dict[str, str]:
    """What the command sees of the environment: no secret of the worker's."""
    own = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {**own, **declaration.environment}


def run_command(plugged: PluggedIn, volume: Volume, work: Path) -> Path:
    """Run the command on a volume in an empty folder; where its label map lies.

    CommandRefused where it failed or left nothing; OverBudget where it took too long.
    """
    declaration = plugged.declaration
    image, output = work / declaration.image, work / declaration.output
    image.parent.mkdir(parents=True, exist_ok=True)
    if "*" not in declaration.output:
        output.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(to_sitk(volume), str(image), useCompression=False)
    places = {"{image}": str(image), "{output}": str(output), "{work}": str(work)}
    command = [_filled(part, places) for part in declaration.command]
    said = work / "said.txt"
    with said.open("wb") as stream:
        try:
            process = subprocess.Popen(  # noqa: S603 - the declaration is the site's own, and no shell reads it
                command,
                cwd=work,
                env=_environment(declaration),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise CommandRefused(f"the segmenter's command could not be started ({type(error).__name__})") from None
        _limit(process, declaration.memory_gib)
        try:
            code = process.wait(timeout=declaration.seconds)
        except subprocess.TimeoutExpired:
            raise OverBudget(
                f"the segmenter's command {declaration.name} took more than {declaration.seconds:g} s"
            ) from None
        finally:
            _end(process)
    if code != 0:
        raise CommandRefused(_why(declaration, code, said))
    found = [path for path in sorted(work.glob(declaration.output)) if path.is_file() and path != image]
    if not found:
        raise CommandRefused(f"the segmenter's command {declaration.name} ended well and left no label map")
    if len(found) > 1:
        raise CommandRefused(f"the segmenter's command {declaration.name} left {len(found)} label maps, one is wanted")
    return found[0]


def _filled(part: str, places: Mapping[str, str]) -> str:
    for name, value in places.items():
        part = part.replace(name, value)
    return part


def _limit(process: subprocess.Popen[bytes], memory_gib: float) -> None:
    if memory_gib <= 0 or os.name != "posix":
        return
    import resource

    if hasattr(resource, "prlimit"):
        bound = int(memory_gib * _GIB)
        try:
            resource.prlimit(process.pid, resource.RLIMIT_AS, (bound, bound))
        except (OSError, ValueError):  # it has ended already, or may not be limited so
            return


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a command: its whole session, since such tools start processes of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _why(declaration: Declaration, code: int, said: Path) -> str:
    """Why a command failed, in words of the declaration's; what it wrote goes into the log alone."""
    text = said.read_bytes()[-200_000:].decode("utf-8", errors="replace")
    fields = {"command": declaration.name, "exit_code": code, "said": text.splitlines()[-KEPT_LINES:]}
    LOG.warning("the segmenter's command failed", extra={"fields": fields})
    name = f"the segmenter's command {declaration.name}"
    for known in declaration.failures:
        if known.contains in text:
            return f"{name}: {known.reason}"
    if code < 0:
        killed = "was killed (out of memory?)" if -code == signal.SIGKILL else f"died of signal {-code}"
        return f"{name} {killed}"
    return f"{name} ended with exit code {code}; the worker's log has what it said"


def read_labels(plugged: PluggedIn, output: Path, volume: Volume) -> tuple[Mask, dict[str, int]]:
    """The label map that a command left, on the volume's grid, and its levels. CommandRefused where it is no such map.

    Values that the declaration does not know are refused by number, since they say that the declaration is not the
    command's.
    """
    declaration = plugged.declaration
    name = f"the label map of {declaration.name}"
    try:
        image = sitk.ReadImage(str(output))
    except RuntimeError:
        raise CommandRefused(f"{name} cannot be read as an image") from None
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise CommandRefused(f"{name} is not one map of three axes")
    try:
        found = mask_from_sitk(image)
    except ValueError as error:
        raise CommandRefused(f"{name} cannot be placed: {error}") from None
    if not volume.geometry.same_grid(found.geometry, tolerance_mm=0.1):
        raise CommandRefused(f"{name} lies on another grid than the scan that it was given")
    values: Any = found.voxels
    if values.dtype.kind == "f":
        if not np.array_equal(values, np.rint(values)):
            raise CommandRefused(f"{name} holds values that are no labels")
        values = np.rint(values)
    if values.size and (float(values.min()) < 0 or float(values.max()) > _LARGEST_LABEL):
        raise CommandRefused(f"{name} holds values that are no labels")
    levels, others = declaration.table.levels, declaration.table.others
    there = [int(value) for value in np.unique(values) if value != 0]
    unknown = [value for value in there if value not in levels and value not in others]
    if unknown:
        raise CommandRefused(
            f"{name} holds labels that its declaration does not know: {', '.join(map(str, unknown[:10]))}"
        )
    named = {levels[value]: value for value in there if value in levels}
    if not named:
        raise CommandRefused(f"{name} holds no vertebra")
    kept = np.where(np.isin(values, list(named.values())), values, 0).astype(np.uint16)
    return Mask(voxels=kept, geometry=volume.geometry), named
