//! The books of one run: which blocks are covered, by whom, and whether that is final.
//!
//! A block is covered at most once. What a stream covers is *pending* until the stream is finished; dropping the
//! stream gives it back. What is `put` is final once stored. Zero blocks need no cover, and may be covered all the
//! same, so that a provider can write a whole disk as one stream.

use super::plan::Plan;
use crate::extent::{Extent, ExtentSet};
use std::collections::BTreeMap;

/// Who covers a range before it is final.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cover {
    /// A `put` that is under way.
    Put,
    /// An output stream, by its number within the run.
    Stream(u32),
}

/// Why a range cannot be covered, read or discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CoverageError {
    /// It holds a block that the backup does not cover.
    #[error("{0} is not part of what this backup covers")]
    NotDirty(Extent),
    /// It holds a block that is covered already.
    #[error("{0} is covered already")]
    Covered(Extent),
    /// It holds a block whose backup is not finished.
    #[error("the backup of {0} is not finished")]
    Unfinished(Extent),
}

/// What of a [`Plan`] is covered so far.
#[derive(Debug, Default)]
pub struct Coverage {
    pending: BTreeMap<Cover, ExtentSet>,
    finished: ExtentSet,
    claimed: ExtentSet,
    discarded: ExtentSet,
}

impl Coverage {
    /// Whether `extent`, made of whole blocks, may be covered now.
    pub fn check(&self, plan: &Plan, extent: Extent) -> Result<(), CoverageError> {
        if !plan.dirty().contains(extent) {
            return Err(CoverageError::NotDirty(extent));
        }
        if self.finished.overlaps(extent) || self.pending.values().any(|set| set.overlaps(extent)) {
            return Err(CoverageError::Covered(extent));
        }
        Ok(())
    }

    /// Reserves `extent` for `cover`. The extent must be whole blocks.
    pub fn begin(
        &mut self,
        plan: &Plan,
        cover: Cover,
        extent: Extent,
    ) -> Result<(), CoverageError> {
        self.check(plan, extent)?;
        self.pending.entry(cover).or_default().insert(extent);
        Ok(())
    }

    /// As [`Coverage::begin`], for a range that the provider holds in bytes of its own making.
    pub fn begin_claim(
        &mut self,
        plan: &Plan,
        stream: u32,
        extent: Extent,
    ) -> Result<(), CoverageError> {
        self.begin(plan, Cover::Stream(stream), extent)?;
        self.claimed.insert(extent);
        Ok(())
    }

    /// Whether a `put` of some part of `extent` is under way.
    pub fn is_being_put(&self, extent: Extent) -> bool {
        self.pending
            .get(&Cover::Put)
            .is_some_and(|puts| puts.overlaps(extent))
    }

    /// A `put` of `extent` is stored.
    pub fn put_done(&mut self, extent: Extent) {
        if let Some(pending) = self.pending.get_mut(&Cover::Put) {
            pending.remove(extent);
        }
        self.finished.insert(extent);
    }

    /// A stream is finished: all it covered is final.
    pub fn finish_stream(&mut self, stream: u32) -> ExtentSet {
        let done = self
            .pending
            .remove(&Cover::Stream(stream))
            .unwrap_or_default();
        for extent in done.iter() {
            self.finished.insert(extent);
        }
        done
    }

    /// A stream was dropped unfinished: all it covered is uncovered again.
    pub fn drop_stream(&mut self, stream: u32) {
        let dropped = self
            .pending
            .remove(&Cover::Stream(stream))
            .unwrap_or_default();
        for extent in dropped.iter() {
            self.claimed.remove(extent);
        }
    }

    /// Marks `extent` as given back to the fleecing image. All of it must be finished or zero. Returns the parts that
    /// were not given back before: to do it again would cost QEMU as much, and whoever asks could ask for ever.
    pub fn begin_discard(
        &mut self,
        plan: &Plan,
        extent: Extent,
    ) -> Result<Vec<Extent>, CoverageError> {
        if !plan.dirty().contains(extent) {
            return Err(CoverageError::NotDirty(extent));
        }
        if !self.is_final(plan, extent) {
            return Err(CoverageError::Unfinished(extent));
        }
        let fresh = self.discarded.gaps(extent).collect();
        self.discarded.insert(extent);
        Ok(fresh)
    }

    /// Whether all of `extent` is final: covered and finished, or zero and not pending.
    pub fn is_final(&self, plan: &Plan, extent: Extent) -> bool {
        // Zero blocks need no cover, so only the data between them must be finished.
        plan.zero()
            .gaps(extent)
            .all(|data| self.finished.contains(data))
            && !self.pending.values().any(|set| set.overlaps(extent))
    }

    /// Whether any byte of `extent` was discarded and can no longer be read.
    pub fn is_discarded(&self, extent: Extent) -> bool {
        self.discarded.overlaps(extent)
    }

    /// Whether every byte of `extent` was discarded.
    pub fn is_all_discarded(&self, extent: Extent) -> bool {
        self.discarded.contains(extent)
    }

    /// What the provider claims, finished or pending.
    pub fn claimed(&self) -> &ExtentSet {
        &self.claimed
    }

    /// What is final.
    pub fn finished(&self) -> &ExtentSet {
        &self.finished
    }

    /// The dirty data that nothing final covers: must be empty before a commit.
    pub fn uncovered(&self, plan: &Plan) -> ExtentSet {
        plan.dirty()
            .iter()
            .flat_map(|dirty| plan.zero().gaps(dirty).collect::<Vec<_>>())
            .flat_map(|data| self.finished.gaps(data).collect::<Vec<_>>())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCK: u64 = 16;
    const BLOCKS: u64 = 24;

    fn blocks(first: u64, count: u64) -> Extent {
        Extent::new(first * BLOCK, count * BLOCK).unwrap()
    }

    fn plan() -> Plan {
        // Dirty: blocks 0..20; zero: 4..8.
        Plan::new(
            BLOCKS * BLOCK,
            BLOCK as u32,
            [blocks(0, 20)],
            [blocks(4, 4)],
        )
    }

    #[derive(Debug, Clone)]
    enum Step {
        Put(u64, u64),
        Splice(u32, u64, u64),
        Claim(u32, u64, u64),
        Finish(u32),
        Drop(u32),
        Discard(u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = (0..BLOCKS - 1, 1..4u64).prop_map(|(f, c)| (f, c.min(BLOCKS - f)));
        prop_oneof![
            range.clone().prop_map(|(f, c)| Step::Put(f, c)),
            (0..3u32, range.clone()).prop_map(|(s, (f, c))| Step::Splice(s, f, c)),
            (0..3u32, range.clone()).prop_map(|(s, (f, c))| Step::Claim(s, f, c)),
            (0..3u32).prop_map(Step::Finish),
            (0..3u32).prop_map(Step::Drop),
            range.prop_map(|(f, c)| Step::Discard(f, c)),
        ]
    }

    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Block {
        Open,
        Pending(u32, bool),
        Final(bool),
    }

    proptest! {
        #[test]
        fn a_block_is_final_exactly_when_its_cover_was_finished(steps in prop::collection::vec(step(), 0..60)) {
            let plan = plan();
            let mut books = Coverage::default();
            let mut model = vec![Block::Open; BLOCKS as usize];
            let open = |model: &[Block], f: u64, c: u64| f + c <= 20 && (f..f + c).all(|b| model[b as usize] == Block::Open);
            for step in steps {
                match step {
                    Step::Put(f, c) => {
                        let fits = open(&model, f, c);
                        prop_assert_eq!(books.begin(&plan, Cover::Put, blocks(f, c)).is_ok(), fits);
                        if fits {
                            books.put_done(blocks(f, c));
                            for b in f..f + c { model[b as usize] = Block::Final(false); }
                        }
                    }
                    Step::Splice(s, f, c) => {
                        let fits = open(&model, f, c);
                        prop_assert_eq!(books.begin(&plan, Cover::Stream(s), blocks(f, c)).is_ok(), fits);
                        if fits { for b in f..f + c { model[b as usize] = Block::Pending(s, false); } }
                    }
                    Step::Claim(s, f, c) => {
                        let fits = open(&model, f, c);
                        prop_assert_eq!(books.begin_claim(&plan, s, blocks(f, c)).is_ok(), fits);
                        if fits { for b in f..f + c { model[b as usize] = Block::Pending(s, true); } }
                    }
                    Step::Finish(s) => {
                        books.finish_stream(s);
                        for b in &mut model { if let Block::Pending(of, claim) = *b && of == s { *b = Block::Final(claim); } }
                    }
                    Step::Drop(s) => {
                        books.drop_stream(s);
                        for b in &mut model { if let Block::Pending(of, _) = *b && of == s { *b = Block::Open; } }
                    }
                    Step::Discard(f, c) => {
                        let done = f + c <= 20 && (f..f + c).all(|b| match model[b as usize] {
                            Block::Final(_) => true,
                            Block::Open => (4..8).contains(&b),
                            Block::Pending(..) => false,
                        });
                        let before: Vec<_> = (f..f + c).filter(|&b| !books.is_discarded(blocks(b, 1))).collect();
                        let fresh = books.begin_discard(&plan, blocks(f, c));
                        prop_assert_eq!(fresh.is_ok(), done);
                        if let Ok(fresh) = fresh {
                            prop_assert!(books.is_discarded(blocks(f, 1)));
                            let fresh: Vec<_> = fresh.iter().flat_map(|part| part.pieces(BLOCK)).map(|piece| piece.start() / BLOCK).collect();
                            prop_assert_eq!(fresh, before);
                        }
                    }
                }
            }
            let uncovered = books.uncovered(&plan);
            for b in 0..BLOCKS {
                let needs = b < 20 && !(4..8).contains(&b);
                let fin = matches!(model[b as usize], Block::Final(_));
                prop_assert_eq!(uncovered.overlaps(blocks(b, 1)), needs && !fin);
                let claimed = matches!(model[b as usize], Block::Final(true) | Block::Pending(_, true));
                prop_assert_eq!(books.claimed().overlaps(blocks(b, 1)), claimed);
            }
        }
    }
}
