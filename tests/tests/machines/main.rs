//! Virtual machines as operators have them: what is attached, what they are doing, what boots in them, and how old their
//! QEMU is.

mod guest_backup;
mod iothreads;
mod machine;
mod older_qemu;
mod topologies;
