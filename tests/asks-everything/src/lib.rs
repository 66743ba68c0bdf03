//! Makes the calls of `guest-sdk/calls.txt` and gives up at the first answer that is not the one written there. As a
//! component it is what holds that file to the host; natively it holds the SDK's mock to the file, as the other SDKs'
//! own tests hold theirs.

use std::collections::BTreeMap;
use std::io::Write;

use fleecebox_guest::{
    Archive, Context, Encoding, Error, Extent, Image, Objects, OutputStream, Provider,
    StoredObject, Volume,
};

const CALLS: &str = include_str!("../../../guest-sdk/calls.txt");

/// What `claims` begins with.
const FIRST_CLAIM: u64 = 65536;

/// A call's arguments.
struct Words<'a>(std::str::SplitWhitespace<'a>);

impl<'a> Words<'a> {
    fn word(&mut self) -> &'a str {
        self.0.next().unwrap_or_default()
    }

    fn number(&mut self) -> Result<u64, Error> {
        let word = self.word();
        let number = word.parse();
        number.map_err(|_| Error::other(format_args!("'{word}' is no number")))
    }

    fn length(&mut self) -> Result<u32, Error> {
        self.number()?.try_into().map_err(Error::other)
    }

    fn range(&mut self) -> Result<Extent, Error> {
        let offset = self.number()?;
        let length = self.number()?;
        Ok(Extent { offset, length })
    }
}

/// Makes the calls of a section. What a call answers besides success is a number, if anything.
fn ask(
    section: &str,
    mut call: impl FnMut(&str, &mut Words) -> Result<Option<u64>, Error>,
) -> Result<(), Error> {
    let mut asked = 0;
    let lines = CALLS
        .lines()
        .skip_while(|line| *line != format!("[{section}]"));
    let lines = lines.skip(1).take_while(|line| !line.starts_with('['));
    for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (words, expected) = line.split_once(" = ").ok_or(Error::other(line))?;
        let mut words = Words(words.split_whitespace());
        let answer = match call(words.word(), &mut words) {
            Ok(None) => "ok".to_owned(),
            Ok(Some(number)) => number.to_string(),
            Err(error) => name(&error),
        };
        if answer != expected {
            let words = format_args!("'{line}', but the answer is {answer}");
            return Err(Error::other(words));
        }
        asked += 1;
    }
    match asked {
        0 => Err(Error::other(format_args!("no calls in [{section}]"))),
        _ => Ok(()),
    }
}

/// As the contract names it.
fn name(error: &Error) -> String {
    let name = match error {
        Error::Cancelled => "cancelled",
        Error::Discarded => "discarded",
        Error::Exists => "exists",
        Error::Io => "io",
        Error::InvalidName => "invalid-name",
        Error::NotDirty => "not-dirty",
        Error::NotFound => "not-found",
        Error::OutOfRange => "out-of-range",
        Error::QuotaExceeded(_) => "quota-exceeded",
        Error::TooLarge => "too-large",
        Error::Other(_) => return error.to_string(),
    };
    name.to_owned()
}

struct AsksEverything;

impl Provider for AsksEverything {
    type Image = Asked;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let (section, image) = match base {
            None => ("full", "image"),
            Some(_) => ("incremental", "image of the incremental"),
        };
        let snapshot = &volume.snapshot;
        let reader = volume.reader.ok_or_else(|| Error::other("no reader"))?;
        let discarder = volume
            .discarder
            .ok_or_else(|| Error::other("no discarder"))?;
        let mut streams: BTreeMap<String, OutputStream> = BTreeMap::new();
        ask(section, |call, words| {
            match call {
                "max-read" => return Ok(Some(reader.max_read().into())),
                "read" => {
                    let offset = words.number()?;
                    reader.read(offset, words.length()?)?;
                }
                "put" => archive.put(snapshot, words.range()?, Encoding::Zstd)?,
                "discard" => discarder.discard(words.range()?)?,
                "create" => {
                    let name = words.word();
                    let stream = archive.create(name, Encoding::Zstd)?;
                    streams.insert(name.to_owned(), stream);
                }
                "finish" => {
                    let stream = streams.remove(words.word()).ok_or(Error::Io)?;
                    return Ok(Some(stream.finish()?));
                }
                _ => {
                    let stream = streams.get_mut(words.word()).ok_or(Error::Io)?;
                    match call {
                        "copy" => {
                            let offset = words.number()?;
                            stream.write_all(&reader.read(offset, words.length()?)?)?;
                        }
                        "splice" => stream.splice(snapshot, words.range()?)?,
                        "claim" => stream.claim(snapshot, words.range()?)?,
                        _ => return Err(Error::other(call)),
                    }
                }
            }
            Ok(None)
        })?;
        Ok(image.into())
    }
}

struct Asked(StoredObject);

impl Image for Asked {
    fn open(_job: Context, objects: Objects, receipt: Vec<u8>) -> Result<Self, Error> {
        let section = String::from_utf8_lossy(&receipt);
        ask(&section, |call, words| {
            let object = objects.open(words.word())?;
            match call {
                "size" => return Ok(Some(object.size())),
                "stored" => object.read_at(words.number()?, words.length()? as usize)?,
                _ => return Err(Error::other(call)),
            };
            Ok(None)
        })?;
        Ok(Asked(objects.open("claims")?))
    }

    fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        self.0.read_at(offset - FIRST_CLAIM, length as usize)
    }
}

fleecebox_guest::export!(AsksEverything);

#[cfg(test)]
mod tests {
    use super::AsksEverything;
    use fleecebox_guest::mock::Disk;

    #[test]
    fn the_mock_answers_as_the_host_does() {
        let mut disk = Disk::new("da", 524_800);
        disk.write(0, &[1; 327_680]);
        disk.write(458_752, &[1; 66_048]);
        let full = disk.back_up::<AsksEverything>().unwrap();
        assert_eq!(full.restore(), disk.bytes());
        disk.write(65_536, b"\x02");
        disk.write(200_000, b"\x02");
        let incremental = disk.back_up::<AsksEverything>().unwrap();
        assert_eq!(incremental.restore(), disk.bytes());
    }
}
