//! Any sequence of calls by a sandbox that somebody has taken over, against one run on one volume.
//!
//! The sandbox process is this very program: it gets its calls in the order's `base` and makes them.
//!
//! What must hold: no panic and no hang; and where the run is said to have succeeded, the block table tells the digest
//! of every block as of the point in time, the frames that it names hold those bytes, and every byte that was read is
//! the disk's.

#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use fleecebox::archive::{BackupId, Digest, Entry};
use fleecebox::channel::{
    ARGUMENT, Answer, Call, Confinement, Order, Outcome, Payload, Run, Socket, take_over,
};
use fleecebox::config::Limits;
use fleecebox::contract::{
    BitmapMode, Context, Encoding, ErrorCode, GuestLimits, LogLevel, RawRange, VolumeInfo, World,
};
use fleecebox::contract::{MAX_READ, MAX_WRITE};
use fleecebox::event::Events;
use fleecebox::extent::Extent;
use fleecebox::grants::account::Account;
use fleecebox::grants::farewell::Farewells;
use fleecebox::grants::run::{Terms, run};
use fleecebox::grants::target::Target;
use fleecebox::sandbox::{Process, Program};
use fleecebox::volume::canary::Canary;
use fleecebox::volume::frozen::Frozen;
use fleecebox::volume::plan::Plan;
use fleecebox::volume::reader::Reader;
use fleecebox_fuzz::memory_disk::MemoryDisk;
use fleecebox_fuzz::runtime;
use fleecebox_fuzz::scratch::{BACKUP, Scratch};
use libfuzzer_sys::fuzz_target;
use serde::{Deserialize, Serialize};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

#[derive(Debug, Arbitrary)]
struct Case {
    block_size: BlockSize,
    blocks: u8,
    tail: u16,
    dirty: Option<Vec<(u8, u8)>>,
    zero: Vec<(u8, u8)>,
    blind: bool,
    reader: bool,
    discarder: bool,
    trim_finished: bool,
    read_blocks: Option<u8>,
    output_blocks: Option<u8>,
    requests: Option<u16>,
    steps: Vec<Step>,
    ending: Option<Ending>,
}

#[derive(Debug, Arbitrary, Clone, Copy)]
enum BlockSize {
    Small,
    Usual,
    Large,
}

#[derive(Debug, Arbitrary)]
enum Ending {
    GivesUp,
    Opened,
    Dies,
}

#[derive(Debug, Arbitrary)]
enum Step {
    NextRegions(u32),
    Discard(Range),
    Read {
        offset: u64,
        length: u32,
    },
    ReadBlocks(u8, u8),
    Put(Range, bool),
    Create {
        name: u8,
        zstd: bool,
    },
    CreateNamed(String),
    Write {
        stream: u8,
        length: u32,
    },
    Splice {
        stream: u8,
        range: Range,
    },
    Claim {
        stream: u8,
        range: Range,
    },
    Finish(u8),
    Drop(u8),
    Attachment,
    Log(String),
    DropUnknown,
    /// Covers everything that is still open, as an honest provider would.
    PutAll,
}

#[derive(Debug, Arbitrary)]
enum Range {
    Blocks(u8, u8),
    Bytes(u64, u64),
}

/// What the sandbox does, as it is handed over to it.
#[derive(Serialize, Deserialize)]
struct Script {
    calls: Vec<Call>,
    ending: Option<Call>,
}

/// One read as the sandbox saw it; its receipt lists them.
#[derive(Serialize, Deserialize)]
struct Seen {
    offset: u64,
    digest: [u8; 32],
    length: u32,
}

const MOST_BLOCKS: u64 = 80;

static SCRATCH: LazyLock<Scratch> = LazyLock::new(Scratch::new);

fuzz_target!(init: be_the_sandbox_if_asked_to(), |bytes: &[u8]| {
    let mut u = Unstructured::new(bytes);
    if let Ok(case) = Case::arbitrary(&mut u) {
        runtime::run_in_real_time(back_up(&case));
    }
});

/// The other side of the socket.
fn be_the_sandbox_if_asked_to() {
    if std::env::args().nth(1).as_deref() == Some(ARGUMENT) {
        // The job may end a sandbox at any moment, so an error here says nothing.
        let _ = sandbox();
        std::process::exit(0);
    }
}

fn sandbox() -> Option<()> {
    let stream = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().ok()?);
    let payload = Payload::adopt(take_over(&stream).ok()?.into_iter().next()?).ok()?;
    let mut socket = Socket::new(stream);
    let missing = Vec::new();
    socket.send(&Confinement { missing }).ok()?;
    let Order::Run(order) = socket.receive().ok()? else {
        return None;
    };
    let script: Script = postcard::from_bytes(&order.base?).ok()?;
    let mut seen = Vec::new();
    for call in script.calls {
        if let Call::Write { length, .. } = call {
            payload.give(&vec![0x77; length as usize]).ok()?;
        }
        socket.send(&call).ok()?;
        if let (Answer::Bytes { length }, Call::Read { offset, .. }) =
            (socket.receive().ok()?, call)
        {
            let bytes = payload.take(length.into()).ok()?;
            seen.push(Seen {
                offset,
                digest: *blake3::hash(&bytes).as_bytes(),
                length,
            });
        }
    }
    let receipt = || {
        Call::Done(Outcome::Receipt(
            postcard::to_stdvec(&seen).unwrap_or_default(),
        ))
    };
    socket.send(&script.ending.unwrap_or_else(receipt)).ok()
}

async fn back_up(case: &Case) {
    let block = case.block();
    let original = case.disk();
    let size = original.len() as u64;
    let socket = SCRATCH.folder.path().join("nbd");
    let _ = std::fs::remove_file(&socket);
    let requests = case.requests.map(u32::from);
    let server = MemoryDisk::new(original.clone(), requests);
    let _serving = server.serve(&socket).expect("a socket can be listened on");

    let frozen = Arc::new(Frozen {
        plan: case.plan(),
        reader: Reader::connect(&socket, "disk", 1, None)
            .await
            .expect("the server is honest"),
    });
    let id: BackupId = BACKUP.parse().expect("it is an id");
    let writer = Arc::new(
        SCRATCH
            .namespace
            .begin(id)
            .expect("there is no such backup"),
    );
    let table = writer
        .block_table(size, block, None)
        .expect("the block size is a good one");
    let (events, _heard) = Events::channel();
    let target = Arc::new(Target::new(
        "disk".into(),
        Arc::clone(&frozen),
        Canary::choose(&frozen.plan),
        Arc::clone(&writer),
        id,
        table,
        Arc::new(Semaphore::new(2)),
        case.trim_finished,
        events,
    ));
    let null = std::fs::File::open("/dev/null").expect("there is a null device");
    let process = Process::start(&Program::at("/proc/self/exe"), &case.order(size), &null)
        .await
        .expect("a process can be started");
    let cancel = CancellationToken::new();
    let receipt = run(process, Arc::clone(&target), case.terms(), &cancel).await;
    assert!(target.tasks.is_empty(), "a task outlives its run");
    let target = Arc::try_unwrap(target)
        .ok()
        .expect("the run is over, so nobody else holds it");
    let (_, table, books) = target.into_parts();

    if let Ok(receipt) = receipt {
        assert!(books.uncovered(&frozen.plan).is_empty());
        let root = table.finish().expect("the archive can be written to");
        writer.durable().expect("the archive can be written to");
        let table = writer.table(root);
        for (index, bytes) in (0u64..).zip(original.chunks(block as usize)) {
            let extent = Extent::new(index * u64::from(block), bytes.len() as u64)
                .expect("a block is not empty");
            let data = frozen.plan.dirty().contains(extent) && !frozen.plan.zero().contains(extent);
            let entry = table.get(index).expect("it was just written");
            match entry {
                Entry::Zero => assert!(!data, "block {index} is lost"),
                Entry::Placed {
                    digest,
                    frame,
                    skip,
                } => {
                    assert!(
                        data && digest == Digest::of(bytes),
                        "block {index} is wrong"
                    );
                    assert!(!books.claimed().overlaps(extent));
                    let stored = SCRATCH.namespace.read_frame(&frame).expect("it is there");
                    let from = skip as usize;
                    assert_eq!(&stored[from..from + bytes.len()], bytes, "block {index}");
                }
                Entry::Claimed { digest, backup } => {
                    assert!(
                        data && digest == Digest::of(bytes),
                        "block {index} is wrong"
                    );
                    assert!(backup == id && books.claimed().contains(extent) && !case.blind);
                }
            }
        }
        let seen: Vec<Seen> = postcard::from_bytes(&receipt).expect("the sandbox wrote it");
        assert!(seen.is_empty() || (case.reader && !case.blind));
        for read in seen {
            let from = read.offset as usize;
            let bytes = &original[from..from + read.length as usize];
            assert_eq!(
                read.digest,
                *blake3::hash(bytes).as_bytes(),
                "read at {from}"
            );
        }
    }
    clear(writer);
}

/// Removes the backup and its packs, so that every execution begins with an empty archive.
fn clear(writer: Arc<fleecebox::archive::BackupWriter>) {
    let writer = Arc::try_unwrap(writer).ok().expect("nobody else writes");
    writer
        .abandon()
        .expect("an uncommitted backup can be removed");
    for entry in std::fs::read_dir(SCRATCH.path("packs")).expect("there is such a folder") {
        let _ = std::fs::remove_file(entry.expect("the folder can be read").path());
    }
}

impl Case {
    fn block(&self) -> u32 {
        match self.block_size {
            BlockSize::Small => 4 << 10,
            BlockSize::Usual => 64 << 10,
            BlockSize::Large => 1 << 20,
        }
    }

    fn size(&self) -> u64 {
        let most = match self.block_size {
            BlockSize::Small | BlockSize::Usual => MOST_BLOCKS,
            BlockSize::Large => 6,
        };
        let whole = u64::from(self.blocks) % most * u64::from(self.block());
        whole + u64::from(self.tail) % u64::from(self.block()) / 512 * 512 + 512
    }

    fn ranges(&self, ranges: &[(u8, u8)]) -> Vec<Extent> {
        let block = u64::from(self.block());
        ranges
            .iter()
            .filter_map(|&(first, count)| {
                Extent::new(u64::from(first) * block, u64::from(count) * block).ok()
            })
            .collect()
    }

    fn plan(&self) -> Plan {
        let all = Extent::new(0, self.size()).expect("the disk is not empty");
        let dirty = self
            .dirty
            .as_ref()
            .map_or_else(|| vec![all], |dirty| self.ranges(dirty));
        Plan::new(self.size(), self.block(), dirty, self.ranges(&self.zero))
    }

    /// Some blocks are equal, so that there are chunks to be found again.
    fn disk(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size() as usize];
        for (index, block) in bytes.chunks_mut(self.block() as usize).enumerate() {
            block.fill((index % 5) as u8 + 1);
            block[0] = (index % 11) as u8 + 1;
        }
        for zero in self.plan().zero().iter() {
            bytes[zero.start() as usize..zero.end() as usize].fill(0);
        }
        bytes
    }

    fn terms(&self) -> Terms {
        let bytes = |blocks: u8| u64::from(blocks) * u64::from(self.block());
        let mut limits = Limits::default();
        limits.read_bytes = self.read_blocks.map_or(limits.read_bytes, bytes);
        limits.output_bytes = self.output_blocks.map_or(limits.output_bytes, bytes);
        Terms {
            world: if self.blind {
                World::BlindProvider
            } else {
                World::Provider
            },
            reader: self.reader,
            discarder: self.discarder,
            own_names: None,
            account: Arc::new(Account::new(limits)),
            attachments: Arc::new([("a".to_owned(), vec![1, 2, 3])].into()),
            farewells: Farewells::default(),
        }
    }

    /// Grants everything, so that calls which this job's terms forbid get as far as the terms.
    fn order(&self, size: u64) -> Order {
        let calls = self
            .steps
            .iter()
            .flat_map(|step| self.calls(step))
            .take(400)
            .collect();
        let ending = self.ending.as_ref().map(|ending| {
            Call::Done(match ending {
                Ending::GivesUp => Outcome::GuestError(ErrorCode::Io),
                Ending::Opened => Outcome::Opened,
                Ending::Dies => Outcome::Bytes { length: u32::MAX },
            })
        });
        let script = Script { calls, ending };
        Order::Run(Run {
            world: World::Provider,
            wasi: Default::default(),
            limits: GuestLimits {
                memory: 1,
                cpu_ms: 1,
            },
            context: Context {
                id: "job".into(),
                settings: String::new(),
            },
            volume: VolumeInfo {
                name: "disk".into(),
                size,
                block_size: self.block(),
                mode: BitmapMode::New,
            },
            reader: true,
            discarder: true,
            base: Some(postcard::to_stdvec(&script).expect("a script can be written")),
            max_read: MAX_READ,
            max_write: MAX_WRITE,
        })
    }

    fn calls(&self, step: &Step) -> Vec<Call> {
        let encoding = |zstd: bool| {
            if zstd {
                Encoding::Zstd
            } else {
                Encoding::Identity
            }
        };
        let block = u64::from(self.block());
        vec![match step {
            Step::NextRegions(limit) => Call::NextRegions {
                limit: limit % 4097,
            },
            Step::Discard(range) => Call::Discard(self.range(range)),
            Step::Read { offset, length } => Call::Read {
                offset: offset % (self.size() + 10),
                length: length % (MAX_READ + 1),
            },
            Step::ReadBlocks(first, count) => {
                let range = self.range(&Range::Blocks(*first, *count));
                Call::Read {
                    offset: range.offset,
                    length: range.length.min(MAX_READ.into()) as u32,
                }
            }
            Step::Put(range, zstd) => Call::Put(self.range(range), encoding(*zstd)),
            Step::Create { name, zstd } => Call::Create {
                name: format!("object-{}", name % 4),
                encoding: encoding(*zstd),
            },
            Step::CreateNamed(name) => Call::Create {
                name: name.chars().take(60).collect(),
                encoding: Encoding::Zstd,
            },
            Step::Write { stream, length } => Call::Write {
                stream: (*stream % 4).into(),
                length: length % (MAX_WRITE / 2),
            },
            Step::Splice { stream, range } => Call::Splice {
                stream: (*stream % 4).into(),
                range: self.range(range),
            },
            Step::Claim { stream, range } => Call::Claim {
                stream: (*stream % 4).into(),
                range: self.range(range),
            },
            Step::Finish(stream) => Call::Finish {
                stream: (*stream % 4).into(),
            },
            Step::Drop(stream) => Call::DropStream {
                stream: (*stream % 4).into(),
            },
            Step::Attachment => Call::Attachment { name: "a".into() },
            Step::Log(message) => Call::Log {
                level: LogLevel::Info,
                message: message.chars().take(1000).collect(),
            },
            Step::DropUnknown => Call::DropStream { stream: u32::MAX },
            Step::PutAll => {
                return (0..self.size().div_ceil(block))
                    .map(|index| {
                        let offset = index * block;
                        let length = block.min(self.size() - offset);
                        Call::Put(RawRange { offset, length }, Encoding::Zstd)
                    })
                    .collect();
            }
        }]
    }

    /// In whole blocks that are mostly inside the disk, or anything at all.
    fn range(&self, range: &Range) -> RawRange {
        match *range {
            Range::Bytes(offset, length) => RawRange { offset, length },
            Range::Blocks(first, count) => {
                let block = u64::from(self.block());
                let offset = u64::from(first) % (self.size().div_ceil(block) + 1) * block;
                let wanted = (u64::from(count) % 24 + 1) * block;
                let left = self.size().saturating_sub(offset);
                RawRange {
                    offset,
                    length: if count < 250 {
                        wanted.min(left)
                    } else {
                        wanted
                    },
                }
            }
        }
    }
}
