//! `job`: attachments and the log; the settings need no call.

use super::run::Run;
use crate::channel::Answer;
use crate::contract::{LogLevel, MAX_ATTACHMENT};
use crate::sandbox::{self, Process};

impl Run {
    pub(super) fn attachment(
        &self,
        name: &str,
        process: &Process,
    ) -> Result<Answer, sandbox::Error> {
        let Some(bytes) = self.terms.attachments.get(name) else {
            return Ok(Answer::Nothing);
        };
        debug_assert!(bytes.len() <= MAX_ATTACHMENT);
        Ok(Answer::Bytes {
            length: process.give_payload(bytes)?,
        })
    }

    pub(super) fn log(&mut self, level: LogLevel, message: &str) -> Answer {
        self.log.line(level, message);
        Answer::Unit
    }
}
