import { hostCall } from "./error.js";

/** Most bytes that one call asks for, so that an answer stays a small part of the provider's memory. */
const READ_AT_ONCE = 1 << 20;

export class Objects {
  constructor(handle) {
    this.handle = handle;
  }

  open(name) {
    const size = Number(hostCall(() => this.handle.size(name)));
    return new StoredObject(this.handle, name, size);
  }
}

export class StoredObject {
  constructor(handle, name, size) {
    this.handle = handle;
    this.name = name;
    this.size = size;
  }

  readAt(offset, length) {
    const read = (at, part) => hostCall(() => this.handle.read(this.name, BigInt(at), part));
    if (length > 0 && length <= READ_AT_ONCE) return read(offset, length);
    const bytes = new Uint8Array(length);
    for (let done = 0; done < length; done += READ_AT_ONCE) {
      bytes.set(read(offset + done, Math.min(READ_AT_ONCE, length - done)), done);
    }
    return bytes;
  }
}
