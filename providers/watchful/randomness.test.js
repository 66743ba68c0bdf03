import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { SAMPLE, Tally, isAlarming, looksRandom } from "./randomness.js";

test("random bytes look random, and a program's text does not", () => {
  const many = Array.from({ length: 200 }, () => looksRandom(randomBytes(SAMPLE)));
  assert.ok(many.filter(Boolean).length > 190);
  const text = readFileSync(new URL("randomness.js", import.meta.url));
  assert.ok(!looksRandom(text.subarray(0, SAMPLE)));
  assert.ok(!looksRandom(new Uint8Array(SAMPLE)));
});

test("an alarm needs many looks, nearly all random, where that was not usual", () => {
  assert.ok(isAlarming(new Tally(64, 63), new Tally(100, 20)));
  assert.ok(!isAlarming(new Tally(8, 8), new Tally(100, 20)));
  assert.ok(!isAlarming(new Tally(64, 40), new Tally(100, 20)));
  assert.ok(!isAlarming(new Tally(64, 63), new Tally(100, 80)));
});
