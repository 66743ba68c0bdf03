//! The mock's side of each call. What it refuses, the real host refuses.

use std::cell::{RefCell, RefMut};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use super::Failure;
use crate::{BitmapMode, Error, Extent};
use imports::{archive, content, job, stored, types, volume};
use types::ErrorCode;

/// Unit of dirty tracking, in bytes, as the host has it unless configured.
pub(super) const BLOCK: u64 = 64 << 10;

const MAX_PUT: u64 = 1 << 20;
const MAX_TRANSFER: u32 = 4 << 20;
const MAX_NAME: usize = 128;

/// How far a block's backup is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cover {
    Nothing,
    /// In an unfinished object; whether it is claimed there.
    Pending {
        stream: u32,
        claimed: bool,
    },
    Done {
        claimed: bool,
    },
}

#[derive(Debug, Clone, Copy)]
struct Block {
    dirty: bool,
    zero: bool,
    cover: Cover,
    discarded: bool,
}

#[derive(Debug, Default)]
struct Object {
    name: String,
    bytes: Vec<u8>,
    /// What the provider wrote; the rest was spliced.
    written: Vec<Range<u64>>,
}

#[derive(Debug)]
struct State {
    info: volume::VolumeInfo,
    bytes: Vec<u8>,
    blocks: Vec<Block>,
    /// Next block that `dirty-regions.next` looks at.
    cursor: usize,
    streams: BTreeMap<u32, Object>,
    next_stream: u32,
    finished: BTreeMap<String, Object>,
    claims: bool,
    settings: String,
    attachments: BTreeMap<String, Vec<u8>>,
    /// Number of the call that fails.
    fault: Option<(u32, Error)>,
    calls: u32,
    log: Vec<String>,
}

/// The host of one backup.
#[derive(Debug)]
pub(super) struct Host(Rc<RefCell<State>>);

/// All that `run` may be handed.
pub(super) struct Handles {
    pub(super) snapshot: volume::Snapshot,
    pub(super) dirty: volume::DirtyRegions,
    pub(super) reader: content::Reader,
    pub(super) discarder: volume::Discarder,
    pub(super) archive: archive::Writer,
}

impl Host {
    pub(super) fn new(
        name: &str,
        bytes: Vec<u8>,
        dirty: &[bool],
        mode: BitmapMode,
        settings: String,
        attachments: BTreeMap<String, Vec<u8>>,
        fault: Option<(u32, Error)>,
    ) -> Host {
        let blocks = bytes.chunks(BLOCK as usize).zip(dirty);
        let blocks = blocks.map(|(bytes, &dirty)| Block {
            dirty,
            zero: bytes.iter().all(|&byte| byte == 0),
            cover: Cover::Nothing,
            discarded: false,
        });
        Host(Rc::new(RefCell::new(State {
            info: volume::VolumeInfo {
                name: name.to_owned(),
                size: bytes.len() as u64,
                block_size: BLOCK as u32,
                mode: match mode {
                    BitmapMode::None => volume::BitmapMode::None,
                    BitmapMode::New => volume::BitmapMode::New,
                    BitmapMode::Reuse => volume::BitmapMode::Reuse,
                },
            },
            blocks: blocks.collect(),
            bytes,
            cursor: 0,
            streams: BTreeMap::new(),
            next_stream: 0,
            finished: BTreeMap::new(),
            claims: true,
            settings,
            attachments,
            fault,
            calls: 0,
            log: Vec::new(),
        })))
    }

    pub(super) fn handles(&self) -> Handles {
        let host = || Rc::clone(&self.0);
        Handles {
            snapshot: volume::Snapshot(Shared(host())),
            dirty: volume::DirtyRegions(Shared(host())),
            reader: content::Reader(Shared(host())),
            discarder: volume::Discarder(Shared(host())),
            archive: archive::Writer(Shared(host())),
        }
    }

    pub(super) fn context(&self) -> job::Context {
        job::Context(Shared(Rc::clone(&self.0)))
    }

    pub(super) fn objects(&self) -> stored::Objects {
        stored::Objects(Shared(Rc::clone(&self.0)))
    }

    /// A blind provider exports no `restore`.
    pub(super) fn refuse_claims(&self) {
        self.0.borrow_mut().claims = false;
    }

    pub(super) fn check_covered(&self) -> Result<(), Failure> {
        let state = self.0.borrow();
        if let Some(object) = state.streams.values().next() {
            return Err(Failure::Leaked(object.name.clone()));
        }
        let missing = |block: &Block| {
            block.dirty && !block.zero && !matches!(block.cover, Cover::Done { .. })
        };
        match state.runs(missing).first() {
            Some(&first) => Err(Failure::Uncovered(first)),
            None => Ok(()),
        }
    }

    /// What the provider has to give back.
    pub(super) fn claimed(&self) -> Vec<Extent> {
        let claimed = Cover::Done { claimed: true };
        let state = self.0.borrow();
        state.runs(|block| !block.zero && block.cover == claimed)
    }

    /// What the host restores by itself.
    pub(super) fn placed_and_zero(&self) -> Vec<Extent> {
        let placed = Cover::Done { claimed: false };
        let state = self.0.borrow();
        state.runs(|block| block.dirty && (block.zero || block.cover == placed))
    }

    /// The finished objects and the log.
    pub(super) fn kept(&self) -> (BTreeMap<String, Vec<u8>>, Vec<String>) {
        let state = self.0.borrow();
        let objects = state.finished.iter();
        let objects = objects.map(|(name, object)| (name.clone(), object.bytes.clone()));
        (objects.collect(), state.log.clone())
    }
}

impl State {
    /// Counts a call that may fail.
    fn call(&mut self) -> Result<(), ErrorCode> {
        self.calls += 1;
        match &self.fault {
            Some((nth, error)) if *nth == self.calls => Err(error.clone().into()),
            _ => Ok(()),
        }
    }

    /// The blocks of a range of whole blocks.
    fn whole(&self, range: types::Extent) -> Result<Range<usize>, ErrorCode> {
        let end = range.offset.checked_add(range.length);
        let end = end.filter(|&end| {
            range.length > 0
                && end <= self.info.size
                && range.offset.is_multiple_of(BLOCK)
                && (end.is_multiple_of(BLOCK) || end == self.info.size)
        });
        let end = end.ok_or(ErrorCode::OutOfRange)?;
        Ok((range.offset / BLOCK) as usize..end.div_ceil(BLOCK) as usize)
    }

    fn bytes_of(&self, range: types::Extent) -> &[u8] {
        &self.bytes[range.offset as usize..(range.offset + range.length) as usize]
    }

    /// The object of that name.
    fn finished(&self, name: &str) -> Result<&Object, ErrorCode> {
        match self.finished.get(name) {
            Some(object) => Ok(object),
            None if is_plain(name) => Err(ErrorCode::NotFound),
            None => Err(ErrorCode::InvalidName),
        }
    }

    /// Covers a range that nothing covers yet.
    fn cover(&mut self, range: types::Extent, cover: Cover) -> Result<(), ErrorCode> {
        let whole = self.whole(range)?;
        let blocks = &mut self.blocks[whole];
        if blocks
            .iter()
            .any(|it| !it.dirty || it.cover != Cover::Nothing)
        {
            return Err(ErrorCode::NotDirty);
        }
        blocks.iter_mut().for_each(|it| it.cover = cover);
        Ok(())
    }

    /// The neighbouring blocks that `is` holds for, joined.
    fn runs(&self, is: impl Fn(&Block) -> bool) -> Vec<Extent> {
        let mut runs: Vec<Extent> = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            let offset = index as u64 * BLOCK;
            let length = BLOCK.min(self.info.size - offset);
            match runs.last_mut() {
                _ if !is(block) => {}
                Some(last) if last.end() == offset => last.length += length,
                _ => runs.push(Extent { offset, length }),
            }
        }
        runs
    }

    /// Ends what an unfinished object covers.
    fn end_stream(&mut self, ended: u32, finished: bool) {
        for block in &mut self.blocks {
            if let Cover::Pending { stream, claimed } = block.cover
                && stream == ended
            {
                block.cover = match finished {
                    true => Cover::Done { claimed },
                    false => Cover::Nothing,
                };
            }
        }
    }
}

/// A handle's way to its host.
#[derive(Debug)]
pub(crate) struct Shared(Rc<RefCell<State>>);

impl Shared {
    fn state(&self) -> RefMut<'_, State> {
        self.0.borrow_mut()
    }
}

fn is_plain(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    !name.is_empty() && name.len() <= MAX_NAME && !name.starts_with('.') && name.bytes().all(plain)
}

/// With the names of the generated bindings, so that one set of wrappers serves both.
pub(crate) mod imports {
    pub(crate) mod types {
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct Extent {
            pub(crate) offset: u64,
            pub(crate) length: u64,
        }

        #[derive(Debug, Clone, Copy)]
        pub(crate) enum Quota {
            Objects,
            OutputBytes,
            ReadBytes,
        }

        #[derive(Debug, Clone)]
        pub(crate) enum ErrorCode {
            Cancelled,
            Discarded,
            Exists,
            Io,
            InvalidName,
            NotDirty,
            NotFound,
            OutOfRange,
            QuotaExceeded(Quota),
            TooLarge,
            Other(Option<String>),
        }

        #[derive(Debug, Clone, Copy)]
        pub(crate) enum Encoding {
            Identity,
            Zstd,
        }

        #[derive(Debug, Clone, Copy)]
        pub(crate) enum RegionKind {
            Data,
            Zero,
        }

        #[derive(Debug, Clone, Copy)]
        pub(crate) struct Region {
            pub(crate) range: Extent,
            pub(crate) kind: RegionKind,
        }
    }

    pub(crate) mod volume {
        use super::super::{BLOCK, Block, Cover, Shared};
        use super::types::{ErrorCode, Extent, Region, RegionKind};

        #[derive(Debug, Clone, Copy)]
        pub(crate) enum BitmapMode {
            None,
            New,
            Reuse,
        }

        #[derive(Debug, Clone)]
        pub(crate) struct VolumeInfo {
            pub(crate) name: String,
            pub(crate) size: u64,
            pub(crate) block_size: u32,
            pub(crate) mode: BitmapMode,
        }

        #[derive(Debug)]
        pub(crate) struct Snapshot(pub(in super::super) Shared);

        impl Snapshot {
            pub(crate) fn info(&self) -> VolumeInfo {
                self.0.state().info.clone()
            }
        }

        #[derive(Debug)]
        pub(crate) struct DirtyRegions(pub(in super::super) Shared);

        impl DirtyRegions {
            pub(crate) fn next(&self, limit: u32) -> Result<Vec<Region>, ErrorCode> {
                let mut state = self.0.state();
                state.call()?;
                if limit == 0 {
                    return Err(ErrorCode::OutOfRange);
                }
                let mut regions: Vec<Region> = Vec::new();
                while let Some(block) = state.blocks.get(state.cursor).copied() {
                    let offset = state.cursor as u64 * BLOCK;
                    let length = BLOCK.min(state.info.size - offset);
                    let joins = |last: &Region| {
                        last.range.offset + last.range.length == offset
                            && matches!(last.kind, RegionKind::Zero) == block.zero
                    };
                    if !block.dirty {
                        // Nothing to say of it.
                    } else if let Some(last) = regions.last_mut().filter(|last| joins(last)) {
                        last.range.length += length;
                    } else if regions.len() == limit as usize {
                        break;
                    } else {
                        regions.push(Region {
                            range: Extent { offset, length },
                            kind: match block.zero {
                                true => RegionKind::Zero,
                                false => RegionKind::Data,
                            },
                        });
                    }
                    state.cursor += 1;
                }
                Ok(regions)
            }
        }

        #[derive(Debug)]
        pub(crate) struct Discarder(pub(in super::super) Shared);

        impl Discarder {
            pub(crate) fn discard(&self, range: Extent) -> Result<(), ErrorCode> {
                let mut state = self.0.state();
                state.call()?;
                let whole = state.whole(range)?;
                let blocks = &mut state.blocks[whole];
                // A zero block is done without a cover, but not while an unfinished object covers it.
                let finished = |it: &Block| match it.cover {
                    Cover::Done { .. } => true,
                    Cover::Nothing => it.zero,
                    Cover::Pending { .. } => false,
                };
                if blocks.iter().any(|it| !it.dirty || !finished(it)) {
                    return Err(ErrorCode::NotDirty);
                }
                blocks.iter_mut().for_each(|it| it.discarded = true);
                Ok(())
            }
        }
    }

    pub(crate) mod content {
        use super::super::{BLOCK, MAX_TRANSFER, Shared};
        use super::types::{ErrorCode, Extent};

        #[derive(Debug)]
        pub(crate) struct Reader(pub(in super::super) Shared);

        impl Reader {
            pub(crate) fn max_read(&self) -> u32 {
                MAX_TRANSFER
            }

            pub(crate) fn read(&self, offset: u64, length: u32) -> Result<Vec<u8>, ErrorCode> {
                let mut state = self.0.state();
                state.call()?;
                if length > MAX_TRANSFER {
                    return Err(ErrorCode::TooLarge);
                }
                let end = offset.checked_add(length.into());
                let end = end.filter(|&end| length > 0 && end <= state.info.size);
                let end = end.ok_or(ErrorCode::OutOfRange)?;
                let blocks = (offset / BLOCK) as usize..end.div_ceil(BLOCK) as usize;
                if state.blocks[blocks.clone()].iter().any(|it| !it.dirty) {
                    return Err(ErrorCode::NotDirty);
                }
                if state.blocks[blocks].iter().any(|it| it.discarded) {
                    return Err(ErrorCode::Discarded);
                }
                let length = length.into();
                Ok(state.bytes_of(Extent { offset, length }).to_vec())
            }
        }
    }

    pub(crate) mod archive {
        use super::super::{Cover, MAX_PUT, MAX_TRANSFER, Object, Shared, is_plain};
        use super::types::{Encoding, ErrorCode, Extent};
        use super::volume::Snapshot;
        use std::rc::Rc;

        #[derive(Debug)]
        pub(crate) struct Writer(pub(in super::super) Shared);

        impl Writer {
            pub(crate) fn put(
                &self,
                _: &Snapshot,
                range: Extent,
                _: Encoding,
            ) -> Result<(), ErrorCode> {
                let mut state = self.0.state();
                state.call()?;
                if range.length > MAX_PUT {
                    return Err(ErrorCode::TooLarge);
                }
                state.cover(range, Cover::Done { claimed: false })
            }

            pub(crate) fn create(
                &self,
                name: &str,
                _: Encoding,
            ) -> Result<OutputStream, ErrorCode> {
                let mut state = self.0.state();
                state.call()?;
                if !is_plain(name) {
                    return Err(ErrorCode::InvalidName);
                }
                let unfinished = state.streams.values().any(|it| it.name == name);
                if unfinished || state.finished.contains_key(name) {
                    return Err(ErrorCode::Exists);
                }
                let number = state.next_stream;
                state.next_stream += 1;
                let object = Object {
                    name: name.to_owned(),
                    ..Object::default()
                };
                state.streams.insert(number, object);
                let host = Shared(Rc::clone(&self.0.0));
                Ok(OutputStream { host, number })
            }
        }

        #[derive(Debug)]
        pub(crate) struct OutputStream {
            host: Shared,
            number: u32,
        }

        impl OutputStream {
            pub(crate) fn max_write(&self) -> u32 {
                MAX_TRANSFER
            }

            pub(crate) fn write(&self, bytes: &[u8]) -> Result<(), ErrorCode> {
                let mut state = self.host.state();
                state.call()?;
                if bytes.len() > MAX_TRANSFER as usize {
                    return Err(ErrorCode::TooLarge);
                }
                let object = state.streams.get_mut(&self.number);
                let object = object.ok_or(ErrorCode::NotFound)?;
                let start = object.bytes.len() as u64;
                object.bytes.extend_from_slice(bytes);
                object.written.push(start..object.bytes.len() as u64);
                Ok(())
            }

            pub(crate) fn splice(&self, _: &Snapshot, range: Extent) -> Result<(), ErrorCode> {
                let mut state = self.host.state();
                state.call()?;
                let (stream, claimed) = (self.number, false);
                state.cover(range, Cover::Pending { stream, claimed })?;
                let bytes = state.bytes_of(range).to_vec();
                let object = state.streams.get_mut(&stream);
                object.ok_or(ErrorCode::NotFound)?.bytes.extend(bytes);
                Ok(())
            }

            pub(crate) fn claim(&self, _: &Snapshot, range: Extent) -> Result<(), ErrorCode> {
                let mut state = self.host.state();
                state.call()?;
                if !state.claims {
                    let words = "a blind provider cannot claim: it exports no restore";
                    return Err(ErrorCode::Other(Some(words.into())));
                }
                let (stream, claimed) = (self.number, true);
                state.cover(range, Cover::Pending { stream, claimed })
            }

            pub(crate) fn finish(this: OutputStream) -> Result<u64, ErrorCode> {
                let mut state = this.host.state();
                // After a failure the object is gone: dropping the stream sees to that.
                state.call()?;
                let object = state.streams.remove(&this.number);
                let object = object.ok_or(ErrorCode::NotFound)?;
                let size = object.bytes.len() as u64;
                state.finished.insert(object.name.clone(), object);
                state.end_stream(this.number, true);
                Ok(size)
            }
        }

        impl Drop for OutputStream {
            fn drop(&mut self) {
                let mut state = self.host.state();
                if state.streams.remove(&self.number).is_some() {
                    state.end_stream(self.number, false);
                }
            }
        }
    }

    pub(crate) mod job {
        use super::super::Shared;

        #[derive(Debug, Clone, Copy)]
        pub(crate) enum Level {
            Debug,
            Info,
            Warn,
            Error,
        }

        #[derive(Debug)]
        pub(crate) struct Context(pub(in super::super) Shared);

        impl Context {
            pub(crate) fn id(&self) -> String {
                "mock".into()
            }

            pub(crate) fn settings(&self) -> String {
                self.0.state().settings.clone()
            }

            pub(crate) fn attachment(&self, name: &str) -> Option<Vec<u8>> {
                self.0.state().attachments.get(name).cloned()
            }

            pub(crate) fn log(&self, _: Level, message: &str) {
                self.0.state().log.push(message.to_owned());
            }
        }
    }

    pub(crate) mod stored {
        use super::super::{MAX_TRANSFER, Shared};
        use super::types::ErrorCode;

        #[derive(Debug)]
        pub(crate) struct Objects(pub(in super::super) Shared);

        impl Objects {
            pub(crate) fn size(&self, name: &str) -> Result<u64, ErrorCode> {
                let mut state = self.0.state();
                state.call()?;
                Ok(state.finished(name)?.bytes.len() as u64)
            }

            pub(crate) fn read(
                &self,
                name: &str,
                offset: u64,
                length: u32,
            ) -> Result<Vec<u8>, ErrorCode> {
                let mut state = self.0.state();
                state.call()?;
                if length > MAX_TRANSFER {
                    return Err(ErrorCode::TooLarge);
                }
                let object = state.finished(name)?;
                let end = offset.checked_add(length.into());
                let end = end.filter(|&end| length > 0 && end <= object.bytes.len() as u64);
                let end = end.ok_or(ErrorCode::OutOfRange)?;
                // Writes follow each other where nothing was spliced between them.
                let written: u64 = object
                    .written
                    .iter()
                    .map(|it| it.end.min(end).saturating_sub(it.start.max(offset)))
                    .sum();
                if written < end - offset {
                    return Err(ErrorCode::OutOfRange);
                }
                Ok(object.bytes[offset as usize..end as usize].to_vec())
            }
        }
    }
}
