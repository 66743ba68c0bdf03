//! What operators do and see: mistakes that they can mend, two of them on one QEMU, a QEMU that runs as another user, and
//! files that others replace.

mod bad_input;
mod other_user;
mod owners;
mod replaced;
