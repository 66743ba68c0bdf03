//! `stored`: reading back what the provider itself wrote.

use super::image::Image;
use crate::archive::{self, ObjectName};
use crate::channel::Answer;
use crate::contract::{ErrorCode, MAX_READ};
use crate::sandbox::Usage;
use std::sync::Arc;
use tokio::task::spawn_blocking;

impl Image {
    pub(super) async fn size(&self, name: String) -> Answer {
        match name.parse::<ObjectName>() {
            Ok(name) => match self.objects.size(&name) {
                Ok(size) => Answer::Size(size),
                Err(error) => Answer::Error(code(&error)),
            },
            Err(_) => Answer::Error(ErrorCode::InvalidName),
        }
    }

    pub(super) async fn read_object(
        &mut self,
        name: String,
        offset: u64,
        length: u32,
    ) -> Result<Vec<u8>, ErrorCode> {
        if length > MAX_READ {
            return Err(ErrorCode::TooLarge);
        }
        let name: ObjectName = name.parse().map_err(|_| ErrorCode::InvalidName)?;
        let objects = Arc::clone(&self.objects);
        let read = spawn_blocking(move || {
            let began = Usage::of_this_thread();
            let read = objects.read(&name, offset, length);
            (read, Usage::of_this_thread().saturating_sub(began))
        });
        let Ok((read, cpu)) = read.await else {
            return Err(ErrorCode::Io);
        };
        // Decoding a frame, or looking for it among many, for one byte: it is done for the provider.
        self.process.worked_for(cpu);
        read.map_err(|error| code(&error))
    }
}

fn code(error: &archive::Error) -> ErrorCode {
    match error {
        archive::Error::NotFound { .. } => ErrorCode::NotFound,
        archive::Error::OutOfRange { .. } => ErrorCode::OutOfRange,
        archive::Error::TooLarge { .. } => ErrorCode::TooLarge,
        _ => ErrorCode::Io,
    }
}
