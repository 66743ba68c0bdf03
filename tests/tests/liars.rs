//! Providers that lie or fail: no backup appears, and the next honest one carries every change.
//!
//! A liar has a good base to build on, in the same namespace, so that its failure could spoil the tracking.

use anyhow::{Result, ensure};
use fleecebox_tests::{
    Disk, Load, MIB, Order, Outcome, Proxy, QemuState, Random, Site, StorageDaemon, Writer,
    component, files_below,
};

/// One test for each: its name, the component, and what the product says about it.
macro_rules! liars {
    ($($sentence:ident: $component:literal, $says:literal;)*) => {
        $(
            #[test]
            fn $sentence() -> Result<()> {
                changes_nothing($component, $says)
            }
        )*
    };
}

liars! {
    a_skipped_block_is_found: "skips-a-block", "in no finished object";
    a_skipped_range_is_found: "skips-a-range", "in no finished object";
    a_claim_in_an_unfinished_object_is_none: "unfinished-streams", "in no finished object";
    a_trap_half_way_leaves_nothing: "traps-half-way", "trapped";
    reading_everything_is_no_backup: "reads-and-writes-nothing", "in no finished object";
    a_claim_without_bytes_is_refuted: "claims-without-bytes", "the bytes were here a moment ago";
    a_claim_of_garbage_is_refuted: "stores-garbage", "gives back other bytes than the disk held";
    a_lie_in_restore_is_found_before_the_commit: "lies-in-restore", "gives back other bytes than the disk held";
    endless_work_is_cut_off: "spins", "CPU";
    memory_has_an_end: "grows-memory", "memory";
}

fn changes_nothing(liar: &str, says: &str) -> Result<()> {
    let site = site_with(liar)?;
    let daemon = disks()?;
    let proxy = Proxy::start(daemon.monitors())?;
    let honest = Order {
        provider: "honest".into(),
        ..site.order(&daemon, "chunked")?.through(&proxy)
    };
    let dishonest = Order {
        provider: "liar".into(),
        ..honest.clone()
    };

    // Without a base it reads everything.
    let before = QemuState::read(daemon.monitors())?;
    refuse(&site, &dishonest, says)?;
    proxy.references()?;
    QemuState::read(daemon.monitors())?.assert_restored(&before, |_| false);
    ensure!(site.list(&honest.archive)?.is_empty());

    let base = site.backup(&honest)?;
    proxy.references()?;
    change(&daemon, 1)?;
    let before = QemuState::read(daemon.monitors())?;
    let files = files_below(&honest.archive)?;
    // The guest goes on writing while the liar runs, and its failure must not lose that either.
    let writer = Writer::start(
        daemon.writer_access("db")?,
        Load {
            seed: 7,
            rate: 50,
            regions: Some(std::iter::once(0..2 * MIB).collect()),
        },
    )?;
    refuse(&site, &dishonest, says)?;
    writer.wait_for(10)?;
    writer.stop()?;
    proxy.references()?;
    QemuState::read(daemon.monitors())?.assert_restored(&before, |_| false);
    assert_eq!(site.list(&honest.archive)?, [base.id.as_str()]);
    let visible = files_below(&honest.archive)?;
    assert_eq!(visible, files, "the archive is not as it was");

    change(&daemon, 2)?;
    let next = site.backup(&honest)?;
    for disk in ["da", "db"] {
        next.assert_base(disk, Some(&base));
    }
    site.check(&honest, &next, &proxy.references()?)
}

/// Runs a backup that must fail by itself, with a message that names the provider's volume and deed.
fn refuse(site: &Site, order: &Order, says: &str) -> Result<Outcome> {
    let outcome = site.backup_command(order).run()?;
    let told = &outcome.stderr;
    ensure!(outcome.code() == Some(1), "{:?}: {told}", outcome.code());
    let last = told.lines().last().unwrap_or_default();
    // Once: not again as its own cause.
    ensure!(last.matches(says).count() == 1, "{told}");
    let names_volume = last.contains("volume da") || last.contains("volume db");
    ensure!(names_volume && last.contains(says), "{says:?}: {told}");
    ensure!(
        outcome.document()?["exit_status"] == 1,
        "{}",
        outcome.stdout
    );
    site.check_no_fleecing_images()?;
    Ok(outcome)
}

fn site_with(liar: &str) -> Result<Site> {
    let site = Site::new()?;
    let honest = component("chunked")?;
    let liar = component(liar)?;
    site.configure(&format!(
        "[provider.honest]\ncomponent = '{}'\nnamespace = 'tenant'\n\
         [provider.liar]\ncomponent = '{}'\nnamespace = 'tenant'\n\
         [provider.liar.limits]\ncpu-seconds = 1\nmemory = {}\n",
        honest.display(),
        liar.display(),
        64 * MIB,
    ))?;
    Ok(site)
}

/// Two disks with some data in several places and much that is zero.
fn disks() -> Result<StorageDaemon> {
    let size = 16 * MIB;
    let disks = [Disk::raw("da", size), Disk::qcow2("db", size + 512)];
    let daemon = StorageDaemon::start_with_writer_exports(&disks)?;
    change(&daemon, 0)?;
    Ok(daemon)
}

fn change(daemon: &StorageDaemon, seed: u64) -> Result<()> {
    let mut random = Random::new(seed);
    for disk in ["da", "db"] {
        let mut access = daemon.writer_access(disk)?;
        for _ in 0..12 {
            let mut bytes = vec![0; 100 << 10];
            random.fill(&mut bytes);
            access.write(random.below(15 * MIB), &bytes)?;
        }
        access.flush()?;
    }
    Ok(())
}
