//! Attacks the checks of each granted call: wrong ranges of all kinds, ranges that are not dirty, covered, unfinished or
//! given back, and names that reach out. Any answer that is not the contract's is told.
//!
//! Then it gives up (`how = "gives-up"`), or backs up all the same, which has to be right (`how = "backs-up"`).

use fleecebox_guest::{Archive, Context, Encoding, Error, Extent, Provider, RegionKind, Volume};
use hostile::Copied;

struct TriesArguments;

/// What was answered, and how it should have been.
#[derive(Default)]
struct Answers {
    right: u32,
    wrong: Vec<String>,
}

impl Answers {
    fn expect<T>(&mut self, attempt: &str, answer: Result<T, Error>, expected: Result<(), Error>) {
        let answer = answer.map(drop);
        if answer == expected {
            self.right += 1;
        } else {
            self.wrong
                .push(format!("{attempt}: {answer:?}, not {expected:?}"));
        }
    }

    fn refused<T>(&mut self, attempt: &str, answer: Result<T, Error>, expected: Error) {
        self.expect(attempt, answer, Err(expected));
    }
}

/// Names that are not plain: they reach out, lie, or are too long.
fn names() -> Vec<String> {
    let mut names: Vec<String> = [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        ".hidden",
        "a\0b",
        "a\nb",
        "\u{1b}[2J",
        " ",
        "\u{ff41}",
        "pa\u{0443}load",
        "\u{202e}gpj",
        "na\u{ef}ve",
        "a\\b",
        "a:b",
        "~",
        "*",
    ]
    .map(String::from)
    .into();
    names.extend([129, 255, 256, 10_240, 1 << 20].map(|length| "x".repeat(length)));
    names
}

impl Provider for TriesArguments {
    type Image = Copied;

    fn run(
        job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let how = hostile::how(&job)?;
        let snapshot = volume.snapshot;
        let info = snapshot.info();
        let (block, size) = (u64::from(info.block_size), info.size);
        let (Some(reader), Some(discarder)) = (volume.reader, volume.discarder) else {
            return Err(Error::other("no reader or no discarder is granted"));
        };
        let regions = volume.dirty.collect::<Result<Vec<_>, _>>()?;
        let data = regions
            .iter()
            .filter(|region| region.kind == RegionKind::Data);
        let blocks: Vec<_> = data.flat_map(|region| region.range.pieces(block)).collect();
        let [a, b, c, ..] = blocks[..] else {
            return Err(Error::other("fewer than three blocks are dirty"));
        };
        let whole = Extent {
            offset: 0,
            length: size,
        };
        let dirty = |piece: &Extent| {
            regions.iter().any(|region| {
                region.range.offset < piece.end() && piece.offset < region.range.end()
            })
        };
        let clean = whole.pieces(block).find(|piece| !dirty(piece));
        let mut answers = Answers::default();
        // The other volume's instance makes objects in the same backup.
        let named = |name: &str| format!("{}-{name}", info.name);

        let last = u64::MAX;
        let past = size.next_multiple_of(block);
        for (offset, length) in [
            (last, 1),
            (0, last),
            (last, last),
            (a.offset, last),
            (past, block),
            (0, past + block),
            (a.offset + 1, block),
            (a.offset, block - 1),
            (a.offset, 1),
            (a.offset, 0),
            // From its end back to its start.
            (a.end(), block.wrapping_neg()),
        ] {
            let range = Extent { offset, length };
            let name = format!("{offset}+{length}");
            let put = if length > fleecebox_guest::MAX_PUT {
                Error::TooLarge
            } else {
                Error::OutOfRange
            };
            answers.refused(
                &format!("put {name}"),
                archive.put(&snapshot, range, Encoding::Zstd),
                put,
            );
            answers.refused(
                &format!("discard {name}"),
                discarder.discard(range),
                Error::OutOfRange,
            );
            let mut stream = archive.create(&named("ranges"), Encoding::Identity)?;
            answers.refused(
                &format!("splice {name}"),
                stream.splice(&snapshot, range),
                Error::OutOfRange,
            );
            answers.refused(
                &format!("claim {name}"),
                stream.claim(&snapshot, range),
                Error::OutOfRange,
            );
        }
        for (offset, length, expected) in [
            (last, 1, Error::OutOfRange),
            (last, reader.max_read(), Error::OutOfRange),
            (size, 1, Error::OutOfRange),
            (size - 1, 2, Error::OutOfRange),
            (a.offset, 0, Error::OutOfRange),
            (a.offset, reader.max_read() + 1, Error::TooLarge),
            (a.offset, u32::MAX, Error::TooLarge),
        ] {
            answers.refused(
                &format!("read {offset}+{length}"),
                reader.read(offset, length),
                expected,
            );
        }
        if let Some(clean) = clean {
            let mut stream = archive.create(&named("clean"), Encoding::Identity)?;
            answers.refused(
                "read what is clean",
                reader.read(clean.offset, 1),
                Error::NotDirty,
            );
            answers.refused(
                "put what is clean",
                archive.put(&snapshot, clean, Encoding::Zstd),
                Error::NotDirty,
            );
            answers.refused(
                "splice what is clean",
                stream.splice(&snapshot, clean),
                Error::NotDirty,
            );
            answers.refused(
                "splice all",
                stream.splice(&snapshot, whole),
                Error::NotDirty,
            );
            answers.refused(
                "claim what is clean",
                stream.claim(&snapshot, clean),
                Error::NotDirty,
            );
            answers.refused(
                "discard what is clean",
                discarder.discard(clean),
                Error::NotDirty,
            );
        }

        answers.refused(
            "discard what is not stored",
            discarder.discard(a),
            Error::NotDirty,
        );
        {
            let mut first = archive.create(&named("first"), Encoding::Identity)?;
            let mut second = archive.create(&named("second"), Encoding::Zstd)?;
            answers.refused(
                "a name in use",
                archive.create(&named("first"), Encoding::Zstd),
                Error::Exists,
            );
            answers.expect("splice", first.splice(&snapshot, b), Ok(()));
            answers.refused(
                "splice what is spliced",
                first.splice(&snapshot, b),
                Error::NotDirty,
            );
            answers.refused(
                "splice what another stream holds",
                second.splice(&snapshot, b),
                Error::NotDirty,
            );
            answers.refused(
                "claim what is spliced",
                second.claim(&snapshot, b),
                Error::NotDirty,
            );
            answers.refused(
                "put what is spliced",
                archive.put(&snapshot, b, Encoding::Zstd),
                Error::NotDirty,
            );
            answers.refused(
                "discard what is spliced and not finished",
                discarder.discard(b),
                Error::NotDirty,
            );
            answers.expect(
                "claim what was not read",
                second.claim(&snapshot, c),
                Ok(()),
            );
            answers.refused("claim twice", second.claim(&snapshot, c), Error::NotDirty);
            answers.refused(
                "claim what another stream claims",
                first.claim(&snapshot, c),
                Error::NotDirty,
            );
            answers.refused(
                "discard what is claimed and not finished",
                discarder.discard(c),
                Error::NotDirty,
            );
            // Both are dropped here, and what they covered is open again.
        }
        answers.expect("put", archive.put(&snapshot, a, Encoding::Zstd), Ok(()));
        answers.refused(
            "put twice",
            archive.put(&snapshot, a, Encoding::Identity),
            Error::NotDirty,
        );
        answers.expect("discard", discarder.discard(a), Ok(()));
        answers.expect("discard again", discarder.discard(a), Ok(()));
        answers.refused(
            "read what was given back",
            reader.read(a.offset, 1),
            Error::Discarded,
        );
        answers.refused(
            "put what was given back",
            archive.put(&snapshot, a, Encoding::Zstd),
            Error::NotDirty,
        );
        for name in names() {
            let shown: String = name.chars().take(20).collect();
            answers.refused(
                &format!("create {shown:?}"),
                archive.create(&name, Encoding::Zstd),
                Error::InvalidName,
            );
            let attached = job.attachment(&name).map_or(Ok(()), |_| Err(Error::Exists));
            answers.expect(&format!("attachment {shown:?}"), attached, Ok(()));
        }

        for wrong in &answers.wrong {
            job.error(wrong);
        }
        if !answers.wrong.is_empty() || how == "gives-up" {
            let (right, wrong) = (answers.right, answers.wrong.len());
            return Err(Error::other(format_args!(
                "{right} attempts were answered as the contract says, {wrong} were not"
            )));
        }
        for &block in blocks.iter().filter(|&&block| block != a) {
            archive.put(&snapshot, block, Encoding::Zstd)?;
        }
        Ok(Vec::new())
    }
}

fleecebox_guest::export!(TriesArguments);
