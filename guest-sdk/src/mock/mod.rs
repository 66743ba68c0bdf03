//! A host in memory, to run a provider natively: disks, an archive and the rules of the contract, in milliseconds.
//!
//! For a provider's own tests (`cargo test`). What it checks is what the host checks first of all: ranges, coverage, and
//! that what was claimed is given back, by an image that is opened anew. It is no sandbox: globals outlive an instance
//! here, a panic is the test's own, and only one volume is backed up at a time. `fleecebox provider test` is the judge
//! of the component.
//!
//! ```
//! use fleecebox_guest::mock::Disk;
//! # use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error, MAX_PUT};
//! # struct Mirror;
//! # impl BlindProvider for Mirror {
//! #     fn run(_: Context, volume: BlindVolume, archive: Archive, _: Option<Vec<u8>>) -> Result<Vec<u8>, Error> {
//! #         for run in volume.dirty.data_runs() {
//! #             for chunk in run?.pieces(MAX_PUT) {
//! #                 archive.put(&volume.snapshot, chunk, Encoding::Zstd)?;
//! #             }
//! #         }
//! #         Ok(Vec::new())
//! #     }
//! # }
//!
//! let mut disk = Disk::new("scsi0", 1_000_001);
//! disk.write(500_000, b"something");
//! let full = disk.back_up_blindly::<Mirror>()?;
//! assert_eq!(full.restore(), disk.bytes());
//!
//! disk.write(1_000_000, b"!");
//! let incremental = disk.back_up_blindly::<Mirror>()?;
//! assert_eq!(incremental.restore(), disk.bytes());
//! assert_eq!(full.restore()[1_000_000], 0);
//! # Ok::<(), fleecebox_guest::mock::Failure>(())
//! ```

mod host;

pub(crate) use host::imports;

use std::collections::BTreeMap;

use crate::{
    Archive, BitmapMode, BlindProvider, BlindVolume, Context, DirtyRegions, Discarder, Error,
    Extent, Image, Objects, Provider, Reader, Snapshot, Volume,
};
use host::{BLOCK, Host};

/// Most bytes that an image is asked for at once.
const READ_BACK: u64 = 4 << 20;

/// A disk that changes and is backed up: the first time in full, then only what changed since the last backup that
/// worked.
#[derive(Debug, Clone)]
pub struct Disk {
    name: String,
    bytes: Vec<u8>,
    settings: String,
    attachments: BTreeMap<String, Vec<u8>>,
    without_reader: bool,
    without_discarder: bool,
    fault: Option<Fault>,
    /// By block; all of them before the first backup.
    dirty: Vec<bool>,
    base: Option<Backup>,
}

/// Which call of the next backup fails.
#[derive(Debug, Clone)]
pub struct Fault {
    nth: u32,
    error: Error,
}

impl Fault {
    /// The call of that number, counted from 1, of all that may fail; with [`Error::Io`].
    pub fn nth_call(nth: u32) -> Fault {
        Fault {
            nth,
            error: Error::Io,
        }
    }

    /// With another error.
    pub fn with(self, error: Error) -> Fault {
        Fault { error, ..self }
    }
}

/// Why there is no backup.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// `run` returned an error.
    #[error("the provider gave up: {0}")]
    GaveUp(Error),
    /// `run` returned success without having covered this range, the first of those missing.
    #[error(
        "{}..{} is neither put, nor in a finished object",
        .0.offset,
        .0.end()
    )]
    Uncovered(Extent),
    /// An object was neither finished nor dropped.
    #[error("the object {0} was neither finished nor dropped")]
    Leaked(String),
    /// The image cannot be opened.
    #[error("the image cannot be opened: {0}")]
    NotOpened(Error),
    /// The image does not give back what was claimed.
    #[error("the image does not give back {}..{}: {error}", .range.offset, .range.end())]
    NotGivenBack {
        /// What was asked for.
        range: Extent,
        /// What it answered.
        error: Error,
    },
    /// The image gives back too few or too many bytes, or other bytes than the disk held.
    #[error("the image gives back other bytes than the disk held in {}..{}", .0.offset, .0.end())]
    Wrong(Extent),
}

/// A backup that worked.
#[derive(Debug, Clone)]
pub struct Backup {
    restored: Vec<u8>,
    receipt: Vec<u8>,
    objects: BTreeMap<String, Vec<u8>>,
    log: Vec<String>,
}

impl Backup {
    /// The whole disk as of this backup: what was placed from the archive, what was claimed from the image.
    pub fn restore(&self) -> &[u8] {
        &self.restored
    }

    /// What `run` returned.
    pub fn receipt(&self) -> &[u8] {
        &self.receipt
    }

    /// The bytes of an object that this backup finished.
    pub fn object(&self, name: &str) -> Option<&[u8]> {
        self.objects.get(name).map(Vec::as_slice)
    }

    /// The lines of its log.
    pub fn log(&self) -> &[String] {
        &self.log
    }
}

impl Disk {
    /// A disk of `size` bytes, all zero.
    pub fn new(name: &str, size: usize) -> Disk {
        Disk {
            name: name.to_owned(),
            bytes: vec![0; size],
            settings: String::new(),
            attachments: BTreeMap::new(),
            without_reader: false,
            without_discarder: false,
            fault: None,
            dirty: vec![true; size.div_ceil(BLOCK as usize)],
            base: None,
        }
    }

    /// What it holds now.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Writes as a guest does.
    ///
    /// # Panics
    ///
    /// If that ends past the disk.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        if !bytes.is_empty() {
            let block = BLOCK as usize;
            self.dirty[offset / block..=(offset + bytes.len() - 1) / block].fill(true);
        }
    }

    /// The provider's settings from here on (TOML).
    pub fn set_settings(&mut self, toml: &str) {
        self.settings = toml.to_owned();
    }

    /// Attaches something, such as `guest-config`.
    pub fn attach(&mut self, name: &str, bytes: &[u8]) {
        self.attachments.insert(name.to_owned(), bytes.to_vec());
    }

    /// Grants no reader from here on.
    pub fn withhold_reader(&mut self) {
        self.without_reader = true;
    }

    /// Grants no discarder from here on.
    pub fn withhold_discarder(&mut self) {
        self.without_discarder = true;
    }

    /// Lets one call of the next backup fail.
    pub fn fail(&mut self, fault: Fault) {
        self.fault = Some(fault);
    }

    /// Backs the disk up, and reads back what was claimed.
    ///
    /// # Errors
    ///
    /// A [`Failure`]; the next backup then covers the same changes again.
    pub fn back_up<P: Provider>(&mut self) -> Result<Backup, Failure> {
        let host = self.host();
        let handles = host.handles();
        let volume = Volume {
            snapshot: Snapshot::new(handles.snapshot),
            dirty: DirtyRegions::new(handles.dirty),
            reader: (!self.without_reader).then(|| Reader::new(handles.reader)),
            discarder: (!self.without_discarder).then(|| Discarder::new(handles.discarder)),
        };
        let returned = P::run(
            Context::new(host.context()),
            volume,
            Archive::new(handles.archive),
            self.base.as_ref().map(|base| base.receipt.clone()),
        );
        let receipt = returned.map_err(Failure::GaveUp)?;
        host.check_covered()?;
        let mut restored = self.placed(&host);
        let claimed = host.claimed();
        if !claimed.is_empty() {
            let context = Context::new(host.context());
            let objects = Objects::new(host.objects());
            let mut image =
                P::Image::open(context, objects, receipt.clone()).map_err(Failure::NotOpened)?;
            for range in claimed.iter().flat_map(|range| range.pieces(READ_BACK)) {
                let given = image
                    .read(range.offset, range.length as u32)
                    .map_err(|error| Failure::NotGivenBack { range, error })?;
                let place = range.offset as usize..range.end() as usize;
                if given != self.bytes[place.clone()] {
                    return Err(Failure::Wrong(range));
                }
                restored[place].copy_from_slice(&given);
            }
        }
        Ok(self.commit(&host, restored, receipt))
    }

    /// As [`back_up`](Self::back_up), for a provider that never sees a byte.
    ///
    /// # Errors
    ///
    /// As for [`back_up`](Self::back_up).
    pub fn back_up_blindly<P: BlindProvider>(&mut self) -> Result<Backup, Failure> {
        let host = self.host();
        let handles = host.handles();
        host.refuse_claims();
        let volume = BlindVolume {
            snapshot: Snapshot::new(handles.snapshot),
            dirty: DirtyRegions::new(handles.dirty),
            discarder: (!self.without_discarder).then(|| Discarder::new(handles.discarder)),
        };
        let returned = P::run(
            Context::new(host.context()),
            volume,
            Archive::new(handles.archive),
            self.base.as_ref().map(|base| base.receipt.clone()),
        );
        let receipt = returned.map_err(Failure::GaveUp)?;
        host.check_covered()?;
        let restored = self.placed(&host);
        Ok(self.commit(&host, restored, receipt))
    }

    fn host(&mut self) -> Host {
        let mode = match self.base {
            Some(_) => BitmapMode::Reuse,
            None => BitmapMode::New,
        };
        Host::new(
            &self.name,
            self.bytes.clone(),
            &self.dirty,
            mode,
            self.settings.clone(),
            self.attachments.clone(),
            self.fault.take().map(|fault| (fault.nth, fault.error)),
        )
    }

    /// The base with all that the host itself placed.
    fn placed(&self, host: &Host) -> Vec<u8> {
        let mut restored = match &self.base {
            Some(base) => base.restored.clone(),
            None => vec![0; self.bytes.len()],
        };
        for range in host.placed_and_zero() {
            let place = range.offset as usize..range.end() as usize;
            restored[place.clone()].copy_from_slice(&self.bytes[place]);
        }
        restored
    }

    fn commit(&mut self, host: &Host, restored: Vec<u8>, receipt: Vec<u8>) -> Backup {
        let (objects, log) = host.kept();
        let backup = Backup {
            restored,
            receipt,
            objects,
            log,
        };
        self.dirty.fill(false);
        self.base = Some(backup.clone());
        backup
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::{DataRuns, Encoding, OutputStream, StoredObject};

    /// Calls `$body` as a blind provider.
    macro_rules! blind {
        ($name:ident, |$job:ident, $volume:ident, $archive:ident| $body:block) => {
            struct $name;
            impl BlindProvider for $name {
                fn run(
                    $job: Context,
                    $volume: BlindVolume,
                    $archive: Archive,
                    _base: Option<Vec<u8>>,
                ) -> Result<Vec<u8>, Error> {
                    $body
                }
            }
        };
    }

    fn disk() -> Disk {
        let mut disk = Disk::new("scsi0", 5 * 65536 + 9);
        disk.write(65536, &[1; 70_000]);
        disk.write(5 * 65536 + 8, b"!");
        disk
    }

    fn splice_all(
        mut object: OutputStream,
        snapshot: &Snapshot,
        runs: DataRuns<DirtyRegions>,
    ) -> Result<u64, Error> {
        for run in runs {
            object.splice(snapshot, run?)?;
        }
        object.finish()
    }

    blind!(Splices, |job, volume, archive| {
        let object = archive.create("all", Encoding::Identity)?;
        let size = splice_all(object, &volume.snapshot, volume.dirty.data_runs())?;
        job.info(format_args!("{size} bytes"));
        Ok(vec![7])
    });

    #[test]
    fn an_incremental_holds_what_changed_and_the_base_the_rest() {
        let mut disk = disk();
        let full = disk.back_up_blindly::<Splices>().unwrap();
        assert_eq!(full.restore(), disk.bytes());
        assert_eq!(full.object("all").map(<[u8]>::len), Some(2 * 65536 + 9));
        assert_eq!(
            (full.receipt(), full.log()),
            (&[7][..], &["131081 bytes".to_owned()][..])
        );
        disk.write(3 * 65536, b"changed");
        let next = disk.back_up_blindly::<Splices>().unwrap();
        assert_eq!(next.restore(), disk.bytes());
        assert_eq!(next.object("all").map(<[u8]>::len), Some(65536));
    }

    #[test]
    fn each_call_fails_in_its_turn_and_the_next_backup_has_everything() {
        for nth in 1..=7 {
            let mut disk = disk();
            disk.fail(Fault::nth_call(nth));
            let failed = disk.back_up_blindly::<Splices>().unwrap_err();
            assert_eq!(failed, Failure::GaveUp(Error::Io), "{nth}");
            let good = disk.back_up_blindly::<Splices>().unwrap();
            assert_eq!(good.restore(), disk.bytes());
        }
        let mut disk = disk();
        disk.fail(Fault::nth_call(8));
        disk.back_up_blindly::<Splices>().unwrap();
    }

    blind!(DropsItsObject, |_job, volume, archive| {
        let mut object = archive.create("all", Encoding::Identity)?;
        for run in volume.dirty.data_runs() {
            object.splice(&volume.snapshot, run?)?;
        }
        Ok(Vec::new())
    });

    blind!(LeaksAnObject, |_job, volume, archive| {
        std::mem::forget(archive.create("index", Encoding::Identity)?);
        let object = archive.create("all", Encoding::Identity)?;
        splice_all(object, &volume.snapshot, volume.dirty.data_runs())?;
        Ok(Vec::new())
    });

    #[test]
    fn an_object_that_is_not_finished_covers_nothing() {
        let first = Extent {
            offset: 65536,
            length: 2 * 65536,
        };
        let failed = disk().back_up_blindly::<DropsItsObject>().unwrap_err();
        assert_eq!(failed, Failure::Uncovered(first));
        let failed = disk().back_up_blindly::<LeaksAnObject>().unwrap_err();
        assert_eq!(failed, Failure::Leaked("index".into()));
    }

    blind!(BreaksRules, |_job, volume, archive| {
        let (snapshot, zstd) = (&volume.snapshot, Encoding::Zstd);
        let range = |offset, length| Extent { offset, length };
        let put = |range| archive.put(snapshot, range, zstd);
        assert_eq!(put(range(0, 0)), Err(Error::OutOfRange));
        assert_eq!(put(range(0, 100)), Err(Error::OutOfRange));
        assert_eq!(put(range(u64::MAX, 2)), Err(Error::OutOfRange));
        assert_eq!(put(range(5 * 65536, 65536)), Err(Error::OutOfRange));
        assert_eq!(put(range(0, 2 << 20)), Err(Error::TooLarge));
        put(range(5 * 65536, 9))?;
        assert_eq!(put(range(5 * 65536, 9)), Err(Error::NotDirty));
        assert_eq!(archive.create(".x", zstd).err(), Some(Error::InvalidName));
        let mut object = archive.create("x", zstd)?;
        assert_eq!(archive.create("x", zstd).err(), Some(Error::Exists));
        let claimed = object.claim(snapshot, range(65536, 65536));
        assert!(matches!(claimed, Err(Error::Other(_))), "{claimed:?}");
        let discarder = volume.discarder.ok_or(Error::Io)?;
        assert_eq!(discarder.discard(range(65536, 65536)), Err(Error::NotDirty));
        object.splice(snapshot, range(65536, 2 * 65536))?;
        object.finish()?;
        discarder.discard(range(65536, 65536))?;
        Ok(Vec::new())
    });

    #[test]
    fn the_contracts_rules_hold() {
        disk().back_up_blindly::<BreaksRules>().unwrap();
    }

    /// Writes its bytes, and gives back what `CHANGE` makes of them.
    struct Writes<const CHANGE: u8>;

    impl<const CHANGE: u8> Provider for Writes<CHANGE> {
        type Image = Written<CHANGE>;

        fn run(
            _job: Context,
            volume: Volume,
            archive: Archive,
            _base: Option<Vec<u8>>,
        ) -> Result<Vec<u8>, Error> {
            let reader = volume.reader.ok_or(Error::other("no reader"))?;
            let mut object = archive.create("all", Encoding::Zstd)?;
            let mut first = None;
            for run in volume.dirty.data_runs() {
                let run = run?;
                first.get_or_insert(run.offset);
                object.write_all(&reader.read(run.offset, run.length as u32)?)?;
                object.claim(&volume.snapshot, run)?;
            }
            object.finish()?;
            Ok(first.unwrap_or_default().to_le_bytes().to_vec())
        }
    }

    struct Written<const CHANGE: u8>(StoredObject);

    impl<const CHANGE: u8> Image for Written<CHANGE> {
        fn open(_: Context, objects: Objects, _: Vec<u8>) -> Result<Self, Error> {
            Ok(Written(objects.open("all")?))
        }

        fn read(&mut self, _: u64, length: u32) -> Result<Vec<u8>, Error> {
            let mut bytes = vec![0; length as usize];
            std::io::Read::read_exact(&mut self.0, &mut bytes)?;
            bytes[0] ^= CHANGE;
            Ok(bytes)
        }
    }

    #[test]
    fn what_was_claimed_is_read_back() {
        let mut disk = disk();
        assert_eq!(disk.back_up::<Writes<0>>().unwrap().restore(), disk.bytes());
        let failed = super::tests::disk().back_up::<Writes<1>>().unwrap_err();
        let first = Extent {
            offset: 65536,
            length: 2 * 65536,
        };
        assert_eq!(failed, Failure::Wrong(first));
        disk.withhold_reader();
        let failed = disk.back_up::<Writes<0>>().unwrap_err();
        assert_eq!(failed, Failure::GaveUp(Error::other("no reader")));
    }
}
