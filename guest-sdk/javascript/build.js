#!/usr/bin/env node
// `fleecebox-build PROGRAM.js -o PROGRAM.wasm` makes a component of a program that exports a provider.
//
// Without WASI: what JavaScript would ask the system for (the clock, randomness, the console, fetch) is not there.

import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, delimiter, extname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const USAGE = "usage: fleecebox-build PROGRAM.js [-o PROGRAM.wasm]";
/** Worlds, by what a program of theirs exports. */
const WORLDS = { "backup,restore": "provider", blindBackup: "blind-provider" };

/** Oldest Node.js that componentize-js runs on; with an older one npm leaves out a part of it without a word. */
const NODE = 20;

function fail(message) {
  console.error(`error: ${message}`);
  process.exit(1);
}

if (parseInt(process.versions.node) < NODE) {
  fail(
    `this is Node.js ${process.versions.node}, and ${NODE} or a later one is needed: remove node_modules, type` +
      " `npx --yes --package=node@22 bash` for a shell that has one, and begin there with `npm install --ignore-scripts`",
  );
}
// Not before, as they cannot even be loaded by an older one.
const { componentize } = await import("@bytecodealliance/componentize-js");
const { build } = await import("esbuild");

function readArguments() {
  try {
    const { values, positionals } = parseArgs({
      options: { output: { type: "string", short: "o" } },
      allowPositionals: true,
    });
    if (positionals.length !== 1) fail(USAGE);
    return { program: positionals[0], output: values.output };
  } catch (error) {
    fail(`${error.message}; ${USAGE}`);
  }
}

const { program, output = `${basename(program, extname(program))}.wasm` } = readArguments();
const folder = await mkdtemp(join(tmpdir(), "fleecebox-build-"));
try {
  // One file without imports, whatever the program imports and whichever language it is in.
  const bundle = join(folder, "program.js");
  const nodePaths = (process.env.NODE_PATH ?? "").split(delimiter).filter(Boolean);
  const options = { nodePaths, bundle: true, format: "esm", target: "es2022", metafile: true, logLevel: "error" };
  const { metafile } = await build({ entryPoints: [program], outfile: bundle, ...options }).catch(() => process.exit(1));
  const exported = Object.values(metafile.outputs)[0].exports.sort().join(",");
  const worldName = WORLDS[exported];
  if (!worldName) {
    fail(`${program} exports ${exported || "nothing"}; it has to export what exported() or exportedBlind() returns`);
  }
  const { component } = await componentize({
    sourcePath: bundle,
    witPath: fileURLToPath(new URL("provider.wit", import.meta.url)),
    worldName,
    disableFeatures: ["stdio", "random", "clocks", "http", "fetch-event"],
  });
  await writeFile(output, component);
  console.log(`${output}: ${component.length} bytes, world ${worldName}`);
} catch (error) {
  fail(`componentize-js could not make ${output} of ${program}: ${error.message}`);
} finally {
  await rm(folder, { recursive: true });
}
