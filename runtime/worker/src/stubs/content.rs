//! `content`: the bytes of a volume.

use super::{Host, Refused};
use crate::bindings::content;
use fleecebox_channel::Call;
use fleecebox_contract::ErrorCode;
use wasmtime::component::Resource;

impl content::Host for Host {}

impl content::HostReader for Host {
    fn max_read(&mut self, _: Resource<content::Reader>) -> wasmtime::Result<u32> {
        Ok(self.max_read)
    }

    fn read(
        &mut self,
        _: Resource<content::Reader>,
        offset: u64,
        length: u32,
    ) -> Result<Vec<u8>, Refused> {
        if length > self.max_read {
            return Err(Refused::Guest(ErrorCode::TooLarge));
        }
        self.ask_bytes(&Call::Read { offset, length }, length)
    }

    fn drop(&mut self, _: Resource<content::Reader>) -> wasmtime::Result<()> {
        Ok(())
    }
}
