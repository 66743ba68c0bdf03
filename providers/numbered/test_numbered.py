import json
import unittest

import numbered
from fleecebox_guest.mock import Disk, Fault, GaveUp

MIB = 1 << 20


class TheProvider(unittest.TestCase):
    def setUp(self):
        self.disk = Disk("scsi0", 20 * MIB + 9)
        self.disk.write(0, b"a" * (9 * MIB))
        self.disk.write(12 * MIB, b"b" * (8 * MIB + 9))
        self.disk.set_settings("file-size = 8388608")

    def test_each_backup_is_given_back_and_no_file_is_longer_than_allowed(self):
        full = self.disk.back_up(numbered.Numbered)
        self.assertEqual(full.restore(), self.disk.bytes())
        index = json.loads(full.object("scsi0.json"))
        self.assertEqual(index["files"], ["scsi0.0001", "scsi0.0002", "scsi0.0003"])
        self.assertTrue(all(len(full.object(name)) <= 8 * MIB for name in index["files"]))

        self.disk.write(5 * MIB, b"changed")
        incremental = self.disk.back_up(numbered.Numbered)
        self.assertEqual(incremental.restore(), self.disk.bytes())
        self.assertEqual(len(incremental.object("scsi0.0001")), 65536)

    def test_the_index_alone_says_how_to_put_the_disk_together(self):
        full = self.disk.back_up(numbered.Numbered)
        index = json.loads(full.object("scsi0.json"))
        disk = bytearray(index["size"])
        for offset, length, file, position in index["extents"]["rows"]:
            disk[offset : offset + length] = full.object(index["files"][file])[position : position + length]
        self.assertEqual(bytes(disk), self.disk.bytes())

    def test_an_error_of_the_host_is_passed_on(self):
        for nth in range(1, 8):
            self.disk.fail(Fault(nth))
            with self.assertRaises(GaveUp):
                self.disk.back_up(numbered.Numbered)

    def test_what_it_cannot_work_with_is_said(self):
        for settings, words in ("file-size = 5", "multiple of"), ("encoding = 'lz4'", "lz4"), ("size = 5", "size"):
            self.disk.set_settings(settings)
            with self.assertRaisesRegex(GaveUp, words):
                self.disk.back_up(numbered.Numbered)
        self.disk.set_settings("")
        self.disk.withhold_reader()
        with self.assertRaisesRegex(GaveUp, "no reader"):
            self.disk.back_up(numbered.Numbered)
