//! What the process can reach through paths, ports, names and signals: nothing (landlock(7)).

use fleecebox_channel::Gap;
use landlock::{
    ABI, Access, AccessFs, AccessNet, LandlockStatus, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetError, RulesetStatus, Scope,
};

/// The newest set of rules that this was tested with.
const TESTED: ABI = ABI::V7;

/// Which set of rules first holds what, and what is missing before it.
const SINCE: [(ABI, Gap); 3] = [
    // The third is the first one that also covers truncating by path.
    (ABI::V3, Gap::Files),
    (ABI::V4, Gap::Tcp),
    (ABI::V6, Gap::Scopes),
];

/// Takes away all that Landlock can take away, for the calling thread and those that it starts. Returns what it cannot.
pub(super) fn nothing() -> Vec<Gap> {
    let offered = match restrict() {
        Ok(RestrictionStatus {
            ruleset: RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced,
            landlock: LandlockStatus::Available { effective_abi, .. },
            ..
        }) => effective_abi,
        _ => ABI::Unsupported,
    };
    let missing = SINCE.into_iter().filter(|(since, _)| offered < *since);
    missing.map(|(_, gap)| gap).collect()
}

/// A ruleset that handles everything and allows nothing.
fn restrict() -> Result<RestrictionStatus, RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(TESTED))?
        .handle_access(AccessNet::from_all(TESTED))?
        .scope(Scope::from_all(TESTED))?
        .create()?
        .restrict_self()
}
