"""Ranges of a volume."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Extent:
    """The half-open byte range `offset .. offset + length` of a volume."""

    offset: int
    """First byte."""
    length: int
    """Number of bytes."""

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.length

    def pieces(self, grid: int) -> "Iterator[Extent]":
        """Cuts the range at every multiple of `grid`, counted from the volume's start, so that the same place of a
        volume is always cut the same way. No piece is longer than `grid`. If `grid` is a multiple of the block size,
        pieces of whole blocks are whole blocks.
        """
        offset = self.offset
        while offset < self.end:
            length = min(self.end - offset, grid - offset % grid)
            yield Extent(offset, length)
            offset += length
