// The mock's side of each call, in the form of the generated bindings: numbers of 64 bits are BigInts, errors have a
// payload. What it refuses, the real host refuses.

import { payloadOf } from "../error.js";
import { Extent } from "../extent.js";

/** Unit of dirty tracking, in bytes, as the host has it unless configured. */
export const BLOCK = 64 << 10;

const MAX_PUT = 1 << 20;
const MAX_TRANSFER = 4 << 20;
const PLAIN = /^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$/;

/** In place of a stream's number: the cover is final. */
const DONE = -1;

/** The host of one backup. */
export class Host {
  constructor(info, bytes, dirty, claims, settings, attachments, fault) {
    this.info = info;
    this.bytes = bytes;
    this.blocks = dirty.map((changed, index) => ({
      dirty: changed,
      zero: bytes.subarray(index * BLOCK, (index + 1) * BLOCK).every((byte) => byte === 0),
      /** The stream whose unfinished object covers it, or `DONE`. */
      cover: undefined,
      claimed: false,
      discarded: false,
    }));
    this.claims = claims;
    this.settings = settings;
    this.attachments = attachments;
    this.fault = fault;
    this.calls = 0;
    this.streams = new Map();
    this.created = 0;
    this.finished = new Map();
    this.log = [];
  }

  snapshot() {
    return { info: () => this.info };
  }

  dirtyRegions() {
    return new DirtyRegions(this);
  }

  reader() {
    return new Reader(this);
  }

  discarder() {
    return new Discarder(this);
  }

  writer() {
    return new Writer(this);
  }

  context() {
    return {
      id: () => "mock",
      settings: () => this.settings,
      attachment: (name) => this.attachments.get(name),
      log: (level, message) => this.log.push(message),
    };
  }

  objects() {
    return new Objects(this);
  }

  /** The name of the first object that was not finished. */
  unfinished() {
    return this.streams.values().next().value?.name;
  }

  /** The first range that nothing final covers. */
  uncovered() {
    return this.#runs((block) => block.dirty && !block.zero && block.cover !== DONE)[0];
  }

  /** What the provider has to give back. */
  claimed() {
    return this.#runs((block) => !block.zero && block.cover === DONE && block.claimed);
  }

  /** What the host restores by itself. */
  placedAndZero() {
    return this.#runs((block) => block.dirty && (block.zero || (block.cover === DONE && !block.claimed)));
  }

  objectsKept() {
    return new Map([...this.finished].map(([name, object]) => [name, joined(object)]));
  }

  /** Counts a call that may fail. */
  call() {
    this.calls += 1;
    if (this.fault?.nthCall === this.calls) throw refusal(payloadOf(this.fault.error));
  }

  /** The blocks of a range of whole blocks. */
  whole(range) {
    const [offset, length] = [unsigned(range.offset), unsigned(range.length)];
    const [block, size, end] = [BigInt(BLOCK), this.info.size, offset + length];
    const whole = length > 0n && offset % block === 0n && (end % block === 0n || end === size);
    if (!whole || end > size) throw refused("out-of-range");
    return this.blocks.slice(Number(offset / block), Math.ceil(Number(end) / BLOCK));
  }

  /** Covers a range that nothing covers yet. */
  cover(range, cover, claimed) {
    const blocks = this.whole(range);
    if (blocks.some((block) => !block.dirty || block.cover !== undefined)) throw refused("not-dirty");
    for (const block of blocks) Object.assign(block, { cover, claimed });
  }

  endStream(stream, cover) {
    for (const block of this.blocks) if (block.cover === stream) block.cover = cover;
  }

  lengthOf(index) {
    return Math.min(BLOCK, this.bytes.length - index * BLOCK);
  }

  /** The neighbouring blocks that `holds` is true of, joined. */
  #runs(holds) {
    const runs = [];
    this.blocks.forEach((block, index) => {
      if (!holds(block)) return;
      const [offset, last] = [index * BLOCK, runs.at(-1)];
      if (last?.end === offset) runs[runs.length - 1] = new Extent(last.offset, last.length + this.lengthOf(index));
      else runs.push(new Extent(offset, this.lengthOf(index)));
    });
    return runs;
  }
}

function refusal(payload) {
  return Object.assign(new Error(payload.tag), { payload });
}

function refused(tag) {
  return refusal({ tag });
}

/** No other number passes a component's boundary. */
function unsigned(number) {
  if (BigInt.asUintN(64, number) !== number) throw new RangeError(`${number} is not a number of 64 bits without a sign`);
  return number;
}

function joined({ pieces, size }) {
  const bytes = new Uint8Array(size);
  for (const piece of pieces) bytes.set(piece.bytes, piece.offset);
  return bytes;
}

class DirtyRegions {
  #host;
  #cursor = 0;

  constructor(host) {
    this.#host = host;
  }

  next(limit) {
    const host = this.#host;
    host.call();
    if (limit === 0) throw refused("out-of-range");
    const regions = [];
    for (; this.#cursor < host.blocks.length; this.#cursor += 1) {
      const block = host.blocks[this.#cursor];
      if (!block.dirty) continue;
      const kind = block.zero ? "zero" : "data";
      const range = { offset: BigInt(this.#cursor * BLOCK), length: BigInt(host.lengthOf(this.#cursor)) };
      const last = regions.at(-1);
      if (last?.kind === kind && last.range.offset + last.range.length === range.offset) {
        last.range.length += range.length;
      } else if (regions.length === limit) {
        break;
      } else {
        regions.push({ range, kind });
      }
    }
    return regions;
  }
}

class Discarder {
  #host;

  constructor(host) {
    this.#host = host;
  }

  discard(range) {
    this.#host.call();
    const blocks = this.#host.whole(range);
    // A zero block is done without a cover, but not while an unfinished object covers it.
    const isDone = ({ zero, cover }) => cover === DONE || (zero && cover === undefined);
    if (blocks.some((block) => !block.dirty || !isDone(block))) throw refused("not-dirty");
    for (const block of blocks) block.discarded = true;
  }
}

class Reader {
  #host;

  constructor(host) {
    this.#host = host;
  }

  maxRead() {
    return MAX_TRANSFER;
  }

  read(offset, length) {
    const host = this.#host;
    host.call();
    if (length > MAX_TRANSFER) throw refused("too-large");
    const end = unsigned(offset) + BigInt(length);
    if (length === 0 || end > host.info.size) throw refused("out-of-range");
    const [first, last] = [Number(offset), Number(end)];
    const blocks = host.blocks.slice(Math.floor(first / BLOCK), Math.ceil(last / BLOCK));
    if (blocks.some((block) => !block.dirty)) throw refused("not-dirty");
    if (blocks.some((block) => block.discarded)) throw refused("discarded");
    return host.bytes.slice(first, last);
  }
}

class Writer {
  #host;

  constructor(host) {
    this.#host = host;
  }

  put(source, range, encoding) {
    this.#host.call();
    if (range.length > MAX_PUT) throw refused("too-large");
    this.#host.cover(range, DONE, false);
  }

  create(name, encoding) {
    const host = this.#host;
    host.call();
    if (!PLAIN.test(name)) throw refused("invalid-name");
    const isTaken = host.finished.has(name) || [...host.streams.values()].some((object) => object.name === name);
    if (isTaken) throw refused("exists");
    const number = host.created++;
    host.streams.set(number, { name, size: 0, pieces: [] });
    return new OutputStream(host, number);
  }
}

class OutputStream {
  #host;
  #number;

  constructor(host, number) {
    this.#host = host;
    this.#number = number;
  }

  get #object() {
    const object = this.#host.streams.get(this.#number);
    if (object === undefined) throw new TypeError("the stream is used up: its object was finished");
    return object;
  }

  maxWrite() {
    return MAX_TRANSFER;
  }

  write(bytes) {
    const object = this.#object;
    this.#host.call();
    if (bytes.length > MAX_TRANSFER) throw refused("too-large");
    append(object, bytes.slice(), true);
  }

  splice(source, range) {
    const object = this.#object;
    this.#host.call();
    this.#host.cover(range, this.#number, false);
    append(object, this.#host.bytes.slice(Number(range.offset), Number(range.offset + range.length)), false);
  }

  claim(source, range) {
    void this.#object;
    this.#host.call();
    if (!this.#host.claims) {
      throw refusal({ tag: "other", val: "a blind provider cannot claim: it exports no restore" });
    }
    this.#host.cover(range, this.#number, true);
  }

  static finish(stream) {
    const [object, host, number] = [stream.#object, stream.#host, stream.#number];
    host.streams.delete(number);
    try {
      host.call();
    } catch (error) {
      // After a failure the object is gone.
      host.endStream(number, undefined);
      throw error;
    }
    host.finished.set(object.name, object);
    host.endStream(number, DONE);
    return BigInt(object.size);
  }
}

function append(object, bytes, isWritten) {
  object.pieces.push({ offset: object.size, bytes, isWritten });
  object.size += bytes.length;
}

class Objects {
  #host;

  constructor(host) {
    this.#host = host;
  }

  #object(name) {
    if (!PLAIN.test(name)) throw refused("invalid-name");
    const object = this.#host.finished.get(name);
    if (object === undefined) throw refused("not-found");
    return object;
  }

  size(name) {
    this.#host.call();
    return BigInt(this.#object(name).size);
  }

  read(name, offset, length) {
    this.#host.call();
    if (length > MAX_TRANSFER) throw refused("too-large");
    const object = this.#object(name);
    const [first, end] = [Number(unsigned(offset)), Number(offset) + length];
    const isSpliced = (piece) => !piece.isWritten && piece.offset < end && first < piece.offset + piece.bytes.length;
    if (length === 0 || end > object.size || object.pieces.some(isSpliced)) throw refused("out-of-range");
    return joined(object).slice(first, end);
  }
}
