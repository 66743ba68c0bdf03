import { hostCall } from "./error.js";
import { toHost } from "./extent.js";

export const MAX_PUT = 1 << 20;

export class Archive {
  constructor(handle) {
    this.handle = handle;
  }

  put(source, range, encoding) {
    hostCall(() => this.handle.put(source.handle, toHost(range), encoding));
  }

  create(name, encoding) {
    return new OutputStream(hostCall(() => this.handle.create(name, encoding)));
  }
}

export class OutputStream {
  constructor(handle) {
    this.handle = handle;
    this.maxWrite = handle.maxWrite();
  }

  write(bytes) {
    for (let start = 0; start < bytes.length; start += this.maxWrite) {
      hostCall(() => this.handle.write(bytes.subarray(start, start + this.maxWrite)));
    }
  }

  splice(source, range) {
    hostCall(() => this.handle.splice(source.handle, toHost(range)));
  }

  claim(source, range) {
    hostCall(() => this.handle.claim(source.handle, toHost(range)));
  }

  finish() {
    return Number(hostCall(() => this.handle.constructor.finish(this.handle)));
  }
}
