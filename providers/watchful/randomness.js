/** Bytes that one look takes: enough that text, code and file systems' tables stand out from noise. */
export const SAMPLE = 4096;

/**
 * Whether a sample looks like random bytes, as encrypted and compressed data does: by the chi-squared statistic of how
 * often each value of a byte occurs. Of random bytes it is about 255 with a standard deviation of 23, so that one
 * sample in a thousand is taken for something else; of text and programs it is thousands.
 */
export function looksRandom(sample) {
  const counts = new Uint32Array(256);
  for (const byte of sample) counts[byte] += 1;
  const expected = sample.length / counts.length;
  let statistic = 0;
  for (const count of counts) statistic += (count - expected) ** 2 / expected;
  return statistic < 330;
}

/** What a run of the provider saw, and what its receipt keeps of that. */
export class Tally {
  constructor(looks = 0, random = 0) {
    this.looks = looks;
    this.random = random;
  }

  count(sample) {
    this.looks += 1;
    this.random += looksRandom(sample) ? 1 : 0;
  }

  /** From 0 to 1. */
  get share() {
    return this.looks === 0 ? 0 : this.random / this.looks;
  }

  toString() {
    return `${this.random} of ${this.looks}`;
  }
}

/** Looks below which a share says nothing. */
const FEW = 32;

/**
 * Whether what changed looks as if something had encrypted it: nearly all of it random, which before was not usual here.
 */
export function isAlarming(now, before) {
  return now.looks >= FEW && now.share > 0.9 && before.share < 0.5;
}
