import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { test } from "node:test";

import { Disk, Fault } from "@fleecebox/guest/mock";

import * as watchful from "./watchful.js";

const MIB = 1 << 20;

function disk() {
  const disk = new Disk("scsi0", 48 * MIB + 9);
  disk.write(0, new Uint8Array(40 * MIB).fill(120));
  disk.write(48 * MIB, "the end");
  return disk;
}

const warned = (backup) => backup.log().some((line) => line.includes("looks encrypted"));

test("each backup restores, and what begins to look encrypted is warned of", () => {
  const scsi0 = disk();
  const full = scsi0.backUp(watchful);
  assert.deepEqual(full.restore(), scsi0.bytes());
  assert.ok(!warned(full));

  scsi0.write(3 * MIB, "changed");
  assert.ok(!warned(scsi0.backUp(watchful)));

  scsi0.write(0, randomBytes(40 * MIB));
  const encrypted = scsi0.backUp(watchful);
  assert.deepEqual(encrypted.restore(), scsi0.bytes());
  assert.ok(warned(encrypted));
});

test("an error of the host is passed on, and without a reader it stores all the same", () => {
  const scsi0 = disk();
  for (let nth = 1; nth < 6; nth += 1) {
    scsi0.fail(new Fault(nth));
    assert.throws(() => scsi0.backUp(watchful), { kind: "gave-up" });
  }
  scsi0.withholdReader();
  const backup = scsi0.backUp(watchful);
  assert.deepEqual(backup.restore(), scsi0.bytes());
  assert.ok(backup.log()[0].includes("does not watch"));
});
