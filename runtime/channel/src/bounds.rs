//! Which calls an order allows its sandbox to make, and how large they may be.
//!
//! The sandbox's own stubs keep to the same bounds. A call that passes them therefore does not come from a provider:
//! it comes from a sandbox that somebody has broken, and ends it.

use super::{Call, Order, Outcome, Payload};
use fleecebox_contract::{
    MAX_ATTACHMENT_NAME, MAX_RECEIPT, MAX_REGIONS, MAX_SENT_NAME, MAX_TEXT, World,
};

/// What the sandbox of one order may say.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    phase: Phase,
    max_read: u32,
    max_write: u32,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    Compile,
    Fit,
    Run { reader: bool, discarder: bool },
    OpenImage,
}

/// What a sandbox said and must not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The call belongs to a handle that this order did not grant, or to another order.
    #[error("it made a call ({0}) that it holds no handle for")]
    NotGranted(&'static str),
    /// A number is greater than what its stubs let pass.
    #[error("it made a call ({call}) with {actual} where {limit} is the most")]
    TooMuch {
        /// The call.
        call: &'static str,
        /// What it carried: bytes, or regions.
        actual: u64,
        /// The most that it may carry.
        limit: u64,
    },
}

impl Bounds {
    /// What `order` allows.
    pub fn new(order: &Order) -> Self {
        match order {
            Order::Compile { .. } => Self {
                phase: Phase::Compile,
                max_read: 0,
                max_write: 0,
            },
            Order::Fit(_) => Self {
                phase: Phase::Fit,
                max_read: 0,
                max_write: 0,
            },
            Order::Run(run) => Self {
                phase: Phase::Run {
                    reader: run.reader && run.world == World::Provider,
                    discarder: run.discarder,
                },
                max_read: run.max_read,
                max_write: run.max_write,
            },
            Order::OpenImage(open) => Self {
                phase: Phase::OpenImage,
                max_read: open.max_read,
                max_write: 0,
            },
        }
    }

    /// Says whether the sandbox may make `call`.
    pub fn check(&self, call: &Call) -> Result<(), Violation> {
        let granted = match (call, self.phase) {
            (Call::Attachment { .. } | Call::Log { .. } | Call::Grow { .. }, phase) => {
                !matches!(phase, Phase::Compile | Phase::Fit)
            }
            (Call::Read { .. }, phase) => matches!(phase, Phase::Run { reader: true, .. }),
            (Call::Discard(_), phase) => matches!(
                phase,
                Phase::Run {
                    discarder: true,
                    ..
                }
            ),
            (Call::ObjectSize { .. } | Call::ObjectRead { .. }, phase) => {
                matches!(phase, Phase::OpenImage)
            }
            (Call::Done(outcome), phase) => match outcome {
                Outcome::Compiled { .. } => matches!(phase, Phase::Compile),
                Outcome::Fits => matches!(phase, Phase::Fit),
                Outcome::Receipt(_) => matches!(phase, Phase::Run { .. }),
                Outcome::Opened | Outcome::Bytes { .. } => matches!(phase, Phase::OpenImage),
                Outcome::GuestError(_) => !matches!(phase, Phase::Compile | Phase::Fit),
                Outcome::Failed(_) => true,
            },
            (
                Call::NextRegions { .. }
                | Call::Put(..)
                | Call::Create { .. }
                | Call::Write { .. }
                | Call::Splice { .. }
                | Call::Claim { .. }
                | Call::Finish { .. }
                | Call::DropStream { .. },
                phase,
            ) => matches!(phase, Phase::Run { .. }),
        };
        if !granted {
            return Err(Violation::NotGranted(call.name()));
        }
        let (named, most) = match call {
            Call::Create { name, .. }
            | Call::ObjectSize { name }
            | Call::ObjectRead { name, .. } => (name.len(), MAX_SENT_NAME),
            Call::Attachment { name } => (name.len(), MAX_ATTACHMENT_NAME),
            _ => (0, 0),
        };
        for (actual, limit) in [(named as u64, most as u64), self.load(call)] {
            if actual > limit {
                return Err(Violation::TooMuch {
                    call: call.name(),
                    actual,
                    limit,
                });
            }
        }
        Ok(())
    }

    /// How much a call carries or asks for beside a name, and the most that it may.
    fn load(&self, call: &Call) -> (u64, u64) {
        match call {
            Call::NextRegions { limit } => ((*limit).into(), MAX_REGIONS.into()),
            Call::Read { length, .. } | Call::ObjectRead { length, .. } => {
                ((*length).into(), self.max_read.into())
            }
            Call::Write { length, .. } => ((*length).into(), self.max_write.into()),
            Call::Log { message, .. } => (message.len() as u64, MAX_TEXT as u64),
            Call::Done(Outcome::Receipt(receipt)) => (receipt.len() as u64, MAX_RECEIPT as u64),
            Call::Done(Outcome::Bytes { length }) => ((*length).into(), self.max_read.into()),
            Call::Done(Outcome::Compiled { length, .. }) => (*length, Payload::COMPILE_SIZE),
            _ => (0, 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{OpenImage, Run};
    use fleecebox_contract::{BitmapMode, Context, GuestLimits, RawRange, VolumeInfo};

    fn context() -> Context {
        Context {
            id: "job".into(),
            settings: String::new(),
        }
    }

    fn run(world: World, reader: bool, discarder: bool) -> Bounds {
        Bounds::new(&Order::Run(Run {
            world,
            wasi: Default::default(),
            limits: GuestLimits {
                memory: 1,
                cpu_ms: 1,
            },
            context: context(),
            volume: VolumeInfo {
                name: "disk".into(),
                size: 1 << 20,
                block_size: 65536,
                mode: BitmapMode::None,
            },
            reader,
            discarder,
            base: None,
            max_read: 1000,
            max_write: 2000,
        }))
    }

    fn image() -> Bounds {
        Bounds::new(&Order::OpenImage(OpenImage {
            wasi: Default::default(),
            limits: GuestLimits {
                memory: 1,
                cpu_ms: 1,
            },
            context: context(),
            receipt: vec![],
            max_read: 1000,
            still: Default::default(),
        }))
    }

    #[test]
    fn a_blind_provider_cannot_read_even_where_its_order_says_so() {
        let read = Call::Read {
            offset: 0,
            length: 1,
        };
        assert!(run(World::Provider, true, false).check(&read).is_ok());
        assert_eq!(
            run(World::BlindProvider, true, false).check(&read),
            Err(Violation::NotGranted("reader.read"))
        );
        assert!(run(World::Provider, false, false).check(&read).is_err());
    }

    #[test]
    fn a_handle_that_was_not_granted_cannot_be_used() {
        let discard = Call::Discard(RawRange {
            offset: 0,
            length: 1,
        });
        assert!(run(World::Provider, true, false).check(&discard).is_err());
        assert!(run(World::Provider, true, true).check(&discard).is_ok());
        assert!(image().check(&discard).is_err());
        assert!(
            image()
                .check(&Call::Create {
                    name: "x".into(),
                    encoding: fleecebox_contract::Encoding::Zstd
                })
                .is_err()
        );
        assert!(
            run(World::Provider, true, true)
                .check(&Call::ObjectSize { name: "x".into() })
                .is_err()
        );
    }

    #[test]
    fn an_order_ends_in_its_own_way_only() {
        let receipt = Call::Done(Outcome::Receipt(vec![]));
        let bytes = Call::Done(Outcome::Bytes { length: 1 });
        assert!(run(World::Provider, true, true).check(&receipt).is_ok());
        assert!(run(World::Provider, true, true).check(&bytes).is_err());
        assert!(image().check(&bytes).is_ok());
        assert!(image().check(&receipt).is_err());
        let compile = Bounds::new(&Order::Compile { length: 1 });
        assert!(
            compile
                .check(&Call::Done(Outcome::Failed(crate::Failure::Memory)))
                .is_ok()
        );
        assert!(
            compile
                .check(&Call::Log {
                    level: fleecebox_contract::LogLevel::Info,
                    message: String::new()
                })
                .is_err()
        );
    }

    #[test]
    fn more_than_the_most_is_a_violation() {
        let bounds = run(World::Provider, true, true);
        assert!(
            bounds
                .check(&Call::Read {
                    offset: 0,
                    length: 1000
                })
                .is_ok()
        );
        assert!(
            bounds
                .check(&Call::Read {
                    offset: 0,
                    length: 1001
                })
                .is_err()
        );
        assert!(
            bounds
                .check(&Call::Write {
                    stream: 0,
                    length: 2000
                })
                .is_ok()
        );
        assert!(
            bounds
                .check(&Call::Write {
                    stream: 0,
                    length: 2001
                })
                .is_err()
        );
        assert!(
            bounds
                .check(&Call::NextRegions {
                    limit: MAX_REGIONS + 1
                })
                .is_err()
        );
        for length in [MAX_ATTACHMENT_NAME, MAX_ATTACHMENT_NAME + 1] {
            let name = "x".repeat(length);
            let within = length == MAX_ATTACHMENT_NAME;
            assert_eq!(bounds.check(&Call::Attachment { name }).is_ok(), within);
        }
        for length in [MAX_SENT_NAME, MAX_SENT_NAME + 1] {
            let encoding = fleecebox_contract::Encoding::Zstd;
            let name = "x".repeat(length);
            let create = Call::Create { name, encoding };
            assert_eq!(bounds.check(&create).is_ok(), length == MAX_SENT_NAME);
        }
        for length in [MAX_RECEIPT, MAX_RECEIPT + 1] {
            let receipt = Call::Done(Outcome::Receipt(vec![0; length]));
            assert_eq!(bounds.check(&receipt).is_ok(), length == MAX_RECEIPT);
        }
        assert!(
            image()
                .check(&Call::Done(Outcome::Bytes { length: 1001 }))
                .is_err()
        );
    }
}
