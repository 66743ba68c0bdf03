use super::*;
use crate::qemu::DataFile;
use crate::qemu::machine::Bitmap;
use proptest::prelude::*;

const SIZE: u64 = 64 << 20;
const NAME: &str = "ours";

/// The image of a number, in a file that was last written at `modified`.
fn image(number: u64, modified: i64) -> Image {
    Image {
        format: "qcow2".into(),
        name: format!("/images/{number}.qcow2"),
        size: SIZE,
        identity: Identity::File {
            inode: number,
            born: Some(7),
            length: 1 << 20,
            modified,
        },
        data_file: None,
    }
}

fn bitmap(recording: bool) -> Bitmap {
    Bitmap {
        name: NAME.into(),
        granularity: 65536,
        dirty: 65536,
        recording,
        busy: false,
        persistent: true,
        inconsistent: false,
    }
}

/// A disk of these images, the active one first, each with what its bitmap of the name does, where it has one.
fn disk(images: &[(Image, Option<bool>)]) -> Disk {
    let layers: Vec<Layer> = images
        .iter()
        .map(|(image, carries)| Layer {
            node: image.name.clone(),
            image: image.clone(),
            bitmaps: carries.map(bitmap).into_iter().collect(),
        })
        .collect();
    let (active, below) = layers.split_first().unwrap();
    Disk {
        name: "va".into(),
        node: active.node.clone(),
        size: SIZE,
        format: "qcow2".into(),
        filename: active.image.name.clone(),
        bitmaps: active.bitmaps.clone(),
        can_persist: true,
        read_only: false,
        image: active.image.clone(),
        below: below.to_vec(),
        shared: false,
    }
}

/// A chain of images by number, without bitmaps.
fn plain(numbers: &[u64]) -> Disk {
    let images: Vec<_> = numbers
        .iter()
        .map(|&number| (image(number, 0), None))
        .collect();
    disk(&images)
}

fn judged(was: &Disk, is: &Disk) -> Result<(), String> {
    tracked(&record(was), is, NAME)
}

#[track_caller]
fn refused(was: &Disk, is: &Disk, why: &str) {
    let reason = judged(was, is).unwrap_err();
    assert!(reason.contains(why), "{reason}");
}

#[test]
fn the_same_images_are_believed_however_the_first_was_written() {
    let now = disk(&[(image(1, 99), Some(true)), (image(2, 0), None)]);
    assert_eq!(judged(&plain(&[1, 2]), &now), Ok(()));
}

#[test]
fn each_overlay_has_to_carry_the_bitmap() {
    let (one, two) = (image(1, 5), image(2, 0));
    let base = plain(&[1, 2]);
    let above = |carries| {
        disk(&[
            (image(9, 5), Some(true)),
            (image(8, 5), carries),
            (one.clone(), Some(true)),
            (two.clone(), None),
        ])
    };
    assert_eq!(judged(&base, &above(Some(true))), Ok(()));
    refused(
        &base,
        &above(None),
        "an overlay is above /images/8.qcow2, which does not carry its bitmap",
    );
    refused(
        &base,
        &above(Some(false)),
        "/images/8.qcow2, whose bitmap cannot be used: it stopped",
    );
    let mut larger = above(Some(true));
    larger.below[0].image.size *= 2;
    refused(&base, &larger, "another size");
}

#[test]
fn what_is_below_has_to_be_what_it_was() {
    let base = plain(&[1, 2, 3]);
    refused(
        &base,
        &plain(&[1, 2]),
        "it was built on /images/3.qcow2 and is not now",
    );
    refused(
        &base,
        &plain(&[1, 3]),
        "it was built on /images/2.qcow2 and is on /images/3.qcow2 now",
    );
    refused(
        &base,
        &plain(&[1, 2, 3, 4]),
        "it is built on /images/4.qcow2 now, and was not",
    );
    let written = disk(&[
        (image(1, 0), None),
        (image(2, 0), None),
        (image(3, 1), None),
    ]);
    refused(
        &base,
        &written,
        "/images/3.qcow2, which it is built on, was written to",
    );
    refused(
        &base,
        &plain(&[2, 3]),
        "its image was /images/1.qcow2, which is not among its images now",
    );
}

#[test]
fn a_file_that_took_the_place_of_the_image_is_another() {
    let mut now = plain(&[1]);
    now.image.identity = image(2, 0).identity;
    refused(&plain(&[1]), &now, "another file is at /images/1.qcow2 now");
    now.image.identity = Identity::Unknown;
    refused(&plain(&[1]), &now, "it cannot be told");
    refused(&now, &now, "it cannot be told");
    // By its name alone, it is the same as long as that is.
    now.image.identity = Identity::Unseen;
    assert_eq!(judged(&now, &now), Ok(()));
}

#[test]
fn a_manifest_that_says_nothing_of_the_images_is_not_believed() {
    let mut record = record(&plain(&[1]));
    record.layers.clear();
    assert!(tracked(&record, &plain(&[1]), NAME).is_err());
}

#[test]
fn what_others_may_write_to_is_known_by_no_bitmap() {
    assert_eq!(written_unseen(&plain(&[1, 2])), None);
    let mut shared = plain(&[1]);
    shared.shared = true;
    assert!(written_unseen(&shared).unwrap().contains("share-rw"));
    let mut outside = plain(&[1, 2]);
    let data = |raw| {
        Some(DataFile {
            name: "/images/data".into(),
            identity: Identity::Unseen,
            raw,
        })
    };
    outside.below[0].image.data_file = data(true);
    assert!(written_unseen(&outside).unwrap().contains("/images/data"));
    outside.below[0].image.data_file = data(false);
    assert_eq!(written_unseen(&outside), None);
    refused(&plain(&[1, 2]), &outside, "or on another file there");
}

proptest! {
    /// Whatever the chains, what is believed is the base's chain with overlays that carry the bitmap.
    #[test]
    fn only_overlays_that_carry_the_bitmap_are_put_on_the_same_chain(
        was in prop::collection::vec(1..5u64, 1..4),
        is in prop::collection::vec((1..5u64, 0..2i64, prop::option::of(any::<bool>())), 1..6),
    ) {
        let images: Vec<_> = is.iter().map(|&(number, modified, carries)| (image(number, modified), carries)).collect();
        if judged(&plain(&was), &disk(&images)).is_ok() {
            let depth = is.len() - was.len();
            let numbers: Vec<_> = is[depth..].iter().map(|&(number, ..)| number).collect();
            prop_assert_eq!(numbers, was);
            prop_assert!(is[depth + 1..].iter().all(|&(_, modified, _)| modified == 0));
            prop_assert!(is[1..=depth].iter().all(|&(.., carries)| carries == Some(true)));
        }
    }
}
