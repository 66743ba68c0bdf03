//! A random sample of an incremental's clean blocks, compared with the base: a missed change must not hide.

use super::frozen::Frozen;
use crate::digest::Digest;
use crate::extent::Extent;
use crate::nbd;

/// Blocks compared per disk. Each costs one read of a block that would not be read otherwise; a disk with one
/// changed block in ten that no bitmap shows is noticed in four backups of five.
const SAMPLES: usize = 16;

/// Random clean blocks with the digests of their bytes now.
pub async fn take(frozen: &Frozen) -> Result<Vec<(Extent, Digest)>, nbd::Error> {
    let clean: Vec<Extent> = frozen.plan.clean().collect();
    let bytes: u64 = clean.iter().map(|extent| extent.len()).sum();
    let mut sample = Vec::new();
    if bytes == 0 {
        return Ok(sample);
    }
    for _ in 0..SAMPLES {
        // A modulo is uneven by less than one in 2^20 for any real disk.
        let mut target = getrandom::u64().map_err(std::io::Error::other)? % bytes;
        let Some(offset) = clean
            .iter()
            .find_map(|extent| match target.checked_sub(extent.len()) {
                None => Some(extent.start() + target),
                Some(rest) => {
                    target = rest;
                    None
                }
            })
        else {
            break;
        };
        let block = u64::from(frozen.plan.block());
        let start = offset / block * block;
        if let Some(extent) = Extent::between(start, (start + block).min(frozen.plan.size())) {
            let bytes = frozen.reader.read(extent).await?;
            sample.push((extent, Digest::of(&bytes)));
        }
    }
    Ok(sample)
}
