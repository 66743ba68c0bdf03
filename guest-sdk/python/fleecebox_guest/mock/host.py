"""The mock's side of each call, with the names of the generated bindings. What it refuses, the real host refuses."""

import string
from dataclasses import dataclass, field

from ..bindings import Err, types
from ..extent import Extent
from ..volume import BitmapMode, Region, RegionKind, VolumeInfo

BLOCK = 64 << 10
"""Unit of dirty tracking, in bytes, as the host has it unless configured."""

MAX_PUT = 1 << 20
MAX_TRANSFER = 4 << 20
MAX_NAME = 128
PLAIN = frozenset(string.ascii_letters + string.digits + "-_.")

DONE = -1
"""In place of a stream's number: the cover is final."""


@dataclass(slots=True)
class Block:
    dirty: bool
    zero: bool
    cover: int | None = None
    """The stream whose unfinished object covers it, or `DONE`."""
    claimed: bool = False
    discarded: bool = False


@dataclass(slots=True)
class Object:
    name: str
    data: bytearray = field(default_factory=bytearray)
    written: list[tuple[int, int]] = field(default_factory=list)
    """What the provider wrote, from where to where; the rest was spliced."""


class Host:
    """The host of one backup."""

    def __init__(self, name, data, dirty, mode: BitmapMode, claims: bool, settings, attachments, fault):
        self.info = VolumeInfo(name, len(data), BLOCK, mode)
        self.data = data
        self.blocks = [
            Block(changed, not any(data[index * BLOCK : (index + 1) * BLOCK])) for index, changed in enumerate(dirty)
        ]
        self.claims = claims
        self.settings = settings
        self.attachments = attachments
        self.fault = fault
        self.calls = 0
        self.streams: dict[int, Object] = {}
        self.created = 0
        self.finished: dict[str, Object] = {}
        self.log: list[str] = []

    def snapshot(self):
        return HostSnapshot(self)

    def dirty_regions(self):
        return HostDirtyRegions(self)

    def reader(self):
        return HostReader(self)

    def discarder(self):
        return HostDiscarder(self)

    def writer(self):
        return HostWriter(self)

    def context(self):
        return HostContext(self)

    def objects(self):
        return HostObjects(self)

    def unfinished(self) -> str | None:
        """The name of the first object that was neither finished nor dropped."""
        return next((object.name for object in self.streams.values()), None)

    def uncovered(self) -> Extent | None:
        """The first range that nothing final covers."""
        runs = self._runs(lambda block: block.dirty and not block.zero and block.cover != DONE)
        return runs[0] if runs else None

    def claimed(self) -> list[Extent]:
        """What the provider has to give back."""
        return self._runs(lambda block: not block.zero and block.cover == DONE and block.claimed)

    def placed_and_zero(self) -> list[Extent]:
        """What the host restores by itself."""
        placed = lambda block: block.cover == DONE and not block.claimed  # noqa: E731
        return self._runs(lambda block: block.dirty and (block.zero or placed(block)))

    def objects_kept(self) -> dict[str, bytes]:
        return {name: bytes(object.data) for name, object in self.finished.items()}

    def call(self) -> None:
        """Counts a call that may fail."""
        self.calls += 1
        if self.fault is not None and self.fault[0] == self.calls:
            raise Err(self.fault[1])

    def whole(self, range) -> list[Block]:
        """The blocks of a range of whole blocks."""
        offset, end = unsigned(range.offset, 64), range.offset + unsigned(range.length, 64)
        whole = range.length > 0 and offset % BLOCK == 0 and (end % BLOCK == 0 or end == self.info.size)
        if not whole or end > self.info.size:
            raise refused("OutOfRange")
        return self.blocks[offset // BLOCK : -(-end // BLOCK)]

    def cover(self, range, cover: int, claimed: bool) -> None:
        """Covers a range that nothing covers yet."""
        blocks = self.whole(range)
        if any(not block.dirty or block.cover is not None for block in blocks):
            raise refused("NotDirty")
        for block in blocks:
            block.cover = cover
            block.claimed = claimed

    def end_stream(self, stream: int, finished: bool) -> None:
        """Ends what an unfinished object covers."""
        for block in self.blocks:
            if block.cover == stream:
                block.cover = DONE if finished else None

    def _runs(self, holds) -> list[Extent]:
        """The neighbouring blocks that `holds` is true of, joined."""
        runs: list[Extent] = []
        for index, block in enumerate(self.blocks):
            if not holds(block):
                continue
            offset = index * BLOCK
            length = min(BLOCK, self.info.size - offset)
            if runs and runs[-1].end == offset:
                runs[-1] = Extent(runs[-1].offset, runs[-1].length + length)
            else:
                runs.append(Extent(offset, length))
        return runs


def refused(kind: str) -> Err:
    return Err(getattr(types, f"ErrorCode_{kind}")())


def unsigned(number: int, bits: int) -> int:
    """No other number passes a component's boundary."""
    if not 0 <= number < 1 << bits:
        raise OverflowError(f"{number} is not a number of {bits} bits without a sign")
    return number


def is_plain(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME and not name.startswith(".") and PLAIN.issuperset(name)


class HostSnapshot:
    def __init__(self, host: Host):
        self._host = host

    def info(self) -> VolumeInfo:
        return self._host.info


class HostDirtyRegions:
    def __init__(self, host: Host):
        self._host = host
        self._cursor = 0

    def next(self, limit: int) -> list[Region]:
        host = self._host
        host.call()
        if unsigned(limit, 32) == 0:
            raise refused("OutOfRange")
        regions: list[Region] = []
        while self._cursor < len(host.blocks):
            block = host.blocks[self._cursor]
            offset = self._cursor * BLOCK
            length = min(BLOCK, host.info.size - offset)
            kind = RegionKind.ZERO if block.zero else RegionKind.DATA
            last = regions[-1] if regions else None
            if not block.dirty:
                pass
            elif last and last.range.end == offset and last.kind is kind:
                regions[-1] = Region(Extent(last.range.offset, last.range.length + length), kind)
            elif len(regions) == limit:
                break
            else:
                regions.append(Region(Extent(offset, length), kind))
            self._cursor += 1
        return regions


class HostDiscarder:
    def __init__(self, host: Host):
        self._host = host

    def discard(self, range) -> None:
        self._host.call()
        blocks = self._host.whole(range)
        # A zero block is done without a cover, but not while an unfinished object covers it.
        if any(not block.dirty or block.cover != DONE and not (block.zero and block.cover is None) for block in blocks):
            raise refused("NotDirty")
        for block in blocks:
            block.discarded = True


class HostReader:
    def __init__(self, host: Host):
        self._host = host

    def max_read(self) -> int:
        return MAX_TRANSFER

    def read(self, offset: int, length: int) -> bytes:
        host = self._host
        host.call()
        if unsigned(length, 32) > MAX_TRANSFER:
            raise refused("TooLarge")
        end = unsigned(offset, 64) + length
        if length == 0 or end > host.info.size:
            raise refused("OutOfRange")
        blocks = host.blocks[offset // BLOCK : -(-end // BLOCK)]
        if any(not block.dirty for block in blocks):
            raise refused("NotDirty")
        if any(block.discarded for block in blocks):
            raise refused("Discarded")
        return host.data[offset:end]


class HostWriter:
    def __init__(self, host: Host):
        self._host = host

    def put(self, source: HostSnapshot, range, encoding) -> None:
        self._host.call()
        if range.length > MAX_PUT:
            raise refused("TooLarge")
        self._host.cover(range, DONE, claimed=False)

    def create(self, name: str, encoding) -> "HostOutputStream":
        host = self._host
        host.call()
        if not is_plain(name):
            raise refused("InvalidName")
        if name in host.finished or any(object.name == name for object in host.streams.values()):
            raise refused("Exists")
        number = host.created
        host.created += 1
        host.streams[number] = Object(name)
        return HostOutputStream(host, number)


class HostOutputStream:
    """Goes out of use by `finish` or when nothing refers to it any more, as the bindings' handle does."""

    def __init__(self, host: Host, number: int):
        self._host = host
        self._number = number

    def _object(self) -> Object:
        object = self._host.streams.get(self._number)
        if object is None:
            raise ValueError("the stream is used up: its object was finished or given up")
        return object

    def max_write(self) -> int:
        return MAX_TRANSFER

    def write(self, data: bytes) -> None:
        object = self._object()
        self._host.call()
        if len(data) > MAX_TRANSFER:
            raise refused("TooLarge")
        start = len(object.data)
        object.data += data
        object.written.append((start, len(object.data)))

    def splice(self, source: HostSnapshot, range) -> None:
        object = self._object()
        self._host.call()
        self._host.cover(range, self._number, claimed=False)
        object.data += self._host.data[range.offset : range.offset + range.length]

    def claim(self, source: HostSnapshot, range) -> None:
        self._object()
        self._host.call()
        if not self._host.claims:
            raise Err(types.ErrorCode_Other("a blind provider cannot claim: it exports no restore"))
        self._host.cover(range, self._number, claimed=True)

    @staticmethod
    def finish(this: "HostOutputStream") -> int:
        object = this._object()
        try:
            this._host.call()
        except Err:
            # After a failure the object is gone.
            this._drop()
            raise
        del this._host.streams[this._number]
        this._host.finished[object.name] = object
        this._host.end_stream(this._number, finished=True)
        return len(object.data)

    def _drop(self) -> None:
        if self._host.streams.pop(self._number, None) is not None:
            self._host.end_stream(self._number, finished=False)

    def __exit__(self, kind, error, traceback) -> None:
        self._drop()

    def __del__(self):
        self._drop()


class HostContext:
    def __init__(self, host: Host):
        self._host = host

    def id(self) -> str:
        return "mock"

    def settings(self) -> str:
        return self._host.settings

    def attachment(self, name: str) -> bytes | None:
        return self._host.attachments.get(name)

    def log(self, level, message: str) -> None:
        self._host.log.append(message)


class HostObjects:
    def __init__(self, host: Host):
        self._host = host

    def _object(self, name: str) -> Object:
        if not is_plain(name):
            raise refused("InvalidName")
        object = self._host.finished.get(name)
        if object is None:
            raise refused("NotFound")
        return object

    def size(self, name: str) -> int:
        self._host.call()
        return len(self._object(name).data)

    def read(self, name: str, offset: int, length: int) -> bytes:
        self._host.call()
        if unsigned(length, 32) > MAX_TRANSFER:
            raise refused("TooLarge")
        object = self._object(name)
        end = unsigned(offset, 64) + length
        # Writes follow each other where nothing was spliced between them.
        written = sum(max(0, min(stop, end) - max(start, offset)) for start, stop in object.written)
        if length == 0 or end > len(object.data) or written < length:
            raise refused("OutOfRange")
        return bytes(object.data[offset:end])
