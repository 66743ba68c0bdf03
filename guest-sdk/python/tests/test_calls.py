"""The mock answers as the real host does: the calls of `guest-sdk/calls.txt`, each with the host's answer."""

import unittest
from pathlib import Path

from fleecebox_guest import (
    BlindProvider,
    Discarded,
    Encoding,
    Error,
    Exists,
    Extent,
    Image,
    InvalidName,
    Io,
    NotDirty,
    NotFound,
    OutOfRange,
    Provider,
    TooLarge,
)
from fleecebox_guest.mock import Disk, Failure, Fault, GaveUp, NotGivenBack, NotOpened, Uncovered, Wrong

ERRORS = {
    Discarded: "discarded",
    Exists: "exists",
    InvalidName: "invalid-name",
    NotDirty: "not-dirty",
    NotFound: "not-found",
    OutOfRange: "out-of-range",
    TooLarge: "too-large",
}


def section(name):
    """The lines of a section, as their words and their answers."""
    text = (Path(__file__).parents[2] / "calls.txt").read_text()
    lines = text.split(f"[{name}]\n")[1].split("\n[")[0].splitlines()
    calls = (line.split(" = ") for line in lines if line and not line.startswith("#"))
    return [(call.split(), answer) for call, answer in calls]


def asks(name, calls):
    """Makes the calls by `calls`, by their first words."""
    for (call, *words), expected in section(name):
        words = [int(word) if word.isdigit() and len(word) < 21 else word for word in words]
        try:
            answer = calls[call](*words)
        except Error as error:
            answer = ERRORS[type(error)]
        answer = "ok" if answer is None else str(answer)
        if answer != expected:
            raise AssertionError(f"{call} {words}: {answer}, and the host says {expected}")


class AsksEverything(Provider):
    class Image(Image):
        def __init__(self, job, objects, receipt):
            self.claims = objects.open("claims")
            asks(
                receipt.decode(),
                {
                    "size": lambda name: objects.open(name).size,
                    "stored": lambda name, offset, length: len(objects.open(name).read_at(offset, length)) and None,
                },
            )

        def read(self, offset, length):
            return self.claims.read_at(offset - 65536, length)

    def run(self, job, volume, archive, base):
        streams = {}

        def create(name):
            streams[str(name)] = archive.create(str(name), Encoding.ZSTD)

        def copy(name, offset, length):
            streams[name].write(volume.reader.read(offset, length))

        calls = {
            "max-read": lambda: volume.reader.max_read,
            "read": lambda offset, length: volume.reader.read(offset, length) and None,
            "put": lambda *range: archive.put(volume.snapshot, Extent(*range), Encoding.ZSTD),
            "discard": lambda *range: volume.discarder.discard(Extent(*range)),
            "create": create,
            "copy": copy,
            "splice": lambda name, *range: streams[name].splice(volume.snapshot, Extent(*range)),
            "claim": lambda name, *range: streams[name].claim(volume.snapshot, Extent(*range)),
            "finish": lambda name: streams[name].finish(),
        }
        asks("full" if base is None else "incremental", calls)
        return b"image" if base is None else b"image of the incremental"


def disk():
    disk = Disk("da", 524_800)
    disk.write(0, b"\1" * 327_680)
    disk.write(458_752, b"\1" * 66_048)
    return disk


class TheMock(unittest.TestCase):
    def test_answers_as_the_host_does(self):
        da = disk()
        self.assertEqual(da.back_up(AsksEverything).restore(), da.bytes())
        da.write(65_536, b"\2")
        da.write(200_000, b"\2")
        self.assertEqual(da.back_up(AsksEverything).restore(), da.bytes())

    def test_finds_what_is_not_covered_and_covers_it_again_after_a_failure(self):
        class DropsItsObject(BlindProvider):
            def run(self, job, volume, archive, base):
                if base is not None:
                    raise AssertionError("a failed backup is no base")
                object = archive.create("all", Encoding.ZSTD)
                for run in volume.dirty.data_runs():
                    object.splice(volume.snapshot, run)
                return b""

        da = disk()
        for _ in range(2):
            with self.assertRaises(Uncovered) as failed:
                da.back_up_blindly(DropsItsObject)
            self.assertEqual(failed.exception.range, Extent(0, 327_680))

    def test_passes_what_a_call_fails_with_on(self):
        class Splices(BlindProvider):
            def run(self, job, volume, archive, base):
                with archive.create("all", Encoding.ZSTD) as object:
                    for run in volume.dirty.data_runs():
                        object.splice(volume.snapshot, run)
                return b""

        for nth in range(1, 7):
            da = disk()
            da.fail(Fault(nth, Io("for once")))
            with self.assertRaises(GaveUp) as failed:
                da.back_up_blindly(Splices)
            self.assertIsInstance(failed.exception.error, Io)
            self.assertEqual(da.back_up_blindly(Splices).restore(), da.bytes())
        da = disk()
        da.fail(Fault(7))
        full = da.back_up_blindly(Splices)
        self.assertEqual(len(full.object("all")), 327_680 + 66_048)

    def test_reads_back_what_was_claimed(self):
        class Wrongly(AsksEverything):
            class Image(AsksEverything.Image):
                def read(self, offset, length):
                    return super().read(offset, length)[:-1] + b"\0"

        class Refuses(AsksEverything):
            class Image(AsksEverything.Image):
                def read(self, offset, length):
                    raise NotFound("gone")

        class DoesNotOpen(AsksEverything):
            class Image(AsksEverything.Image):
                def __init__(self, job, objects, receipt):
                    objects.open("nothing")

        for provider, failure in (Wrongly, Wrong), (Refuses, NotGivenBack), (DoesNotOpen, NotOpened):
            with self.assertRaises(failure):
                disk().back_up(provider)

    def test_grants_only_what_it_is_told_to(self):
        class Needs(Provider):
            Image = AsksEverything.Image

            def run(self, job, volume, archive, base):
                for handle, words in (volume.reader, "no reader"), (volume.discarder, "no discarder"):
                    if handle is None:
                        raise Error(words)
                raise Error(f"{job.settings(depth=1)['depth']}, {job.attachment('guest-config')}")

        da = disk()
        da.set_settings("depth = 7")
        da.attach("guest-config", b"memory: 1")
        for words, withhold in (
            ("7, b'memory: 1'", da.withhold_discarder),
            ("no discarder", da.withhold_reader),
            ("no reader", lambda: None),
        ):
            with self.assertRaisesRegex(Failure, words):
                da.back_up(Needs)
            withhold()

    def test_no_stream_is_used_after_it_was_finished(self):
        class WritesOn(BlindProvider):
            def run(self, job, volume, archive, base):
                object = archive.create("all", Encoding.ZSTD)
                object.finish()
                object.write(b"more")

        with self.assertRaisesRegex(ValueError, "used up"):
            disk().back_up_blindly(WritesOn)

    def test_a_blind_provider_cannot_claim(self):
        class Claims(BlindProvider):
            def run(self, job, volume, archive, base):
                archive.create("all", Encoding.ZSTD).claim(volume.snapshot, Extent(0, 65_536))

        with self.assertRaisesRegex(GaveUp, "cannot claim"):
            disk().back_up_blindly(Claims)


if __name__ == "__main__":
    unittest.main()
