// `fleecebox-build` says what it needs, before it loads what an older Node.js cannot.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { test } from "node:test";
import { fileURLToPath } from "node:url";

test("an older Node.js is named, and what to do about it", () => {
  const old = 'data:text/javascript,Object.defineProperty(process, "versions", { value: { node: "18.20.4" } })';
  const build = fileURLToPath(new URL("../build.js", import.meta.url));
  const { status, stderr } = spawnSync(process.execPath, ["--import", old, build, "x.js"], { encoding: "utf8" });
  assert.equal(status, 1, stderr);
  assert.match(stderr, /^error: this is Node.js 18\.20\.4, and 20 or a later one is needed.*npx --yes --package=node@22/);
});
