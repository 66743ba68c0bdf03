//! Holding images against each other with tools that are not ours.

use std::path::Path;

use anyhow::Result;

use crate::process::{run, tool};

/// The same length and the same bytes, by `cmp`.
///
/// # Errors
/// With cmp's words, which name the first byte that differs.
pub fn same_bytes(left: &Path, right: &Path) -> Result<()> {
    run("diffutils", tool("cmp").arg(left).arg(right)).map(drop)
}

/// The same content as a disk, by `qemu-img compare` with the formats probed from the
/// files; for raw against qcow2.
///
/// # Errors
/// With qemu-img's words, which name the first offset that differs.
pub fn same_disk(left: &Path, right: &Path) -> Result<()> {
    run(
        "qemu-utils",
        tool("qemu-img").arg("compare").arg(left).arg(right),
    )
    .map(drop)
}

/// The same content as a disk that QEMU has open, and has written out.
///
/// # Errors
/// As [`same_disk`].
pub fn same_as_live(image: &Path, live: &Path) -> Result<()> {
    let mut compare = tool("qemu-img");
    run(
        "qemu-utils",
        compare.args(["compare", "-U"]).arg(image).arg(live),
    )
    .map(drop)
}

/// A qcow2 file whose own structures are without a fault, by `qemu-img check`.
///
/// # Errors
/// With qemu-img's words.
pub fn qcow2_is_clean(image: &Path) -> Result<()> {
    let mut check = tool("qemu-img");
    run(
        "qemu-utils",
        check.args(["check", "-q", "-f", "qcow2"]).arg(image),
    )
    .map(drop)
}

/// Says in a qcow2 image that what it does not hold is in another, by `qemu-img rebase -u`.
///
/// # Errors
/// With qemu-img's words.
pub fn put_on_top_of(image: &Path, below: &Path) -> Result<()> {
    let mut rebase = tool("qemu-img");
    rebase.args(["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b"]);
    run("qemu-utils", rebase.arg(below).arg(image)).map(drop)
}

/// A raw image with an ext4 file system without a fault, by `e2fsck -fn`.
///
/// # Errors
/// With e2fsck's words.
pub fn ext4_is_clean(raw_image: &Path) -> Result<()> {
    run("e2fsprogs", tool("e2fsck").arg("-fn").arg(raw_image)).map(drop)
}
