//! Who is connected, and whose place a newcomer gets.

use super::Bounds;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// All places.
#[derive(Debug)]
pub(super) struct Places {
    bounds: Bounds,
    taken: Mutex<Vec<Arc<Seat>>>,
    count: watch::Sender<usize>,
}

/// One client's.
#[derive(Debug)]
pub(super) struct Seat {
    user: u32,
    bounds: Bounds,
    activity: Mutex<Activity>,
    given_away: Notify,
}

#[derive(Debug)]
struct Activity {
    /// Requests under way.
    requests: usize,
    /// When there was last one.
    last: Instant,
}

/// A seat that is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    seat: Arc<Seat>,
    places: Arc<Places>,
}

/// A request that is under way until this is dropped.
#[derive(Debug)]
pub(super) struct UnderWay(Arc<Seat>);

impl Places {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            taken: Mutex::default(),
            count: watch::Sender::new(0),
        }
    }

    pub(super) fn count(&self) -> watch::Receiver<usize> {
        self.count.subscribe()
    }

    /// A place for one more client of `user`; none where all are taken by those who use them.
    pub(super) fn take(self: &Arc<Self>, user: u32) -> Option<Place> {
        let mut taken = lock(&self.taken);
        let of_user = taken.iter().filter(|seat| seat.user == user).count();
        if of_user >= self.bounds.of_one_user {
            // Nobody else pays for it.
            free_one(&mut taken, |seat| seat.user == user)?;
        } else if taken.len() >= self.bounds.clients {
            free_one(&mut taken, |_| true)?;
        }
        let seat = Arc::new(Seat {
            user,
            bounds: self.bounds,
            activity: Mutex::new(Activity {
                requests: 0,
                last: Instant::now(),
            }),
            given_away: Notify::new(),
        });
        taken.push(Arc::clone(&seat));
        self.count.send_replace(taken.len());
        Some(Place {
            seat,
            places: Arc::clone(self),
        })
    }
}

/// Gives away the place of the one who has been idle longest, if that is long enough.
fn free_one(taken: &mut Vec<Arc<Seat>>, may_be: impl Fn(&Seat) -> bool) -> Option<()> {
    let idle = taken.iter().enumerate();
    let idle = idle.filter(|(_, seat)| may_be(seat));
    let idle = idle.filter_map(|(at, seat)| Some((seat.idle_since()?, at)));
    let (_, at) = idle.min()?;
    taken.swap_remove(at).given_away.notify_one();
    Some(())
}

impl Seat {
    pub(super) fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Notes a request.
    pub(super) fn begin(self: &Arc<Self>) -> UnderWay {
        lock(&self.activity).requests += 1;
        UnderWay(Arc::clone(self))
    }

    /// None where that is not long ago.
    fn idle_since(&self) -> Option<Instant> {
        let activity = lock(&self.activity);
        let is_idle = activity.requests == 0 && activity.last.elapsed() >= self.bounds.idle;
        is_idle.then_some(activity.last)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut activity = lock(&self.0.activity);
        activity.requests -= 1;
        activity.last = Instant::now();
    }
}

impl Place {
    pub(super) fn bounds(&self) -> Bounds {
        self.seat.bounds
    }

    pub(super) fn seat(&self) -> Arc<Seat> {
        Arc::clone(&self.seat)
    }

    /// Waits until somebody else has it.
    pub(super) async fn given_away(&self) {
        self.seat.given_away.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = lock(&self.places.taken);
        taken.retain(|seat| !Arc::ptr_eq(seat, &self.seat));
        self.places.count.send_replace(taken.len());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No change under these locks can be left half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
