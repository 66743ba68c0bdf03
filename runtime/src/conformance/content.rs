//! What the simulated disks hold and how they change: made from a seed, so that a run can be had again.

use crate::simulator::Disk;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Numbers that look random: splitmix64.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `limit`, which is not 0.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn bytes(&mut self, length: u64) -> Vec<u8> {
        let words = std::iter::repeat_with(|| self.next().to_le_bytes());
        words.flatten().take(length as usize).collect()
    }

    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }
}

/// Several disks, of which hardly one has a size that is a multiple of anything.
pub(super) fn several(seed: u64) -> Vec<Disk> {
    let mut random = Random::new(seed);
    // A run longer than any call takes at once, holes, and a last block that is short and full of data.
    let mut large = Disk::new("scsi0", 9 * MIB + 4321);
    large.write(100 * KIB, &random.bytes(5 * MIB + 17));
    large.write(6 * MIB, &random.bytes(64 * KIB));
    large.write(9 * MIB - 5, &random.bytes(4326));
    // The same MiB twice, text, and zeroes that were written; its last block is one byte.
    let mut middle = Disk::new("virtio1", 3 * MIB + 1);
    let twice = random.bytes(MIB);
    middle.write(0, &twice);
    middle.write(MIB, &twice);
    middle.write(2 * MIB, &b"the same words again and again. ".repeat(4096));
    middle.write(2 * MIB + 256 * KIB, &[0; 100_000]);
    middle.write(3 * MIB, b"!");
    // Nearly nothing in it, and no short block.
    let mut sparse = Disk::new("sata2.0", 2 * MIB);
    sparse.write(MIB + 3, b"a few bytes far in");
    // Shorter than a block.
    let mut tiny = Disk::new("tiny_disk-3", 777);
    tiny.write(0, &random.bytes(777));
    // Never written.
    let empty = Disk::new("empty4", MIB + 512);
    vec![large, middle, sparse, tiny, empty]
}

/// One small disk with three runs of data, for what is done again and again.
pub(super) fn one(seed: u64) -> Vec<Disk> {
    let mut random = Random::new(seed);
    let mut disk = Disk::new("scsi0", 2 * MIB + 300 * KIB + 99);
    disk.write(0, &random.bytes(MIB + 100 * KIB));
    disk.write(MIB + 512 * KIB, &random.bytes(64 * KIB));
    disk.write(2 * MIB + 200 * KIB, &random.bytes(100 * KIB + 99));
    vec![disk]
}

/// What a guest does between two backups: small writes anywhere, bytes that stay what they were, holes, and the last
/// byte of each disk.
pub(super) fn change(disks: &mut [Disk], seed: u64) {
    let mut random = Random::new(seed);
    for disk in disks {
        let size = disk.size();
        for _ in 0..6 {
            let length = 1 + random.below(40 * KIB);
            let bytes = random.bytes(length);
            disk.write(random.below(size), &bytes);
        }
        let at = random.below(size);
        let same = disk.bytes()[at as usize..].iter().take(5000).copied();
        let same: Vec<u8> = same.collect();
        disk.write(at, &same);
        disk.discard(random.below(size), 150 * KIB);
        disk.write(size - 1, &random.bytes(1));
    }
}
