//! The trusted side of each interface of the contract: check, charge, act.
//!
//! A sandbox process sends calls; here they are answered. Everything in a call is a claim by an attacker: ranges are
//! checked against the plan and the books, quotas are charged, and only then is anything read, stored or given back.
//!
//! Each interface of `wit/provider.wit` has a file of its name, here and on the confined side (`stubs` of the worker):
//! `volume`, `content`, `archive`, `job`, `stored`. [`run`] serves one run on one volume, and shows which call goes where;
//! [`image`] does so for one opened image at read-back, verify and restore.

pub mod account;
mod archive;
mod content;
pub mod farewell;
pub mod image;
mod job;
mod names;
mod pace;
mod provider_log;
mod put;
pub mod run;
mod stored;
mod stream;
pub mod target;
mod volume;
