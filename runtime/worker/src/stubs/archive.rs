//! `archive`: chunks, objects, and what is claimed to be in them.

use super::{Host, Lost, Refused, sent};
use crate::bindings::{archive, types, volume};
use fleecebox_channel::{Answer, Call};
use fleecebox_contract::ErrorCode;
use wasmtime::component::Resource;

impl archive::Host for Host {}

impl archive::HostWriter for Host {
    fn put(
        &mut self,
        _: Resource<archive::Writer>,
        _: Resource<volume::Snapshot>,
        range: types::Extent,
        encoding: types::Encoding,
    ) -> Result<(), Refused> {
        self.job.ask_unit(&Call::Put(range.into(), encoding.into()))
    }

    fn create(
        &mut self,
        _: Resource<archive::Writer>,
        name: String,
        encoding: types::Encoding,
    ) -> Result<Resource<archive::OutputStream>, Refused> {
        match self.job.ask(&Call::Create {
            name: sent(name),
            encoding: encoding.into(),
        })? {
            Answer::Stream(number) => Ok(Resource::new_own(number)),
            _ => Err(Lost::WrongAnswer.into()),
        }
    }

    fn drop(&mut self, _: Resource<archive::Writer>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl archive::HostOutputStream for Host {
    fn max_write(&mut self, _: Resource<archive::OutputStream>) -> wasmtime::Result<u32> {
        Ok(self.max_write)
    }

    fn write(
        &mut self,
        stream: Resource<archive::OutputStream>,
        bytes: Vec<u8>,
    ) -> Result<(), Refused> {
        if bytes.len() > self.max_write as usize {
            return Err(Refused::Guest(ErrorCode::TooLarge));
        }
        let length = self.give(&bytes)?;
        self.job.ask_unit(&Call::Write {
            stream: stream.rep(),
            length,
        })
    }

    fn splice(
        &mut self,
        stream: Resource<archive::OutputStream>,
        _: Resource<volume::Snapshot>,
        range: types::Extent,
    ) -> Result<(), Refused> {
        self.job.ask_unit(&Call::Splice {
            stream: stream.rep(),
            range: range.into(),
        })
    }

    fn claim(
        &mut self,
        stream: Resource<archive::OutputStream>,
        _: Resource<volume::Snapshot>,
        range: types::Extent,
    ) -> Result<(), Refused> {
        self.job.ask_unit(&Call::Claim {
            stream: stream.rep(),
            range: range.into(),
        })
    }

    fn finish(&mut self, stream: Resource<archive::OutputStream>) -> Result<u64, Refused> {
        self.ask_size(&Call::Finish {
            stream: stream.rep(),
        })
    }

    fn drop(&mut self, stream: Resource<archive::OutputStream>) -> wasmtime::Result<()> {
        self.job
            .ask_unit(&Call::DropStream {
                stream: stream.rep(),
            })
            .map_err(Refused::into_trap)
    }
}
