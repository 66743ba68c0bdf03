"""Between the classes that an author writes and those that componentize-py looks for.

`fleecebox_guest.build` puts this folder on the component's path: it looks for `Backup` or `BlindBackup` in the module
that it makes a component of, and for `Image` in a module `restore`.
"""
