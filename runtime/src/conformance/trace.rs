//! What providers asked and were answered, one list for each sandbox process. The kit judges a provider by it, and lets
//! single calls fail to see what the provider makes of that.

use crate::channel::{Answer, Call, ImageRead, Order};
use crate::contract::ErrorCode;
use crate::sandbox::{self, Bytes, Witness};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio_util::sync::CancellationToken;

/// Follows every process that a program starts. Clones share one list. It grows with each call, so it is
/// for jobs of a few MiB.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trace(Arc<Mutex<Heard>>);

#[derive(Debug, Default)]
struct Heard {
    conversations: Vec<Conversation>,
    fault: Option<Fault>,
    cut: Option<Cut>,
    /// Calls of the fault's kind so far, or those that can fail.
    met: u32,
}

/// All calls of one process.
#[derive(Debug, Clone, Default)]
pub(crate) struct Conversation {
    /// The volume of a run; none for an opened image.
    pub(crate) volume: Option<String>,
    /// In order.
    pub(crate) exchanges: Vec<Exchange>,
}

/// A call and its answer.
#[derive(Debug, Clone)]
pub(crate) struct Exchange {
    /// What was asked.
    pub(crate) call: Call,
    /// Missing where the process was ended first, and for [`Call::Done`].
    pub(crate) answer: Option<Answer>,
}

/// A call that fails without reaching the host: to the provider it is as if the host could not do it.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    /// [`Call::name`] of the calls that may fail; any, where it is none.
    pub(crate) call: Option<&'static str>,
    /// How many of them are let through first.
    pub(crate) after: u32,
    /// Whether all later ones fail too.
    pub(crate) lasting: bool,
    /// What the provider is told.
    pub(crate) code: ErrorCode,
}

/// A call in the midst of which the job is cancelled.
#[derive(Debug, Clone)]
pub(crate) struct Cut {
    /// How many that can fail are made first.
    pub(crate) after: u32,
    /// Cancels the job.
    pub(crate) cancel: CancellationToken,
}

impl Trace {
    /// A trace in which `fault` happens.
    pub(crate) fn with_fault(fault: Fault) -> Self {
        let trace = Self::default();
        trace.state().fault = Some(fault);
        trace
    }

    /// A trace in which `cut` happens.
    pub(crate) fn with_cut(cut: Cut) -> Self {
        let trace = Self::default();
        trace.state().cut = Some(cut);
        trace
    }

    /// Everything so far.
    pub(crate) fn conversations(&self) -> Vec<Conversation> {
        self.state().conversations.clone()
    }

    /// Begins the list of one process, unless it runs no provider.
    fn listen(&self, order: &Order) -> Option<Listener> {
        let volume = match order {
            Order::Compile { .. } | Order::Fit(_) => return None,
            Order::Run(run) => Some(run.volume.name.clone()),
            Order::OpenImage(_) => None,
        };
        let mut state = self.state();
        state.conversations.push(Conversation {
            volume,
            exchanges: Vec::new(),
        });
        Some(Listener {
            trace: self.clone(),
            conversation: state.conversations.len() - 1,
        })
    }

    fn state(&self) -> MutexGuard<'_, Heard> {
        // Nothing in it is ever half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Witness for Trace {
    fn begin(&self, order: &Order) -> Option<Box<dyn sandbox::Listener>> {
        Some(Box::new(self.listen(order)?))
    }
}

/// The place of one process in a [`Trace`].
#[derive(Debug)]
struct Listener {
    trace: Trace,
    conversation: usize,
}

impl sandbox::Listener for Listener {
    fn called(&self, call: &Call, _: Bytes<'_>) -> Option<ErrorCode> {
        let mut state = self.trace.state();
        state.cut(call);
        let refused = state.refuses(call);
        if let Some(conversation) = state.conversations.get_mut(self.conversation) {
            let call = call.clone();
            conversation.exchanges.push(Exchange { call, answer: None });
        }
        refused
    }

    fn answered(&self, answer: &Answer, _: Bytes<'_>) {
        let mut state = self.trace.state();
        let conversation = state.conversations.get_mut(self.conversation);
        if let Some(last) = conversation.and_then(|it| it.exchanges.last_mut()) {
            last.answer = Some(answer.clone());
        }
    }

    fn asked(&self, _: ImageRead) {}
}

impl Heard {
    fn cut(&mut self, call: &Call) {
        let Some(cut) = self.cut.as_ref().filter(|_| call.can_fail()) else {
            return;
        };
        if self.met == cut.after {
            cut.cancel.cancel();
        }
        self.met = self.met.saturating_add(1);
    }

    fn refuses(&mut self, call: &Call) -> Option<ErrorCode> {
        let fault = self.fault.as_ref()?;
        let meant = fault.call.is_none_or(|name| name == call.name());
        if !meant || !call.can_fail() {
            return None;
        }
        let before = self.met;
        self.met += 1;
        let fails = before == fault.after || before > fault.after && fault.lasting;
        fails.then(|| fault.code.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::OpenImage;
    use crate::contract::{Context, GuestLimits};
    use crate::sandbox::Listener as _;

    fn listener(trace: &Trace) -> Listener {
        let open = OpenImage {
            wasi: Default::default(),
            limits: GuestLimits {
                memory: 0,
                cpu_ms: 0,
            },
            context: Context {
                id: String::new(),
                settings: String::new(),
            },
            receipt: Vec::new(),
            max_read: 0,
            still: Default::default(),
        };
        trace.listen(&Order::OpenImage(open)).unwrap()
    }

    fn refused(fault: Fault) -> Vec<bool> {
        let listener = listener(&Trace::with_fault(fault));
        let finish = |stream| Call::Finish { stream };
        let calls = [
            finish(0),
            Call::DropStream { stream: 1 },
            finish(2),
            finish(3),
        ];
        let heard = calls
            .iter()
            .map(|call| listener.called(call, &|_| None).is_some());
        heard.collect()
    }

    #[test]
    fn only_the_meant_call_fails() {
        let fault = |call, lasting| Fault {
            call,
            after: 1,
            lasting,
            code: ErrorCode::Io,
        };
        let finish = Call::Finish { stream: 0 }.name();
        assert_eq!(
            refused(fault(Some(finish), false)),
            [false, false, true, false]
        );
        assert_eq!(refused(fault(None, true)), [false, false, true, true]);
        assert_eq!(refused(fault(Some("another"), true)), [false; 4]);
    }

    #[test]
    fn a_refused_call_is_in_the_trace_with_what_the_provider_was_told() {
        let trace = Trace::with_fault(Fault {
            call: None,
            after: 0,
            lasting: false,
            code: ErrorCode::Io,
        });
        let listener = listener(&trace);
        let called = |call| listener.called(&call, &|_| None);
        assert_eq!(called(Call::Finish { stream: 0 }), Some(ErrorCode::Io));
        listener.answered(&Answer::Error(ErrorCode::Io), &|_| None);
        assert_eq!(called(Call::NextRegions { limit: 1 }), None);
        listener.answered(&Answer::Unit, &|_| None);
        let all = trace.conversations();
        let answers: Vec<_> = all[0].exchanges.iter().map(|it| &it.answer).collect();
        assert!(
            matches!(
                answers[..],
                [Some(Answer::Error(ErrorCode::Io)), Some(Answer::Unit)]
            ),
            "{answers:?}"
        );
    }
}
