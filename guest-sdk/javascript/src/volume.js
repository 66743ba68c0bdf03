import { hostCall } from "./error.js";
import { Extent, fromHost, toHost } from "./extent.js";

/** Regions that one call asks the host for: enough that calls cost nothing beside the copying. */
const REGIONS_PER_CALL = 1024;

export class Snapshot {
  constructor(handle) {
    this.handle = handle;
  }

  info() {
    const { name, size, blockSize, mode } = this.handle.info();
    return { name, size: Number(size), blockSize, mode };
  }
}

export class DirtyRegions {
  constructor(handle) {
    this.handle = handle;
  }

  *[Symbol.iterator]() {
    for (;;) {
      const batch = hostCall(() => this.handle.next(REGIONS_PER_CALL));
      if (batch.length === 0) return;
      for (const { range, kind } of batch) yield { range: fromHost(range), kind };
    }
  }

  *dataRuns() {
    let run;
    for (const { range, kind } of this) {
      if (kind === "zero") continue;
      if (run?.end === range.offset) {
        run = new Extent(run.offset, run.length + range.length);
        continue;
      }
      if (run) yield run;
      run = range;
    }
    if (run) yield run;
  }
}

export class Reader {
  constructor(handle) {
    this.handle = handle;
    this.maxRead = handle.maxRead();
  }

  read(offset, length) {
    return hostCall(() => this.handle.read(BigInt(offset), length));
  }
}

export class Discarder {
  constructor(handle) {
    this.handle = handle;
  }

  discard(range) {
    hostCall(() => this.handle.discard(toHost(range)));
  }
}
