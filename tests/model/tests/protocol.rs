//! The protocol holds, and each planted bug is found.

use fleecebox_model::{
    Bounds, Bug, INCREMENTALS, NOTHING_LEFT, ONE_RECORDS, Protocol, RESTORES, TRACKED,
};
use stateright::{Checker, HasDiscoveries, Model};
use std::time::Instant;

/// Two archives, for what one could do to the other.
const TWO_ARCHIVES: Bounds = Bounds {
    archives: 2,
    runs: 3,
    writes: 2,
    faults: 2,
    full: false,
    images: 0,
};

/// Many runs on one archive, for chains of incrementals.
const LONG_CHAIN: Bounds = Bounds {
    archives: 1,
    runs: 4,
    writes: 2,
    faults: 2,
    full: false,
    images: 0,
};

/// Much that goes wrong.
const MANY_FAULTS: Bounds = Bounds {
    archives: 1,
    runs: 3,
    writes: 1,
    faults: 4,
    full: false,
    images: 0,
};

/// With `--full` among the runs.
const FULL_RUNS: Bounds = Bounds {
    archives: 1,
    runs: 3,
    writes: 2,
    faults: 2,
    full: true,
    images: 0,
};

/// Little of everything: enough for most planted bugs.
const FEW: Bounds = Bounds {
    archives: 1,
    runs: 3,
    writes: 1,
    faults: 2,
    full: false,
    images: 0,
};

/// Runs for two archives in turn, each dying half-way.
const TAKING_TURNS: Bounds = Bounds {
    archives: 2,
    runs: 5,
    writes: 1,
    faults: 2,
    full: false,
    images: 0,
};

/// Images that come and go between runs that die.
const IMAGES: Bounds = Bounds {
    archives: 1,
    runs: 3,
    writes: 2,
    faults: 1,
    full: false,
    images: 2,
};

/// Explores all of it, tells how much that was, and how each property that was discovered came about.
fn explore(bounds: Bounds, bug: Option<Bug>, until: HasDiscoveries) -> Vec<&'static str> {
    let start = Instant::now();
    let checker = Protocol { bounds, bug }.checker().finish_when(until);
    let checker = checker.spawn_bfs().join();
    println!(
        "{bounds:?}, {bug:?}: {} states, of them {} different, up to {} events deep, in {:.1?}",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        start.elapsed()
    );
    let discoveries = checker.discoveries();
    for (property, path) in &discoveries {
        println!("\n{property}:");
        let steps = path.clone().into_vec();
        for (step, (world, event)) in steps.iter().enumerate() {
            println!("{step:3}   {world}");
            if let Some(event) = event {
                println!("{:>3} > {}", "", world.tell(event));
            }
        }
    }
    discoveries.into_keys().collect()
}

fn holds(bounds: Bounds) -> Vec<&'static str> {
    explore(bounds, None, HasDiscoveries::AnyFailures)
}

#[test]
fn two_archives_on_one_disk_never_harm_each_other() {
    let found = holds(TWO_ARCHIVES);
    assert!(
        found.iter().all(|&found| found == INCREMENTALS),
        "{found:?}"
    );
}

#[test]
fn a_chain_of_incrementals_restores_whatever_failed_in_between() {
    assert_eq!(holds(LONG_CHAIN), [INCREMENTALS]);
}

#[test]
fn no_combination_of_faults_loses_a_write() {
    let found = holds(MANY_FAULTS);
    assert!(
        found.iter().all(|&found| found == INCREMENTALS),
        "{found:?}"
    );
}

#[test]
fn a_full_backup_between_incrementals_costs_them_nothing() {
    let found = holds(FULL_RUNS);
    assert!(
        found.iter().all(|&found| found == INCREMENTALS),
        "{found:?}"
    );
}

#[test]
fn overlays_and_templates_that_come_and_go_lose_no_write() {
    let found = holds(IMAGES);
    assert!(
        found.iter().all(|&found| found == INCREMENTALS),
        "{found:?}"
    );
}

/// Whether `bug` breaks `property`, within bounds in which the protocol holds.
fn found(bug: Bug, property: &'static str, bounds: Bounds) {
    let broken = explore(bounds, Some(bug), HasDiscoveries::AllOf([property].into()));
    assert!(
        broken.contains(&property),
        "{bug:?} was not found: {broken:?}"
    );
}

#[test]
fn a_bitmap_removed_before_the_commit_is_found() {
    found(Bug::OldRemovedBeforeCommit, TRACKED, FEW);
}

#[test]
fn disabling_before_adding_is_found() {
    found(Bug::DisabledBeforeAdded, RESTORES, FEW);
}

#[test]
fn bitmaps_switched_before_the_drain_are_found() {
    found(Bug::BitmapsBeforeBackup, RESTORES, FEW);
}

#[test]
fn the_latest_backup_taken_for_the_base_is_found() {
    found(Bug::LatestBackupAsBase, RESTORES, FEW);
}

#[test]
fn another_archives_bitmap_taken_for_ones_own_is_found() {
    found(Bug::AnotherArchivesBitmap, RESTORES, TWO_ARCHIVES);
}

#[test]
fn an_old_bitmap_removed_in_mode_news_transaction_is_found() {
    found(Bug::OldRemovedInNewsTransaction, TRACKED, FULL_RUNS);
}

#[test]
fn merging_any_bitmap_that_stopped_is_found() {
    found(Bug::AnyStoppedBitmapMerged, RESTORES, TAKING_TURNS);
}

#[test]
fn merging_before_enabling_is_found() {
    found(Bug::MergedBeforeEnabled, RESTORES, FEW);
}

#[test]
fn enabling_last_is_found() {
    found(Bug::EnabledLast, RESTORES, FEW);
}

#[test]
fn forgetting_to_merge_is_found() {
    found(Bug::NothingMerged, RESTORES, FEW);
}

#[test]
fn an_unknown_commit_taken_for_done_is_found() {
    found(Bug::UnknownTakenForCommitted, TRACKED, FEW);
}

#[test]
fn building_on_a_manifest_that_is_not_durable_is_found() {
    found(Bug::UnsyncedManifestBelieved, RESTORES, FEW);
}

#[test]
fn a_bitmap_of_a_full_backup_that_died_is_found() {
    found(Bug::UncommittedNewLeft, ONE_RECORDS, FEW);
}

#[test]
fn removing_the_base_under_a_job_is_found() {
    found(Bug::BaseRemovedUnderJob, RESTORES, FEW);
}

#[test]
fn a_bitmap_that_stays_after_success_is_found() {
    found(Bug::OldKeptAfterCommit, NOTHING_LEFT, FEW);
}

#[test]
fn reading_only_the_overlays_bitmap_is_found() {
    found(Bug::OverlaysBitmapAlone, RESTORES, IMAGES);
}

#[test]
fn believing_a_bitmap_of_other_images_is_found() {
    found(Bug::ImagesNotCompared, RESTORES, IMAGES);
}
