//! The table of attacks.

use crate::{files, raw};
use anyhow::Result;
use std::path::{Path, PathBuf};

/// One attack by a provider or by a file that is to be taken for one.
pub(super) struct Case {
    /// Of the case; it begins with the provider's.
    pub(super) name: &'static str,
    /// What is run.
    pub(super) component: Source,
    /// `settings.how`, if there is such a setting.
    pub(super) how: Option<&'static str>,
    /// Limits and grants beside the usual ones, in TOML.
    pub(super) policy: &'static str,
    /// The exit status that it comes to.
    pub(super) status: i32,
    /// What the operator is told, besides the volume's name where there is one.
    pub(super) says: &'static str,
    /// Which limit on the processor's time the command is started under, in seconds.
    pub(super) processor: Option<u64>,
}

/// Where a case's component comes from.
pub(super) enum Source {
    /// `tests/hostile/examples`.
    Example(&'static str),
    /// Made by the test, in this file of its own.
    Made(fn(&Path) -> Result<PathBuf>),
}

/// An attack on a run: it ends in a failure (exit status 1) of a volume that is named.
const fn run(name: &'static str, says: &'static str) -> Case {
    Case {
        name,
        component: Source::Example(name),
        how: None,
        policy: "",
        status: 1,
        says,
        processor: None,
    }
}

/// The same of a kind.
const fn kind(
    component: &'static str,
    name: &'static str,
    how: &'static str,
    says: &'static str,
) -> Case {
    Case {
        component: Source::Example(component),
        how: Some(how),
        ..run(name, says)
    }
}

/// A component that the test makes, which is refused before any of it runs (exit status 2).
const fn refused(
    name: &'static str,
    make: fn(&Path) -> Result<PathBuf>,
    says: &'static str,
) -> Case {
    Case {
        component: Source::Made(make),
        status: 2,
        ..run(name, says)
    }
}

/// One that runs.
const fn made(name: &'static str, make: fn(&Path) -> Result<PathBuf>, says: &'static str) -> Case {
    Case {
        status: 1,
        ..refused(name, make, says)
    }
}

const UNFINISHED: &str = "in no finished object";
const OTHER_BYTES: &str = "gives back other bytes than the disk held";
const CPU: &str = "it used more CPU time than its limit allows";
const MEMORY: &str = "it needs more memory than its limit allows";

/// Every case, in the order of the table.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        // Time, memory and the stack.
        run("spins", CPU),
        made("spins-when-instantiated", raw::spins_when_instantiated, CPU),
        run("copies-memory", CPU),
        run("grows-memory", MEMORY),
        made("grows-tables", raw::grows_tables, "it trapped"),
        run(
            "recurses",
            "it trapped: wasm trap: out of bounds memory access",
        ),
        made(
            "recurses-in-the-machine",
            raw::recurses_in_the_machine,
            "call stack exhausted",
        ),
        Case {
            policy: "[provider.limits]\nwall-seconds = 1\n",
            ..run(
                "trickles",
                "it ran for longer than its limit of 1 s (wall-seconds)",
            )
        },
        Case {
            policy: "[provider.limits]\nread-bytes = 262144\n",
            ..run("reads-here-and-there", "quota-exceeded(read-bytes)")
        },
        // What the host keeps for it.
        Case {
            policy: "[provider.limits]\nobjects = 1000\n",
            ..run("hoards-streams", "quota-exceeded(objects)")
        },
        Case {
            policy: "[provider.limits]\nobjects = 200\n",
            ..run("makes-objects", "quota-exceeded(objects)")
        },
        Case {
            // A call costs processor time on both sides.
            policy: "[provider.limits]\noutput-bytes = 268435456\ncpu-seconds = 20\n",
            ..run("floods-calls", "quota-exceeded(output-bytes)")
        },
        Case {
            policy: "[provider.limits]\nlog-bytes = 4096\n",
            ..run("floods-log", r"gave up: \u{1b}[2J\nfleecebox: backup done")
        },
        kind(
            "returns-much",
            "returns-too-much",
            "65537",
            "receipt has 65537 bytes, more than its limit of 65536 (receipt-bytes)",
        ),
        kind(
            "returns-much",
            "returns-far-too-much",
            "2000000",
            "receipt has 2000000 bytes, more than its limit of 65536 (receipt-bytes)",
        ),
        kind(
            "returns-much",
            "returns-more-than-is-taken",
            "50000000",
            "it trapped",
        ),
        // Arguments, names, handles.
        kind(
            "tries-arguments",
            "tries-arguments",
            "gives-up",
            "attempts were answered as the contract says, 0 were not",
        ),
        made(
            "finishes-twice",
            raw::finishes_twice,
            "it trapped: unknown handle index",
        ),
        made(
            "writes-after-finish",
            raw::writes_after_finish,
            "it trapped: unknown handle index",
        ),
        made(
            "forges-a-handle",
            raw::forges_a_handle,
            "it trapped: unknown handle index",
        ),
        made(
            "drops-what-it-was-lent",
            raw::drops_twice,
            "it trapped: unknown handle index",
        ),
        // Coverage.
        run("covers-nothing", UNFINISHED),
        run("skips-a-block", UNFINISHED),
        run("skips-a-range", UNFINISHED),
        run("reads-and-writes-nothing", UNFINISHED),
        run("unfinished-streams", UNFINISHED),
        run("drops-streams", UNFINISHED),
        // Claims.
        run("claims-without-bytes", "the bytes were here a moment ago"),
        run("stores-garbage", OTHER_BYTES),
        run("corrupts-one-byte-in-restore", OTHER_BYTES),
        run("swaps-objects", "the provider"),
        // What it is asked for again.
        kind("attacks-restore", "spins-in-restore", "spins", CPU),
        kind("attacks-restore", "spins-when-opened", "spins-in-open", CPU),
        kind(
            "attacks-restore",
            "refuses-to-open",
            "refuses-to-open",
            "is at home",
        ),
        kind("attacks-restore", "traps-in-restore", "traps", "it trapped"),
        kind(
            "attacks-restore",
            "restores-too-little",
            "too-few",
            "bytes instead of",
        ),
        kind(
            "attacks-restore",
            "restores-nothing",
            "nothing",
            "it gave back 0 bytes instead of",
        ),
        kind(
            "attacks-restore",
            "restores-too-much",
            "too-many",
            "bytes instead of",
        ),
        kind(
            "attacks-restore",
            "restores-far-too-much",
            "far-too-many",
            "it returned 8388608 bytes where 4194304 are allowed",
        ),
        kind(
            "attacks-restore",
            "restores-without-end",
            "endless",
            "it trapped",
        ),
        kind(
            "attacks-restore",
            "restores-until-memory-ends",
            "grows",
            MEMORY,
        ),
        Case {
            policy: "[provider.limits]\nwall-seconds = 2\ncpu-seconds = 60\n",
            ..kind(
                "attacks-restore",
                "restores-slowly",
                "takes-its-time",
                "reading back what it claims took longer than its limit of 2 s (wall-seconds)",
            )
        },
        run("lets-the-host-work", CPU),
        // Blindness.
        Case {
            policy: "[provider.grant]\nread = false\n",
            ..kind(
                "spies-ungranted",
                "spies-ungranted",
                crate::blind::BACKWARDS,
                "nothing can be claimed that may not be read",
            )
        },
        Case {
            policy: "[provider.limits]\ncpu-seconds = 30\n",
            ..kind(
                "spies-ungranted",
                "spies-in-its-objects",
                crate::blind::BACKWARDS,
                "its own bytes were served: true, others were refused: true, bytes of the disk in memory: false",
            )
        },
        // What is no provider.
        Case {
            status: 2,
            ..run(
                "imports-a-socket",
                "it cannot be used as a provider: it imports `wasi:sockets/",
            )
        },
        refused(
            "tells-time",
            raw::tells_time,
            "it cannot be used as a provider: it imports `wasi:clocks/wall-clock@",
        ),
        refused(
            "finds-randomness",
            raw::finds_randomness,
            "it cannot be used as a provider: it imports `wasi:random/random@",
        ),
        Case {
            status: 2,
            ..run("wrong-world", "it cannot be used as a provider")
        },
        refused(
            "of-other-types",
            raw::of_other_types,
            "it cannot be used as a provider: it does not fit its world",
        ),
        refused(
            "garbage",
            files::garbage,
            "it is not a component that can be run",
        ),
        refused(
            "empty",
            files::empty,
            "it is not a component that can be run",
        ),
        refused(
            "truncated",
            files::truncated,
            "it is not a component that can be run",
        ),
        refused(
            "core-module",
            files::core_module,
            "the file is a core WebAssembly module, not a component",
        ),
        refused(
            "half-a-gigabyte",
            files::half_a_gigabyte,
            "more than its limit of 67108864 (component-bytes)",
        ),
        refused(
            "endless-file",
            files::endless,
            "has more than the 67108864 bytes that are allowed",
        ),
        Case {
            processor: Some(2),
            ..refused("compile-bomb", files::compile_bomb, "to compile")
        },
    ];
    cases.extend(TRAPS.iter().map(|&(name, call)| {
        kind(
            "traps-at",
            name,
            call,
            "it trapped: wasm trap: wasm `unreachable` instruction executed",
        )
    }));
    cases
}

/// Each call of the contract.
const TRAPS: [(&str, &str); 18] = [
    ("traps-at-settings", "settings"),
    ("traps-at-log", "log"),
    ("traps-at-attachment", "attachment"),
    ("traps-at-info", "info"),
    ("traps-at-next", "next"),
    ("traps-at-put", "put"),
    ("traps-at-discard", "discard"),
    ("traps-at-create", "create"),
    ("traps-at-splice", "splice"),
    ("traps-at-finish", "finish"),
    ("traps-at-read", "read"),
    ("traps-at-write", "write"),
    ("traps-at-claim", "claim"),
    ("traps-at-drop", "drop"),
    ("traps-at-return", "return"),
    ("traps-at-image-open", "image-open"),
    ("traps-at-object-size", "object-size"),
    ("traps-at-object-read", "object-read"),
];
