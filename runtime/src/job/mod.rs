//! Jobs, each one thing from start to end: [`backup`], [`export`], [`mod@restore`] and [`verify`], which both go by
//! [`read_back`], and [`mod@serve`].
//! [`claims`] is what the proof of a backup and reading one back have in common.

pub mod audit;
pub mod backup;
pub mod base;
pub mod claims;
pub mod component;
pub mod doubts;
pub mod dry_run;
pub mod ending;
pub mod export;
pub mod extra;
pub mod fleecing;
pub mod journal;
pub mod lineage;
mod mark;
pub mod means;
pub mod point_in_time;
pub mod power;
pub mod prove;
pub mod read_back;
pub mod reading;
pub mod recover;

pub mod restore;
pub mod selection;
pub mod serve;
pub mod signals;
pub mod slots;
pub mod storage;
pub mod stored;
pub mod subject;
pub mod tracking;
pub mod transfer;
pub mod verify;
pub mod volume_run;

#[cfg(test)]
mod tests;
