//! A component that may run: compiled, and of a world that grants all that it imports.

use crate::contract::{Refusal, Wasi, World};
use crate::event::Events;
use crate::sandbox::{self, Cache, CompileError, Compiled, FitError, Program};
use bytes::Bytes;
use std::collections::BTreeSet;

/// A component that was looked at before any of it runs.
#[derive(Debug, Clone)]
pub struct Component {
    /// Its machine code.
    pub compiled: Compiled,
    /// The world that it is for.
    pub world: World,
    /// The parts of WASI that it is granted.
    pub wasi: BTreeSet<Wasi>,
}

/// Why a component is not run.
#[derive(Debug, thiserror::Error)]
pub enum ComponentError {
    /// It cannot be compiled.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// Its imports are not granted, or it exports no provider.
    #[error("it cannot be used as a provider")]
    Refused(#[from] Refusal),
    /// It cannot be run, or not as confined as required.
    #[error(transparent)]
    Unfit(#[from] FitError),
}

impl ComponentError {
    /// Whether the component itself is at fault, and not this host.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Refused(_) | Self::Unfit(FitError::Refused(_)) => true,
            Self::Unfit(_) => false,
            Self::Compile(error) => matches!(
                error,
                CompileError::TooLarge { .. }
                    | CompileError::CoreModule
                    | CompileError::Refused(_)
                    | CompileError::TimedOut
                    | CompileError::ProcessorTime
                    | CompileError::Memory
            ),
        }
    }
}

impl Component {
    /// Compiles `bytes`, or takes them from the cache, and checks that they import nothing but what their world and
    /// `wasi` grant.
    pub async fn load(
        bytes: Bytes,
        program: &Program,
        cache: &Cache,
        wasi: BTreeSet<Wasi>,
        events: &Events,
    ) -> Result<Self, ComponentError> {
        let compiled = sandbox::compile(program, bytes, cache).await?;
        events.confinement(&compiled.missing);
        let world = crate::contract::world_of(&compiled.interface, &wasi)?;
        // Now, and not when a VM has a snapshot for it.
        let missing = sandbox::fit(program, &compiled, world, wasi.clone()).await?;
        events.confinement(&missing);
        Ok(Self {
            compiled,
            world,
            wasi,
        })
    }
}
