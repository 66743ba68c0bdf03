"""The exported resource `restore.image`."""

from fleecebox_guest import Context, Objects
from fleecebox_guest.error import export_call
from fleecebox_guest.exports import exported


class Image:
    def __init__(self, image):
        self._image = image

    @classmethod
    def open(cls, job, objects, receipt):
        with export_call():
            return cls(exported().Image(Context(job), Objects(objects), receipt))

    def read(self, offset, length):
        with export_call():
            return self._image.read(offset, length)
