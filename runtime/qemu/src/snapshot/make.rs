//! The steps to a point in time, in their order, and the way back.

use super::{
    CBW_TIMEOUT_SECONDS, Cause, FleecingFormat, Form, NbdServer, Nodes, Plan, PointRequest, Probe,
    Readers, UndoError, id, remains,
};
use crate::agent::{Agent, AgentError, Freeze};
use crate::backup_access::{self, AccessError};
use crate::bitmap::{self, Tracking};
use crate::descriptor;
use crate::filter;
use crate::ids::{JobId, OwnId, Role};
use crate::machine::{self, Unusable};
use crate::monitor::{Monitor, MonitorError};
use crate::present;
use crate::removal::{self, ServerFate};
use crate::schema::Schema;
use crate::standstill::{self, Stopped};
use fleecebox_contract::with_causes;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;
use tokio::time::Instant;

/// What is told of a guest that need not be frozen.
pub const NOT_FROZEN: &str =
    "the guest's file systems are not frozen, so what is read of them is as after a loss of power";

/// What is known of the guest's file systems.
pub(super) struct Frozen {
    pub(super) time: Option<Duration>,
    pub(super) still: Option<AgentError>,
    pub(super) stopped: Stopped,
    pub(super) notes: Vec<String>,
    pub(super) one_moment: bool,
}

impl Default for Frozen {
    fn default() -> Self {
        Self {
            time: None,
            still: None,
            stopped: Stopped::default(),
            notes: Vec::new(),
            one_moment: true,
        }
    }
}

pub(super) async fn make(
    monitor: &Monitor,
    schema: &Schema,
    request: &PointRequest,
    agent: Option<&mut Agent>,
    server: &mut ServerFate,
    frozen: &mut Frozen,
    nodes: &mut Nodes,
) -> Result<(), Cause> {
    for plan in &request.plans {
        check_bitmap(plan)?;
    }
    if request.form == Form::BackupAccess
        && !backup_access::is_offered(monitor, schema)
            .await
            .map_err(Cause::Monitor)?
    {
        return Err(AccessError::Missing.into());
    }
    *nodes = Nodes::of(monitor, request).await?;
    if request.form != Form::Filter {
        refuse_exports_on_iothreads(monitor, &request.plans).await?;
    }
    for ((index, plan), node) in (0..).zip(&request.plans).zip(&nodes.fleecing) {
        add_fleecing(monitor, request, index, plan, node).await?;
    }

    match agent {
        None => freeze_disks(monitor, schema, request, frozen, nodes).await?,
        Some(agent) => {
            let start = Instant::now();
            match agent.freeze().await {
                Ok(count) => {
                    let taken = freeze_disks(monitor, schema, request, frozen, nodes).await;
                    frozen.still = agent.thaw().await.err();
                    frozen.time = Some(start.elapsed());
                    taken?;
                    let told = format!("the guest's agent froze {count} file systems");
                    frozen.notes.push(told);
                }
                // Freezing failed, and so did thawing after it.
                Err(e @ AgentError::StillFrozen { .. }) => {
                    frozen.still = Some(e);
                    return Err(Cause::Thaw);
                }
                Err(e) if request.freeze == Freeze::IfAvailable => {
                    frozen
                        .notes
                        .push(format!("{NOT_FROZEN}: {}", with_causes(&e)));
                    freeze_disks(monitor, schema, request, frozen, nodes).await?;
                }
                Err(e) => return Err(Cause::Freeze(e)),
            }
            if frozen.still.is_some() {
                return Err(Cause::Thaw);
            }
        }
    }

    if request.form != Form::BackupAccess {
        for (index, plan) in (0..).zip(&request.plans) {
            add_access(monitor, request.job, index)
                .await
                .map_err(|source| Cause::Access {
                    disk: plan.disk.name.clone(),
                    source,
                })?;
        }
    }
    if let NbdServer::Start(path) = &request.server {
        start_server(monitor, path).await?;
        *server = ServerFate::StopIfUnused;
    }
    for ((index, plan), access) in (0..).zip(&request.plans).zip(&nodes.access) {
        add_export(monitor, request, index, plan, access)
            .await
            .map_err(|source| Cause::Export {
                disk: plan.disk.name.clone(),
                source,
            })?;
    }
    for (index, plan) in (0..).zip(&request.plans) {
        add_probe(monitor, request.job, index, &plan.disk.node)
            .await
            .map_err(|source| Cause::Export {
                disk: plan.disk.name.clone(),
                source,
            })?;
    }
    add_probes_of_others(monitor, request, nodes).await
}

/// Takes back what [`make`] got done: everything is looked for, so it need not say how far it came.
pub(super) async fn undo(
    monitor: &Monitor,
    request: &PointRequest,
    server: ServerFate,
    nodes: &Nodes,
) -> Vec<UndoError> {
    let remains = remains(request.job, request.form, request.plans.iter(), nodes);
    let removed = removal::remove(monitor, &remains, server).await;
    let mut left: Vec<_> = removed.into_iter().map(UndoError::from).collect();
    if left.iter().any(UndoError::is_lost) {
        // No bitmap can be put back either.
        return left;
    }
    for plan in &request.plans {
        // A bitmap that was found unusable is left for the caller to judge.
        if check_bitmap(plan).is_err() {
            continue;
        }
        match bitmap::back_out(monitor, &plan.disk.node, &plan.bitmap).await {
            Ok(Tracking::Restored) => {}
            Ok(Tracking::Lost) => {
                tracing::warn!("disk {}: the next backup reads it in full", plan.disk.name);
            }
            Err(source) => left.push(UndoError::Bitmap {
                disk: plan.disk.name.clone(),
                source,
            }),
        }
    }
    left
}

/// A disabled bitmap must not be taken for the base, nor be enabled again by a later undo.
fn check_bitmap(plan: &Plan) -> Result<(), Cause> {
    let Some(old) = plan.bitmap.old() else {
        return Ok(());
    };
    let name = old.to_string();
    let state = plan.disk.bitmap(&name).ok_or(Unusable::Missing);
    state
        .and_then(|bitmap| bitmap.usable())
        .map_err(|reason| Cause::Bitmap {
            disk: plan.disk.name.clone(),
            bitmap: name,
            reason,
        })
}

/// A backup job on a disk that an export runs in an iothread aborts QEMU 10.0.2. QEMU does not say which exports do, so
/// where there are iothreads, each export of a disk that no device has is one of them.
async fn refuse_exports_on_iothreads(monitor: &Monitor, plans: &[Plan]) -> Result<(), Cause> {
    let exports = present::exports(monitor).await.map_err(Cause::Monitor)?;
    let export_of = |plan: &Plan| exports.iter().find(|export| export.node == plan.disk.node);
    if !plans.iter().any(|plan| export_of(plan).is_some())
        || !present::has_iothreads(monitor)
            .await
            .map_err(Cause::Monitor)?
    {
        return Ok(());
    }
    let devices = present::devices(monitor).await.map_err(Cause::Monitor)?;
    let has = |plan: &Plan, device: &present::Device| {
        let inserted = device.inserted.as_ref();
        inserted.is_some_and(|inserted| inserted.name == plan.disk.node)
    };
    for plan in plans {
        if let Some(export) = export_of(plan)
            && !devices.iter().any(|device| has(plan, device))
        {
            return Err(Cause::ExportOnIothread {
                disk: plan.disk.name.clone(),
                export: export.id.clone(),
            });
        }
    }
    Ok(())
}

async fn add_fleecing(
    monitor: &Monitor,
    request: &PointRequest,
    index: u16,
    plan: &Plan,
    node: &str,
) -> Result<(), Cause> {
    let file =
        |filename: Value| json!({ "driver": "file", "filename": filename, "discard": "unmap" });
    let image = id(request.job, Role::Image, index);
    let options = |filename| match request.format {
        FleecingFormat::Raw => {
            json!({ "driver": "raw", "node-name": node, "discard": "unmap", "file": file(filename) })
        }
        FleecingFormat::Qcow2 => {
            let mut file = file(filename);
            file["node-name"] = json!(image);
            file
        }
    };
    let (path, file) = (&plan.fleecing, plan.descriptor.as_ref().map(AsFd::as_fd));
    let name = match request.format {
        FleecingFormat::Raw => node,
        FleecingFormat::Qcow2 => &image,
    };
    // Whose such a node is stands in its path alone.
    let added = match request.form {
        Form::BackupAccess => descriptor::add_by_path(monitor, name, path, file, options).await,
        Form::Job | Form::Filter => descriptor::add_node(monitor, name, path, file, options).await,
    };
    let added = match request.format {
        FleecingFormat::Raw => added,
        FleecingFormat::Qcow2 => match added {
            Ok(()) => format_qcow2(monitor, request.job, index, plan, node).await,
            error => error,
        },
    };
    match added {
        Ok(()) => Ok(()),
        Err(source) if source.is_refusal() => Err(Cause::Fleecing {
            path: plan.fleecing.clone(),
            source,
        }),
        Err(error) => Err(Cause::Monitor(error)),
    }
}

/// Makes the file below a qcow2 image, and adds its node.
async fn format_qcow2(
    monitor: &Monitor,
    job: JobId,
    index: u16,
    plan: &Plan,
    node: &str,
) -> Result<(), MonitorError> {
    let size = plan.disk.size;
    let (image, create) = (id(job, Role::Image, index), id(job, Role::Create, index));
    let mut events = monitor.events();
    let options = json!({ "driver": "qcow2", "file": image, "size": size });
    let arguments = json!({ "job-id": create, "options": options });
    monitor.execute_raw("blockdev-create", arguments).await?;
    loop {
        let jobs = present::jobs(monitor).await?;
        let Some(job) = jobs.into_iter().find(|job| job.id == create) else {
            break;
        };
        if job.status == "concluded" {
            let dismiss = json!({ "id": create });
            monitor.execute_raw("job-dismiss", dismiss).await?;
            if let Some(description) = job.error {
                return Err(MonitorError::Refused {
                    command: "blockdev-create".into(),
                    class: "GenericError".into(),
                    description,
                });
            }
            break;
        }
        events.nudge(Duration::from_millis(20)).await;
    }
    // Until [`super::PointInTime::make_room`].
    let shrinks = plan.bitmap.old().is_none();
    let added = monitor.execute_raw("blockdev-add", qcow2(node, &image, shrinks));
    added.await.map(drop)
}

/// The node of such an image, and whether what is discarded leaves it.
pub(super) fn qcow2(node: &str, image: &str, shrinks: bool) -> Value {
    let discard = if shrinks { "unmap" } else { "ignore" };
    json!({ "driver": "qcow2", "node-name": node, "discard": discard, "file": image })
}

/// The moment itself.
async fn freeze_disks(
    monitor: &Monitor,
    schema: &Schema,
    request: &PointRequest,
    frozen: &mut Frozen,
    nodes: &mut Nodes,
) -> Result<(), Cause> {
    let switch = bitmap::switch(&request.plans, request.block_size);
    let stopped = &mut frozen.stopped;
    match request.form {
        Form::BackupAccess => {
            let (adds, disables) = switch.into_iter().partition(bitmap::is_add);
            bitmap_actions(monitor, adds).await?;
            let mut disks = Vec::new();
            for (plan, fleecing) in request.plans.iter().zip(&nodes.fleecing) {
                let device = fleecing.strip_suffix(backup_access::FLEECING);
                disks.push((&plan.disk, device.unwrap_or(fleecing).to_owned()));
            }
            let state = machine::run_state(monitor).await.map_err(Cause::Monitor)?;
            // QEMU puts its filters in one after the other. Where nothing can be stopped, each disk has its own moment.
            frozen.one_moment = state.is_some() || disks.len() == 1;
            let runs = state.is_some_and(|state| state.running);
            let set_up = async {
                let held = backup_access::Held::of(monitor, request.job, &disks).await?;
                nodes.held = Some(held);
                backup_access::set_up(monitor, schema, request.job, &disks).await
            };
            let access = standstill::during(monitor, runs, stopped, set_up).await?;
            nodes.access = access.nodes;
            frozen.notes.extend(access.notes);
            bitmap_actions(monitor, disables).await?;
            match stopped.still {
                Some(_) => Err(Cause::Cont),
                None => Ok(()),
            }
        }
        Form::Job => transaction(monitor, backups(request, schema).chain(switch).collect()).await,
        Form::Filter => {
            let plans = &request.plans;
            filter::insert(monitor, schema, request.job, plans, switch, stopped).await?;
            match stopped.still {
                Some(_) => Err(Cause::Cont),
                None => Ok(()),
            }
        }
    }
}

/// All at once, where there are any.
async fn bitmap_actions(monitor: &Monitor, actions: Vec<Value>) -> Result<(), Cause> {
    match actions.is_empty() {
        true => Ok(()),
        false => transaction(monitor, actions).await,
    }
}

async fn transaction(monitor: &Monitor, actions: Vec<Value>) -> Result<(), Cause> {
    let arguments = json!({ "actions": actions });
    let taken = monitor.execute_raw("transaction", arguments).await;
    taken.map(drop).map_err(Cause::Transaction)
}

/// They come before all actions on bitmaps. A backup action drains its disk and holds the drain to the end of the
/// transaction, while bitmap actions do not drain: with all backups first, no write falls between any
/// two actions. Adding before disabling loses nothing even so.
fn backups(request: &PointRequest, schema: &Schema) -> impl Iterator<Item = Value> {
    (0..).zip(&request.plans).map(|(index, plan)| {
        let mut data = json!({
            "job-id": id(request.job, Role::Job, index),
            "device": plan.disk.node,
            "target": id(request.job, Role::Fleecing, index),
            "sync": "none",
            "filter-node-name": id(request.job, Role::Filter, index),
            "auto-dismiss": false,
        });
        // A full fleecing image then breaks the snapshot instead of the guest's write.
        if schema.command_has_argument("blockdev-backup", "on-cbw-error") {
            data["on-cbw-error"] = json!("break-snapshot");
        }
        if schema.command_has_argument("blockdev-backup", "cbw-timeout") {
            data["cbw-timeout"] = json!(CBW_TIMEOUT_SECONDS);
        }
        json!({ "type": "blockdev-backup", "data": data })
    })
}

async fn add_access(monitor: &Monitor, job: JobId, index: u16) -> Result<(), MonitorError> {
    let arguments = json!({
        "driver": "snapshot-access",
        "node-name": id(job, Role::Access, index),
        "file": id(job, Role::Filter, index),
        "discard": "unmap",
    });
    let added = monitor.execute_raw("blockdev-add", arguments).await;
    added.map(drop)
}

async fn start_server(monitor: &Monitor, path: &Path) -> Result<(), Cause> {
    let arguments = json!({ "addr": { "type": "unix", "data": { "path": path } } });
    match monitor.execute_raw("nbd-server-start", arguments).await {
        Ok(_) => Ok(()),
        // QMP has no class of its own for this; the words are QEMU's since the command exists.
        Err(MonitorError::Refused { description, .. })
            if description.contains("already running") =>
        {
            Err(Cause::ServerRunning)
        }
        Err(source) => match descriptor::start_server(monitor, path).await {
            Ok(()) => Ok(()),
            Err(_) => Err(Cause::Server {
                path: path.into(),
                source,
            }),
        },
    }
}

/// Never with an `iothread`: a later `blockdev-backup` of that node would abort QEMU.
async fn add_export(
    monitor: &Monitor,
    request: &PointRequest,
    index: u16,
    plan: &Plan,
    access: &str,
) -> Result<(), MonitorError> {
    let export = id(request.job, Role::Export, index);
    let mut arguments = json!({
        "type": "nbd",
        "id": export,
        "node-name": access,
        "name": export,
        "writable": request.readers == Readers::Discard,
    });
    if let Some(old) = plan.bitmap.old() {
        arguments["bitmaps"] = json!([{ "node": plan.disk.node, "name": old.to_string() }]);
    }
    let added = monitor.execute_raw("block-export-add", arguments).await;
    added.map(drop)
}

/// To remove anything, QEMU waits for the requests to all disks: those that are not in the point in time are given an
/// export as well. What only other people's jobs use is not: they could not remove it when they have ended.
async fn add_probes_of_others(
    monitor: &Monitor,
    request: &PointRequest,
    nodes: &mut Nodes,
) -> Result<(), Cause> {
    let (others, plugged) = others(monitor, request).await.map_err(Cause::Monitor)?;
    nodes.plugged = plugged;
    for (index, (node, disk)) in (0..).skip(request.plans.len()).zip(others) {
        match add_probe(monitor, request.job, index, &node).await {
            Ok(()) => {
                let export = id(request.job, Role::Probe, index);
                nodes.others.push((node, Probe { disk, export }));
            }
            // Where nobody may read, it goes unasked.
            Err(error) if error.is_refusal() => {}
            Err(error) => return Err(Cause::Monitor(error)),
        }
    }
    Ok(())
}

/// The nodes that devices and exports have, but those of the point in time, each with what its user calls it; and those
/// of the point in time that devices have.
async fn others(
    monitor: &Monitor,
    request: &PointRequest,
) -> Result<(BTreeMap<String, String>, BTreeSet<String>), MonitorError> {
    let graph = present::graph(monitor).await?;
    let (mut others, mut plugged) = (BTreeMap::new(), BTreeSet::new());
    for export in present::exports(monitor).await? {
        if OwnId::parse(&export.id).is_none() {
            others.insert(export.node.clone(), export.node);
        }
    }
    for device in present::devices(monitor).await? {
        if let Some(inserted) = &device.inserted {
            let name = device.id().unwrap_or(&inserted.name);
            others.insert(inserted.name.clone(), name.into());
        }
    }
    others.retain(|node, _| {
        let mut disks = request.plans.iter().map(|plan| &plan.disk.node);
        // What lies above a disk is a filter, ours or QEMU's.
        let above = disks.find(|disk| *disk == node || graph.is_below(disk, node));
        plugged.extend(above.cloned());
        above.is_none()
    });
    Ok((others, plugged))
}

/// The export that stays until all else is gone, to ask the storage of `node` by.
async fn add_probe(
    monitor: &Monitor,
    job: JobId,
    index: u16,
    node: &str,
) -> Result<(), MonitorError> {
    let export = id(job, Role::Probe, index);
    let arguments = json!({
        "type": "nbd",
        "id": export,
        "node-name": node,
        "name": export,
        "writable": false,
    });
    let added = monitor.execute_raw("block-export-add", arguments).await;
    added.map(drop)
}
