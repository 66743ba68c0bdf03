//! Which of a VM's disks a job takes, and by whose word others are left out.
//!
//! What is left out by nobody's word makes a backup incomplete: a disk that no rule grants, and one that cannot be backed
//! up. Who names the disks that are wanted, or those that are not, has said so.

use super::extra::{self, Extra};
use super::point_in_time::PointError;
use crate::archive::LeftOut;
use crate::config::Vm;
use crate::event::Events;
use crate::policy::Decision;
use crate::qemu::machine::{self, Other, beside_words};
use crate::qemu::{self, Form, Monitor, Schema, image, needs};

/// What was decided before QEMU is asked for its disks; those that are asked for are the VM's `disks`.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// The policy, where there is one to hold against.
    pub decision: Option<Decision>,
    /// Whether the disks that are asked for are simply those of the rule: nobody named them otherwise.
    pub by_rule: bool,
    /// Further volumes that the rule does not grant.
    pub extra_not_granted: Vec<String>,
}

/// The disks of a VM, as they were selected.
#[derive(Debug)]
pub struct Selected {
    /// Those to take.
    pub disks: Vec<qemu::Disk>,
    /// Drives that need not be backed up.
    pub skipped: Vec<machine::Skipped>,
    /// The VM's other disks.
    pub left_out: Vec<LeftOut>,
    /// What this QEMU can do.
    pub schema: Schema,
}

/// Finds the disks, holds them against the policy, and tells what is left out.
pub async fn select(
    vm: &Vm,
    selection: &Selection,
    extra: &[Extra],
    monitor: &Monitor,
    events: &Events,
) -> Result<Selected, PointError> {
    let choice = match &vm.disks[..] {
        [] => machine::Choice::AllBut(vm.exclude.clone()),
        names => machine::Choice::NamedBut(names.to_vec(), vm.exclude.clone()),
    };
    let mut found = machine::disks(monitor, &choice).await?;
    if let Some(decision) = &selection.decision {
        for disk in &found.disks {
            let names = found.names.get(&disk.node).map_or(&[][..], Vec::as_slice);
            decision.hold(&disk.name, names)?;
        }
    }
    if vm.point_in_time.unwrap_or_default() == Form::Job {
        machine::below_limits(monitor, &mut found.disks).await?;
    }
    extra::add_nodes(monitor, extra, &mut found).await?;
    let schema = needs::check(monitor, &found.disks).await?;
    image::describe(monitor, &mut found.disks).await?;
    // An extra may be one of the others.
    let nodes: Vec<_> = found.disks.iter().map(|disk| disk.node.clone()).collect();
    found
        .others
        .retain(|other| !other.node.as_ref().is_some_and(|node| nodes.contains(node)));
    for skipped in &found.skipped {
        events.note(format!("{} is skipped: {}", skipped.name, skipped.reason));
    }
    for (name, first) in &found.doubles {
        events.note(format!(
            "{name} is the same disk as {first}, and taken once, as {first}"
        ));
    }
    let left_out = left_out(vm, selection, &found.others);
    for disk in left_out.iter().filter(|disk| !disk.excluded) {
        events.warn(format!(
            "{} is left out, so the backup is incomplete: {} (`exclude` says that it is not wanted)",
            disk.name, disk.reason
        ));
    }
    Ok(Selected {
        disks: found.disks,
        skipped: found.skipped,
        left_out,
        schema,
    })
}

fn left_out(vm: &Vm, selection: &Selection, others: &[Other]) -> Vec<LeftOut> {
    let rule = selection.decision.as_ref().map_or(0, Decision::line);
    let not_granted = || format!("the rule in line {rule} does not grant it");
    let of_other = |other: &Other| {
        let named = !vm.disks.is_empty() && !selection.by_rule;
        let reason = match &other.beside {
            _ if other.excluded => "it is excluded".into(),
            _ if named => "it is not among the disks that were named".into(),
            Some(driver) => beside_words(driver),
            None => not_granted(),
        };
        LeftOut {
            name: other.name.clone(),
            reason,
            excluded: other.excluded || named,
        }
    };
    let of_extra = |name: &String| LeftOut {
        name: name.clone(),
        reason: not_granted(),
        excluded: vm.exclude.contains(name),
    };
    let extra = selection.extra_not_granted.iter().map(of_extra);
    others.iter().map(of_other).chain(extra).collect()
}
