//! The load inside the test guest: one thread per folder overwrites, appends to, truncates,
//! creates and removes files, syncs them, and reports its own worst write on standard output.
//!
//! A line per thread and [`REPORT_EVERY`] writes:
//! `guest-writer folder=/disk/a writes=200 worst-us=1234`
//! With `--count FIRST SECOND` it writes 1, 2, 3 … to the start of two block devices, each number first to one and, when
//! that is done, to the other, past all caches: no moment shows the second ahead of the first.
//!
//! In the line above, `worst-us` is the slowest single write with its sync since the line before.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Small enough that a line comes several times a second even on an emulated processor.
const REPORT_EVERY: u64 = 50;
/// Files per folder: together at most 16 MiB, so that they fit the smallest test disk.
const FILES: u64 = 32;
/// A file never grows beyond this many bytes.
const FILE_LIMIT: u64 = 512 << 10;
/// Keeps the guest from taking a whole processor of the machine that runs the tests.
const PAUSE: Duration = Duration::from_millis(5);

fn main() {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let [option, first, second] = &arguments[..]
        && option == "--count"
    {
        if let Err(error) = count(first, second) {
            println!("guest: counting failed: {error}");
        }
        return;
    }
    let folders: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    std::thread::scope(|scope| {
        for (seed, folder) in (1u64..).zip(&folders) {
            scope.spawn(move || {
                if let Err(error) = write_for_ever(folder, seed) {
                    println!("guest: writing to {} failed: {error}", folder.display());
                }
            });
        }
    });
}

/// A sector in memory that begins where `O_DIRECT` wants it.
#[repr(align(4096))]
struct Sector([u8; 4096]);

fn count(first: &OsString, second: &OsString) -> io::Result<()> {
    /// `O_DIRECT | O_DSYNC` on x86 (fcntl-linux.h of glibc).
    const UNCACHED: i32 = 0o40000 | 0o10000;
    let open = |path| {
        OpenOptions::new()
            .write(true)
            .custom_flags(UNCACHED)
            .open(path)
    };
    let disks = [open(first)?, open(second)?];
    let mut sector = Box::new(Sector([0; 4096]));
    for number in 1u64.. {
        sector.0[..8].copy_from_slice(&number.to_le_bytes());
        for disk in &disks {
            disk.write_all_at(&sector.0, 0)?;
        }
        if number % 1000 == 1 {
            println!("guest-counter {number}");
        }
    }
    Ok(())
}

fn write_for_ever(folder: &PathBuf, seed: u64) -> io::Result<()> {
    let mut random = Xorshift(0x9e37_79b9_7f4a_7c15 ^ seed);
    let mut worst = Duration::ZERO;
    let mut buffer = vec![0u8; 64 << 10];
    for writes in 1u64.. {
        let path = folder.join(format!("file-{}", random.below(FILES)));
        if random.below(16) == 0 {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let length = 1 + random.below(buffer.len() as u64) as usize;
        let offset = random.below(FILE_LIMIT - buffer.len() as u64);
        for chunk in buffer[..length].chunks_mut(8) {
            let bytes = random.next().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
        let started = Instant::now();
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&path)?;
        if random.below(32) == 0 {
            file.set_len(random.below(FILE_LIMIT))?;
        }
        file.write_all_at(&buffer[..length], offset)?;
        file.sync_data()?;
        worst = worst.max(started.elapsed());
        if writes % REPORT_EVERY == 0 {
            println!(
                "guest-writer folder={} writes={writes} worst-us={}",
                folder.display(),
                worst.as_micros()
            );
            worst = Duration::ZERO;
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// Marsaglia's xorshift64: enough to vary offsets and to make bytes that do not compress.
struct Xorshift(u64);

impl Xorshift {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
