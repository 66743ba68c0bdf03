//! `job`: settings, attachments and the log.

use super::{Host, Lost, Refused};
use crate::bindings::job;
use fleecebox_channel::{Answer, Call};
use fleecebox_contract::{LogLevel, MAX_ATTACHMENT_NAME};
use wasmtime::component::Resource;

impl job::Host for Host {}

impl job::HostContext for Host {
    fn id(&mut self, _: Resource<job::Context>) -> wasmtime::Result<String> {
        Ok(self.context.id.clone())
    }

    fn settings(&mut self, _: Resource<job::Context>) -> wasmtime::Result<String> {
        Ok(self.context.settings.clone())
    }

    fn attachment(
        &mut self,
        _: Resource<job::Context>,
        name: String,
    ) -> wasmtime::Result<Option<Vec<u8>>> {
        if name.len() > MAX_ATTACHMENT_NAME {
            return Ok(None);
        }
        match self
            .job
            .ask(&Call::Attachment { name })
            .map_err(Refused::into_trap)?
        {
            Answer::Bytes { length } => {
                Ok(Some(self.payload.take(length.into()).map_err(Lost::from)?))
            }
            Answer::Nothing => Ok(None),
            _ => Err(Lost::WrongAnswer.into()),
        }
    }

    fn log(
        &mut self,
        _: Resource<job::Context>,
        level: job::Level,
        message: String,
    ) -> wasmtime::Result<()> {
        let level = match level {
            job::Level::Debug => LogLevel::Debug,
            job::Level::Info => LogLevel::Info,
            job::Level::Warn => LogLevel::Warn,
            job::Level::Error => LogLevel::Error,
        };
        self.job.log(level, message).map_err(Refused::into_trap)
    }

    fn drop(&mut self, _: Resource<job::Context>) -> wasmtime::Result<()> {
        Ok(())
    }
}
