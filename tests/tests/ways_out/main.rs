//! Every way out of a backup: whatever ends it, stops it, starves it or lies to it, the VM runs on and the next run is
//! right.

mod aborts;
mod agents;
mod crash;
mod faults;
mod from_outside;
mod hanging_storage;
mod kills;
mod stalls;
