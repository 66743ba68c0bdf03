import { ProviderError, hostCall } from "../error.js";
import { BLOCK, Host } from "./host.js";

// The exports of a provider's program are called, and so the SDK's own code between them and the provider's class is in
// use as it is in a component. They fail as calls of the host do: `hostCall` makes a `ProviderError` of that.

/** Most bytes that an image is asked for at once. */
const READ_BACK = 4 << 20;

export class Failure extends Error {
  constructor(kind, message, { range, object, error } = {}) {
    super(message, error && { cause: error });
    this.name = "Failure";
    this.kind = kind;
    this.range = range;
    this.object = object;
    this.error = error;
  }
}

export class Fault {
  constructor(nthCall, error = new ProviderError("the mock lets this call fail", "io")) {
    this.nthCall = nthCall;
    this.error = error;
  }
}

export class Backup {
  #restored;
  #receipt;
  #objects;
  #log;

  constructor(restored, receipt, objects, log) {
    this.#restored = restored;
    this.#receipt = receipt;
    this.#objects = objects;
    this.#log = log;
  }

  restore() {
    return this.#restored;
  }

  receipt() {
    return this.#receipt;
  }

  object(name) {
    return this.#objects.get(name);
  }

  log() {
    return this.#log;
  }
}

export class Disk {
  #name;
  #bytes;
  #dirty;
  #settings = "";
  #attachments = new Map();
  #withoutReader = false;
  #withoutDiscarder = false;
  #fault;
  #base;

  constructor(name, size) {
    this.#name = name;
    this.#bytes = new Uint8Array(size);
    this.#dirty = new Array(Math.ceil(size / BLOCK)).fill(true);
  }

  bytes() {
    return this.#bytes.slice();
  }

  write(offset, bytes) {
    const data = typeof bytes === "string" ? new TextEncoder().encode(bytes) : bytes;
    this.#bytes.set(data, offset);
    if (data.length > 0) {
      this.#dirty.fill(true, Math.floor(offset / BLOCK), Math.ceil((offset + data.length) / BLOCK));
    }
  }

  setSettings(toml) {
    this.#settings = toml;
  }

  attach(name, bytes) {
    this.#attachments.set(name, bytes);
  }

  withholdReader() {
    this.#withoutReader = true;
  }

  withholdDiscarder() {
    this.#withoutDiscarder = true;
  }

  fail(fault) {
    this.#fault = fault;
  }

  backUp({ backup, restore }) {
    const host = this.#host(true);
    const volume = { ...this.#granted(host), reader: this.#withoutReader ? undefined : host.reader() };
    const receipt = this.#run(backup, volume, host);
    const restored = this.#placed(host);
    let image;
    for (const claimed of host.claimed()) {
      for (const piece of claimed.pieces(READ_BACK)) {
        image ??= opened(restore, host, receipt);
        const given = givenBack(image, piece);
        if (!equal(given, this.#bytes.subarray(piece.offset, piece.end))) {
          const words = `the image gives back other bytes than the disk held in ${piece.offset}..${piece.end}`;
          throw new Failure("wrong", words, { range: piece });
        }
        restored.set(given, piece.offset);
      }
    }
    return this.#commit(host, restored, receipt);
  }

  backUpBlindly({ blindBackup }) {
    const host = this.#host(false);
    const receipt = this.#run(blindBackup, this.#granted(host), host);
    return this.#commit(host, this.#placed(host), receipt);
  }

  #host(claims) {
    const fault = this.#fault;
    this.#fault = undefined;
    const mode = this.#base ? "reuse" : "new";
    const info = { name: this.#name, size: BigInt(this.#bytes.length), blockSize: BLOCK, mode };
    return new Host(info, this.bytes(), this.#dirty, claims, this.#settings, this.#attachments, fault);
  }

  #granted(host) {
    const discarder = this.#withoutDiscarder ? undefined : host.discarder();
    return { snapshot: host.snapshot(), dirty: host.dirtyRegions(), discarder };
  }

  #run(backup, volume, host) {
    let receipt;
    try {
      receipt = hostCall(() => backup.run(host.context(), volume, host.writer(), this.#base?.receipt()));
    } catch (error) {
      throw new Failure("gave-up", `the provider gave up: ${error.message}`, { error });
    }
    if (!(receipt instanceof Uint8Array)) throw new TypeError(`run returned ${receipt}, which is no Uint8Array`);
    const object = host.unfinished();
    if (object !== undefined) throw new Failure("leaked", `the object ${object} was not finished`, { object });
    const range = host.uncovered();
    if (range !== undefined) {
      const words = `${range.offset}..${range.end} is neither put, nor in a finished object`;
      throw new Failure("uncovered", words, { range });
    }
    return receipt;
  }

  /** The base with all that the host itself placed. */
  #placed(host) {
    const restored = this.#base ? this.#base.restore().slice() : new Uint8Array(this.#bytes.length);
    for (const { offset, end } of host.placedAndZero()) restored.set(this.#bytes.subarray(offset, end), offset);
    return restored;
  }

  #commit(host, restored, receipt) {
    this.#dirty.fill(false);
    this.#base = new Backup(restored, receipt, host.objectsKept(), host.log);
    return this.#base;
  }
}

function opened(restore, host, receipt) {
  try {
    return hostCall(() => restore.Image.open(host.context(), host.objects(), receipt));
  } catch (error) {
    throw new Failure("not-opened", `the image cannot be opened: ${error.message}`, { error });
  }
}

function givenBack(image, range) {
  try {
    return hostCall(() => image.read(BigInt(range.offset), range.length));
  } catch (error) {
    const words = `the image does not give back ${range.offset}..${range.end}: ${error.message}`;
    throw new Failure("not-given-back", words, { range, error });
  }
}

function equal(some, other) {
  return some.length === other.length && some.every((byte, index) => byte === other[index]);
}

