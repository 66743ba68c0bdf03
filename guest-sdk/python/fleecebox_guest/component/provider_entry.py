"""The module that a component of a `Provider` is made of."""

import fleecebox_provider_program  # noqa: F401  the author's, whose `export` names the provider

from fleecebox_guest import Archive, Context, DirtyRegions, Discarder, Reader, Snapshot, Volume
from fleecebox_guest.error import export_call
from fleecebox_guest.exports import exported


class Backup:
    def run(self, job, volume, archive, base):
        with export_call():
            granted = Volume(
                Snapshot(volume.snapshot),
                DirtyRegions(volume.dirty),
                volume.reader and Reader(volume.reader),
                volume.discarder and Discarder(volume.discarder),
            )
            return exported()().run(Context(job), granted, Archive(archive), base)
