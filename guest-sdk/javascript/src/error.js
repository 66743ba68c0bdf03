/** What an operator reads of an error that came from the host, by the contract's `error-code`. */
const WORDS = {
  cancelled: "the job was cancelled",
  discarded: "the range was discarded",
  exists: "an object of that name exists",
  io: "storage or the snapshot failed",
  "invalid-name": "not a plain name",
  "not-dirty": "the range is not part of what this backup covers",
  "not-found": "there is no such object",
  "out-of-range": "the range is empty, ends past the end, or is not made of whole blocks",
  "too-large": "more bytes than the host takes at once",
};

export class ProviderError extends Error {
  constructor(message, code = "other", quota = undefined) {
    super(message);
    this.name = "ProviderError";
    this.code = code;
    this.quota = quota;
  }
}

function fromPayload({ tag, val }) {
  if (tag === "other") return new ProviderError(val ?? "an error without a description");
  if (tag === "quota-exceeded") return new ProviderError(`the limit on ${val} is reached`, tag, val);
  return new ProviderError(WORDS[tag] ?? tag, tag);
}

/** Calls the host; what it fails with is thrown as a `ProviderError`. */
export function hostCall(call) {
  try {
    return call();
  } catch (error) {
    throw error?.payload?.tag ? fromPayload(error.payload) : error;
  }
}

/**
 * Runs an export. Its error becomes the contract's; so does a mistake in the provider's code, with where it is: a
 * component has no console to print it on.
 */
export function exportCall(call) {
  try {
    return call();
  } catch (error) {
    throw Object.assign(new Error("an export failed"), { payload: payloadOf(error) });
  }
}

export function payloadOf(error) {
  if (!(error instanceof ProviderError)) {
    const place = String(error?.stack ?? "").trim().split("\n")[0];
    return { tag: "other", val: `${error} (${place})` };
  }
  if (error.code === "other") return { tag: "other", val: error.message };
  if (error.code === "quota-exceeded") return { tag: error.code, val: error.quota };
  return { tag: error.code };
}
