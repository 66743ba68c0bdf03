//! What providers give back of their claims, at any place.
//!
//! An instance is asked as for a restore: a segment of its own, from its first claim on. So it stays open while somebody
//! reads on, and what it gave back is kept for who reads a little behind; who reads further behind has another one asked
//! from the start. Nothing that it is asked tells it which of this is wanted.

use super::super::claims::{Asking, Claims, segment_of};
use super::super::means::Means;
use crate::access::Kept;
use crate::archive::{BackupId, ObjectRef};
use crate::contract::with_causes;
use crate::extent::Extent;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;

/// Images open at once, as in a restore: each has a process and the memory that its provider may have.
const IMAGES: usize = 4;

/// After so long without a question, an image makes room for another one. Who reads on asks within milliseconds.
const PAUSE: Duration = Duration::from_millis(100);

/// How often it is looked for one that makes room.
const LOOK: Duration = Duration::from_millis(50);

/// For how long an image is asked while others wait, at the most. A segment takes seconds where the provider is not slow.
const TURN: Duration = Duration::from_secs(60);

/// For how long it is believed that an image does not give back what it did not.
const BELIEVED: Duration = super::BELIEVED;

/// What is kept of it, and of the archive's frames.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    /// A frame, by its file and offset.
    Frame(ObjectRef, u64),
    /// An answer about a volume's claims in a backup, from this byte on.
    Answer(usize, BackupId, u64),
}

/// Bytes that a provider gave back, not compared with anything.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    /// Where they lie on the volume.
    pub(super) extent: Extent,
    pub(super) bytes: Arc<Vec<u8>>,
}

/// Why there is no answer.
#[derive(Debug, Clone)]
pub(super) struct NotAsked {
    pub(super) reason: String,
    pub(super) is_denied: bool,
}

/// What a volume's provider claimed in a backup, if it may be asked.
pub(super) type Found = Result<Arc<Claims>, NotAsked>;

/// Somebody wants to know it.
pub(super) struct Lookup {
    pub(super) volume: usize,
    pub(super) backup: BackupId,
    pub(super) reply: oneshot::Sender<Found>,
}

/// Whose lane it is: a volume, a backup and a segment.
type Whose = (usize, BackupId, u64);

/// Who asks.
pub(super) struct Asked {
    lookups: mpsc::Sender<Lookup>,
    kept: Arc<Kept<Key>>,
    means: Means,
    lanes: std::sync::Mutex<BTreeMap<Whose, Arc<Mutex<Lane>>>>,
    images: Arc<Semaphore>,
    /// Who wait for one of the images.
    waiting: Arc<AtomicUsize>,
}

/// A segment of which one question is put after the other.
#[derive(Default)]
struct Lane {
    open: Option<Open>,
    failed: Option<Failed>,
}

/// An image that is open.
struct Open {
    asking: Asking,
    since: Instant,
    used: Instant,
    _image: OwnedSemaphorePermit,
}

/// From a block on, an image gives nothing back.
struct Failed {
    since: Instant,
    from: u64,
    why: NotAsked,
}

impl Lane {
    /// Why nothing is given back at `at`, as far as that is believed.
    fn failed_at(&self, at: u64) -> Option<NotAsked> {
        let failed = self.failed.as_ref()?;
        let is_it = failed.from <= at && failed.since.elapsed() < BELIEVED;
        is_it.then(|| failed.why.clone())
    }

    fn fails(&mut self, from: u64, why: NotAsked) -> NotAsked {
        self.failed = Some(Failed {
            since: Instant::now(),
            from,
            why: why.clone(),
        });
        why
    }

    fn is_of_use(&self) -> bool {
        let failed = self.failed.as_ref();
        self.open.is_some() || failed.is_some_and(|failed| failed.since.elapsed() < BELIEVED)
    }
}

impl Asked {
    pub(super) fn new(lookups: mpsc::Sender<Lookup>, kept: Arc<Kept<Key>>, means: &Means) -> Self {
        Self {
            lookups,
            kept,
            means: means.clone(),
            lanes: std::sync::Mutex::default(),
            images: Arc::new(Semaphore::new(IMAGES)),
            waiting: Arc::default(),
        }
    }

    /// What the provider of `backup` gives back for the byte `at`, with its neighbours.
    ///
    /// Its future may be dropped at any time: what has begun is kept for who asks next.
    pub(super) async fn answer(
        &self,
        volume: usize,
        backup: BackupId,
        at: u64,
    ) -> Result<Answer, NotAsked> {
        let wanted = Wanted {
            kept: Arc::clone(&self.kept),
            volume,
            backup,
            at,
        };
        if let Some(answer) = wanted.kept() {
            return Ok(answer);
        }
        let claims = self.claims(volume, backup).await?;
        let lane = self.lane((volume, backup, segment_of(at)));
        let mut lane = lane.lock_owned().await;
        if let Some(answer) = wanted.kept() {
            return Ok(answer);
        }
        if let Some(why) = lane.failed_at(at) {
            return Err(why);
        }
        if let Some(open) = lane.open.take_if(|open| !open.asking.asks_for(at)) {
            open.asking.close().await;
        }
        let image = match lane.open {
            Some(_) => None,
            None => Some(self.image().await),
        };
        // Whoever leaves must not leave an instance in the middle of a question.
        let asking = wanted.ask(lane, claims, image, Arc::clone(&self.waiting));
        let means = self.means.clone();
        let asked = tokio::spawn(async move { means.unless_cancelled(asking).await });
        match asked.await {
            Ok(Some(answer)) => answer,
            Ok(None) => Err(ending()),
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(ending()),
            },
        }
    }

    /// Ends all instances.
    pub(super) async fn close(&self) {
        let lanes = std::mem::take(&mut *self.lanes());
        for lane in lanes.into_values() {
            if let Some(open) = lane.lock().await.open.take() {
                open.asking.close().await;
            }
        }
    }

    async fn claims(&self, volume: usize, backup: BackupId) -> Found {
        let (reply, found) = oneshot::channel();
        let lookup = Lookup {
            volume,
            backup,
            reply,
        };
        self.lookups.send(lookup).await.map_err(|_| ending())?;
        let found = found.await.map_err(|_| ending())?;
        found.map_err(|NotAsked { reason, is_denied }| NotAsked {
            is_denied,
            ..cannot_be_asked(backup, &reason)
        })
    }

    /// Lanes that nobody is in and that hold nothing are forgotten on the way.
    fn lane(&self, whose: Whose) -> Arc<Mutex<Lane>> {
        let mut lanes = self.lanes();
        lanes.retain(|_, lane| {
            Arc::strong_count(lane) > 1 || lane.try_lock().is_ok_and(|lane| lane.is_of_use())
        });
        Arc::clone(lanes.entry(whose).or_default())
    }

    /// The right to open an image, as soon as there is one.
    async fn image(&self) -> OwnedSemaphorePermit {
        let _waiting = Waiting::new(&self.waiting);
        loop {
            if let Ok(image) = Arc::clone(&self.images).try_acquire_owned() {
                return image;
            }
            if let Some(open) = self.paused() {
                open.asking.close().await;
                continue;
            }
            let image = Arc::clone(&self.images).acquire_owned();
            if let Ok(Ok(image)) = timeout(LOOK, image).await {
                return image;
            }
        }
    }

    /// Takes that image which has paused longest.
    fn paused(&self) -> Option<Open> {
        let lanes = self.lanes();
        let guards = lanes.values().filter_map(|lane| lane.try_lock().ok());
        let paused = guards.filter_map(|lane| Some((lane.open.as_ref()?.used, lane)));
        let paused = paused.filter(|(used, _)| used.elapsed() >= PAUSE);
        let (_, mut lane) = paused.min_by_key(|(used, _)| *used)?;
        lane.open.take()
    }

    fn lanes(&self) -> std::sync::MutexGuard<'_, BTreeMap<Whose, Arc<Mutex<Lane>>>> {
        // No change of the map can be left half done.
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ending() -> NotAsked {
    NotAsked {
        reason: "the server is ending".into(),
        is_denied: false,
    }
}

/// A byte that is wanted.
struct Wanted {
    kept: Arc<Kept<Key>>,
    volume: usize,
    backup: BackupId,
    at: u64,
}

impl Wanted {
    /// What is kept and holds it.
    fn kept(&self) -> Option<Answer> {
        let (from, to) = (self.key(0), self.key(self.at));
        let (key, bytes) = self.kept.find_last(&from, &to)?;
        let Key::Answer(.., start) = key else {
            return None;
        };
        let extent = Extent::new(start, bytes.len() as u64).ok()?;
        (self.at < extent.end()).then_some(Answer { extent, bytes })
    }

    fn key(&self, start: u64) -> Key {
        Key::Answer(self.volume, self.backup, start)
    }

    /// Asks the lane's image, or one that is opened with the right to, on until it gives back what is wanted. An image
    /// stays open as long as it has something to give.
    async fn ask(
        self,
        mut lane: OwnedMutexGuard<Lane>,
        claims: Arc<Claims>,
        image: Option<OwnedSemaphorePermit>,
        waiting: Arc<AtomicUsize>,
    ) -> Result<Answer, NotAsked> {
        let opened = match image {
            None => lane.open.take(),
            Some(image) => {
                let asking = claims.ask(segment_of(self.at)).await;
                let now = Instant::now();
                let open = asking.map(|asking| Open {
                    asking,
                    since: now,
                    used: now,
                    _image: image,
                });
                match open {
                    Ok(open) => Some(open),
                    Err(error) => {
                        let why = cannot_be_asked(self.backup, &with_causes(&error));
                        return Err(lane.fails(0, why));
                    }
                }
            }
        };
        // It is out of the lane while it is asked: where that is broken off, it ends.
        let Some(mut open) = opened else {
            return Err(ending());
        };
        let answered = self.on(&mut open, &mut lane).await;
        let gives_way = waiting.load(Ordering::Relaxed) > 0 && open.since.elapsed() >= TURN;
        if open.asking.is_done() || gives_way {
            open.asking.close().await;
        } else {
            open.used = Instant::now();
            lane.open = Some(open);
        }
        answered
    }

    /// Asks on.
    async fn on(&self, open: &mut Open, lane: &mut Lane) -> Result<Answer, NotAsked> {
        let backup = self.backup;
        while open.asking.asks_for(self.at)
            && let Some((question, answer)) = open.asking.next().await
        {
            let extent = question.extent;
            let holds_it = (extent.start()..extent.end()).contains(&self.at);
            match answer {
                Ok(bytes) => {
                    let bytes = Arc::new(bytes);
                    self.kept.keep(self.key(extent.start()), Arc::clone(&bytes));
                    if holds_it {
                        return Ok(Answer { extent, bytes });
                    }
                }
                Err(source) => {
                    let has_ended_it = source.has_ended_it();
                    let why = NotAsked {
                        reason: format!(
                            "the provider of backup {backup} does not give back what it claimed: {}",
                            with_causes(&source)
                        ),
                        is_denied: false,
                    };
                    if has_ended_it {
                        return Err(lane.fails(extent.start(), why));
                    }
                    if holds_it {
                        return Err(why);
                    }
                }
            }
        }
        Err(NotAsked {
            reason: format!(
                "backup {backup}, in which it is said to be claimed, has no claim of it"
            ),
            is_denied: false,
        })
    }
}

fn cannot_be_asked(backup: BackupId, why: &str) -> NotAsked {
    NotAsked {
        reason: format!(
            "the provider of backup {backup} cannot be asked for what it claimed: {why}"
        ),
        is_denied: false,
    }
}

/// Counts who wait.
struct Waiting(Arc<AtomicUsize>);

impl Waiting {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
