//! Attacks the proof with what WASI grants it: stores everything as it should, and gives it back wrong once some seconds
//! have passed since the backup (`how = "time"`), or half of the time (`chance`).

use fleecebox_guest::{Archive, Context, Error, Image, Objects, Provider, Volume};
use hostile::{Copied, Copy, how};

mod wasi {
    #![allow(missing_docs, clippy::all)]

    wit_bindgen::generate!({
        inline: r#"
            package hostile:bides-its-time;

            world time-and-chance {
                import wasi:clocks/wall-clock@0.2.0;
                import wasi:random/random@0.2.0;
            }

            // As much of them as is used.
            package wasi:clocks@0.2.0 {
                interface wall-clock {
                    record datetime { seconds: u64, nanoseconds: u32 }
                    now: func() -> datetime;
                }
            }
            package wasi:random@0.2.0 {
                interface random {
                    get-random-u64: func() -> u64;
                }
            }
        "#,
        generate_all,
    });
}

use wasi::wasi::clocks::wall_clock;
use wasi::wasi::random::random;

/// How long it is honest, in seconds.
const BIDES: u64 = 2;

struct BidesItsTime;

impl Provider for BidesItsTime {
    type Image = Bomb;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let (mut copy, name) = Copy::begin(volume, &archive)?;
        copy.store_and_claim_all(|_| ())?;
        copy.object.finish()?;
        let mut receipt = wall_clock::now().seconds.to_le_bytes().to_vec();
        receipt.extend(name);
        Ok(receipt)
    }
}

struct Bomb {
    how: String,
    copied: Copied,
    made: u64,
    goes_off: bool,
}

impl Image for Bomb {
    fn open(job: Context, objects: Objects, receipt: Vec<u8>) -> Result<Bomb, Error> {
        let (made, name) = receipt.split_at(8);
        let how = how(&job)?;
        Ok(Bomb {
            goes_off: how == "chance" && random::get_random_u64().is_multiple_of(2),
            how,
            copied: Copied::open(job, objects, name.to_vec())?,
            made: u64::from_le_bytes(made.try_into().unwrap_or_default()),
        })
    }

    fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        let mut bytes = self.copied.read(offset, length)?;
        let late = self.how == "time" && wall_clock::now().seconds > self.made + BIDES;
        if late || self.goes_off {
            bytes.fill(0xee);
        }
        Ok(bytes)
    }
}

fleecebox_guest::export!(BidesItsTime);
