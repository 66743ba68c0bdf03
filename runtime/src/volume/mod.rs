//! One frozen disk: what of it has to be backed up, how its bytes are read, and what has been covered so far.
//!
//! In the order of a backup: [`open`] asks the export of a [`source`] what is dirty and zero and makes the [`plan`]; [`sample`]
//! compares some clean blocks with the base; [`discard`] gives the clean ranges back; [`reader`] fetches bytes over its
//! [`lane`]s, never more than their sockets hold, within the job's [`bandwidth`], with [`read_ahead`] for providers that read them themselves; [`coverage`] keeps the books; and
//! [`canary`] shows at the end that the snapshot was intact.

pub mod bandwidth;
pub mod canary;
pub mod coverage;
pub mod discard;
pub mod frozen;
pub mod lane;
pub mod open;
pub mod plan;
pub mod read_ahead;
pub mod reader;
pub mod sample;
pub mod source;
