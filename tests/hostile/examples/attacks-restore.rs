//! Attacks whoever asks for the backup again: everything is stored honestly, but `image` spins, traps, gives back too
//! little, too much, or more than anybody asked for, as `how` says.

use fleecebox_guest::{Archive, Context, Error, Image, Objects, Provider, Volume};
use hostile::{Copied, Copy};

struct AttacksRestore;

impl Provider for AttacksRestore {
    type Image = Attacks;

    fn run(
        _job: Context,
        volume: Volume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let (mut copy, receipt) = Copy::begin(volume, &archive)?;
        copy.store_and_claim_all(|_| ())?;
        copy.object.finish()?;
        Ok(receipt)
    }
}

struct Attacks {
    how: String,
    objects: Objects,
    copied: Copied,
}

fn spin() -> ! {
    loop {
        std::hint::spin_loop();
    }
}

impl Image for Attacks {
    fn open(job: Context, objects: Objects, receipt: Vec<u8>) -> Result<Attacks, Error> {
        let how = hostile::how(&job)?;
        match &*how {
            "spins-in-open" => spin(),
            "refuses-to-open" => return Err(Error::other("nobody\n\u{1b}[31mis at home")),
            _ => {}
        }
        let copied = Copied::open(job, objects.clone(), receipt)?;
        Ok(Attacks {
            how,
            objects,
            copied,
        })
    }

    fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Error> {
        let mut bytes = self.copied.read(offset, length)?;
        match &*self.how {
            "spins" => spin(),
            "traps" => panic!("no bytes today"),
            "too-few" => drop(bytes.pop()),
            "too-many" => bytes.push(0),
            "far-too-many" => bytes.resize(8 << 20, 0),
            "endless" => bytes.resize(40 << 20, 0),
            "nothing" => bytes.clear(),
            // Each question takes the host some microseconds, and the provider next to nothing.
            "takes-its-time" => (0..100_000).for_each(|_| drop(self.objects.open("nothing"))),
            "grows" => loop {
                bytes.extend_from_within(..);
            },
            _ => return Err(Error::other("unknown kind of attack")),
        }
        Ok(bytes)
    }
}

fleecebox_guest::export!(AttacksRestore);
