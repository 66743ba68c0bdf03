export class Extent {
  constructor(offset, length) {
    this.offset = offset;
    this.length = length;
  }

  get end() {
    return this.offset + this.length;
  }

  *pieces(grid) {
    for (let offset = this.offset; offset < this.end; ) {
      const length = Math.min(this.end - offset, grid - (offset % grid));
      yield new Extent(offset, length);
      offset += length;
    }
  }
}

/** As the contract has it: with 64 bits. */
export function toHost({ offset, length }) {
  return { offset: BigInt(offset), length: BigInt(length) };
}

export function fromHost({ offset, length }) {
  return new Extent(Number(offset), Number(length));
}
