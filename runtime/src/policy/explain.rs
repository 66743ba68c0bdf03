//! What one provider may do on one VM, in plain words, each with the line of the file that says so.

use crate::config::{self, Config, ConfigError, Limits, Names, Tenant};
use serde::Serialize;

/// One thing that is granted, refused or limited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Clause {
    /// What of the three.
    pub verdict: Verdict,
    /// In plain words.
    pub text: String,
    /// The line that says so, counted from 1; none where it is so because no line says otherwise.
    pub line: Option<usize>,
}

/// What a clause says of its subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It may.
    Granted,
    /// It may not.
    Refused,
    /// It may, up to here.
    Limited,
}

/// All that the file says of `provider` on `vm` in the hands of `tenant`.
pub fn explain(
    config: &Config,
    tenant: &str,
    vm: &str,
    provider: &str,
) -> Result<Vec<Clause>, ConfigError> {
    let name = tenant;
    let tenant = config.tenant.get(name).ok_or_else(|| {
        let remedy = "name one of the configuration";
        config::unknown("tenant", name, config.tenant.keys(), remedy)
    })?;
    let mut said = Vec::new();
    let mut say = |verdict, text: String, path: &[&str]| {
        let line = config.lines.exact(path);
        said.push(Clause {
            verdict,
            text,
            line,
        });
    };
    let Some(index) = tenant.vms.iter().position(|owned| owned == vm) else {
        let vm = vm.escape_debug();
        let text = format!("everything: the VM '{vm}' is not tenant {name}'s");
        say(Verdict::Refused, text, &["tenant", name, "vms"]);
        return Ok(said);
    };
    let Some(pinned) = tenant.provider.get(provider) else {
        let provider = provider.escape_debug();
        let text = format!("everything: tenant {name} has no provider '{provider}'");
        say(Verdict::Refused, text, &["tenant", name]);
        return Ok(said);
    };
    let Some((number, rule)) = tenant.rule(vm, provider) else {
        let text = format!("everything: no rule names the provider '{provider}' and the VM '{vm}'");
        say(Verdict::Refused, text, &["tenant", name]);
        return Ok(said);
    };
    let index = index.to_string();
    let own = |key| ["tenant", name, key];
    say(
        Verdict::Granted,
        format!("the VM '{vm}' as tenant {name}'s"),
        &["tenant", name, "vms", &index],
    );
    let number = number.to_string();
    let key = |key: &'static str| ["tenant", name, "grant", number.as_str(), key];
    let component = pinned.component.display();
    say(
        Verdict::Limited,
        format!(
            "only the component with the SHA-256 {}, now in {component}",
            pinned.sha256
        ),
        &["tenant", name, "provider", provider, "sha256"],
    );
    let archives = Names::Only(tenant.archives.clone());
    say(
        Verdict::Granted,
        format!("storing in the archives: {archives}"),
        &own("archives"),
    );
    say(
        Verdict::Limited,
        format!(
            "only the namespace '{}' of an archive",
            tenant.namespace(name)
        ),
        &own("namespace"),
    );
    match &rule.volumes {
        Names::All => say(Verdict::Granted, "all disks".into(), &key("volumes")),
        only if *only == Names::default() => {
            say(Verdict::Refused, "every disk".into(), &key("volumes"));
        }
        only => say(
            Verdict::Granted,
            format!("the disks {only}, no others"),
            &key("volumes"),
        ),
    }
    let may = |granted| match granted {
        true => Verdict::Granted,
        false => Verdict::Refused,
    };
    say(
        may(rule.read),
        "reading the bytes of the disks (read)".into(),
        &key("read"),
    );
    say(
        may(rule.discard),
        "giving snapshot space back early (discard)".into(),
        &key("discard"),
    );
    let parts: Vec<_> = rule.wasi.iter().map(|part| part.name()).collect();
    match &parts[..] {
        [] => say(
            Verdict::Refused,
            "every part of WASI (wasi)".into(),
            &key("wasi"),
        ),
        parts => say(
            Verdict::Granted,
            format!("the parts of WASI: {} (wasi)", parts.join(", ")),
            &key("wasi"),
        ),
    }
    match &rule.attachments {
        only if *only == Names::default() => {
            say(
                Verdict::Refused,
                "every attachment".into(),
                &key("attachments"),
            );
        }
        names => say(
            Verdict::Granted,
            format!("attachments: {names}"),
            &key("attachments"),
        ),
    }
    for (limit, text) in limits(&rule.limits) {
        let path = ["tenant", name, "grant", number.as_str(), "limits", limit];
        say(Verdict::Limited, text, &path);
    }
    say(Verdict::Limited, jobs(tenant), &own("jobs-at-once"));
    Ok(said)
}

fn jobs(tenant: &Tenant) -> String {
    match tenant.jobs_at_once {
        Some(jobs) => format!("{jobs} jobs of the tenant at the same time (jobs-at-once)"),
        None => "any number of jobs of the tenant at the same time (jobs-at-once)".into(),
    }
}

/// Each limit by its key, in words.
fn limits(limits: &Limits) -> Vec<(&'static str, String)> {
    let bytes = |key, what: &str, bytes: u64| (key, format!("{bytes} bytes {what} ({key})"));
    let seconds = |key, what: &str, s: u64| (key, format!("{s} s {what} ({key})"));
    let mut rows = vec![
        bytes(
            "memory",
            "of memory for all volumes together",
            limits.memory,
        ),
        seconds(
            "cpu-seconds",
            "of processor time for all volumes together",
            limits.cpu_seconds,
        ),
        seconds(
            "wall-seconds",
            "from start to end of each run",
            limits.wall_seconds,
        ),
        bytes(
            "output-bytes",
            "stored, before encoding",
            limits.output_bytes,
        ),
        bytes("read-bytes", "of disks read", limits.read_bytes),
        ("objects", format!("{} objects (objects)", limits.objects)),
        bytes("log-bytes", "of log", limits.log_bytes),
        bytes("receipt-bytes", "in a receipt", limits.receipt_bytes.into()),
        bytes(
            "component-bytes",
            "in the component",
            limits.component_bytes,
        ),
    ];
    rows.push(match limits.bandwidth {
        Some(rate) => bytes("bandwidth", "of disks read in a second", rate.get()),
        None => ("bandwidth", "reading as fast as it goes (bandwidth)".into()),
    });
    rows.push(match limits.fleecing_bytes {
        Some(most) => bytes(
            "fleecing-bytes",
            "of fleecing images, or the job is given up",
            most,
        ),
        None => (
            "fleecing-bytes",
            "fleecing images as large as the file system allows (fleecing-bytes)".into(),
        ),
    });
    rows.push(match limits.snapshot_seconds {
        Some(most) => seconds(
            "snapshot-seconds",
            "for the snapshot, or the job is given up",
            most,
        ),
        None => (
            "snapshot-seconds",
            "a snapshot that lives as long as its runs (snapshot-seconds)".into(),
        ),
    });
    rows.push(match limits.progress_per_minute {
        Some(least) => bytes(
            "progress-per-minute",
            "at least to be covered in a minute",
            least,
        ),
        None => (
            "progress-per-minute",
            "any pace (progress-per-minute)".into(),
        ),
    });
    rows.push(match limits.zstd_level {
        Some(most) => (
            "zstd-level",
            format!("zstd at no higher a level than {most} (zstd-level)"),
        ),
        None => (
            "zstd-level",
            "zstd at whatever level the archive has (zstd-level)".into(),
        ),
    });
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const ACME: &str = "[tenant.acme]\nvms = ['web', 'db']\narchives = ['main']\n\
        [tenant.acme.provider.chunked]\ncomponent = 'c.wasm'\n\
        sha256 = 'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'\n\
        [[tenant.acme.grant]]\nprovider = 'chunked'\nvms = ['web']\nvolumes = ['scsi0']\n\
        discard = true\nwasi = ['output', 'random']\n[tenant.acme.grant.limits]\nobjects = 7\n";

    fn said(vm: &str, provider: &str) -> Vec<Clause> {
        let config = crate::policy::parse(ACME, Path::new("f")).unwrap();
        explain(&config, "acme", vm, provider).unwrap()
    }

    fn has(said: &[Clause], verdict: Verdict, part: &str, line: Option<usize>) -> bool {
        said.iter().any(|clause| {
            clause.verdict == verdict && clause.text.contains(part) && clause.line == line
        })
    }

    #[test]
    fn every_key_of_a_rule_is_explained_with_its_line() {
        let said = said("web", "chunked");
        assert!(has(&said, Verdict::Granted, "scsi0", Some(10)), "{said:#?}");
        assert!(has(&said, Verdict::Granted, "discard", Some(11)));
        assert!(has(&said, Verdict::Refused, "(read)", None));
        assert!(has(&said, Verdict::Refused, "every attachment", None));
        assert!(has(
            &said,
            Verdict::Granted,
            "WASI: random, output (wasi)",
            Some(12)
        ));
        assert!(has(&said, Verdict::Limited, "7 objects", Some(14)));
        assert!(has(&said, Verdict::Limited, "e3b0c442", Some(6)));
        let Ok(toml::Value::Table(all)) = toml::Value::try_from(Limits::default()) else {
            panic!("limits are a table");
        };
        // Those without a value are left out of TOML.
        for key in all.keys() {
            assert!(
                said.iter()
                    .any(|clause| clause.text.contains(&format!("({key})"))),
                "{key}"
            );
        }
    }

    #[test]
    fn what_no_rule_names_is_refused_altogether() {
        for (vm, provider) in [("db", "chunked"), ("web", "image"), ("mail", "chunked")] {
            let said = said(vm, provider);
            assert!(
                said.len() == 1 && said[0].verdict == Verdict::Refused,
                "{said:?}"
            );
        }
        let config = crate::policy::parse(ACME, Path::new("f")).unwrap();
        let error = explain(&config, "acne", "web", "chunked").unwrap_err();
        assert!(error.to_string().contains("there is acme"), "{error}");
    }
}
