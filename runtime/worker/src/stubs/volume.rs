//! `volume`: what there is of a disk, what of it is wanted, and giving it back early.

use super::{Host, Lost, Refused};
use crate::bindings::{types, volume};
use fleecebox_channel::{Answer, Call};
use fleecebox_contract::{BitmapMode, MAX_REGIONS};
use wasmtime::component::Resource;

impl volume::Host for Host {}

impl volume::HostSnapshot for Host {
    fn info(&mut self, _: Resource<volume::Snapshot>) -> wasmtime::Result<volume::VolumeInfo> {
        let volume = self.volume.as_ref().ok_or(Lost::WrongAnswer)?;
        Ok(volume::VolumeInfo {
            name: volume.name.clone(),
            size: volume.size,
            block_size: volume.block_size,
            mode: match volume.mode {
                BitmapMode::None => volume::BitmapMode::None,
                BitmapMode::New => volume::BitmapMode::New,
                BitmapMode::Reuse => volume::BitmapMode::Reuse,
            },
        })
    }

    fn drop(&mut self, _: Resource<volume::Snapshot>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl volume::HostDirtyRegions for Host {
    fn next(
        &mut self,
        _: Resource<volume::DirtyRegions>,
        limit: u32,
    ) -> Result<Vec<types::Region>, Refused> {
        let limit = limit.min(MAX_REGIONS);
        let Answer::Regions(regions) = self.job.ask(&Call::NextRegions { limit })? else {
            return Err(Lost::WrongAnswer.into());
        };
        if regions.len() > limit as usize {
            return Err(Lost::WrongAnswer.into());
        }
        let region = |(offset, length, zero)| types::Region {
            range: types::Extent { offset, length },
            kind: if zero {
                types::RegionKind::Zero
            } else {
                types::RegionKind::Data
            },
        };
        Ok(regions.into_iter().map(region).collect())
    }

    fn drop(&mut self, _: Resource<volume::DirtyRegions>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl volume::HostDiscarder for Host {
    fn discard(
        &mut self,
        _: Resource<volume::Discarder>,
        range: types::Extent,
    ) -> Result<(), Refused> {
        self.job.ask_unit(&Call::Discard(range.into()))
    }

    fn drop(&mut self, _: Resource<volume::Discarder>) -> wasmtime::Result<()> {
        Ok(())
    }
}
