//! Whether what a bitmap says is all that changed: the images that a disk is made of now, against those that it was made
//! of at the backup that the bitmap is named for.
//!
//! A bitmap follows what is written through the node of its own image. So it may be believed where that image is still
//! in the disk's chain, where each overlay above it carries a bitmap of that name too, and where nothing below it
//! changed. What was put, merged or pulled in between cannot break that unseen: an image that was written through QEMU
//! says so in its own bitmap, and one that was read-only says so by its file's time.

use crate::archive::{DiskRecord, FileRecord, LayerRecord};
use crate::qemu::{Disk, Identity, Image, Layer};

/// What a manifest keeps of a disk.
pub fn record(disk: &Disk) -> DiskRecord {
    DiskRecord {
        format: disk.format.clone(),
        identity: disk.filename.clone(),
        layers: images(disk).map(layer).collect(),
        mark: None,
    }
}

fn images(disk: &Disk) -> impl Iterator<Item = &Image> {
    std::iter::once(&disk.image).chain(disk.below.iter().map(|layer| &layer.image))
}

fn layer(image: &Image) -> LayerRecord {
    LayerRecord {
        format: image.format.clone(),
        name: image.name.clone(),
        size: image.size,
        file: file(&image.identity),
        data: image
            .data_file
            .as_ref()
            .map(|data| (data.name.clone(), file(&data.identity))),
    }
}

fn file(identity: &Identity) -> FileRecord {
    match identity {
        &Identity::File {
            inode,
            born,
            length,
            modified,
        } => FileRecord::File {
            inode,
            born,
            length,
            modified,
        },
        Identity::Device { id } => FileRecord::Device { id: id.clone() },
        Identity::Unseen => FileRecord::Named,
        Identity::Unknown => FileRecord::Unknown,
    }
}

/// Why no bitmap of the disk can know all that is written to it, whatever its images are.
pub fn written_unseen(disk: &Disk) -> Option<String> {
    if disk.shared {
        return Some(
            "its device shares it with other writers (share-rw), whose writes no bitmap of this VM knows".into(),
        );
    }
    let outside =
        images(disk).find_map(|image| image.data_file.as_ref().filter(|data| data.raw))?;
    Some(format!(
        "its data is in a raw file of its own ({}), which can be written or put back without the image's bitmaps",
        outside.name
    ))
}

/// Whether the bitmap `name` holds all that changed since the disk was as `base` says, with those of that name on the
/// images below.
///
/// # Errors
/// What may have changed without it.
pub fn tracked(base: &DiskRecord, disk: &Disk, name: &str) -> Result<(), String> {
    let Some((image, below)) = base.layers.split_first() else {
        return Err("it does not say which images the disk was made of".into());
    };
    let now: Vec<LayerRecord> = images(disk).map(layer).collect();
    let Some(depth) = now.iter().position(|now| is_same(now, image)) else {
        return Err(match now.first() {
            Some(now) if now.name == image.name => {
                format!("another file is at {} now, or it cannot be told", now.name)
            }
            _ => format!(
                "its image was {}, which is not among its images now",
                image.name
            ),
        });
    };
    if let Some(layer) = disk.below[..depth].get(disk.carriers(name).count()) {
        return Err(not_carried(layer, name));
    }
    let mut below_now = now[depth + 1..].iter();
    for was in below {
        let Some(is) = below_now.next() else {
            return Err(format!("it was built on {} and is not now", was.name));
        };
        if !is_same(is, was) {
            return Err(format!(
                "it was built on {} and is on {} now, or on another file there",
                was.name, is.name
            ));
        }
        if is_changed(is, was) {
            return Err(format!("{}, which it is built on, was written to", is.name));
        }
    }
    match below_now.next() {
        Some(added) => Err(format!("it is built on {} now, and was not", added.name)),
        None => Ok(()),
    }
}

/// Why an overlay's lower neighbour cannot add what it knows.
fn not_carried(layer: &Layer, name: &str) -> String {
    let image = &layer.image.name;
    match layer.bitmap(name).map(|bitmap| bitmap.usable()) {
        None => format!("an overlay is above {image}, which does not carry its bitmap"),
        Some(Err(unusable)) => {
            format!("an overlay is above {image}, whose bitmap cannot be used: {unusable}")
        }
        Some(Ok(())) => format!("an overlay is above {image}, which has another size"),
    }
}

fn is_same(now: &LayerRecord, was: &LayerRecord) -> bool {
    let data = match (&now.data, &was.data) {
        (None, None) => true,
        (Some((name, file)), Some((was_name, was_file))) => {
            is_same_file(file, was_file, name == was_name)
        }
        _ => false,
    };
    data && now.format == was.format && is_same_file(&now.file, &was.file, now.name == was.name)
}

fn is_same_file(now: &FileRecord, was: &FileRecord, named: bool) -> bool {
    match (now, was) {
        (
            FileRecord::File { inode, born, .. },
            FileRecord::File {
                inode: was_inode,
                born: was_born,
                ..
            },
        ) => (inode, born) == (was_inode, was_born) && (born.is_some() || named),
        (FileRecord::Device { id }, FileRecord::Device { id: was_id }) => {
            id == was_id && (id.is_some() || named)
        }
        (FileRecord::Named, FileRecord::Named) => named,
        _ => false,
    }
}

/// Of an image that nothing should write to.
fn is_changed(now: &LayerRecord, was: &LayerRecord) -> bool {
    now.size != was.size || now.file != was.file || now.data != was.data
}

#[cfg(test)]
mod tests;
