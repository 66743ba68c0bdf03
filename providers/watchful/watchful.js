/**
 * `watchful`: a deduplicating provider that warns when a disk begins to look encrypted.
 *
 * It has the host store what changed, as chunks of 1 MiB, as `chunked` does; and of each chunk it reads 4 KiB to see
 * whether they look random. Where nearly all of what changed does and used not to, which is what ransomware leaves
 * behind, the job's log says so. The backup itself is made as ever: it is the ones before that will be wanted.
 */

import { MAX_PUT, ProviderError, exported } from "@fleecebox/guest";

import { SAMPLE, Tally, isAlarming } from "./randomness.js";

/** The receipt is what was seen of the whole disk when it was last read in full, as JSON. */
function seenIn(receipt) {
  if (receipt === undefined) return new Tally();
  try {
    const { looks, random } = JSON.parse(new TextDecoder().decode(receipt));
    return new Tally(looks, random);
  } catch {
    throw new ProviderError("the base's receipt is not one of watchful");
  }
}

class Watchful {
  static Image = class {
    constructor() {
      throw new ProviderError("watchful claims nothing, so that there is nothing to read back");
    }
  };

  run(job, volume, archive, base) {
    job.settings();
    const before = seenIn(base);
    const now = new Tally();
    if (!volume.reader) job.warn("the policy grants no reader: watchful stores, but does not watch");

    for (const run of volume.dirty.dataRuns()) {
      for (const chunk of run.pieces(MAX_PUT)) {
        if (volume.reader) {
          const length = Math.min(SAMPLE, chunk.length);
          // The middle: what begins at round offsets is more often a header.
          const offset = chunk.offset + Math.floor((chunk.length - length) / 2);
          now.count(volume.reader.read(offset, length));
        }
        archive.put(volume.snapshot, chunk, "zstd");
      }
    }

    job.info(`${now} samples of what changed look random`);
    if (base !== undefined && isAlarming(now, before)) {
      job.warn(`what changed looks encrypted: ${now} samples are random, and of the whole disk ${before} were`);
    }
    const seen = base === undefined ? now : before;
    return new TextEncoder().encode(JSON.stringify({ looks: seen.looks, random: seen.random }));
  }
}

export const { backup, restore } = exported(Watchful);
