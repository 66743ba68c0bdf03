"""Storing: chunks that the host packs, and objects with names."""

from enum import Enum

from .bindings import types
from .error import host_call
from .extent import Extent
from .volume import Snapshot

MAX_PUT = 1 << 20
"""Longest range that one `Archive.put` takes, in bytes."""


class Encoding(Enum):
    """How the host encodes what it stores. It decodes again when reading, so that sizes and offsets are always those
    before encoding.
    """

    IDENTITY = 0
    """Stored as it is."""
    ZSTD = 1
    """Compressed with Zstandard at a level that the operator chooses."""


class Archive:
    """Authority to store."""

    def __init__(self, handle):
        self._handle = handle

    def put(self, source: Snapshot, range: Extent, encoding: Encoding) -> None:
        """Stores a range of whole blocks, at most `MAX_PUT` long, as one chunk that is addressed by its content and
        stored once. May return before the copy is done; a failure then shows in a later call, or fails the backup.

        Raises `TooLarge` above `MAX_PUT`; `OutOfRange`, `NotDirty`, `Discarded`, `QuotaExceeded`, `Io`.
        """
        with host_call:
            extent = types.Extent(range.offset, range.length)
            self._handle.put(source._handle, extent, types.Encoding(encoding.value))

    def create(self, name: str, encoding: Encoding) -> "OutputStream":
        """Starts an object. Its name is unique within the backup, which may have other volumes, and plain: 1 to 128
        ASCII letters, digits, `-`, `_` and `.`, not beginning with `.`.

        Raises `InvalidName`, `Exists`, `QuotaExceeded`, `Io`.
        """
        with host_call:
            return OutputStream(self._handle.create(name, types.Encoding(encoding.value)))


class OutputStream:
    """An object under construction. One that is never finished is discarded, and all that it covered.

    In a `with` it is finished at the end, and discarded if an exception passes.
    """

    def __init__(self, handle):
        self._handle = handle
        self._max_write = handle.max_write()

    def write(self, data: bytes) -> int:
        """Appends bytes of the provider's own making, in as many calls as it takes, and returns how many. Nothing is
        buffered here, so that small writes are better joined before.

        Raises `QuotaExceeded`, `Io`.
        """
        with host_call:
            if len(data) <= self._max_write:
                self._handle.write(bytes(data))
            else:
                view = memoryview(data)
                for start in range(0, len(view), self._max_write):
                    self._handle.write(bytes(view[start : start + self._max_write]))
        return len(data)

    def splice(self, source: Snapshot, range: Extent) -> None:
        """Appends a range of whole blocks, of any length, without passing it through the provider. May return before
        the copy is done; a failure then shows in a later call or in `finish`.

        Raises `OutOfRange`, `NotDirty`, `Discarded`, `QuotaExceeded`, `Io`.
        """
        with host_call:
            self._handle.splice(source._handle, types.Extent(range.offset, range.length))

    def claim(self, source: Snapshot, range: Extent) -> None:
        """Says that the bytes written so far hold the backup of a range of whole blocks, of any length, which
        `Image.read` will give back. The host checks it before it commits.

        Raises `OutOfRange`, `NotDirty`, `QuotaExceeded`, `Io`.
        """
        with host_call:
            self._handle.claim(source._handle, types.Extent(range.offset, range.length))

    def finish(self) -> int:
        """Makes the object durable; returns its size before encoding, in bytes.

        Raises `Io`, or what an earlier call left behind. The object is then gone, and all that it covered.
        """
        with host_call:
            return type(self._handle).finish(self._handle)

    def __enter__(self) -> "OutputStream":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.finish()
        else:
            self._handle.__exit__(None, None, None)
