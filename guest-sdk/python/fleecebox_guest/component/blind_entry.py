"""The module that a component of a `BlindProvider` is made of."""

import fleecebox_provider_program  # noqa: F401  the author's, whose `export_blind` names the provider

from fleecebox_guest import Archive, BlindVolume, Context, DirtyRegions, Discarder, Snapshot
from fleecebox_guest.error import export_call
from fleecebox_guest.exports import exported


class BlindBackup:
    def run(self, job, volume, archive, base):
        with export_call():
            granted = BlindVolume(
                Snapshot(volume.snapshot),
                DirtyRegions(volume.dirty),
                volume.discarder and Discarder(volume.discarder),
            )
            return exported()().run(Context(job), granted, Archive(archive), base)
