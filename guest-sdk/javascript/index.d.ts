/**
 * Write a Fleecebox backup provider in JavaScript or TypeScript.
 *
 * A provider backs up one volume per call. It is handed a few capabilities and reaches nothing else; the host moves the
 * bytes, remembers where each block is, and proves the backup before it counts. There are two kinds:
 *
 * - a `BlindProvider` arranges what the host stores and cannot see a byte of the disk. Most providers are best blind:
 *   they are as fast as the host, and there is nothing to restore, because the host does it by itself;
 * - a `Provider` reads the bytes, writes them in a form of its own, *claims* the ranges that it holds, and gives them
 *   back through its `Image`.
 *
 * A whole blind provider, which keeps each volume's changes as one object:
 *
 * ```js
 * import { exportedBlind } from "@fleecebox/guest";
 *
 * class Mirror {
 *   run(job, volume, archive, base) {
 *     const object = archive.create(volume.snapshot.info().name, "zstd");
 *     for (const run of volume.dirty.dataRuns()) object.splice(volume.snapshot, run);
 *     job.info(`stored ${object.finish()} bytes`);
 *     return new Uint8Array();
 *   }
 * }
 *
 * export const { blindBackup } = exportedBlind(Mirror);
 * ```
 *
 * `fleecebox-build mirror.js` makes `mirror.wasm` of it. Whatever a call fails with is thrown as a `ProviderError`; let
 * it pass, and the host shows it to the operator. The contract itself, with the rules for ranges and names, is
 * `provider.wit`.
 *
 * Offsets, lengths and sizes are numbers of bytes: exact up to 8 PiB. There is no console, clock, randomness or fetch.
 */

/** Longest range that one `Archive.put` takes, in bytes. */
export const MAX_PUT: number;

/** Why a call failed: the contract's `error-code`. */
export type ErrorCode =
  /** The job was cancelled; return promptly. Every later call fails the same way. */
  | "cancelled"
  /** The range was discarded and can no longer be read. */
  | "discarded"
  /** An object of that name exists in this backup. */
  | "exists"
  /** Storage or the snapshot failed. The backup will not be committed. */
  | "io"
  /** The name is empty, too long, or not a single plain component. */
  | "invalid-name"
  /** Some byte of the range lies in no dirty region. */
  | "not-dirty"
  /** There is no such object. */
  | "not-found"
  /** The range is empty, overflows, ends past the end, or is not made of whole blocks. */
  | "out-of-range"
  /** The call would pass a limit of the policy. */
  | "quota-exceeded"
  /** The call carries more bytes than the host takes at once. */
  | "too-large"
  /** Anything else, in words. */
  | "other";

/** A limit that the host's policy sets. */
export type Quota = "objects" | "output-bytes" | "read-bytes";

/**
 * Why a call failed. Thrown by a provider, `new ProviderError("…")` carries the provider's own words: one line that the
 * operator reads. Details of host failures go to the host's log.
 */
export class ProviderError extends Error {
  constructor(message: string, code?: ErrorCode, quota?: Quota);
  readonly code: ErrorCode;
  /** With `quota-exceeded`. */
  readonly quota?: Quota;
}

/** How much a line of the log matters: for the author, worth keeping, odd, failed. */
export type Level = "debug" | "info" | "warn" | "error";

/** The job: its id, the provider's settings, what the operator attached, and the log. */
export interface Context {
  /** Opaque and unique. */
  id(): string;
  /**
   * The provider's settings, with what they are unless set; `chunk-size` is the property `chunkSize`. An unknown key or
   * a value of another type than the default's is a `ProviderError` that names it.
   */
  settings<T extends object>(defaults?: T): T;
  /** The provider's settings as the operator wrote them (TOML). Empty if there are none. */
  settingsText(): string;
  /** What the operator attached under that name, such as `guest-config` or `firewall-config`. */
  attachment(name: string): Uint8Array | undefined;
  /** Adds a line to the job's log. The host cuts it at 4 KiB and leaves out lines that come too fast. */
  log(level: Level, message: unknown): void;
  debug(message: unknown): void;
  info(message: unknown): void;
  warn(message: unknown): void;
  error(message: unknown): void;
}

/** The half-open byte range `offset .. offset + length` of a volume. */
export class Extent {
  constructor(offset: number, length: number);
  readonly offset: number;
  readonly length: number;
  /** The byte after the last. */
  readonly end: number;
  /**
   * Cuts the range at every multiple of `grid`, counted from the volume's start, so that the same place of a volume is
   * always cut the same way. No piece is longer than `grid`. If `grid` is a multiple of the block size, pieces of whole
   * blocks are whole blocks.
   */
  pieces(grid: number): Generator<Extent>;
}

/**
 * What is known of the changes since an earlier backup: nothing is tracked; tracking starts with this backup; only what
 * changed since the base is to be backed up.
 */
export type BitmapMode = "none" | "new" | "reuse";

/** What a provider may know about a volume. */
export interface VolumeInfo {
  /** Stable across backups, such as `drive-scsi0`. Fit for the name of an object. */
  readonly name: string;
  /** Need not be a multiple of the block size. */
  readonly size: number;
  /** A power of two. Ranges begin and end on multiples of this, but for the volume's end. */
  readonly blockSize: number;
  /** What the dirty regions are made from. */
  readonly mode: BitmapMode;
}

/** Names one frozen volume. It reveals no byte of it: the host copies on the holder's behalf. */
export interface Snapshot {
  /** What the volume is. The same at every call. */
  info(): VolumeInfo;
}

/**
 * What is known of a region without reading it: `data` is to be backed up, and may still read as zeroes; `zero` the host
 * has recorded already.
 */
export type RegionKind = "data" | "zero";

/** A part of what is to be backed up: made of whole blocks, never empty, and of one kind. */
export interface Region {
  readonly range: Extent;
  readonly kind: RegionKind;
}

/**
 * What is to be backed up: regions in ascending order that do not overlap, to be gone through once. Neighbours may be of
 * the same kind; how the host cuts them means nothing.
 */
export interface DirtyRegions extends Iterable<Region> {
  /**
   * Only what has to be stored: zero regions are left out, for the host has recorded them, and neighbouring data regions
   * are joined. So runs depend on the volume's content alone, which chunks that are to be found again need.
   */
  dataRuns(): Generator<Extent>;
}

/** Authority to see a volume's bytes. */
export interface Reader {
  /** Most bytes that one `read` may ask for, at least 64 KiB. Ascending reads of about this size are the fastest. */
  readonly maxRead: number;
  /** Reads exactly `length` bytes at any offset within the dirty regions. */
  read(offset: number, length: number): Uint8Array;
}

/** Authority to give snapshot space back early. Acts on the fleecing image only, never on the disk of the VM. */
export interface Discarder {
  /** Gives up a range of whole blocks whose backup is finished: nothing reads it again in this backup. */
  discard(range: Extent): void;
}

/** What a blind backup may do with one volume. What is undefined, the operator's policy does not grant. */
export interface BlindVolume {
  readonly snapshot: Snapshot;
  /** What of it is to be backed up. */
  readonly dirty: DirtyRegions;
  /** Authority to give snapshot space back early. */
  readonly discarder?: Discarder;
}

/** What a backup may do with one volume. What is undefined, the operator's policy does not grant. */
export interface Volume extends BlindVolume {
  /** Authority to see its bytes. */
  readonly reader?: Reader;
}

/**
 * How the host encodes what it stores: as it is, or compressed with Zstandard at a level that the operator chooses. It
 * decodes again when reading, so that sizes and offsets are always those before encoding.
 */
export type Encoding = "identity" | "zstd";

/** Authority to store. */
export interface Archive {
  /**
   * Stores a range of whole blocks, at most `MAX_PUT` long, as one chunk that is addressed by its content and stored
   * once. May return before the copy is done; a failure then shows in a later call, or fails the backup.
   */
  put(source: Snapshot, range: Extent, encoding: Encoding): void;
  /**
   * Starts an object. Its name is unique within the backup, which may have other volumes, and plain: 1 to 128 ASCII
   * letters, digits, `-`, `_` and `.`, not beginning with `.`.
   */
  create(name: string, encoding: Encoding): OutputStream;
}

/** An object under construction. One that is never finished is discarded, and all that it covered. */
export interface OutputStream {
  /** Appends bytes of the provider's own making, in as many calls as it takes. Nothing is buffered. */
  write(bytes: Uint8Array): void;
  /**
   * Appends a range of whole blocks, of any length, without passing it through the provider. May return before the copy
   * is done; a failure then shows in a later call or in `finish`.
   */
  splice(source: Snapshot, range: Extent): void;
  /**
   * Says that the bytes written so far hold the backup of a range of whole blocks, of any length, which `Image.read`
   * will give back. The host checks it before it commits.
   */
  claim(source: Snapshot, range: Extent): void;
  /** Makes the object durable; returns its size before encoding. */
  finish(): number;
}

/** The objects that this provider wrote, of one finished backup. */
export interface Objects {
  /** Opens an object for reading. */
  open(name: string): StoredObject;
}

/** One object. What was spliced into it is not served: `out-of-range`. */
export interface StoredObject {
  /** Its size before encoding. */
  readonly size: number;
  /** Exactly `length` bytes from `offset` on, in as many calls as it takes. */
  readAt(offset: number, length: number): Uint8Array;
}

/** A provider that sees the bytes: the contract's world `provider`. */
export interface Provider {
  /**
   * Backs up one volume. Volumes may run side by side, each in an instance of its own that shares no memory with this
   * one. `base` is what this returned for the volume in the backup that this one builds on. What it returns, the
   * receipt, is kept with the backup; it has at most 64 KiB.
   *
   * After an error nothing of the backup is kept, and the next one covers the same changes again.
   */
  run(job: Context, volume: Volume, archive: Archive, base: Uint8Array | undefined): Uint8Array;
}

/** The claimed ranges of one volume in one backup: the contract's `restore.image`. */
export interface Image {
  /**
   * Returns exactly `length` bytes of the volume, at most 4 MiB. Called in any order, for ranges of whole blocks that
   * were claimed in this very backup, though not necessarily by one claim.
   */
  read(offset: number, length: number): Uint8Array;
}

/** A provider that cannot see the bytes: the contract's world `blind-provider`. */
export interface BlindProvider {
  /** Backs up one volume, as `Provider.run` does. */
  run(job: Context, volume: BlindVolume, archive: Archive, base: Uint8Array | undefined): Uint8Array;
}

/**
 * Makes a component of a `Provider`: `export const { backup, restore } = exported(Mine);`
 *
 * Its static `Image` opens the image that a receipt of `run` stands for. `objects` holds what all volumes of that backup
 * wrote.
 */
export function exported(provider: {
  new (): Provider;
  Image: new (job: Context, objects: Objects, receipt: Uint8Array) => Image;
}): { backup: object; restore: object };

/** Makes a component of a `BlindProvider`: `export const { blindBackup } = exportedBlind(Mine);` */
export function exportedBlind(provider: new () => BlindProvider): { blindBackup: object };
