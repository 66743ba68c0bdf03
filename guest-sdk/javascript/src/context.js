import { parse } from "smol-toml";

import { ProviderError } from "./error.js";

export class Context {
  constructor(handle) {
    this.handle = handle;
  }

  id() {
    return this.handle.id();
  }

  settings(defaults = {}) {
    let given;
    try {
      given = parse(this.settingsText());
    } catch (error) {
      throw new ProviderError(`settings: ${error.message.split("\n")[0]}`);
    }
    const keys = new Map(Object.keys(defaults).map((name) => [kebab(name), name]));
    const settings = { ...defaults };
    for (const [key, value] of Object.entries(given)) {
      const name = keys.get(key);
      if (name === undefined) {
        const known = [...keys.keys()].map((key) => `\`${key}\``).join(", ") || "no settings";
        throw new ProviderError(`settings: unknown key \`${key}\`; there is ${known}`);
      }
      if (typeof value !== typeof defaults[name]) {
        throw new ProviderError(`settings: \`${key}\` is ${value}, and must be a ${typeof defaults[name]}`);
      }
      settings[name] = value;
    }
    return settings;
  }

  settingsText() {
    return this.handle.settings();
  }

  attachment(name) {
    return this.handle.attachment(name);
  }

  log(level, message) {
    this.handle.log(level, String(message));
  }

  debug(message) {
    this.log("debug", message);
  }

  info(message) {
    this.log("info", message);
  }

  warn(message) {
    this.log("warn", message);
  }

  error(message) {
    this.log("error", message);
  }
}

function kebab(name) {
  return name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
}
