"""The types that componentize-py generates; where there are none, in plain Python, stand-ins of the same names."""

from dataclasses import dataclass
from enum import Enum

try:
    from componentize_py_types import Err
    from wit_world.imports import job, types
except ModuleNotFoundError:

    class Err(Exception):
        def __init__(self, value):
            super().__init__(value)
            self.value = value

    class job:
        Level = Enum("Level", "DEBUG INFO WARN ERROR", start=0)

    class types:
        Encoding = Enum("Encoding", "IDENTITY ZSTD", start=0)
        RegionKind = Enum("RegionKind", "DATA ZERO", start=0)
        Quota = Enum("Quota", "OBJECTS OUTPUT_BYTES READ_BYTES", start=0)

        @dataclass
        class Extent:
            offset: int
            length: int

        @dataclass
        class ErrorCode_QuotaExceeded:
            value: object

        @dataclass
        class ErrorCode_Other:
            value: str | None

    for _name in (
        "Cancelled Discarded Exists Io InvalidName NotDirty NotFound OutOfRange TooLarge"
    ).split():
        setattr(types, f"ErrorCode_{_name}", type(f"ErrorCode_{_name}", (), {}))
