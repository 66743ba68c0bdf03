//! Stored bytes that are read back before anything refers to them, and what a base lacks.

use super::*;

/// Commits a backup of one volume of these chunks, on `base`.
fn backup(fixture: &Fixture, base: Option<&Manifest>, chunks: &[Vec<u8>]) -> Manifest {
    let writer = fixture.begin();
    if let Some(base) = base {
        writer.build_on(base);
    }
    commit(writer, base, chunks).unwrap()
}

fn commit(
    writer: BackupWriter,
    base: Option<&Manifest>,
    chunks: &[Vec<u8>],
) -> Result<Manifest, Error> {
    let base = base.map(|base| base.record.volumes[0].root);
    let table = writer.block_table(64 * u64::from(BLOCK), BLOCK, base)?;
    let mut block = 0;
    for chunk in chunks {
        let frame = put(&writer, chunk);
        for (skip, digest) in (0u32..).zip(digests(chunk)) {
            let entry = Entry::Placed {
                digest,
                frame: frame.clone(),
                skip: skip * BLOCK,
            };
            table.set(block, entry)?;
            block += 1;
        }
    }
    let root = table.finish()?;
    writer.commit(record(vec![volume(root)]))
}

fn pack_of(frame: &Frame) -> String {
    frame.object().to_string()
}

fn sorted<const N: usize>(backups: [&Manifest; N]) -> [BackupId; N] {
    let mut ids = backups.map(|manifest| manifest.backup);
    ids.sort_unstable();
    ids
}

#[test]
fn a_known_chunk_whose_bytes_changed_is_stored_anew_once_and_found_by_those_who_need_it() {
    let fixture = Fixture::new();
    let chunk = data(1, 3);
    let writer = fixture.begin();
    let first = put(&writer, &chunk);
    writer.commit(record(vec![])).unwrap();
    flip(&fixture.path(&pack_of(&first)), 7);

    let writer = fixture.begin();
    let second = put(&writer, &chunk);
    assert_ne!(second, first);
    assert_eq!(put(&writer, &chunk), second);
    assert_eq!(writer.stats().known_chunks, 1);
    writer.commit(record(vec![])).unwrap();

    let writer = fixture.begin();
    assert_eq!(put(&writer, &chunk), second);
    let namespace = fixture.namespace();
    assert_eq!(namespace.copies(&first), std::slice::from_ref(&second));
    assert_eq!(namespace.read_frame(&second).unwrap(), chunk);
    // Even where somebody puts the byte right again.
    flip(&fixture.path(&pack_of(&first)), 7);
    flip(&fixture.path(&pack_of(&second)), 7);
    let namespace = fixture.namespace();
    namespace.set_recheck(Recheck::Everything);
    let writer = namespace.begin(fresh_id()).unwrap();
    let third = put(&writer, &chunk);
    assert!(third != first && third != second);
}

#[test]
fn what_was_read_lately_is_believed_unless_all_is_to_be_read() {
    let fixture = Fixture::new();
    let chunk = data(1, 3);
    let writer = fixture.begin();
    let first = put(&writer, &chunk);
    writer.commit(record(vec![])).unwrap();
    // What was written is not what was read.
    let writer = fixture.begin();
    assert_eq!(put(&writer, &chunk), first);
    writer.commit(record(vec![])).unwrap();
    flip(&fixture.path(&pack_of(&first)), 7);
    let again = |recheck| {
        let namespace = fixture.namespace();
        namespace.set_recheck(recheck);
        put(&namespace.begin(fresh_id()).unwrap(), &chunk)
    };
    assert_eq!(again(Recheck::OlderThan(BELIEVED)), first);
    // One that found it out, and failed.
    assert_ne!(again(Recheck::OlderThan(std::time::Duration::ZERO)), first);
    assert_ne!(again(Recheck::OlderThan(BELIEVED)), first);
    assert_ne!(again(Recheck::Everything), first);
}

#[test]
fn a_base_that_cannot_be_restored_is_found_out_and_so_is_who_needs_what_it_lacks() {
    type Harm = fn(&Path);
    let harms: [(&str, &str, Harm); 6] = [
        // In the second frame, which the second backup needs too.
        ("packs", "pack", |path| flip(path, 10_000)),
        ("packs", "pack", truncate),
        ("packs", "pack", |path| std::fs::remove_file(path).unwrap()),
        ("pages", "pages", |path| flip(path, 7)),
        ("pages", "pages", truncate),
        ("pages", "pages", |path| std::fs::remove_file(path).unwrap()),
    ];
    for (number, (kind, file, harm)) in harms.into_iter().enumerate() {
        let fixture = Fixture::new();
        let first = backup(&fixture, None, &[data(1, 3), data(2, 3)]);
        let second = backup(&fixture, Some(&first), &[data(3, 3)]);
        let other = backup(&fixture, None, &[data(4, 3)]);
        let lack = |manifest: &Manifest| {
            let lack = fixture.namespace().lack_of(manifest, "drive-scsi0");
            lack.unwrap().map(|lack| lack.file)
        };
        assert_eq!(lack(&second), None);
        let needs = second.needs("drive-scsi0").unwrap();
        let of_first = first.needs("drive-scsi0").unwrap();
        let harmed = of_first.files.keys().find(|path| path.ends_with(file));
        let harmed = harmed.unwrap();
        assert!(needs.files.contains_key(harmed), "{needs:?}");
        harm(&fixture.path(harmed));
        assert_eq!(lack(&first).as_ref(), Some(harmed), "{number}");
        // Its own leaf replaced the base's: all that it has of the base is in frames.
        let expected = (kind == "packs" || number > 3).then_some(harmed);
        assert_eq!(lack(&second).as_ref(), expected, "{number}");
        assert_eq!(lack(&other), None, "{number}");
        let who = fixture.namespace().who_needs(harmed).unwrap();
        assert_eq!(who, sorted([&first, &second]), "{number}");
    }
}

#[test]
fn a_base_is_read_back_once_and_what_is_found_wrong_later_is_known_of_it() {
    let fixture = Fixture::new();
    let first = backup(&fixture, None, &[data(1, 3)]);
    let frame = || {
        let table = fixture.namespace().table(first.record.volumes[0].root);
        match table.get(0).unwrap() {
            Entry::Placed { frame, .. } => frame,
            other => panic!("{other:?}"),
        }
    };
    let lacks = || {
        let namespace = fixture.namespace();
        let lack = namespace.lack_of(&first, "drive-scsi0").unwrap();
        namespace.record_checks("a test").unwrap();
        lack.is_some()
    };
    assert!(!lacks());
    flip(&fixture.path(&pack_of(&frame())), 7);
    assert!(!lacks(), "it was not believed");
    let namespace = fixture.namespace();
    namespace.note_wrong(&frame());
    namespace.record_checks("verify").unwrap();
    assert!(lacks());
}

#[test]
fn a_backup_whose_base_lost_a_pack_in_the_meantime_does_not_commit() {
    let fixture = Fixture::new();
    let first = backup(&fixture, None, &[data(1, 3), data(2, 3)]);
    let needs = first.needs("drive-scsi0").unwrap();
    let pack = needs.files.keys().find(|path| path.ends_with("pack"));
    let pack = fixture.path(pack.unwrap());
    let away = pack.with_extension("away");
    for tell_needs in [false, true] {
        let writer = fixture.begin();
        if tell_needs {
            writer.build_on(&first);
        }
        std::fs::rename(&pack, &away).unwrap();
        let failed = commit(writer, Some(&first), &[data(3, 3)]);
        assert!(failed.is_err_and(|error| error.is_damage()));
        std::fs::rename(&away, &pack).unwrap();
    }
    assert_eq!(fixture.namespace().backups().unwrap(), [first.backup]);
}

#[test]
fn a_manifest_without_needs_is_gone_through() {
    let fixture = Fixture::new();
    let mut first = backup(&fixture, None, &[data(1, 3), data(2, 3)]);
    let mut second = backup(&fixture, Some(&first), &[data(3, 3)]);
    let needs = second.needs.clone();
    for manifest in [&mut first, &mut second] {
        manifest.needs.clear();
        let path = format!("backups/{}/manifest.json", manifest.backup);
        std::fs::write(fixture.path(&path), manifest.render().unwrap()).unwrap();
    }
    let namespace = fixture.namespace();
    assert_eq!(namespace.lack_of(&second, "drive-scsi0").unwrap(), None);
    let table = namespace.table(first.record.volumes[0].root);
    let Entry::Placed { frame, .. } = table.get(5).unwrap() else {
        panic!("a block that was put");
    };
    let shared = &pack_of(&frame);
    assert!(needs[0].files.contains_key(shared));
    let who = namespace.who_needs(shared).unwrap();
    assert_eq!(who, sorted([&first, &second]));
    std::fs::remove_file(fixture.path(shared)).unwrap();
    let lack = fixture.namespace().lack_of(&second, "drive-scsi0").unwrap();
    assert!(lack.is_some());
}

#[test]
fn a_page_is_read_again_whoever_saw_it() {
    let fixture = Fixture::new();
    let first = backup(&fixture, None, &[data(1, 3)]);
    let lack = || {
        let namespace = fixture.namespace();
        let lack = namespace.lack_of(&first, "drive-scsi0").unwrap();
        namespace.record_checks("a test").unwrap();
        lack.map(|lack| lack.file)
    };
    assert_eq!(lack(), None);
    let pages = format!("backups/{}/pages", first.backup);
    flip(&fixture.path(&pages), 7);
    assert_eq!(lack(), Some(pages));
}
