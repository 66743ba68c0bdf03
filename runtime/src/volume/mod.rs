//! One frozen disk: what of it has to be backed up, how its bytes are read, and what has been covered so far.
//!
//! [`plan`] turns a dirty bitmap and the allocation into whole blocks, [`coverage`] keeps the books on them,
//! [`reader`] fetches bytes over NBD, [`digest`] names them, [`prepare`] ties these to the point in time.

pub mod coverage;
pub mod digest;
pub mod plan;
