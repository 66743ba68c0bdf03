//! Whom the process runs as.

use fleecebox_channel::Gap;
use rustix::process::{Gid, Uid, geteuid, getpid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};
use std::io;

/// Added to the process id it makes a user id that nobody has: process ids are below 2^22 (proc(5), `pid_max`), and of
/// what follows, systemd's table of user ids, which others keep to, gives nothing to anybody.
///
/// A user of its own for each process, because those of one user may send each other signals.
const OWN_USER: u32 = 0x7000_0000;

/// For a container whose user ids do not go that far. Others may run as this user too.
const NOBODY: u32 = 65534;

/// Gives up root's user and groups, where the process has them, and every capability.
///
/// For the calling thread, and those that it starts.
pub(super) fn drop_privileges() -> Result<Option<Gap>, io::Error> {
    let stays = geteuid().is_root() && !become_nobody();
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none)?;
    Ok(stays.then_some(Gap::User))
}

fn become_nobody() -> bool {
    // What this process may do, the one that started it may: without the right to send signals to another user's
    // processes it could not end this one.
    let needed = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::KILL;
    if !capabilities(None).is_ok_and(|sets| sets.effective.contains(needed)) {
        return false;
    }
    let own = OWN_USER + getpid().as_raw_nonzero().get().unsigned_abs();
    set_thread_groups(&[]).is_ok() && [own, NOBODY].into_iter().any(become_user)
}

fn become_user(id: u32) -> bool {
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    set_thread_res_gid(group, group, group).is_ok() && set_thread_res_uid(user, user, user).is_ok()
}
