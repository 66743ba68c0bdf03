//! The causal order of writes to two disks, each on an iothread of its own: a guest writes a number to the first disk, and
//! when that is done, to the second. No point in time may show the second disk ahead of the first.
//!
//! The transaction is the product's own, caught on its way to QEMU and given again and again; `FLEECEBOX_ROUNDS` says how
//! often. Given in pieces, one command after the other, it is shown to break the order, so that the test can see it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Disk, Guest, MIB, NbdClient, Proxy, Qmp, Site};
use serde_json::{Value, json};

const SIZE: u64 = 4 * MIB;
const LIMIT: Duration = Duration::from_secs(30);
const ROUNDS: u32 = 100;
/// Enough for the wrong way to be caught: it takes a round or two on a fast machine, and with each round the pieces lie
/// further apart, so that a slow guest writes between them as well.
const WRONG_ROUNDS: u32 = 40;
const FURTHER_APART: Duration = Duration::from_millis(10);

/// Names of a round, each by the disk's number.
fn name(what: &str, disk: usize) -> String {
    format!("{what}-{disk}")
}

/// The product's actions with names of this test's own, and without the bitmaps of a VM's backups.
fn renamed(actions: &Value, nodes: &[String; 2]) -> Result<Vec<Value>> {
    let mut renamed = actions.as_array().context("no actions")?.clone();
    for action in &mut renamed {
        let data = action["data"].as_object_mut().context("no data")?;
        let node = data.get("device").or_else(|| data.get("node"));
        let disk = nodes.iter().position(|name| node == Some(&json!(name)));
        let disk = disk.context("an action on another node")?;
        for (field, what) in [
            ("job-id", "job"),
            ("target", "fleecing"),
            ("filter-node-name", "filter"),
            ("name", "bitmap"),
        ] {
            if let Some(value) = data.get_mut(field) {
                *value = json!(name(what, disk));
            }
        }
    }
    Ok(renamed)
}

/// How the moment is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    AtOnce,
    InPieces { apart: Duration },
}

struct Rounds {
    qmp: Qmp,
    actions: Vec<Value>,
    socket: std::path::PathBuf,
}

impl Rounds {
    fn begin(guest: &Guest, actions: Vec<Value>) -> Result<Self> {
        let socket = guest.folder().join("rounds.sock");
        let mut qmp = guest.control()?;
        for disk in 0..2 {
            let path = guest.folder().join(name("fleecing", disk));
            std::fs::File::create(&path)?.set_len(SIZE)?;
            let node = json!({"driver": "raw", "node-name": name("fleecing", disk),
                "file": {"driver": "file", "filename": path}});
            qmp.execute("blockdev-add", node)?;
        }
        let address = json!({"type": "unix", "data": {"path": socket}});
        qmp.execute("nbd-server-start", json!({"addr": address}))?;
        Ok(Self {
            qmp,
            actions,
            socket,
        })
    }

    /// The numbers on both disks at one point in time.
    fn numbers(&mut self, taken: Taken) -> Result<[u64; 2]> {
        let qmp = &mut self.qmp;
        match taken {
            Taken::AtOnce => {
                qmp.execute("transaction", json!({"actions": self.actions}))?;
            }
            Taken::InPieces { apart } => {
                for action in &self.actions {
                    qmp.execute("transaction", json!({"actions": [action]}))?;
                    std::thread::sleep(apart);
                }
            }
        }
        let mut numbers = [0; 2];
        for (disk, number) in numbers.iter_mut().enumerate() {
            let access = json!({"driver": "snapshot-access", "node-name": name("access", disk),
                "file": name("filter", disk)});
            qmp.execute("blockdev-add", access)?;
            let export = json!({"type": "nbd", "id": name("export", disk),
                "node-name": name("access", disk), "name": name("export", disk)});
            qmp.execute("block-export-add", export)?;
            let mut sector = [0; 512];
            NbdClient::connect(&self.socket, &name("export", disk))?.read(0, &mut sector)?;
            let (first, _) = sector.split_at(8);
            *number = u64::from_le_bytes(first.try_into()?);
        }
        for disk in 0..2 {
            let id = name("export", disk);
            qmp.execute("block-export-del", json!({"id": id, "mode": "hard"}))?;
            qmp.event("BLOCK_EXPORT_DELETED", LIMIT, |event| {
                event["data"]["id"] == id
            })?;
            qmp.execute("blockdev-del", json!({"node-name": name("access", disk)}))?;
            let job = name("job", disk);
            qmp.execute("block-job-cancel", json!({"device": job}))?;
            qmp.event("BLOCK_JOB_CANCELLED", LIMIT, |event| {
                event["data"]["device"] == job
            })?;
            qmp.execute("job-dismiss", json!({"id": job}))?;
        }
        for action in &self.actions {
            if action["type"] == "block-dirty-bitmap-add" {
                let data = &action["data"];
                let bitmap = json!({"node": data["node"], "name": data["name"]});
                qmp.execute("block-dirty-bitmap-remove", bitmap)?;
            }
        }
        Ok(numbers)
    }
}

/// What the product gives QEMU for its point in time, and what it then restores.
fn products_actions(guest: &Guest, site: &Site) -> Result<Value> {
    let proxy = Proxy::start(guest.monitors())?;
    let order = site.order_for(proxy.socket(), "chunked")?;
    let backup = site.backup(&order)?;
    proxy.references()?;
    let restored = site.restore(&site.archive(), &backup.id)?;
    let number = |name: &str| first_number(&restored.join(name));
    let (first, second) = (number("device-a.raw")?, number("device-b.raw")?);
    ensure!(first >= second && first <= second + 1, "{first}, {second}");
    let actions = proxy.transactions().into_iter().next();
    actions.context("the product gave no transaction")
}

fn first_number(image: &Path) -> Result<u64> {
    let bytes = std::fs::read(image)?;
    let bytes = bytes.get(..8).context("a short image")?;
    Ok(u64::from_le_bytes(bytes.try_into()?))
}

#[test]
fn no_point_in_time_shows_the_second_disk_ahead_of_the_first() -> Result<()> {
    let disks = [Disk::raw("disk-a", SIZE), Disk::qcow2("disk-b", SIZE)];
    let guest = Guest::boot_counting(&disks)?;
    let site = Site::new()?;
    let nodes = guest.disks().each_ref().map(|disk| disk.node.clone());
    let actions = renamed(&products_actions(&guest, &site)?, &nodes)?;
    let mut rounds = Rounds::begin(&guest, actions)?;

    let wanted = match std::env::var("FLEECEBOX_ROUNDS") {
        Ok(rounds) => rounds.parse().context("FLEECEBOX_ROUNDS")?,
        Err(_) => ROUNDS,
    };
    let mut last = 0;
    let mut between = 0;
    for round in 0..wanted {
        let [first, second] = rounds.numbers(Taken::AtOnce)?;
        ensure!(
            second <= first && first <= second + 1,
            "round {round}: the first disk shows {first}, the second {second}"
        );
        ensure!(first >= last, "round {round}: {last} became {first}");
        last = first;
        between += u32::from(first == second + 1);
    }
    println!(
        "{wanted} points in time in order, {between} of them between two writes; {last} written"
    );
    ensure!(last > u64::from(wanted), "the guest wrote too little");
    ensure!(between > 0, "no point in time fell between two writes");

    let caught = (0..WRONG_ROUNDS).find_map(|round| {
        let apart = FURTHER_APART * round;
        match rounds.numbers(Taken::InPieces { apart }) {
            Ok([first, second]) if second > first => Some(Ok((round, second - first))),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        }
    });
    let (round, ahead) = caught
        .transpose()?
        .context("even command by command the order held: this test sees nothing")?;
    println!("command by command, round {round} shows the second disk ahead by {ahead}");
    Ok(())
}
