//! A reader of archives that is made of `runtime/docs/archive-format.md` alone and of none of the product's code. What it
//! reads is the disk, and all that the page says of digests, keys and lengths is so.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use fleecebox_tests::{Disk, MIB, Random, Site, StorageDaemon, files_below};
use serde_json::Value;

/// More than a leaf of 128 blocks of 64 KiB, and an end that is no whole block.
const SIZE: u64 = 20 * MIB + 3 * 512;

/// What a page says of some neighbouring blocks.
#[derive(Clone, Debug)]
enum Run {
    Zero(u64),
    Placed {
        file: PathBuf,
        offset: u64,
        stored: u64,
        decoded: u64,
        encoding: u64,
        skip: u64,
        digests: Vec<[u8; 32]>,
    },
    Claimed(Vec<[u8; 32]>),
}

/// A namespace's folder.
struct Reader(PathBuf);

/// A volume as it was read.
struct Volume {
    bytes: Vec<u8>,
    /// Of each claimed block its number and digest: its bytes are the provider's to give.
    claimed: BTreeMap<u64, [u8; 32]>,
}

#[test]
fn what_was_put_is_read_by_the_page_alone() -> Result<()> {
    is_read("chunked", "")
}

#[test]
fn what_was_spliced_is_read_by_the_page_alone() -> Result<()> {
    is_read("splices-everything", "settings = { encoding = 'zstd' }")?;
    is_read("splices-everything", "settings = { encoding = 'identity' }")
}

#[test]
fn what_is_claimed_has_the_digests_of_the_disk() -> Result<()> {
    is_read("image", "")
}

fn is_read(provider: &str, settings: &str) -> Result<()> {
    let site = Site::new()?;
    let content = site.path("content.raw");
    Random::new(11).fill_file(&content, 7)?;
    File::options()
        .append(true)
        .open(&content)?
        .write_all(&b"words and words ".repeat(200_000))?;
    let daemon =
        StorageDaemon::start_with_writer_exports(&[Disk::raw("da", SIZE).holding(&content)])?;
    let mut order = site.order(&daemon, provider)?;
    site.configure(&format!(
        "[provider.its-own]\ncomponent = {:?}\n{settings}\n",
        order.provider
    ))?;
    order.provider = "its-own".into();
    let archive: Value = {
        site.backup(&order)?;
        serde_json::from_slice(&fs::read(order.archive.join("fleecebox-archive.json"))?)?
    };
    ensure!(archive["format"] == 1, "{archive}");
    let mut access = daemon.writer_access("da")?;
    access.write(3 * MIB + 17 * 512, &[0x5a; 70_144])?;
    access.write_zeroes(MIB, 1 << 20)?;
    access.write(SIZE - 512, &[0xa5; 512])?;
    access.flush()?;
    let second = site.backup(&order)?;
    ensure!(!second.volume("da")["base"].is_null(), "{}", second.said);

    let reader = Reader(order.archive.join("namespaces/its-own"));
    let manifest = reader.manifest(&second.id)?;
    ensure!(manifest["archive"] == archive["id"] && manifest["namespace"] == "its-own");
    let volume = &manifest["record"]["volumes"][0];
    ensure!(volume["name"] == "da");
    let read = reader.volume(&volume["root"])?;
    let disk = fs::read(&daemon.disks()[0].path)?;
    ensure!(read.bytes.len() as u64 == SIZE && disk.len() as u64 == SIZE);
    for (number, (read_block, block)) in
        (0..).zip(read.bytes.chunks(65_536).zip(disk.chunks(65_536)))
    {
        match read.claimed.get(&number) {
            None => ensure!(read_block == block, "block {number} is another"),
            Some(digest) => ensure!(digest == blake3::hash(block).as_bytes(), "block {number}"),
        }
    }
    ensure!(read.claimed.is_empty() == (provider != "image"));

    reader.checks_packs()?;
    reader.checks_objects(&manifest)?;
    reader.checks_records()?;
    let component = volume_component(&manifest)?;
    let kept = fs::read(reader.0.join(format!("components/{component}.wasm")))?;
    use sha2::Digest as _;
    ensure!(hex::encode(sha2::Sha256::digest(kept)) == component);
    for (file, length) in manifest["needs"][0]["files"].as_object().context("needs")? {
        let found = fs::metadata(reader.0.join(file))?.len();
        ensure!(length.as_u64() == Some(found), "{file}");
    }
    Ok(())
}

fn volume_component(manifest: &Value) -> Result<&str> {
    let component = &manifest["record"]["provider"]["component"];
    component.as_str().context("no component")
}

impl Reader {
    /// Compact JSON with sorted keys, which holds the digest of the rest.
    fn manifest(&self, id: &str) -> Result<Value> {
        let bytes = fs::read(self.0.join(format!("backups/{id}/manifest.json")))?;
        let mut manifest: Value = serde_json::from_slice(&bytes)?;
        ensure!(serde_json::to_vec(&manifest)? == bytes, "not compact");
        ensure!(manifest["format"] == 1 && manifest["backup"] == id);
        let fields = manifest.as_object_mut().context("no object")?;
        let digest = fields.remove("digest").context("no digest")?;
        let rest = serde_json::to_vec(&manifest)?;
        ensure!(digest == blake3::hash(&rest).to_hex().as_str());
        Ok(manifest)
    }

    fn volume(&self, root: &Value) -> Result<Volume> {
        let number = |value: &Value| value.as_u64().context("no number");
        let size = number(&root["shape"]["size"])?;
        let block = number(&root["shape"]["block_size"])?;
        let blocks = size.div_ceil(block);
        let level = (0..).find(|level| 128_u64.pow(level + 1) >= blocks);
        let mut volume = Volume {
            bytes: vec![0; usize::try_from(size)?],
            claimed: BTreeMap::new(),
        };
        let page = &root["page"];
        if page.is_null() {
            return Ok(volume);
        }
        let id = page["backup"].as_str().context("no backup")?;
        let digest = page["digest"].as_str().context("no digest")?;
        let bytes = self.page(id, number(&page["offset"])?, number(&page["length"])?)?;
        ensure!(blake3::hash(&bytes).to_hex().as_str() == digest);
        let level = level.context("no level")?;
        self.walk(&bytes, level, 0, block, &mut volume)?;
        Ok(volume)
    }

    fn page(&self, id: &str, offset: u64, length: u64) -> Result<Vec<u8>> {
        range(&self.0.join(format!("backups/{id}/pages")), offset, length)
    }

    fn walk(
        &self,
        page: &[u8],
        level: u32,
        first: u64,
        block: u64,
        volume: &mut Volume,
    ) -> Result<()> {
        let mut rest = Bytes(page);
        if rest.varint()? == 0 {
            ensure!(level == 0, "a leaf at level {level}");
            let mut at = first;
            for run in self.leaf(&mut rest)? {
                at += self.fill(&run, at, block, volume)?;
            }
            return Ok(());
        }
        ensure!(rest.varint()? == u64::from(level) && level > 0);
        let ids = rest.list(|rest| rest.id())?;
        let children = rest.list(|rest| {
            let (slot, id) = (rest.byte()?, rest.byte()?);
            let (offset, length) = (rest.varint()?, rest.varint()?);
            Ok((slot, id, offset, length, rest.array::<32>()?))
        })?;
        ensure!(rest.0.is_empty());
        for (slot, id, offset, length, digest) in children {
            let id = ids.get(usize::from(id)).context("no such id")?;
            let below = self.page(id, offset, length)?;
            ensure!(*blake3::hash(&below).as_bytes() == digest);
            let begins = first + u64::from(slot) * 128_u64.pow(level);
            self.walk(&below, level - 1, begins, block, volume)?;
        }
        Ok(())
    }

    fn leaf(&self, rest: &mut Bytes<'_>) -> Result<Vec<Run>> {
        let files = rest.list(|rest| {
            Ok(match rest.varint()? {
                0 => PathBuf::from(format!("packs/{}.pack", hex::encode(rest.array::<16>()?))),
                1 => {
                    let id = rest.id()?;
                    format!("backups/{id}/objects/{}", rest.text()?).into()
                }
                form => bail!("a file of form {form}"),
            })
        })?;
        let runs = rest.list(|rest| {
            Ok(match rest.varint()? {
                0 => Run::Zero(rest.varint()?),
                1 => {
                    let file = usize::try_from(rest.varint()?)?;
                    let [offset, stored, decoded, encoding, skip] = [(); 5].map(|()| rest.varint());
                    Run::Placed {
                        file: files.get(file).context("no such file")?.clone(),
                        offset: offset?,
                        stored: stored?,
                        decoded: decoded?,
                        encoding: encoding?,
                        skip: skip?,
                        digests: rest.list(|rest| rest.array())?,
                    }
                }
                2 => {
                    rest.id()?;
                    Run::Claimed(rest.list(|rest| rest.array())?)
                }
                form => bail!("a run of form {form}"),
            })
        })?;
        ensure!(rest.0.is_empty());
        Ok(runs)
    }

    /// Returns how many blocks the run has.
    fn fill(&self, run: &Run, first: u64, block: u64, volume: &mut Volume) -> Result<u64> {
        match run {
            Run::Zero(count) => Ok(*count),
            Run::Claimed(digests) => {
                volume
                    .claimed
                    .extend((first..).zip(digests.iter().copied()));
                Ok(digests.len() as u64)
            }
            Run::Placed {
                file,
                offset,
                stored,
                decoded,
                encoding,
                skip,
                digests,
            } => {
                let frame = range(&self.0.join(file), *offset, *stored)?;
                let frame = decode(&frame, *encoding)?;
                ensure!(frame.len() as u64 == *decoded);
                let all = volume.bytes.len();
                let start = usize::try_from(first * block)?;
                let end = all.min(start + digests.len() * usize::try_from(block)?);
                let skip = usize::try_from(*skip)?;
                let found = frame.get(skip..skip + (end - start)).context("too short")?;
                for (bytes, digest) in found.chunks(usize::try_from(block)?).zip(digests) {
                    ensure!(blake3::hash(bytes).as_bytes() == digest);
                }
                volume.bytes[start..end].copy_from_slice(found);
                Ok(digests.len() as u64)
            }
        }
    }

    fn key(&self) -> Result<[u8; 32]> {
        let key = fs::read(self.0.join("key"))?;
        key.try_into().ok().context("a key of another length")
    }

    /// Each pack's table, by its digest, and each frame by the id of its chunk.
    fn checks_packs(&self) -> Result<()> {
        let key = self.key()?;
        for pack in files_below(&self.0.join("packs"))? {
            let bytes = fs::read(self.0.join("packs").join(&pack))?;
            let (rest, magic) = bytes.split_last_chunk::<8>().context("too short")?;
            let (rest, digest) = rest.split_last_chunk::<32>().context("too short")?;
            let (rest, count) = rest.split_last_chunk::<4>().context("too short")?;
            ensure!(magic == b"FLBXPK01", "{}", pack.display());
            let table = u32::from_le_bytes(*count) as usize * 29;
            let at = rest.len().checked_sub(table).context("too short")?;
            let (frames, table) = rest.split_at(at);
            ensure!(blake3::hash(table).as_bytes() == digest);
            for entry in table.chunks(29) {
                let number = |at: usize| {
                    let four = entry[at..at + 4].first_chunk::<4>();
                    four.map_or(0, |four| u32::from_le_bytes(*four)) as usize
                };
                let (offset, stored, decoded) = (number(16), number(20), number(24));
                let chunk = decode(&frames[offset..offset + stored], entry[28].into())?;
                ensure!(chunk.len() == decoded);
                let mut id = blake3::Hasher::new_keyed(&key);
                id.update(&(decoded as u32).to_le_bytes());
                for block in chunk.chunks(65_536) {
                    id.update(blake3::hash(block).as_bytes());
                }
                ensure!(entry[..16] == id.finalize().as_bytes()[..16]);
            }
        }
        Ok(())
    }

    /// Each object's length, and the digest of what its provider wrote.
    fn checks_objects(&self, manifest: &Value) -> Result<()> {
        let id = manifest["backup"].as_str().context("no id")?;
        for object in manifest["objects"].as_array().context("no objects")? {
            let name = object["name"].as_str().context("no name")?;
            let file = fs::read(self.0.join(format!("backups/{id}/objects/{name}")))?;
            ensure!(object["stored"].as_u64() == Some(file.len() as u64));
            let encoding = u64::from(object["encoding"] == "zstd");
            let bytes = decode(&file, encoding)?;
            ensure!(object["size"].as_u64() == Some(bytes.len() as u64));
            let mut written = blake3::Hasher::new();
            for run in object["written"].as_array().context("no runs")? {
                let number = |at: usize| run[at].as_u64().context("no number");
                let (offset, length) = (number(0)? as usize, number(1)? as usize);
                written.update(&bytes[offset..offset + length]);
            }
            ensure!(object["digest"] == written.finalize().to_hex().as_str());
        }
        Ok(())
    }

    /// What was read back: a line, and its keyed digest.
    fn checks_records(&self) -> Result<()> {
        let key = self.key()?;
        let records = files_below(&self.0.join("checks"))?;
        ensure!(!records.is_empty(), "no records of checks");
        for record in records {
            let bytes = fs::read(self.0.join("checks").join(record))?;
            let (line, digest) = bytes.split_last_chunk::<64>().context("too short")?;
            ensure!(blake3::keyed_hash(&key, line).to_hex().as_bytes() == digest);
            let line: Value = serde_json::from_slice(line)?;
            ensure!(line["by"].is_string() && line["when"].is_string());
            ensure!(line["files"].is_object());
        }
        Ok(())
    }
}

fn range(path: &Path, offset: u64, length: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(length)?];
    let file = File::open(path).with_context(|| path.display().to_string())?;
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

fn decode(bytes: &[u8], encoding: u64) -> Result<Vec<u8>> {
    if encoding == 0 {
        return Ok(bytes.to_vec());
    }
    ensure!(encoding == 1, "encoding {encoding}");
    let mut stored = tempfile::tempfile()?;
    stored.write_all(bytes)?;
    let mut again = stored.try_clone()?;
    std::io::Seek::rewind(&mut again)?;
    let output = Command::new("zstd")
        .arg("-dc")
        .stdin(Stdio::from(again))
        .output()
        .context("zstd")?;
    ensure!(output.status.success());
    Ok(output.stdout)
}

/// What of a page is not read yet.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> Result<u8> {
        let (first, rest) = self.0.split_first().context("a page that ends early")?;
        self.0 = rest;
        Ok(*first)
    }

    fn varint(&mut self) -> Result<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        bail!("a number without an end")
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (first, rest) = self
            .0
            .split_first_chunk()
            .context("a page that ends early")?;
        self.0 = rest;
        Ok(*first)
    }

    fn list<T>(&mut self, mut one: impl FnMut(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        (0..self.varint()?).map(|_| one(self)).collect()
    }

    fn text(&mut self) -> Result<String> {
        Ok(String::from_utf8(self.list(Self::byte)?)?)
    }

    /// As it is written in names.
    fn id(&mut self) -> Result<String> {
        let (seconds, random) = (self.varint()?, self.varint()?);
        let mut date = Command::new("date");
        date.args(["-u", "-d", &format!("@{seconds}"), "+%Y%m%dT%H%M%SZ"]);
        let time = String::from_utf8(date.output()?.stdout)?;
        Ok(format!("{}-{random:016x}", time.trim()))
    }
}
