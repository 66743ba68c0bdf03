"""One frozen volume, and what may be done with it."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from .bindings import types
from .error import host_call
from .extent import Extent

REGIONS_PER_CALL = 1024
"""Regions that one call asks the host for: enough that calls cost nothing beside the copying."""


class BitmapMode(Enum):
    """What is known of the changes since an earlier backup."""

    NONE = 0
    """Nothing is tracked: the whole volume is to be backed up."""
    NEW = 1
    """Tracking starts with this backup: the whole volume is to be backed up."""
    REUSE = 2
    """Only what changed since the base is to be backed up."""


@dataclass(frozen=True)
class VolumeInfo:
    """What a provider may know about a volume."""

    name: str
    """Stable across backups, such as `drive-scsi0`. Fit for the name of an object."""
    size: int
    """In bytes. Need not be a multiple of the block size."""
    block_size: int
    """In bytes, a power of two. Ranges begin and end on multiples of this, but for the volume's end."""
    mode: BitmapMode
    """What the dirty regions are made from."""


class Snapshot:
    """Names one frozen volume. It reveals no byte of it: the host copies on the holder's behalf."""

    def __init__(self, handle):
        self._handle = handle

    def info(self) -> VolumeInfo:
        """What the volume is. The same at every call."""
        info = self._handle.info()
        return VolumeInfo(info.name, info.size, info.block_size, BitmapMode(info.mode.value))


class RegionKind(Enum):
    """What is known of a region without reading it."""

    DATA = 0
    """To be backed up. It may still read as zeroes."""
    ZERO = 1
    """Reads as zeroes. The host has recorded it already; nothing needs to be done."""


@dataclass(frozen=True)
class Region:
    """A part of what is to be backed up."""

    range: Extent
    """Made of whole blocks; never empty."""
    kind: RegionKind
    """The same for the whole range."""


class DirtyRegions:
    """What is to be backed up: regions in ascending order that do not overlap. Neighbours may be of the same kind; how
    the host cuts them means nothing.

    Can be gone through once. Raises `Error` if the host cannot say what comes next.
    """

    def __init__(self, handle):
        self._handle = handle

    def __iter__(self) -> Iterator[Region]:
        while True:
            with host_call:
                batch = self._handle.next(REGIONS_PER_CALL)
            if not batch:
                return
            for region in batch:
                range = Extent(region.range.offset, region.range.length)
                yield Region(range, RegionKind(region.kind.value))

    def data_runs(self) -> Iterator[Extent]:
        """Only what has to be stored: zero regions are left out, for the host has recorded them, and neighbouring data
        regions are joined. So runs depend on the volume's content alone, which chunks that are to be found again need.
        """
        run = None
        for region in self:
            if region.kind is RegionKind.ZERO:
                continue
            if run is not None and run.end == region.range.offset:
                run = Extent(run.offset, run.length + region.range.length)
                continue
            if run is not None:
                yield run
            run = region.range
        if run is not None:
            yield run


class Reader:
    """Authority to see a volume's bytes."""

    def __init__(self, handle):
        self._handle = handle
        self._max_read = handle.max_read()

    @property
    def max_read(self) -> int:
        """Most bytes that one `read` may ask for, at least 64 KiB. Reads of about this size, in ascending order, are
        the fastest.
        """
        return self._max_read

    def read(self, offset: int, length: int) -> bytes:
        """Reads exactly `length` bytes at any offset within the dirty regions.

        Raises `TooLarge` above `max_read`, `OutOfRange`, `NotDirty`, `Discarded`, `QuotaExceeded`, `Io`.
        """
        with host_call:
            return self._handle.read(offset, length)


class Discarder:
    """Authority to give snapshot space back early. Acts on the fleecing image only, never on the disk of the VM."""

    def __init__(self, handle):
        self._handle = handle

    def discard(self, range: Extent) -> None:
        """Gives up a range of whole blocks whose backup is finished: nothing reads it again in this backup.

        Raises `OutOfRange`; `NotDirty` if some byte of it is in no dirty region, or neither zero, nor put, nor in an
        object that is finished.
        """
        with host_call:
            self._handle.discard(types.Extent(range.offset, range.length))
