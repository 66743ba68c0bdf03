//! The forms of the point in time, what crashes QEMU in them and is never sent, and what changes beneath a bitmap.

mod filter;
mod fleecing;
mod graph;
mod guards;
mod proxmox;
mod qemu_scenarios;
