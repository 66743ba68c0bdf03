export { MAX_PUT, Archive, OutputStream } from "./archive.js";
export { Context } from "./context.js";
export { ProviderError } from "./error.js";
export { exported, exportedBlind } from "./exported.js";
export { Extent } from "./extent.js";
export { Objects, StoredObject } from "./objects.js";
export { DirtyRegions, Discarder, Reader, Snapshot } from "./volume.js";
