//! The disks of a test: what they are, and their files.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};

use crate::process::{run, tool};

/// How the bytes lie in the disk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One to one. Its bitmaps live as long as QEMU.
    Raw,
    /// QEMU's own format, which can keep bitmaps.
    Qcow2,
}

impl Format {
    /// QEMU's name of the driver.
    pub fn driver(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

#[derive(Clone, Debug)]
enum Content {
    Blank,
    CopyOf(PathBuf),
    Ext4,
}

/// A disk to be made.
#[derive(Clone, Debug)]
pub struct Disk {
    node: String,
    format: Format,
    size: u64,
    content: Content,
}

impl Disk {
    /// A blank disk of `size` bytes (a multiple of 512) in a sparse raw file. `node` becomes the
    /// name of its block node, at most 31 characters, and the stem of its file's name.
    pub fn raw(node: &str, size: u64) -> Self {
        Self {
            node: node.into(),
            format: Format::Raw,
            size,
            content: Content::Blank,
        }
    }

    /// The same in a qcow2 file.
    pub fn qcow2(node: &str, size: u64) -> Self {
        Self {
            format: Format::Qcow2,
            ..Self::raw(node, size)
        }
    }

    /// Starts with the bytes of a raw image, which may be shorter than the disk.
    #[must_use]
    pub fn holding(self, raw_image: &Path) -> Self {
        Self {
            content: Content::CopyOf(raw_image.into()),
            ..self
        }
    }

    /// Starts with an empty ext4 file system.
    #[must_use]
    pub fn formatted(self) -> Self {
        Self {
            content: Content::Ext4,
            ..self
        }
    }

    /// Makes the file in `folder`.
    ///
    /// # Errors
    /// When `qemu-img` or `mkfs.ext4` is missing or fails.
    pub fn create(&self, folder: &Path) -> Result<DiskFile> {
        let path = folder.join(format!("{}.{}", self.node, self.format.driver()));
        let plain = folder.join(format!("{}.new", self.node));
        match &self.content {
            Content::Blank => {
                File::create(&plain)?;
            }
            // Keeps holes as holes, so that a test's allocation is what its content says.
            Content::CopyOf(image) => {
                run(
                    "coreutils",
                    tool("cp").arg("--sparse=always").arg(image).arg(&plain),
                )?;
            }
            Content::Ext4 => {
                File::create(&plain)?.set_len(self.size)?;
                run(
                    "e2fsprogs",
                    tool("mkfs.ext4").args(["-q", "-F"]).arg(&plain),
                )?;
            }
        }
        File::options()
            .write(true)
            .open(&plain)?
            .set_len(self.size)?;
        match self.format {
            Format::Raw => std::fs::rename(&plain, &path)?,
            Format::Qcow2 => {
                let mut convert = tool("qemu-img");
                convert
                    .args(["convert", "-f", "raw", "-O", "qcow2"])
                    .arg(&plain)
                    .arg(&path);
                run("qemu-utils", &mut convert)?;
                std::fs::remove_file(&plain)?;
            }
        }
        Ok(DiskFile {
            node: self.node.clone(),
            format: self.format,
            path,
        })
    }
}

/// A disk's file.
#[derive(Clone, Debug)]
pub struct DiskFile {
    /// The name of the disk's block node.
    pub node: String,
    /// How the bytes lie in the file.
    pub format: Format,
    /// The file.
    pub path: PathBuf,
}

impl DiskFile {
    /// The arguments of `blockdev-add`; discard reaches the file.
    pub fn blockdev(&self) -> Value {
        json!({
            "driver": self.format.driver(),
            "node-name": self.node,
            "discard": "unmap",
            "file": {"driver": "file", "filename": self.path, "discard": "unmap"},
        })
    }
}
