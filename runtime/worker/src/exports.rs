//! The types of what a component exports, held against its world without an instance: the bindings look at them only when
//! there is one, and then code of the component's has run.

use super::bindings::blind::exports::fleecebox::provider as blind;
use super::bindings::provider::exports::fleecebox::provider as seeing;
use super::bindings::{archive, job, stored, types};
use super::stubs::Host;
use fleecebox_contract::{BACKUP, BLIND_BACKUP, RESTORE};
use wasmtime::component::types::ComponentItem;
use wasmtime::component::{
    Component, ComponentNamedList, InstancePre, Lift, Lower, Resource, ResourceAny,
};
use wasmtime::error::Context as _;

type Answer<T> = (Result<T, types::ErrorCode>,);
type Job = Resource<job::Context>;
type Writer = Resource<archive::Writer>;
type Receipt<'a> = Option<&'a [u8]>;

/// `backup` and `restore`.
pub(super) fn of_a_provider(
    component: &Component,
    pre: &InstancePre<Host>,
) -> wasmtime::Result<()> {
    let run = "run";
    check::<(Job, seeing::backup::Grant, Writer, Receipt), Answer<Vec<u8>>>(
        component, pre, BACKUP, run,
    )?;
    let open = "[static]image.open";
    check::<(Job, Resource<stored::Objects>, &[u8]), Answer<ResourceAny>>(
        component, pre, RESTORE, open,
    )?;
    let read = "[method]image.read";
    check::<(ResourceAny, u64, u32), Answer<Vec<u8>>>(component, pre, RESTORE, read)
}

/// `blind-backup`.
pub(super) fn of_a_blind_one(
    component: &Component,
    pre: &InstancePre<Host>,
) -> wasmtime::Result<()> {
    check::<(Job, blind::blind_backup::Grant, Writer, Receipt), Answer<Vec<u8>>>(
        component,
        pre,
        BLIND_BACKUP,
        "run",
    )
}

fn check<Params, Return>(
    component: &Component,
    pre: &InstancePre<Host>,
    interface: &str,
    function: &str,
) -> wasmtime::Result<()>
where
    Params: ComponentNamedList + Lower,
    Return: ComponentNamedList + Lift,
{
    let exported = component
        .get_export_index(None, interface)
        .and_then(|interface| component.get_export(Some(&interface), function));
    match exported {
        Some((ComponentItem::ComponentFunc(exported), _)) => exported
            .typecheck::<Params, Return>(&pre.instance_type())
            .with_context(|| format!("`{function}` of `{interface}` has other types")),
        _ => Err(wasmtime::format_err!(
            "it exports no `{function}` in `{interface}`"
        )),
    }
}
