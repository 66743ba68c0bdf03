//! The trusted side of each interface of the contract: check, charge, act.
//!
//! A sandbox process sends calls; here they are answered. Everything in a call is a claim by an attacker: ranges are
//! checked against the plan and the books, quotas are charged, and only then is anything read, stored or given back.
//! [`run`] serves one run on one volume; [`image`] serves one opened image at read-back, verify and restore.

pub mod account;
pub mod farewell;
pub mod image;
mod names;
mod pace;
mod provider_log;
mod put;
pub mod run;
mod stream;
pub mod target;
