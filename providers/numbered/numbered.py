"""`numbered`: a provider that reads the bytes and keeps them in numbered files of bounded size, with an index in JSON.

Each backup of a volume is `VOLUME.0001`, `VOLUME.0002`, … and `VOLUME.json`, which says what of the volume lies where.
So the files fit on media and services with a limit on the size of a file, and ten lines in any language put a disk
together again from them. Zeroes are not stored.

Settings, all optional:

| key | meaning | unless set |
|---|---|---|
| `file-size` | bytes in one file at most: a multiple of 4 MiB | 256 MiB |
| `encoding` | `"zstd"` or `"identity"` | `"zstd"` |
"""

import json
from bisect import bisect_right

from fleecebox_guest import Encoding, Error, Extent, Image, OutOfRange, Provider, export

PART = 4 << 20
"""What is read, written and claimed as one; a part is never cut in two by the end of a file."""

VERSION = 1


class Files:
    """The numbered files of one volume, while they are written."""

    def __init__(self, archive, name: str, file_size: int, encoding: Encoding):
        self.archive = archive
        self.name = name
        self.file_size = file_size
        self.encoding = encoding
        self.object = None
        self.used = 0
        self.names = []
        self.index = []

    def with_room_for(self, length: int):
        """The file that the next `length` bytes go to."""
        if self.object is None or self.used + length > self.file_size:
            self.finish()
            self.names.append(f"{self.name}.{len(self.names) + 1:04}")
            self.object = self.archive.create(self.names[-1], self.encoding)
            self.used = 0
        return self.object

    def add(self, part: Extent):
        """Notes that a part was written to the current file."""
        last = self.index[-1] if self.index else None
        file = len(self.names) - 1
        if last and last[2] == file and last[0] + last[1] == part.offset:
            last[1] += part.length
        else:
            self.index.append([part.offset, part.length, file, self.used])
        self.used += part.length

    def finish(self):
        if self.object is not None:
            self.object.finish()
            self.object = None


class NumberedImage(Image):
    def __init__(self, job, objects, receipt):
        stored = objects.open(receipt.decode())
        index = json.loads(stored.read_at(0, stored.size))
        if index["version"] != VERSION:
            raise Error(f"the index is of version {index['version']}, and this provider reads {VERSION}")
        self.files = [objects.open(name) for name in index["files"]]
        self.rows = index["extents"]["rows"]
        self.offsets = [row[0] for row in self.rows]

    def read(self, offset, length):
        parts = []
        while length > 0:
            number = bisect_right(self.offsets, offset) - 1
            if number < 0 or offset >= self.rows[number][0] + self.rows[number][1]:
                raise OutOfRange(f"nothing is stored for offset {offset}")
            start, available, file, position = self.rows[number]
            part = min(length, start + available - offset)
            parts.append(self.files[file].read_at(position + offset - start, part))
            offset += part
            length -= part
        return b"".join(parts)


class Numbered(Provider):
    Image = NumberedImage

    def run(self, job, volume, archive, base):
        settings = job.settings(file_size=256 << 20, encoding="zstd")
        if settings["file_size"] < PART or settings["file_size"] % PART:
            raise Error(f"settings: `file-size` is {settings['file_size']}, and must be a multiple of {PART}")
        if settings["encoding"] not in ("identity", "zstd"):
            raise Error(f"settings: `encoding` is {settings['encoding']!r}, and must be \"zstd\" or \"identity\"")
        if volume.reader is None:
            raise Error("numbered has to read the volume, and the policy grants no reader")

        info = volume.snapshot.info()
        files = Files(archive, info.name, settings["file_size"], Encoding[settings["encoding"].upper()])
        for run in volume.dirty.data_runs():
            for part in run.pieces(PART):
                object = files.with_room_for(part.length)
                for piece in part.pieces(volume.reader.max_read):
                    object.write(volume.reader.read(piece.offset, piece.length))
                object.claim(volume.snapshot, part)
                files.add(part)
        files.finish()

        index = {
            "version": VERSION,
            "volume": info.name,
            "size": info.size,
            "files": files.names,
            "extents": {"fields": ["offset", "length", "file", "position"], "rows": files.index},
        }
        name = f"{info.name}.json"
        with archive.create(name, Encoding.ZSTD) as object:
            object.write(json.dumps(index).encode())
        job.info(f"{sum(row[1] for row in files.index)} bytes in {len(files.names)} files, listed in `{name}`")
        return name.encode()


export(Numbered)
