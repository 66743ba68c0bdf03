//! Attacks blindness across the volumes of one job: two instances that could see what the other does would be each other's
//! clock. Takes a name that the other one takes as well, then stores until its quota is used up, and says what it met.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};

struct MeetsItsNeighbour;

impl BlindProvider for MeetsItsNeighbour {
    fn run(
        job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let block_size: u64 = volume.snapshot.info().block_size.into();
        let meeting = archive.create("meeting", Encoding::Identity);
        let mut stored = 0;
        for run in volume.dirty.data_runs() {
            for piece in run?.pieces(block_size) {
                if let Err(error) = archive.put(&volume.snapshot, piece, Encoding::Zstd) {
                    let met = matches!(meeting, Err(Error::Exists));
                    job.info(format_args!(
                        "somebody was there: {met}; blocks stored: {stored}"
                    ));
                    return Err(error);
                }
                stored += 1;
            }
        }
        Err(Error::other("the quota is larger than the disk"))
    }
}

fleecebox_guest::export_blind!(MeetsItsNeighbour);
