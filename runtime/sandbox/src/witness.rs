//! Who follows what sandbox processes ask and are answered.

use fleecebox_channel::{Answer, Call, ImageRead, Order};
use fleecebox_contract::ErrorCode;
use std::fmt::Debug;
use std::sync::Arc;

/// Follows every process that a [`super::Program`] starts.
pub trait Witness: Debug + Send + Sync {
    /// A process begins with `order`. Nothing where the witness does not follow it.
    fn begin(&self, order: &Order) -> Option<Box<dyn Listener>>;
}

/// Follows one process. What it is told is not yet checked by anybody but for the bounds of its order.
pub trait Listener: Debug + Send + Sync {
    /// It made a call. With a code, the call fails with it and is not carried out.
    fn called(&self, call: &Call, payload: Bytes<'_>) -> Option<ErrorCode>;

    /// It was answered.
    fn answered(&self, answer: &Answer, payload: Bytes<'_>);

    /// Its image was asked for bytes.
    fn asked(&self, read: ImageRead);
}

/// The first bytes of what both processes hold, as many as a call or an answer says; nothing where they cannot be read.
pub type Bytes<'a> = &'a dyn Fn(u32) -> Option<Vec<u8>>;

/// All that follow one process.
#[derive(Debug)]
pub(super) struct Listeners(Vec<Box<dyn Listener>>);

impl Listeners {
    pub(super) fn begin(witnesses: &[Arc<dyn Witness>], order: &Order) -> Self {
        Self(witnesses.iter().filter_map(|it| it.begin(order)).collect())
    }

    /// All hear it, whoever lets it fail; of several codes the first counts.
    pub(super) fn called(&self, call: &Call, payload: Bytes<'_>) -> Option<ErrorCode> {
        let codes = self.0.iter().map(|it| it.called(call, payload));
        codes.fold(None, Option::or)
    }

    pub(super) fn answered(&self, answer: &Answer, payload: Bytes<'_>) {
        self.0.iter().for_each(|it| it.answered(answer, payload));
    }

    pub(super) fn asked(&self, read: ImageRead) {
        self.0.iter().for_each(|it| it.asked(read));
    }
}
