// The mock answers as the real host does: the calls of `guest-sdk/calls.txt`, each with the host's answer.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { Extent, ProviderError, exported, exportedBlind } from "@fleecebox/guest";
import { Disk, Fault } from "@fleecebox/guest/mock";

const CALLS = readFileSync(new URL("../../calls.txt", import.meta.url), "utf8");

/** Makes the calls of a section by `calls`, by their first words. */
function asks(section, calls) {
  const lines = CALLS.split(`[${section}]\n`)[1].split("\n[")[0].split("\n");
  for (const line of lines.filter((line) => line && !line.startsWith("#"))) {
    const [asked, expected] = line.split(" = ");
    const [call, ...words] = asked.split(" ");
    let answer;
    try {
      answer = calls[call](...words);
    } catch (error) {
      answer = error.code ?? `${error}`;
    }
    assert.equal(typeof answer === "number" ? `${answer}` : typeof answer === "string" ? answer : "ok", expected, asked);
  }
}

/** With 64 bits, which are more than an `Extent` of numbers can say. */
const big = (offset, length) => ({ offset: BigInt(offset), length: BigInt(length) });

class AsksEverything {
  static Image = class {
    constructor(job, objects, receipt) {
      this.claims = objects.open("claims");
      asks(new TextDecoder().decode(receipt), {
        size: (name) => objects.open(name).size,
        stored: (name, offset, length) => void objects.open(name).readAt(Number(offset), Number(length)),
      });
    }

    read(offset, length) {
      return this.claims.readAt(offset - 65_536, length);
    }
  };

  run(job, volume, archive, base) {
    const streams = {};
    const { snapshot, reader } = volume;
    asks(base ? "incremental" : "full", {
      "max-read": () => reader.maxRead,
      read: (offset, length) => void raw(() => reader.handle.read(BigInt(offset), Number(length))),
      put: (...range) => raw(() => archive.handle.put(snapshot.handle, big(...range), "zstd")),
      discard: (...range) => raw(() => volume.discarder.handle.discard(big(...range))),
      create: (name) => void (streams[name] = archive.create(name, "zstd")),
      copy: (name, offset, length) => streams[name].write(reader.read(Number(offset), Number(length))),
      splice: (name, ...range) => streams[name].splice(snapshot, big(...range)),
      claim: (name, ...range) => streams[name].claim(snapshot, big(...range)),
      finish: (name) => streams[name].finish(),
    });
    return new TextEncoder().encode(base ? "image of the incremental" : "image");
  }
}

function raw(call) {
  try {
    return call();
  } catch (error) {
    throw new ProviderError("", error.payload.tag);
  }
}

function disk() {
  const disk = new Disk("da", 524_800);
  disk.write(0, new Uint8Array(327_680).fill(1));
  disk.write(458_752, new Uint8Array(66_048).fill(1));
  return disk;
}

/** A blind provider whose `run` is this. */
const blind = (run) =>
  exportedBlind(
    class {
      run(job, volume, archive, base) {
        return run({ job, volume, archive, base }) ?? new Uint8Array();
      }
    },
  );

const splices = blind(({ volume, archive }) => {
  const object = archive.create("all", "zstd");
  for (const run of volume.dirty.dataRuns()) object.splice(volume.snapshot, run);
  object.finish();
});

test("the mock answers as the host does", () => {
  const da = disk();
  const program = exported(AsksEverything);
  assert.deepEqual(da.backUp(program).restore(), da.bytes());
  da.write(65_536, "\x02");
  da.write(200_000, "\x02");
  assert.deepEqual(da.backUp(program).restore(), da.bytes());
});

test("what is not covered is found, and covered again after a failure", () => {
  const da = disk();
  for (let round = 0; round < 2; round += 1) {
    const stores = blind(({ volume, archive, base }) => {
      assert.equal(base, undefined);
      archive.put(volume.snapshot, new Extent(0, 65_536), "zstd");
    });
    assert.throws(() => da.backUpBlindly(stores), { kind: "uncovered", range: new Extent(65_536, 262_144) });
  }
  const leaks = blind(({ archive }) => void archive.create("all", "zstd"));
  assert.throws(() => da.backUpBlindly(leaks), { kind: "leaked", object: "all" });
});

test("what a call fails with is passed on", () => {
  for (let nth = 1; nth < 7; nth += 1) {
    const da = disk();
    da.fail(new Fault(nth));
    assert.throws(() => da.backUpBlindly(splices), ({ kind, error }) => kind === "gave-up" && error.code === "io");
    assert.deepEqual(da.backUpBlindly(splices).restore(), da.bytes());
  }
  const da = disk();
  da.fail(new Fault(7));
  assert.equal(da.backUpBlindly(splices).object("all").length, 327_680 + 66_048);
});

test("what was claimed is read back", () => {
  class Wrongly extends AsksEverything {
    static Image = class extends AsksEverything.Image {
      read(offset, length) {
        return super.read(offset, length).fill(0, -1);
      }
    };
  }
  class Refuses extends AsksEverything {
    static Image = class extends AsksEverything.Image {
      read() {
        throw new ProviderError("gone", "not-found");
      }
    };
  }
  class DoesNotOpen extends AsksEverything {
    static Image = class {
      constructor(job, objects) {
        objects.open("nothing");
      }
    };
  }
  for (const [provider, kind] of [[Wrongly, "wrong"], [Refuses, "not-given-back"], [DoesNotOpen, "not-opened"]]) {
    assert.throws(() => disk().backUp(exported(provider)), { kind });
  }
});

test("only what it is told to is granted", () => {
  class Needs {
    static Image = AsksEverything.Image;

    run(job, { reader, discarder }) {
      if (!reader) throw new ProviderError("no reader");
      if (!discarder) throw new ProviderError("no discarder");
      const { depth } = job.settings({ depth: 1 });
      throw new ProviderError(`${depth}, ${new TextDecoder().decode(job.attachment("guest-config"))}`);
    }
  }
  const da = disk();
  da.setSettings("depth = 7");
  da.attach("guest-config", new TextEncoder().encode("memory: 1"));
  const says = (words) => assert.throws(() => da.backUp(exported(Needs)), ({ error }) => error.message === words);
  says("7, memory: 1");
  da.withholdDiscarder();
  says("no discarder");
  da.withholdReader();
  says("no reader");
});

test("no stream is used after it was finished, and a blind provider cannot claim", () => {
  const writesOn = blind(({ archive }) => {
    const object = archive.create("all", "zstd");
    object.finish();
    object.write(Uint8Array.of(1));
  });
  assert.throws(() => disk().backUpBlindly(writesOn), /used up/);
  const claims = blind(({ volume, archive }) => {
    archive.create("all", "zstd").claim(volume.snapshot, new Extent(0, 65_536));
  });
  assert.throws(() => disk().backUpBlindly(claims), /cannot claim/);
});
