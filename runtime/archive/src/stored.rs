//! Reading back what a provider wrote, and nothing else.

use super::error::{Damage, Error};
use super::frame::{Frame, ObjectRef};
use super::lock;
use super::name::{BackupId, ObjectName};
use super::object::ObjectInfo;
use super::seek_table::{self, FOOTER, Lengths};
use super::store::{self, Store};
use fleecebox_contract::Encoding;
use fleecebox_contract::digest::Digest;
use fleecebox_contract::extent::Extent;
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex};

/// Most bytes that one read gives, far above what a provider may be handed at once.
pub const STORED_READ_LIMIT: u32 = 16 << 20;

/// Bytes read at once where a whole object is.
const VERIFY_PIECE: u64 = 1 << 20;

/// The objects of one backup, whether it is committed or still in the making.
pub struct StoredObjects {
    store: Arc<Store>,
    backup: BackupId,
    objects: Arc<BTreeMap<ObjectName, ObjectInfo>>,
    /// The object read last, so that a provider that reads on pays for opening and decoding once.
    open: Mutex<Option<Arc<OpenObject>>>,
}

struct OpenObject {
    name: ObjectName,
    reference: ObjectRef,
    file: File,
    /// In ascending order; none for identity.
    frames: Vec<Place>,
    last: Mutex<Option<(u64, Arc<Vec<u8>>)>>,
}

/// Where a frame lies: as little as will do, for a provider decides how many there are and how often they are looked up.
#[derive(Clone, Copy)]
struct Place {
    /// First byte before encoding.
    start: u64,
    /// First byte in the file.
    offset: u64,
    lengths: Lengths,
}

impl StoredObjects {
    pub(super) fn new(store: Arc<Store>, backup: BackupId, objects: Vec<ObjectInfo>) -> Self {
        let named = |info: ObjectInfo| (info.name.clone(), info);
        Self {
            store,
            backup,
            objects: Arc::new(objects.into_iter().map(named).collect()),
            open: Mutex::default(),
        }
    }

    /// The same for another reader, who keeps what it reads open by itself.
    pub fn again(&self) -> Self {
        Self {
            store: Arc::clone(&self.store),
            backup: self.backup,
            objects: Arc::clone(&self.objects),
            open: Mutex::default(),
        }
    }

    /// What is recorded of an object.
    pub fn info(&self, name: &ObjectName) -> Result<&ObjectInfo, Error> {
        self.objects.get(name).ok_or_else(|| Error::NotFound {
            what: name.to_string(),
        })
    }

    /// Size before encoding, in bytes.
    pub fn size(&self, name: &ObjectName) -> Result<u64, Error> {
        self.info(name).map(|info| info.size)
    }

    /// Bytes that the provider wrote, at offsets before encoding. Out of range where any of them was spliced from
    /// a volume or is past the end: a blind provider must not see a volume through its objects.
    pub fn read(&self, name: &ObjectName, offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        let info = self.info(name)?;
        let out_of_range = Error::OutOfRange {
            offset,
            length: length.into(),
        };
        if length > STORED_READ_LIMIT {
            return Err(Error::TooLarge {
                limit: STORED_READ_LIMIT.into(),
                actual: length.into(),
            });
        }
        let Ok(range) = Extent::new(offset, length.into()) else {
            return Err(out_of_range);
        };
        let at = info.written.partition_point(|run| run.end() <= offset);
        if !info.written.get(at).is_some_and(|run| run.contains(range)) {
            return Err(out_of_range);
        }
        let object = self.open(info)?;
        match info.encoding {
            Encoding::Identity => store::read_range(&object.file, name, offset, length.into()),
            Encoding::Zstd => object.decode(range),
        }
    }

    /// Reads what the provider wrote of an object and compares it with its digest, and the file's length with what
    /// was stored.
    pub fn verify(&self, name: &ObjectName) -> Result<(), Error> {
        let info = self.info(name)?;
        let file = self.store.open_object(&self.reference(name))?;
        let actual = file.metadata().map_err(Error::at(name))?.len();
        if actual != info.stored {
            return Err(Error::damaged(name)(Damage::Length {
                expected: info.stored,
                actual,
            }));
        }
        let mut hasher = blake3::Hasher::new();
        let pieces = |run: &Extent| run.pieces(VERIFY_PIECE);
        for piece in info.written.iter().flat_map(pieces) {
            hasher.update(&self.read(name, piece.start(), piece.len() as u32)?);
        }
        if Digest::from(hasher.finalize()) != info.digest {
            return Err(Error::damaged(name)(Damage::Digest));
        }
        Ok(())
    }

    fn reference(&self, name: &ObjectName) -> ObjectRef {
        ObjectRef::Object {
            backup: self.backup,
            name: name.clone(),
        }
    }

    fn open(&self, info: &ObjectInfo) -> Result<Arc<OpenObject>, Error> {
        let mut open = lock(&self.open);
        if let Some(object) = open.as_ref().filter(|object| object.name == info.name) {
            return Ok(object.clone());
        }
        let reference = self.reference(&info.name);
        let file = self.store.open_object(&reference)?;
        let frames = match info.encoding {
            Encoding::Identity => Vec::new(),
            Encoding::Zstd => read_frames(&file, &reference)?,
        };
        let object = Arc::new(OpenObject {
            name: info.name.clone(),
            reference,
            file,
            frames,
            last: Mutex::default(),
        });
        *open = Some(object.clone());
        Ok(object)
    }
}

impl OpenObject {
    fn decode(&self, range: Extent) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        let mut at = range.start();
        while at < range.end() {
            let after = self.frames.partition_point(|place| place.start <= at);
            let short = || Error::damaged(&self.name)(Damage::Frame);
            let place = after.checked_sub(1).map(|index| self.frames[index]);
            let place = place.ok_or_else(short)?;
            let decoded = self.frame(place)?;
            let end = (range.end() - place.start).min(decoded.len() as u64);
            let part = decoded.get((at - place.start) as usize..end as usize);
            let part = part.filter(|part| !part.is_empty()).ok_or_else(short)?;
            bytes.extend(part);
            at += part.len() as u64;
        }
        Ok(bytes)
    }

    fn frame(&self, place: Place) -> Result<Arc<Vec<u8>>, Error> {
        let mut last = lock(&self.last);
        if let Some((_, decoded)) = last.as_ref().filter(|(at, _)| *at == place.start) {
            return Ok(decoded.clone());
        }
        let Lengths { stored, decoded } = place.lengths;
        let object = self.reference.clone();
        let frame = Frame::new(object, place.offset, stored, decoded, Encoding::Zstd)
            .map_err(|_| Error::damaged(&self.name)(Damage::Frame))?;
        let decoded = Arc::new(store::read_frame_of(&self.file, &frame)?);
        *last = Some((place.start, decoded.clone()));
        Ok(decoded)
    }
}

/// The frames of a zstd object.
fn read_frames(file: &File, object: &ObjectRef) -> Result<Vec<Place>, Error> {
    let length = file.metadata().map_err(Error::at(object))?.len();
    let footer_at = length.saturating_sub(FOOTER as u64);
    let footer = store::read_range(file, object, footer_at, FOOTER as u64)?;
    let footer = footer.first_chunk().ok_or(Damage::Frame);
    let table = footer.and_then(|footer| seek_table::table_length(*footer, length));
    let table = table.map_err(Error::damaged(object))?;
    let data = length - table;
    let bytes = store::read_range(file, object, data, table)?;
    let lengths = seek_table::parse(&bytes, data).map_err(Error::damaged(object))?;
    let (mut offset, mut start) = (0, 0);
    let placed = lengths.into_iter().map(|lengths| {
        let place = Place {
            start,
            offset,
            lengths,
        };
        offset += u64::from(lengths.stored);
        start += u64::from(lengths.decoded);
        place
    });
    Ok(placed.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Archive, BackupWriter};
    use cap_std::ambient_authority;
    use cap_std::fs::Dir;

    fn object(writer: &BackupWriter, name: &str, bytes: &[u8]) {
        let mut object = writer
            .create(&name.parse().unwrap(), Encoding::Identity)
            .unwrap();
        object.write(bytes).unwrap();
        object.finish().unwrap();
    }

    #[test]
    fn another_tenants_and_another_backups_objects_look_like_none_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let root = Dir::open_ambient_dir(folder.path(), ambient_authority()).unwrap();
        let archive = Archive::create(root).unwrap();
        let id = |second| {
            let time = time::OffsetDateTime::UNIX_EPOCH + time::Duration::seconds(second);
            BackupId::random(time).unwrap()
        };
        let begin = |tenant: &str, id| {
            let namespace = archive.create_namespace(&tenant.parse().unwrap()).unwrap();
            namespace.begin(id).unwrap()
        };
        // The same id in both, as nothing forbids.
        let shared = id(1);
        let (ours, theirs) = (begin("ours", shared), begin("theirs", shared));
        let older = begin("ours", id(2));
        object(&theirs, "same", b"theirs");
        object(&theirs, "only-theirs", b"theirs");
        object(&older, "only-older", b"older");
        object(&ours, "same", b"ours");
        let seen = ours.objects();
        let name = |name: &str| name.parse::<ObjectName>().unwrap();
        assert_eq!(seen.read(&name("same"), 0, 4).unwrap(), b"ours");
        assert_eq!(seen.size(&name("same")).unwrap(), 4);
        for there in ["only-theirs", "only-older"] {
            let nowhere = "n".repeat(there.len());
            let told = |name: &str| {
                let name: ObjectName = name.parse().unwrap();
                let size = seen.size(&name).unwrap_err().to_string();
                (size, seen.read(&name, 0, 1).unwrap_err().to_string())
            };
            let (size, read) = told(there);
            let expected = told(&nowhere);
            let same = |text: String| text.replace(there, &nowhere);
            assert_eq!((same(size), same(read)), expected);
        }
    }
}
