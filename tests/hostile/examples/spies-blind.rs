//! Attacks blindness: makes every call that a blind provider has, looks for a byte of the disk in all of its own memory
//! afterwards, and tells what it could learn. The pattern to look for comes backwards, in `how`.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error, Extent};

struct SpiesBlind;

impl BlindProvider for SpiesBlind {
    fn run(
        job: Context,
        volume: BlindVolume,
        archive: Archive,
        base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let mut pattern = hostile::how(&job)?.into_bytes();
        // To show that what is there is found.
        let known = std::hint::black_box(pattern.clone());
        pattern.reverse();
        let info = volume.snapshot.info();
        let mut blocks = Vec::new();
        for run in volume.dirty.data_runs() {
            blocks.extend(run?.pieces(info.block_size.into()));
        }
        // Answers of all kinds: right, refused, about bytes that are known already and bytes that are not.
        let mut stream = archive.create(&format!("{}.spliced", info.name), Encoding::Zstd)?;
        let beyond = Extent {
            offset: info.size.next_multiple_of(1 << 16),
            length: 1 << 16,
        };
        let mut told = vec![
            format!("{:?}", stream.splice(&volume.snapshot, blocks[0])),
            format!("{:?}", stream.claim(&volume.snapshot, blocks[1])),
            format!("{:?}", stream.splice(&volume.snapshot, beyond)),
        ];
        told.push(format!("{:?}", stream.finish()));
        for name in [
            "guest-config",
            "da",
            "db",
            "spliced",
            "/etc/passwd",
            "../spliced",
        ] {
            told.push(format!("{:?}", job.attachment(name)));
        }
        let mut puts = 1;
        for block in &blocks[1..] {
            match archive.put(&volume.snapshot, *block, Encoding::Zstd) {
                Ok(()) => puts += 1,
                Err(error) => {
                    told.push(format!("{error:?}"));
                    break;
                }
            }
        }
        if let Some(discarder) = &volume.discarder {
            told.push(format!("{:?}", discarder.discard(blocks[0])));
        }
        let found = hostile::in_memory(&pattern);
        pattern.reverse();
        let found_backwards = hostile::in_memory(&pattern).is_some();
        drop(std::hint::black_box(known));
        job.info(format_args!("answers: {}", told.join(", ")));
        job.info(format_args!("the search works: {found_backwards}"));
        job.info(format_args!(
            "bytes of the disk in memory: {}",
            found.is_some()
        ));
        job.info(format_args!("blocks stored before the end: {puts}"));
        let mut receipt = told.join("\n").into_bytes();
        receipt.extend(base.unwrap_or_default());
        match told.iter().any(|answer| answer.contains("Quota")) {
            true => Err(Error::other("the quota is used up")),
            false => Ok(receipt),
        }
    }
}

fleecebox_guest::export_blind!(SpiesBlind);
