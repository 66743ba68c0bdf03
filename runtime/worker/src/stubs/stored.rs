//! `stored`: reading back what the provider itself wrote.

use super::{Host, Refused, sent};
use crate::bindings::stored;
use fleecebox_channel::Call;
use fleecebox_contract::ErrorCode;
use wasmtime::component::Resource;

impl stored::Host for Host {}

impl stored::HostObjects for Host {
    fn size(&mut self, _: Resource<stored::Objects>, name: String) -> Result<u64, Refused> {
        self.ask_size(&Call::ObjectSize { name: sent(name) })
    }

    fn read(
        &mut self,
        _: Resource<stored::Objects>,
        name: String,
        offset: u64,
        length: u32,
    ) -> Result<Vec<u8>, Refused> {
        if length > self.max_read {
            return Err(Refused::Guest(ErrorCode::TooLarge));
        }
        self.ask_bytes(
            &Call::ObjectRead {
                name: sent(name),
                offset,
                length,
            },
            length,
        )
    }

    fn drop(&mut self, _: Resource<stored::Objects>) -> wasmtime::Result<()> {
        Ok(())
    }
}
