"""Why a call failed, and how an export says so."""

from contextlib import contextmanager
from enum import Enum

from .bindings import Err, types


class Quota(Enum):
    """A limit that the host's policy sets."""

    OBJECTS = 0
    """Objects that one backup may hold."""
    OUTPUT_BYTES = 1
    """Bytes that one backup may store, before encoding."""
    READ_BYTES = 2
    """Bytes of volumes that one backup may read."""


class Error(Exception):
    """Why a call failed: the contract's `error-code`. Details of host failures go to the host's log.

    Raised by a provider, it carries the provider's own words: one line that the operator reads. Its subclasses are the
    other codes.
    """

    def code(self):
        """What the host is told."""
        return types.ErrorCode_Other(str(self) or None)


class Cancelled(Error):
    """The job was cancelled; return promptly. Every later call fails the same way."""

    def code(self):
        return types.ErrorCode_Cancelled()


class Discarded(Error):
    """The range was discarded and can no longer be read."""

    def code(self):
        return types.ErrorCode_Discarded()


class Exists(Error):
    """An object of that name exists in this backup."""

    def code(self):
        return types.ErrorCode_Exists()


class Io(Error):
    """Storage or the snapshot failed. The backup will not be committed."""

    def code(self):
        return types.ErrorCode_Io()


class InvalidName(Error):
    """The name is empty, too long, or not a single plain component."""

    def code(self):
        return types.ErrorCode_InvalidName()


class NotDirty(Error):
    """Some byte of the range lies in no dirty region."""

    def code(self):
        return types.ErrorCode_NotDirty()


class NotFound(Error):
    """There is no such object."""

    def code(self):
        return types.ErrorCode_NotFound()


class OutOfRange(Error):
    """The range is empty, overflows, ends past the end, or is not made of whole blocks."""

    def code(self):
        return types.ErrorCode_OutOfRange()


class QuotaExceeded(Error):
    """The call would pass a limit of the policy: `quota`."""

    def __init__(self, quota: Quota):
        super().__init__(quota)
        self.quota = quota

    def code(self):
        return types.ErrorCode_QuotaExceeded(types.Quota(self.quota.value))


class TooLarge(Error):
    """The call carries more bytes than the host takes at once."""

    def code(self):
        return types.ErrorCode_TooLarge()


_SIMPLE = {
    getattr(types, f"ErrorCode_{kind.__name__}"): kind
    for kind in (Cancelled, Discarded, Exists, Io, InvalidName, NotDirty, NotFound, OutOfRange, TooLarge)
}


def from_code(code) -> Error:
    """The error that the host's answer stands for."""
    if isinstance(code, types.ErrorCode_QuotaExceeded):
        return QuotaExceeded(Quota(code.value.value))
    if isinstance(code, types.ErrorCode_Other):
        return Error(code.value or "")
    kind = _SIMPLE[type(code)]
    return kind(kind.__doc__)


class _HostCall:
    """Around a call to the host: what it fails with becomes an `Error`. A class, because it is on every read's way."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is not None and issubclass(kind, Err):
            raise from_code(error.value) from None


host_call = _HostCall()


@contextmanager
def export_call():
    """Around an export: an `Error` becomes the contract's. So does any other exception, which is a mistake in the
    provider's code, with the place where it was raised: a component has no standard error to print it on.
    """
    try:
        yield
        return
    except Error as error:
        code = error.code()
    except Exception as error:
        code = types.ErrorCode_Other(_where_and_what(error))
    raise Err(code)


def _where_and_what(error: Exception) -> str:
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    file = traceback.tb_frame.f_code.co_filename.rpartition("/")[2]
    return f"{file}:{traceback.tb_lineno}: {type(error).__name__}: {error}"
