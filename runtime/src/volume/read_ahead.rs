//! Windows of a frozen disk, fetched before they are asked for, with the digests of their blocks.
//!
//! A provider that reads from start to end finds its bytes here. A window is what is dirty and not zero within one
//! aligned MiB: clean ranges may have been given back to the fleecing image and cannot be read.

use super::frozen::Frozen;
use super::reader::PIECE;
use crate::buffer::Buffer;
use crate::digest::{self, Digest};
use crate::extent::Extent;
use crate::nbd;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio_util::task::AbortOnDropHandle;

/// Windows fetched ahead of a sequential reader: as many as four connections keep busy.
const AHEAD: usize = 12;

/// Windows kept behind, for readers that go back a little.
const BEHIND: usize = 2;

/// Windows kept at most, whatever the order of the reads: they hold a MiB each.
const KEPT: usize = 2 * AHEAD;

/// Digests kept for blocks that were read and not claimed yet: 4 GiB of 64 KiB blocks in 3 MiB of memory. A block
/// whose digest was let go is read again when it is claimed.
const DIGESTS: usize = 1 << 16;

/// One fetched window.
#[derive(Debug)]
struct Window {
    bytes: Buffer,
    digests: Vec<Digest>,
}

#[derive(Debug)]
struct Slot {
    state: WindowState,
    /// The read that wanted it last.
    turn: u64,
}

#[derive(Debug)]
enum WindowState {
    Loading(AbortOnDropHandle<Result<Arc<Window>, nbd::Error>>),
    Ready(Arc<Window>),
}

/// Reads of one provider instance.
#[derive(Debug)]
pub struct ReadAhead {
    frozen: Arc<Frozen>,
    windows: BTreeMap<u64, Slot>,
    digests: BTreeMap<u64, Digest>,
    last: Option<Extent>,
    turn: u64,
    fetched: u64,
}

impl ReadAhead {
    /// Nothing is fetched until the first read.
    pub fn new(frozen: Arc<Frozen>) -> Self {
        Self {
            frozen,
            windows: BTreeMap::new(),
            digests: BTreeMap::new(),
            last: None,
            turn: 0,
            fetched: 0,
        }
    }

    /// Bytes that were asked of the disk so far, ahead of reads and for them.
    pub fn fetched(&self) -> u64 {
        self.fetched
    }

    /// Appends the bytes of `extent` to `out`. All of it must be dirty and not discarded.
    pub async fn read(&mut self, extent: Extent, out: &mut Vec<u8>) -> Result<(), nbd::Error> {
        let mut at = extent.start();
        while let Some(rest) = Extent::between(at, extent.end()) {
            let zero = self.frozen.plan.zero().within(rest).next();
            let end = match zero {
                Some(zero) if zero.start() == at => {
                    out.resize(out.len() + zero.len() as usize, 0);
                    zero.end()
                }
                _ => self.read_data(rest, out).await?,
            };
            at = end;
        }
        Ok(())
    }

    /// The digest of a block that was read here, given away.
    pub fn take_digest(&mut self, block: u64) -> Option<Digest> {
        self.digests.remove(&block)
    }

    /// Copies what one window holds from the start of `rest`; returns where that ends.
    async fn read_data(&mut self, rest: Extent, out: &mut Vec<u8>) -> Result<u64, nbd::Error> {
        let Some(window) = self.window_at(rest.start()) else {
            // Not reachable for a dirty range; reading it plainly is right in any case.
            self.fetched += rest.len();
            out.extend_from_slice(&self.frozen.bytes(rest).await?.bytes);
            return Ok(rest.end());
        };
        self.turn += 1;
        // A reader that jumps forward is not sequential: what lies behind its next window is not what it wants next.
        let sequential = self
            .last
            .is_none_or(|last| last == window || self.window_from(last.end()) == Some(window));
        self.last = Some(window);
        if sequential {
            self.fetch_from(window);
        } else {
            self.fetch(window);
        }
        let end = rest.end().min(window.end());
        let Ok(loaded) = self.ready(window).await else {
            // A part of the window was given back meanwhile, which makes all of it unreadable at once.
            if let Some(wanted) = Extent::between(rest.start(), end) {
                self.fetched += wanted.len();
                out.extend_from_slice(&self.frozen.reader.read(wanted).await?);
            }
            return Ok(end);
        };
        let from = (rest.start() - window.start()) as usize;
        out.extend_from_slice(&loaded.bytes[from..(end - window.start()) as usize]);
        Ok(end)
    }

    /// The window that holds the byte at `offset`.
    fn window_at(&self, offset: u64) -> Option<Extent> {
        let plan = &self.frozen.plan;
        let span = Extent::between(
            offset & !(PIECE - 1),
            plan.size().min((offset | (PIECE - 1)).saturating_add(1)),
        )?;
        plan.dirty()
            .within(span)
            .flat_map(|dirty| plan.zero().gaps(dirty))
            .find(|data| data.start() <= offset && offset < data.end())
    }

    /// The first window at or after `offset`.
    fn window_from(&self, offset: u64) -> Option<Extent> {
        let plan = &self.frozen.plan;
        let rest = Extent::between(offset, plan.size())?;
        let data = plan
            .dirty()
            .within(rest)
            .flat_map(|dirty| plan.zero().gaps(dirty))
            .next()?;
        self.window_at(data.start())
    }

    fn fetch_from(&mut self, first: Extent) {
        let mut wanted = Some(first);
        for _ in 0..AHEAD {
            let Some(window) = wanted else { break };
            self.fetch(window);
            wanted = self.window_from(window.end());
        }
        // What lies behind is let go, so that memory holds no more than the windows ahead.
        while let Some((&start, _)) = self.windows.first_key_value()
            && start < first.start()
            && self.windows.range(..first.start()).count() > BEHIND
        {
            self.windows.remove(&start);
        }
    }

    fn fetch(&mut self, window: Extent) {
        let turn = self.turn;
        if let Some(slot) = self.windows.get_mut(&window.start()) {
            slot.turn = turn;
            return;
        }
        while self.windows.len() >= KEPT {
            // One read wants far fewer than are kept, so none of its own goes.
            let oldest = self.windows.iter().min_by_key(|(_, slot)| slot.turn);
            let Some((&oldest, _)) = oldest else { break };
            self.windows.remove(&oldest);
        }
        self.fetched += window.len();
        let frozen = Arc::clone(&self.frozen);
        let task = tokio::spawn(async move { load(&frozen, window).await });
        let state = WindowState::Loading(AbortOnDropHandle::new(task));
        self.windows.insert(window.start(), Slot { state, turn });
    }

    async fn ready(&mut self, window: Extent) -> Result<Arc<Window>, nbd::Error> {
        let slot = self.windows.remove(&window.start());
        let loaded = match slot.map(|slot| slot.state) {
            Some(WindowState::Ready(loaded)) => loaded,
            // `fetch` put it there just now.
            None => load(&self.frozen, window).await?,
            Some(WindowState::Loading(task)) => {
                let loaded = task.await.map_err(std::io::Error::other)??;
                let first = window.start() / u64::from(self.frozen.plan.block());
                self.digests
                    .extend((first..).zip(loaded.digests.iter().copied()));
                while self.digests.len() > DIGESTS {
                    self.digests.pop_first();
                }
                loaded
            }
        };
        let slot = Slot {
            state: WindowState::Ready(Arc::clone(&loaded)),
            turn: self.turn,
        };
        self.windows.insert(window.start(), slot);
        Ok(loaded)
    }
}

async fn load(frozen: &Frozen, window: Extent) -> Result<Arc<Window>, nbd::Error> {
    let bytes = frozen.reader.read(window).await?;
    let digests = digest::of_blocks(&bytes, frozen.plan.block());
    Ok(Arc::new(Window { bytes, digests }))
}
