import { Archive } from "./archive.js";
import { Context } from "./context.js";
import { exportCall } from "./error.js";
import { Objects } from "./objects.js";
import { DirtyRegions, Discarder, Reader, Snapshot } from "./volume.js";

export function exported(provider) {
  return { backup: { run: runOf(provider) }, restore: { Image: imageOf(provider.Image) } };
}

export function exportedBlind(provider) {
  return { blindBackup: { run: runOf(provider) } };
}

function runOf(provider) {
  return (job, volume, archive, base) =>
    exportCall(() => {
      const granted = {
        snapshot: new Snapshot(volume.snapshot),
        dirty: new DirtyRegions(volume.dirty),
        reader: volume.reader && new Reader(volume.reader),
        discarder: volume.discarder && new Discarder(volume.discarder),
      };
      return new provider().run(new Context(job), granted, new Archive(archive), base);
    });
}

function imageOf(opened) {
  return class Image {
    constructor(image) {
      this.image = image;
    }

    static open(job, objects, receipt) {
      return exportCall(() => new Image(new opened(new Context(job), new Objects(objects), receipt)));
    }

    read(offset, length) {
      return exportCall(() => this.image.read(Number(offset), length));
    }
  };
}
