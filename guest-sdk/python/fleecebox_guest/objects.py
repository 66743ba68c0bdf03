"""Reading back what the provider itself wrote."""

import io

from .error import host_call

READ_AT_ONCE = 1 << 20
"""Most bytes that one call asks for, so that an answer stays a small part of the provider's memory."""


class Objects:
    """The objects that this provider wrote, of one finished backup."""

    def __init__(self, handle):
        self._handle = handle

    def open(self, name: str) -> "StoredObject":
        """Opens an object for reading.

        Raises `InvalidName`, `NotFound`, `Io`.
        """
        with host_call:
            return StoredObject(self._handle, name, self._handle.size(name))


class StoredObject(io.RawIOBase):
    """One object, as a file that can be read and sought in. What was spliced into it is not served: `OutOfRange`.

    Nothing is buffered here, and each read is a call to the host, so that small reads are better put through an
    `io.BufferedReader`. `read_at` is the shortest way to one range.
    """

    def __init__(self, handle, name: str, size: int):
        self._handle = handle
        self._name = name
        self._size = size
        self._position = 0

    @property
    def size(self) -> int:
        """Its size before encoding, in bytes."""
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` on, in as many calls as it takes."""
        with host_call:
            if 0 < length <= READ_AT_ONCE:
                return self._handle.read(self._name, offset, length)
            parts = (min(READ_AT_ONCE, length - done) for done in range(0, length, READ_AT_ONCE))
            starts = range(offset, offset + length, READ_AT_ONCE)
            return b"".join(self._handle.read(self._name, at, part) for at, part in zip(starts, parts))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        length = max(0, min(len(buffer), READ_AT_ONCE, self._size - self._position))
        buffer[:length] = self.read_at(self._position, length)
        self._position += length
        return length

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError("a position before the object's start")
        self._position = start + offset
        return self._position
