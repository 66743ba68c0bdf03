//! What a provider is granted and how much of it.
//!
//! Without tenants the configuration's `[provider.NAME.limits]` and `[provider.NAME.grant]` say it, and what they leave
//! out has defaults for one operator who trusts what he starts. With a `[tenant.NAME]` part everything that no rule
//! grants is denied:
//! - [`decide`] and [`Restores`]: from the file to what one job may do
//! - [`check`](mod@check): contradictions, which keep a file from being used, and dead rules
//! - [`explain`](mod@explain): a decision in plain words, each with its line

pub mod check;
mod decision;
pub mod explain;
#[cfg(test)]
mod tests;

pub use decision::{Decision, Denied, Restores, Tenancy, decide};

use crate::config::{Config, ConfigError, DEFAULT_PATH};
use std::path::Path;

/// Reads the configuration as [`Config::load`] does. One that contradicts itself is refused.
///
/// # Errors
/// Where it cannot be read, is wrong, or contradicts itself; the first contradiction is told.
pub fn load(path: Option<&Path>) -> Result<Config, ConfigError> {
    consistent(Config::load(path)?, path.unwrap_or(Path::new(DEFAULT_PATH)))
}

/// Parses the text of `path` as [`Config::parse`] does. One that contradicts itself is refused.
///
/// # Errors
/// Where it is wrong or contradicts itself.
pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
    consistent(Config::parse(text, path)?, path)
}

fn consistent(config: Config, path: &Path) -> Result<Config, ConfigError> {
    match check::contradictions(&config).into_iter().next() {
        None => Ok(config),
        Some(found) => Err(ConfigError::Parse {
            path: path.to_owned(),
            message: format!("{found} (`fleecebox policy check` lists all that is wrong)"),
        }),
    }
}
