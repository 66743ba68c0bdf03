"""The job, as far as a provider may know it."""

import tomllib
from enum import Enum
from typing import Any

from .bindings import job as bindings
from .error import Error


class Level(Enum):
    """How much a line of the log matters."""

    DEBUG = 0
    """For the provider's author."""
    INFO = 1
    """Progress worth keeping."""
    WARN = 2
    """Something is odd; the backup goes on."""
    ERROR = 3
    """Something failed."""


class Context:
    """The job: its id, the provider's settings, what the operator attached, and the log."""

    def __init__(self, handle):
        self._handle = handle

    def id(self) -> str:
        """Opaque and unique."""
        return self._handle.id()

    def settings(self, **defaults: Any) -> dict[str, Any]:
        """The provider's settings, with what they are unless set; `chunk-size` is the keyword `chunk_size`.

        Raises `Error`, with one line that names the key, for a key that has no default here or a value of another type
        than the default's.
        """
        try:
            given = tomllib.loads(self.settings_text())
        except tomllib.TOMLDecodeError as error:
            raise Error(f"settings: {error}") from None
        settings = dict(defaults)
        for key, value in given.items():
            name = key.replace("-", "_")
            if "_" in key or name not in defaults:
                known = ", ".join(f"`{name.replace('_', '-')}`" for name in defaults) or "no settings"
                raise Error(f"settings: unknown key `{key}`; there is {known}")
            if type(value) is not type(defaults[name]):
                wanted = type(defaults[name]).__name__
                raise Error(f"settings: `{key}` is {value!r}, and must be of type {wanted}")
            settings[name] = value
        return settings

    def settings_text(self) -> str:
        """The provider's settings as the operator wrote them (TOML). Empty if there are none."""
        return self._handle.settings()

    def attachment(self, name: str) -> bytes | None:
        """What the operator attached under that name, such as `guest-config` or `firewall-config`."""
        return self._handle.attachment(name)

    def log(self, level: Level, message: str) -> None:
        """Adds a line to the job's log. The host cuts it at 4 KiB and leaves out lines that come too fast."""
        self._handle.log(bindings.Level(level.value), message)

    def debug(self, message: str) -> None:
        """`log` at `Level.DEBUG`."""
        self.log(Level.DEBUG, message)

    def info(self, message: str) -> None:
        """`log` at `Level.INFO`."""
        self.log(Level.INFO, message)

    def warn(self, message: str) -> None:
        """`log` at `Level.WARN`."""
        self.log(Level.WARN, message)

    def error(self, message: str) -> None:
        """`log` at `Level.ERROR`."""
        self.log(Level.ERROR, message)
