/**
 * A host in memory, to run a provider in plain Node.js: disks, an archive and the rules of the contract, in milliseconds.
 *
 * For a provider's own tests (`node --test`). What it checks is what the host checks first of all: ranges, coverage, and
 * that what was claimed is given back, by an image that is opened anew. It is no sandbox: globals outlive an instance
 * here, all of Node.js works, and only one volume is backed up at a time. `fleecebox provider test` is the judge of the
 * component.
 *
 * ```js
 * import { Disk } from "@fleecebox/guest/mock";
 * import * as mirror from "./mirror.js";
 *
 * const disk = new Disk("scsi0", 1_000_001);
 * disk.write(500_000, "something");
 * const full = disk.backUpBlindly(mirror);
 * assert.deepEqual(full.restore(), disk.bytes());
 *
 * disk.write(1_000_000, "!");
 * const incremental = disk.backUpBlindly(mirror);
 * assert.deepEqual(incremental.restore(), disk.bytes());
 * ```
 */

import type { Extent, ProviderError } from "./index.js";

/** Why there is no backup. The next one covers the same changes again. */
export class Failure extends Error {
  readonly kind:
    /** `run` threw `error`. A mistake in the provider's code says where it is. */
    | "gave-up"
    /** `run` succeeded without having covered `range`, the first of those missing. */
    | "uncovered"
    /** The object `object` was not finished. */
    | "leaked"
    /** The image cannot be opened, because of `error`. */
    | "not-opened"
    /** The image answers `error` for `range`, which was claimed. */
    | "not-given-back"
    /** The image gives back too few or too many bytes, or other bytes than the disk held in `range`. */
    | "wrong";
  readonly range?: Extent;
  readonly object?: string;
  readonly error?: ProviderError;
}

/** Which call of the next backup fails, counted from 1, of all that may fail; with `io` unless said otherwise. */
export class Fault {
  constructor(nthCall: number, error?: ProviderError);
}

/** A backup that worked. */
export class Backup {
  /** The whole disk as of this backup: what was placed from the archive, what was claimed from the image. */
  restore(): Uint8Array;
  /** What `run` returned. */
  receipt(): Uint8Array;
  /** The bytes of an object that this backup finished. */
  object(name: string): Uint8Array | undefined;
  /** The lines of its log. */
  log(): string[];
}

/**
 * A disk that changes and is backed up: the first time in full, then only what changed since the last backup that
 * worked.
 */
export class Disk {
  /** All zero. */
  constructor(name: string, size: number);
  /** What it holds now. */
  bytes(): Uint8Array;
  /** Writes as a guest does; text is UTF-8. A `RangeError` if that ends past the disk. */
  write(offset: number, bytes: Uint8Array | string): void;
  /** The provider's settings from here on (TOML). */
  setSettings(toml: string): void;
  /** Attaches something, such as `guest-config`. */
  attach(name: string, bytes: Uint8Array): void;
  /** Grants no reader from here on. */
  withholdReader(): void;
  /** Grants no discarder from here on. */
  withholdDiscarder(): void;
  /** Lets one call of the next backup fail. */
  fail(fault: Fault): void;
  /** Backs the disk up by what `exported` made, and reads back what was claimed. Throws a `Failure`. */
  backUp(program: { backup: object; restore: object }): Backup;
  /** As `backUp`, for what `exportedBlind` made. */
  backUpBlindly(program: { blindBackup: object }): Backup;
}
