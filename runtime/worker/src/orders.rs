//! What a sandbox process does when it is told to compile, to run, or to open an image.

use super::bindings::blind::BlindProvider;
use super::bindings::provider::Provider;
use super::bindings::{blind, provider};
use super::compiled;
use super::confine::Confined;
use super::exports;
use super::limits::{Limits, OutOfTime};
use super::stubs::{Host, Lost};
use super::surroundings::Surroundings;
use super::wasi;
use fleecebox_channel::{
    Call, Failure, Fit, ImageRead, OpenImage, Outcome, Payload, Run, Socket, SocketError,
};
use fleecebox_contract::{Interface, MAX_PASSED, MAX_RECEIPT, Wasi, World};
use provider::exports::fleecebox::provider as provider_exports;
use rustix::fs::fstat;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::time::Duration;
use wasmtime::component::{Component, HasSelf, Linker, Resource};
use wasmtime::{Engine, Store, Trap, UpdateDeadline};

/// Most bytes of names that a component's imports and exports may have together: they travel in one message.
const MAX_NAMES: usize = 64 << 10;

/// Most bytes of the reason in a [`Failure`].
const MAX_REASON: usize = 300;

/// The number in a handle where there is only one of its kind.
const THE_ONLY_ONE: u32 = 0;

/// Compiles the component that lies in the payload. None of its code runs.
pub(super) fn compile(
    confined: &Confined,
    mut socket: Socket,
    payload: &Payload,
    length: u64,
) -> Result<(), Lost> {
    confined.compile().map_err(|_| Lost::Unconfined)?;
    let outcome = match machine_code(&payload.take(length)?) {
        Err(failure) => Outcome::Failed(failure),
        Ok((interface, code)) => Outcome::Compiled {
            length: payload.give(&code)?,
            interface,
        },
    };
    socket.send(&Call::Done(outcome))?;
    closed(socket.receive().map_err(Lost::from))
}

/// What [`compile`] tells of a component: what it imports and exports, and its machine code.
pub(super) fn machine_code(component: &[u8]) -> Result<(Interface, Vec<u8>), Failure> {
    let (component, code) =
        compiled::compile(component).map_err(|error| Failure::NotAComponent(reason(&error)))?;
    Ok((interface(&component)?, code))
}

/// Links a component as a run would, by the types of all that it imports and exports, and goes no further.
pub(super) fn fit(
    engine: &Engine,
    confined: &Confined,
    (mut socket, file): (Socket, OwnedFd),
    order: &Fit,
) -> Result<(), Lost> {
    let linked = load(engine, confined, 0, file)?.and_then(|component| {
        let linked = match order.world {
            World::Provider => provider_pre(engine, &component, &order.wasi)
                .and_then(|pre| exports::of_a_provider(&component, pre.instance_pre())),
            World::BlindProvider => blind_pre(engine, &component, &order.wasi)
                .and_then(|pre| exports::of_a_blind_one(&component, pre.instance_pre())),
        };
        linked.map_err(|error| Failure::CannotLink(reason(&error)))
    });
    let outcome = linked.map_or_else(Outcome::Failed, |()| Outcome::Fits);
    socket.send(&Call::Done(outcome))?;
    closed(socket.receive().map_err(Lost::from))
}

/// Runs `run` once.
pub(super) async fn run(
    engine: &Engine,
    confined: &Confined,
    (socket, payload, file): (Socket, Payload, OwnedFd),
    order: Run,
) -> Result<(), Lost> {
    let component = load(engine, confined, order.limits.memory, file)?;
    let limits = Limits::new(
        order.limits.memory,
        Duration::from_millis(order.limits.cpu_ms),
    );
    let sizes = (order.max_read, order.max_write);
    let host = Host::new(
        socket,
        payload,
        order.context,
        Some(order.volume),
        sizes,
        limits,
        Surroundings::Real,
    );
    let mut store = store(engine, host);
    let base = order.base.as_deref();
    let mut called = async |component: &Component| match order.world {
        World::Provider => {
            let instance = provider_pre(engine, component, &order.wasi).map_err(Stop::Link)?;
            let instance = instance.instantiate_async(&mut store).await;
            let instance: Provider = instance.map_err(Stop::Trap)?;
            let grant = provider_exports::backup::Grant {
                snapshot: Resource::new_own(THE_ONLY_ONE),
                dirty: Resource::new_own(THE_ONLY_ONE),
                reader: order.reader.then(|| Resource::new_own(THE_ONLY_ONE)),
                discarder: order.discarder.then(|| Resource::new_own(THE_ONLY_ONE)),
            };
            instance
                .fleecebox_provider_backup()
                .call_run(
                    &mut store,
                    Resource::new_own(THE_ONLY_ONE),
                    grant,
                    Resource::new_own(THE_ONLY_ONE),
                    base,
                )
                .await
                .map_err(Stop::Trap)
        }
        World::BlindProvider => {
            let instance = blind_pre(engine, component, &order.wasi).map_err(Stop::Link)?;
            let instance = instance.instantiate_async(&mut store).await;
            let instance = instance.map_err(Stop::Trap)?;
            let grant = blind::exports::fleecebox::provider::blind_backup::Grant {
                snapshot: Resource::new_own(THE_ONLY_ONE),
                dirty: Resource::new_own(THE_ONLY_ONE),
                discarder: order.discarder.then(|| Resource::new_own(THE_ONLY_ONE)),
            };
            instance
                .fleecebox_provider_blind_backup()
                .call_run(
                    &mut store,
                    Resource::new_own(THE_ONLY_ONE),
                    grant,
                    Resource::new_own(THE_ONLY_ONE),
                    base,
                )
                .await
                .map_err(Stop::Trap)
        }
    };
    let returned = match component {
        Err(failure) => Err(failure),
        Ok(component) => Ok(called(&component).await),
    };
    let outcome = match returned {
        Err(failure) => Outcome::Failed(failure),
        Ok(Err(stop)) => Outcome::Failed(stop.failure(&store)?),
        Ok(Ok(Err(code))) => Outcome::GuestError(code.into()),
        Ok(Ok(Ok(receipt))) if receipt.len() > MAX_RECEIPT => Outcome::Failed(Failure::TooLarge {
            length: receipt.len() as u64,
            limit: MAX_RECEIPT as u64,
        }),
        Ok(Ok(Ok(receipt))) => Outcome::Receipt(receipt),
    };
    done(&mut store, outcome)?;
    closed(store.data_mut().hear())
}

/// Says how a call of an export ended, after what it wrote.
fn done(store: &mut Store<Host>, outcome: Outcome) -> Result<(), Lost> {
    store.data().wasi.flush_output()?;
    store.data_mut().tell(&Call::Done(outcome))
}

/// What is heard after the last word is waited for, and is the end: until then the job process can look at what this one has
/// used.
fn closed(heard: Result<(), Lost>) -> Result<(), Lost> {
    match heard {
        Err(Lost::Socket(SocketError::Closed)) => Ok(()),
        other => other,
    }
}

/// Opens an image and serves reads of it, until the job process closes the socket or the guest fails.
pub(super) async fn open_image(
    engine: &Engine,
    confined: &Confined,
    (socket, payload, file): (Socket, Payload, OwnedFd),
    order: OpenImage,
) -> Result<(), Lost> {
    let component = load(engine, confined, order.limits.memory, file)?;
    let limits = Limits::new(
        order.limits.memory,
        Duration::from_millis(order.limits.cpu_ms),
    );
    let host = Host::new(
        socket,
        payload,
        order.context,
        None,
        (order.max_read, 0),
        limits,
        Surroundings::Still(order.still),
    );
    let mut store = store(engine, host);
    let mut called = async |component: &Component| {
        let instance = provider_pre(engine, component, &order.wasi).map_err(Stop::Link)?;
        let instance = instance.instantiate_async(&mut store).await;
        let instance = instance.map_err(Stop::Trap)?;
        let image = instance
            .fleecebox_provider_restore()
            .image()
            .call_open(
                &mut store,
                Resource::new_own(THE_ONLY_ONE),
                Resource::new_own(THE_ONLY_ONE),
                &order.receipt,
            )
            .await
            .map_err(Stop::Trap)?;
        Ok(image.map(|image| (instance, image)))
    };
    let opened = match component {
        Err(failure) => Err(failure),
        Ok(component) => Ok(called(&component).await),
    };
    let (instance, image) = match opened {
        Err(failure) => {
            done(&mut store, Outcome::Failed(failure))?;
            return closed(store.data_mut().hear());
        }
        Ok(Err(stop)) => {
            let failure = Stop::failure(stop, &store)?;
            done(&mut store, Outcome::Failed(failure))?;
            return closed(store.data_mut().hear());
        }
        Ok(Ok(Err(code))) => {
            done(&mut store, Outcome::GuestError(code.into()))?;
            return closed(store.data_mut().hear());
        }
        Ok(Ok(Ok(opened))) => opened,
    };
    done(&mut store, Outcome::Opened)?;
    loop {
        let ImageRead { offset, length } = store.data_mut().hear()?;
        store.data_mut().limits.begin_call();
        let read = instance
            .fleecebox_provider_restore()
            .image()
            .call_read(&mut store, image, offset, length)
            .await;
        let outcome = match read {
            // An instance that did not return is never entered again.
            Err(error) => {
                let failure = Stop::Trap(error).failure(&store)?;
                done(&mut store, Outcome::Failed(failure))?;
                return closed(store.data_mut().hear());
            }
            Ok(Err(code)) => Outcome::GuestError(code.into()),
            Ok(Ok(bytes)) if bytes.len() > order.max_read as usize => {
                Outcome::Failed(Failure::TooLarge {
                    length: bytes.len() as u64,
                    limit: order.max_read.into(),
                })
            }
            Ok(Ok(bytes)) => Outcome::Bytes {
                length: store.data_mut().give(&bytes)?,
            },
        };
        done(&mut store, outcome)?;
    }
}

fn provider_pre(
    engine: &Engine,
    component: &Component,
    granted: &BTreeSet<Wasi>,
) -> wasmtime::Result<provider::ProviderPre<Host>> {
    let mut linker = Linker::new(engine);
    Provider::add_to_linker::<_, HasSelf<Host>>(&mut linker, |host| host)?;
    wasi::add_to_linker(&mut linker, granted)?;
    provider::ProviderPre::new(linker.instantiate_pre(component)?)
}

fn blind_pre(
    engine: &Engine,
    component: &Component,
    granted: &BTreeSet<Wasi>,
) -> wasmtime::Result<blind::BlindProviderPre<Host>> {
    let mut linker = Linker::new(engine);
    BlindProvider::add_to_linker::<_, HasSelf<Host>>(&mut linker, |host| host)?;
    wasi::add_to_linker(&mut linker, granted)?;
    blind::BlindProviderPre::new(linker.instantiate_pre(component)?)
}

fn store(engine: &Engine, host: Host) -> Store<Host> {
    let mut store = Store::new(engine, host);
    store.limiter(|host| host);
    store.set_hostcall_fuel(MAX_PASSED);
    store.set_epoch_deadline(1);
    store.epoch_deadline_callback(|store| {
        store.data().limits.charge()?;
        Ok(UpdateDeadline::Continue(1))
    });
    store
}

/// Takes the machine code in, and then the right to take in more.
fn load(
    engine: &Engine,
    confined: &Confined,
    memory: u64,
    file: OwnedFd,
) -> Result<Result<Component, Failure>, Lost> {
    let size = fstat(&file).map_err(|_| Lost::Unconfined)?.st_size;
    let bounded = confined.load(memory, size.unsigned_abs());
    bounded.map_err(|_| Lost::Unconfined)?;
    let component = compiled::load(engine, file);
    confined.run().map_err(|_| Lost::Unconfined)?;
    Ok(component)
}

/// Where on its way the guest stopped.
enum Stop {
    /// Before any of its code ran.
    Link(wasmtime::Error),
    /// In its own code, or in a stub.
    Trap(wasmtime::Error),
}

impl Stop {
    /// What the job process is told; an error if it is the job process that is lost.
    fn failure(self, store: &Store<Host>) -> Result<Failure, Lost> {
        let error = match self {
            Self::Link(error) => return Ok(Failure::CannotLink(reason(&error))),
            Self::Trap(error) => error,
        };
        match error.downcast::<Lost>() {
            Ok(lost) => Err(lost),
            Err(error) if error.is::<OutOfTime>() => Ok(Failure::CpuTime),
            Err(_) if store.data().limits.memory_refused() => Ok(Failure::Memory),
            Err(error) => Ok(Failure::Trapped(reason(&error))),
        }
    }
}

/// One line that says what is at the bottom of an error.
fn reason(error: &wasmtime::Error) -> String {
    let text = match error.downcast_ref::<Trap>() {
        Some(trap) => trap.to_string(),
        None => wasi::misuse(error).unwrap_or_else(|| format!("{error:#}")),
    };
    let mut line: String = text.lines().collect::<Vec<_>>().join(" ");
    line.truncate(line.floor_char_boundary(MAX_REASON));
    // The text can repeat names of the guest's choice.
    line.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

fn interface(component: &Component) -> Result<Interface, Failure> {
    let (kind, engine) = (component.component_type(), component.engine());
    let interface = Interface {
        imports: kind
            .imports(engine)
            .map(|(name, _)| name.to_owned())
            .collect(),
        exports: kind
            .exports(engine)
            .map(|(name, _)| name.to_owned())
            .collect(),
    };
    let names = interface.imports.iter().chain(&interface.exports);
    let length: usize = names.map(|name| name.len() + 1).sum();
    if length > MAX_NAMES {
        return Err(Failure::CannotLink(format!(
            "the names of its imports and exports take {length} bytes, more than the {MAX_NAMES} that are allowed"
        )));
    }
    Ok(interface)
}
