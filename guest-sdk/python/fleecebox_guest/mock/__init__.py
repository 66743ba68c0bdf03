"""A host in memory, to run a provider in plain Python: disks, an archive and the rules of the contract, in milliseconds.

For a provider's own tests (`python3 -m unittest`). What it checks is what the host checks first of all: ranges, coverage,
and that what was claimed is given back, by an image that is opened anew. It is no sandbox: globals outlive an instance
here, all of Python's library works, an exception that is no `Error` is the test's own, and only one volume is backed up
at a time. `fleecebox provider test` is the judge of the component::

    from fleecebox_guest.mock import Disk

    disk = Disk("scsi0", 1_000_001)
    disk.write(500_000, b"something")
    full = disk.back_up_blindly(Mirror)
    assert full.restore() == disk.bytes()

    disk.write(1_000_000, b"!")
    incremental = disk.back_up_blindly(Mirror)
    assert incremental.restore() == disk.bytes()
    assert full.restore()[1_000_000] == 0
"""

from dataclasses import dataclass

from ..archive import Archive
from ..context import Context
from ..error import Error, Io
from ..extent import Extent
from ..objects import Objects
from ..provider import BlindProvider, BlindVolume, Provider, Volume
from ..volume import BitmapMode, DirtyRegions, Discarder, Reader, Snapshot
from .host import BLOCK, Host

__all__ = [
    "Backup",
    "Disk",
    "Failure",
    "Fault",
    "GaveUp",
    "Leaked",
    "NotGivenBack",
    "NotOpened",
    "Uncovered",
    "Wrong",
]

READ_BACK = 4 << 20
"""Most bytes that an image is asked for at once."""


@dataclass(frozen=True)
class Fault:
    """Which call of the next backup fails, counted from 1, of all that may fail; and with what."""

    nth_call: int
    error: Error = Io()


class Failure(Exception):
    """Why there is no backup. The next one covers the same changes again."""


class GaveUp(Failure):
    """`run` raised an error, which is `error`."""

    def __init__(self, error: Error):
        super().__init__(f"the provider gave up: {error!r}")
        self.error = error


class Uncovered(Failure):
    """`run` succeeded without having covered `range`, the first of those missing."""

    def __init__(self, range: Extent):
        super().__init__(f"{range.offset}..{range.end} is neither put, nor in a finished object")
        self.range = range


class Leaked(Failure):
    """The object `name` was neither finished nor dropped."""

    def __init__(self, name: str):
        super().__init__(f"the object {name} was neither finished nor dropped")
        self.name = name


class NotOpened(Failure):
    """The image cannot be opened, because of `error`."""

    def __init__(self, error: Error):
        super().__init__(f"the image cannot be opened: {error!r}")
        self.error = error


class NotGivenBack(Failure):
    """The image answers `error` for `range`, which was claimed."""

    def __init__(self, range: Extent, error: Error):
        super().__init__(f"the image does not give back {range.offset}..{range.end}: {error!r}")
        self.range = range
        self.error = error


class Wrong(Failure):
    """The image gives back too few or too many bytes, or other bytes than the disk held in `range`."""

    def __init__(self, range: Extent):
        super().__init__(f"the image gives back other bytes than the disk held in {range.offset}..{range.end}")
        self.range = range


class Backup:
    """A backup that worked."""

    def __init__(self, restored: bytes, receipt: bytes, objects: dict[str, bytes], log: list[str]):
        self._restored = restored
        self._receipt = receipt
        self._objects = objects
        self._log = log

    def restore(self) -> bytes:
        """The whole disk as of this backup: what was placed from the archive, what was claimed from the image."""
        return self._restored

    def receipt(self) -> bytes:
        """What `run` returned."""
        return self._receipt

    def object(self, name: str) -> bytes | None:
        """The bytes of an object that this backup finished."""
        return self._objects.get(name)

    def log(self) -> list[str]:
        """The lines of its log."""
        return self._log


class Disk:
    """A disk that changes and is backed up: the first time in full, then only what changed since the last backup that
    worked.
    """

    def __init__(self, name: str, size: int):
        """All zero."""
        self._name = name
        self._bytes = bytearray(size)
        self._dirty = [True] * -(-size // BLOCK)
        self._settings = ""
        self._attachments: dict[str, bytes] = {}
        self._without_reader = False
        self._without_discarder = False
        self._fault: Fault | None = None
        self._base: Backup | None = None

    def write(self, offset: int, data: bytes) -> None:
        """Writes as a guest does. Raises `IndexError` if that ends past the disk."""
        end = offset + len(data)
        if offset < 0 or end > len(self._bytes):
            raise IndexError(f"{offset}..{end} is not within the disk")
        self._bytes[offset:end] = data
        if data:
            for block in range(offset // BLOCK, (end - 1) // BLOCK + 1):
                self._dirty[block] = True

    def set_settings(self, toml: str) -> None:
        """The provider's settings from here on (TOML)."""
        self._settings = toml

    def attach(self, name: str, data: bytes) -> None:
        """Attaches something, such as `guest-config`."""
        self._attachments[name] = data

    def withhold_reader(self) -> None:
        """Grants no reader from here on."""
        self._without_reader = True

    def withhold_discarder(self) -> None:
        """Grants no discarder from here on."""
        self._without_discarder = True

    def fail(self, fault: Fault) -> None:
        """Lets one call of the next backup fail."""
        self._fault = fault

    def back_up(self, provider: type[Provider]) -> Backup:
        """Backs the disk up, and reads back what was claimed. Raises a `Failure`."""
        host = self._host(claims=True)
        volume = Volume(
            Snapshot(host.snapshot()),
            DirtyRegions(host.dirty_regions()),
            None if self._without_reader else Reader(host.reader()),
            None if self._without_discarder else Discarder(host.discarder()),
        )
        receipt = self._run(provider, volume, host)
        restored = self._placed(host)
        image = None
        for claimed in host.claimed():
            for piece in claimed.pieces(READ_BACK):
                if image is None:
                    image = _open(provider, host, receipt)
                try:
                    given = image.read(piece.offset, piece.length)
                except Error as error:
                    raise NotGivenBack(piece, error) from error
                if given != self._bytes[piece.offset : piece.end]:
                    raise Wrong(piece)
                restored[piece.offset : piece.end] = given
        return self._commit(host, restored, receipt)

    def back_up_blindly(self, provider: type[BlindProvider]) -> Backup:
        """As `back_up`, for a provider that never sees a byte."""
        host = self._host(claims=False)
        volume = BlindVolume(
            Snapshot(host.snapshot()),
            DirtyRegions(host.dirty_regions()),
            None if self._without_discarder else Discarder(host.discarder()),
        )
        receipt = self._run(provider, volume, host)
        return self._commit(host, self._placed(host), receipt)

    def bytes(self) -> bytes:
        """What it holds now."""
        return bytes(self._bytes)

    def _host(self, claims: bool) -> Host:
        mode = BitmapMode.REUSE if self._base else BitmapMode.NEW
        fault, self._fault = self._fault, None
        return Host(
            self._name,
            bytes(self._bytes),
            self._dirty,
            mode,
            claims,
            self._settings,
            self._attachments,
            (fault.nth_call, fault.error.code()) if fault else None,
        )

    def _run(self, provider, volume, host: Host) -> bytes:
        base = self._base.receipt() if self._base else None
        try:
            receipt = provider().run(Context(host.context()), volume, Archive(host.writer()), base)
        except Error as error:
            raise GaveUp(error) from error
        # Other types do not pass the component's boundary either.
        receipt = bytes(memoryview(receipt))
        leaked = host.unfinished()
        if leaked is not None:
            raise Leaked(leaked)
        uncovered = host.uncovered()
        if uncovered is not None:
            raise Uncovered(uncovered)
        return receipt

    def _placed(self, host: Host) -> bytearray:
        """The base with all that the host itself placed."""
        restored = bytearray(self._base.restore() if self._base else len(self._bytes))
        for placed in host.placed_and_zero():
            restored[placed.offset : placed.end] = self._bytes[placed.offset : placed.end]
        return restored

    def _commit(self, host: Host, restored: bytearray, receipt: bytes) -> Backup:
        backup = Backup(bytes(restored), receipt, host.objects_kept(), host.log)
        self._dirty = [False] * len(self._dirty)
        self._base = backup
        return backup


def _open(provider: type[Provider], host: Host, receipt: bytes):
    try:
        return provider.Image(Context(host.context()), Objects(host.objects()), receipt)
    except Error as error:
        raise NotOpened(error) from error
