"""The two kinds of provider, and what each is handed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from .archive import Archive
from .context import Context
from .objects import Objects
from .volume import DirtyRegions, Discarder, Reader, Snapshot


@dataclass(frozen=True)
class Volume:
    """What a backup may do with one volume. What is None, the operator's policy does not grant."""

    snapshot: Snapshot
    """The volume."""
    dirty: DirtyRegions
    """What of it is to be backed up."""
    reader: Reader | None
    """Authority to see its bytes."""
    discarder: Discarder | None
    """Authority to give snapshot space back early."""


@dataclass(frozen=True)
class BlindVolume:
    """What a blind backup may do with one volume. What is None, the operator's policy does not grant."""

    snapshot: Snapshot
    """The volume."""
    dirty: DirtyRegions
    """What of it is to be backed up."""
    discarder: Discarder | None
    """Authority to give snapshot space back early."""


class Provider(ABC):
    """A provider that sees the bytes: the contract's world `provider`. `export` makes a component of it."""

    Image: "type[Image]"
    """Gives back what `run` claimed."""

    @abstractmethod
    def run(self, job: Context, volume: Volume, archive: Archive, base: bytes | None) -> bytes:
        """Backs up one volume. Volumes may run side by side, each in an instance of its own that shares no memory with
        this one.

        `base` is what this returned for the volume in the backup that this one builds on. What it returns, the
        receipt, is kept with the backup; it has at most 64 KiB.

        After an `Error` nothing of the backup is kept, and the next one covers the same changes again.
        """


class Image(ABC):
    """The claimed ranges of one volume in one backup: the contract's `restore.image`."""

    @abstractmethod
    def __init__(self, job: Context, objects: Objects, receipt: bytes):
        """Opens the image that the receipt of `Provider.run` stands for. `objects` holds what all volumes of that
        backup wrote. An `Error` is shown to whoever restores or verifies.
        """

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly `length` bytes of the volume, at most 4 MiB. Called in any order, for ranges of whole blocks
        that were claimed in this very backup, though not necessarily by one claim.
        """


class BlindProvider(ABC):
    """A provider that cannot see the bytes: the contract's world `blind-provider`. `export_blind` makes a component of
    it.
    """

    @abstractmethod
    def run(self, job: Context, volume: BlindVolume, archive: Archive, base: bytes | None) -> bytes:
        """Backs up one volume, as `Provider.run` does."""
