"""Write a Fleecebox backup provider in Python.

A provider backs up one volume per call. It is handed a few capabilities and reaches nothing else; the host moves the
bytes, remembers where each block is, and proves the backup before it counts. There are two kinds:

- a `BlindProvider` arranges what the host stores and cannot see a byte of the disk. Most providers are best blind: they
  are as fast as the host, and there is nothing to restore, because the host does it by itself;
- a `Provider` reads the bytes, writes them in a form of its own, *claims* the ranges that it holds, and gives them back
  through its `Image`.

A whole blind provider, which keeps each volume's changes as one object::

    from fleecebox_guest import BlindProvider, Encoding, export_blind

    class Mirror(BlindProvider):
        def run(self, job, volume, archive, base):
            object = archive.create(volume.snapshot.info().name, Encoding.ZSTD)
            for run in volume.dirty.data_runs():
                object.splice(volume.snapshot, run)
            job.info(f"stored {object.finish()} bytes")
            return b""

    export_blind(Mirror)

`fleecebox-build mirror.py` makes `mirror.wasm` of it. Whatever a call fails with is raised as an `Error`; let it pass,
and the host shows it to the operator. The contract itself, with the rules for ranges and names, is `provider.wit`.

In plain Python, a provider runs against a host in memory: `fleecebox_guest.mock`, for its own tests.
"""

from .archive import MAX_PUT, Archive, Encoding, OutputStream
from .context import Context, Level
from .error import (
    Cancelled,
    Discarded,
    Error,
    Exists,
    InvalidName,
    Io,
    NotDirty,
    NotFound,
    OutOfRange,
    Quota,
    QuotaExceeded,
    TooLarge,
)
from .exports import export, export_blind
from .extent import Extent
from .objects import Objects, StoredObject
from .provider import BlindProvider, BlindVolume, Image, Provider, Volume
from .volume import BitmapMode, DirtyRegions, Discarder, Reader, Region, RegionKind, Snapshot, VolumeInfo

__all__ = [
    "MAX_PUT",
    "Archive",
    "BitmapMode",
    "BlindProvider",
    "BlindVolume",
    "Cancelled",
    "Context",
    "DirtyRegions",
    "Discarded",
    "Discarder",
    "Encoding",
    "Error",
    "Exists",
    "Extent",
    "Image",
    "InvalidName",
    "Io",
    "Level",
    "NotDirty",
    "NotFound",
    "Objects",
    "OutOfRange",
    "OutputStream",
    "Provider",
    "Quota",
    "QuotaExceeded",
    "Reader",
    "Region",
    "RegionKind",
    "Snapshot",
    "StoredObject",
    "TooLarge",
    "Volume",
    "VolumeInfo",
    "export",
    "export_blind",
]
