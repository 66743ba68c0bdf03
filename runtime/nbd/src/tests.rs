//! The client against servers that lie, and against servers that are real.

mod fake;
mod hostile;
mod real;

use fleecebox_contract::extent::Extent;

fn extent(offset: u64, length: u64) -> Extent {
    Extent::new(offset, length).unwrap()
}
