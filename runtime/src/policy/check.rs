//! What is wrong with a configuration's policy: contradictions, which keep it from being used at all, and rules that
//! can never mean anything.
//!
//! Nothing here asks a VM or an archive: whether a disk exists is known only while its QEMU runs.

use super::lines::Lines;
use super::tenant::{Rule, Tenant};
use super::{Limits, Names};
use crate::archive::{ComponentId, NamespaceName};
use crate::channel::{MAX_RECEIPT, World};
use crate::config::Config;
use crate::sandbox::MAX_COMPONENT;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// What the smallest provider has before its first line: 17 pages of WebAssembly, one of them the compiler's own data.
const LEAST_MEMORY: u64 = 17 << 16;

/// The unit of everything that is stored, in bytes.
const BLOCK: u64 = crate::job::point_in_time::BLOCK_SIZE as u64;

/// A line of a provider's log costs at least this, in bytes.
const LINE_COST: u64 = crate::grants::LINE_COST;

/// Something wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Finding {
    /// Where, counted from 1.
    pub line: usize,
    /// How bad it is.
    pub kind: Kind,
    /// One line.
    pub message: String,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Two things that cannot both be meant, or one that makes every job fail.
    Contradiction,
    /// It changes nothing.
    DeadRule,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.message)
    }
}

/// What is known of a provider's component.
#[derive(Debug, Clone, Copy)]
pub struct Inspected {
    /// In bytes.
    pub size: u64,
    /// Its digest.
    pub id: ComponentId,
    /// The world that it is for; none where it was not looked into or is of none.
    pub world: Option<World>,
}

/// Components by the names of their tenant, which is empty without tenants, and provider.
pub type Components = BTreeMap<(String, String), Inspected>;

/// Everything that is wrong, in the order of lines.
pub fn findings(config: &Config, components: &Components) -> Vec<Finding> {
    let mut check = Check::new(config);
    check.contradictions();
    for (name, provider) in &config.provider {
        let known = components.get(&(String::new(), name.clone()));
        let path = ["provider", name];
        check.limits(&provider.limits, &path, known);
        if let (Some(known), Some(pin)) = (known, provider.sha256) {
            check.pin(known, pin, &path);
        }
        let read = config.lines.exact(&["provider", name, "grant", "read"]);
        if provider.grant.read && known.is_some_and(Inspected::is_blind) && read.is_some() {
            check.blind(&["provider", name, "grant", "read"], name);
        }
    }
    for (name, tenant) in &config.tenant {
        check.tenant(name, tenant, components);
    }
    check
        .found
        .sort_by_key(|finding| (finding.line, finding.kind));
    check.found
}

/// What keeps a configuration from being used: whatever it meant, it was not this.
pub fn contradictions(config: &Config) -> Vec<Finding> {
    let mut check = Check::new(config);
    check.contradictions();
    check.found.sort_by_key(|finding| finding.line);
    check.found
}

impl Inspected {
    fn is_blind(&self) -> bool {
        self.world == Some(World::BlindProvider)
    }
}

struct Check<'a> {
    config: &'a Config,
    lines: &'a Lines,
    found: Vec<Finding>,
}

impl<'a> Check<'a> {
    fn new(config: &'a Config) -> Self {
        Self {
            config,
            lines: &config.lines,
            found: Vec::new(),
        }
    }

    fn say(&mut self, kind: Kind, path: &[&str], message: String) {
        self.found.push(Finding {
            line: self.lines.near(path).unwrap_or(1),
            kind,
            message,
        });
    }

    fn contradiction(&mut self, path: &[&str], message: String) {
        self.say(Kind::Contradiction, path, message);
    }

    fn dead(&mut self, path: &[&str], message: String) {
        self.say(Kind::DeadRule, path, message);
    }

    fn contradictions(&mut self) {
        let config = self.config;
        if config.tenant.is_empty() {
            return;
        }
        for provider in config.provider.keys() {
            self.contradiction(
                &["provider", provider],
                format!(
                    "[provider.{provider}] belongs to no tenant; where there are tenants it is [tenant.NAME.provider.{provider}]"
                ),
            );
        }
        let mut owners = BTreeMap::new();
        let mut namespaces = BTreeMap::new();
        for (name, tenant) in &config.tenant {
            for (index, vm) in tenant.vms.iter().enumerate() {
                let path = ["tenant", name, "vms", &index.to_string()];
                match owners.insert(vm, name) {
                    Some(other) if other == name => {
                        self.contradiction(&path, format!("the VM '{vm}' is listed twice"));
                    }
                    Some(other) => self.contradiction(
                        &path,
                        format!("the VM '{vm}' belongs to tenant {other} already, and a VM has one owner"),
                    ),
                    None => {}
                }
            }
            let namespace = tenant.namespace(name);
            let path = ["tenant", name, "namespace"];
            if namespace.parse::<NamespaceName>().is_err() {
                self.contradiction(
                    &path,
                    format!(
                        "'{}' cannot name a namespace: use 1 to 128 letters, digits, '-', '_' and '.'",
                        namespace.escape_debug()
                    ),
                );
            }
            // It names files in the state folder.
            if name.parse::<NamespaceName>().is_err() {
                self.contradiction(
                    &["tenant", name],
                    format!(
                        "'{}' cannot name a tenant: use 1 to 128 letters, digits, '-', '_' and '.'",
                        name.escape_debug()
                    ),
                );
            }
            if let Some(other) = namespaces.insert(namespace, name) {
                self.contradiction(
                    &path,
                    format!("the namespace '{namespace}' is tenant {other}'s already, and tenants are kept apart by it"),
                );
            }
            self.rules(name, tenant);
        }
    }

    /// Names that a tenant's rules use and it does not have, and two rules for the same.
    fn rules(&mut self, name: &str, tenant: &Tenant) {
        let mut ruled = BTreeMap::new();
        for (number, rule) in tenant.grant.iter().enumerate() {
            let index = number.to_string();
            let at = |key: &'static str| ["tenant", name, "grant", index.as_str(), key];
            let provider = rule.provider.escape_debug();
            if !tenant.provider.contains_key(&rule.provider) {
                let message = format!("tenant {name} has no provider '{provider}'");
                self.contradiction(&at("provider"), message);
            }
            for vm in rule.vms.listed() {
                if !tenant.vms.contains(vm) {
                    let vm = vm.escape_debug();
                    let message = format!("the VM '{vm}' is not among the `vms` of tenant {name}");
                    self.contradiction(&at("vms"), message);
                }
            }
            for vm in tenant.vms.iter().filter(|vm| rule.vms.covers(vm)) {
                let Some(first) = ruled.insert((vm, &rule.provider), number) else {
                    continue;
                };
                let path = ["tenant", name, "grant", &first.to_string()];
                let first = self.lines.near(&path).unwrap_or(1);
                let message = format!(
                    "line {first} has a rule for the provider '{provider}' on the VM '{vm}' already, and it is unclear which holds"
                );
                self.contradiction(&at("provider"), message);
            }
        }
    }

    /// What is allowed in itself and comes to nothing.
    fn tenant(&mut self, name: &str, tenant: &Tenant, components: &Components) {
        for (index, vm) in tenant.vms.iter().enumerate() {
            let path = ["tenant", name, "vms", &index.to_string()];
            match self.config.vm.get(vm) {
                None => self.dead(&path, format!("there is no [vm.{vm}]")),
                Some(known) => self.defaults(name, tenant, vm, known),
            }
            if !tenant.grant.iter().any(|rule| rule.vms.covers(vm)) {
                self.dead(&path, format!("no rule grants anything on the VM '{vm}'"));
            }
        }
        for (index, archive) in tenant.archives.iter().enumerate() {
            if !self.config.archive.contains_key(archive) {
                let path = ["tenant", name, "archives", &index.to_string()];
                self.dead(&path, format!("there is no [archive.{archive}]"));
            }
        }
        if tenant.archives.is_empty() && !tenant.grant.is_empty() {
            let path = ["tenant", name, "archives"];
            let message = format!("tenant {name} has no archive, so nothing can be backed up");
            self.contradiction(&path, message);
        }
        for (provider, written) in &tenant.provider {
            let path = ["tenant", name, "provider", provider];
            let used = |rule: &&Rule| {
                rule.provider == *provider && tenant.vms.iter().any(|vm| rule.vms.covers(vm))
            };
            if !tenant.grant.iter().any(|rule| used(&rule)) {
                let message = format!("no VM may use the provider '{provider}'");
                self.dead(&path, message);
            }
            let known = components.get(&(name.to_owned(), provider.clone()));
            if let Some(known) = known {
                self.pin(known, written.sha256, &path);
            }
        }
        for (number, rule) in tenant.grant.iter().enumerate() {
            let index = number.to_string();
            let at = ["tenant", name, "grant", index.as_str()];
            let key = |key: &'static str| ["tenant", name, "grant", index.as_str(), key];
            let known = components.get(&(name.to_owned(), rule.provider.clone()));
            if rule.read && known.is_some_and(Inspected::is_blind) {
                self.blind(&key("read"), &rule.provider);
            }
            if rule.volumes == Names::default() {
                let message = "it grants no volume, so it grants nothing".into();
                self.dead(&key("volumes"), message);
            }
            let vms: Vec<_> = tenant
                .vms
                .iter()
                .filter(|vm| rule.vms.covers(vm))
                .filter_map(|vm| self.config.vm.get(vm))
                .collect();
            for attachment in rule.attachments.listed() {
                if !vms.iter().any(|vm| vm.attachments.contains_key(attachment)) {
                    let attachment = attachment.escape_debug();
                    let message = format!("no VM of this rule has an attachment '{attachment}'");
                    self.dead(&key("attachments"), message);
                }
            }
            // A VM that names no disks has those that its QEMU tells, which nobody can know here.
            let named = !vms.is_empty() && vms.iter().all(|vm| !vm.disks.is_empty());
            for volume in rule.volumes.listed() {
                let names = |vm: &&crate::config::Vm| {
                    vm.disks.contains(volume) || vm.extra.contains_key(volume)
                };
                if named && !vms.iter().any(names) {
                    let volume = volume.escape_debug();
                    let message = format!("no VM of this rule names the disk '{volume}'");
                    self.dead(&key("volumes"), message);
                }
            }
            self.limits(&rule.limits, &at, known);
        }
    }

    /// What a command on the VM takes when nothing is named.
    fn defaults(&mut self, name: &str, tenant: &Tenant, vm: &str, known: &crate::config::Vm) {
        if let Some(provider) = &known.provider
            && tenant.rule(vm, provider).is_none()
        {
            let provider = provider.escape_debug();
            let message = format!(
                "the VM '{vm}' is backed up by '{provider}' unless another is named, and tenant {name} does not grant that provider anything on it"
            );
            self.contradiction(&["vm", vm, "provider"], message);
        }
        if let Some(archive) = &known.archive
            && !tenant.archives.contains(archive)
        {
            let archive = archive.escape_debug();
            let message = format!(
                "backups of the VM '{vm}' go to '{archive}' unless another is named, which is not among the `archives` of tenant {name}"
            );
            self.contradiction(&["vm", vm, "archive"], message);
        }
        if let Some((number, rule)) = known
            .provider
            .as_ref()
            .and_then(|provider| tenant.rule(vm, provider))
            && let Some(disk) = known.disks.iter().find(|disk| !rule.volumes.covers(disk))
        {
            let path = ["tenant", name, "grant", &number.to_string()];
            let line = self.lines.near(&path).unwrap_or(1);
            let disk = disk.escape_debug();
            let message = format!(
                "the disk '{disk}' of the VM '{vm}' is backed up unless others are named, and the rule in line {line} does not grant it"
            );
            self.contradiction(&["vm", vm, "disks"], message);
        }
    }

    fn blind(&mut self, path: &[&str], provider: &str) {
        let message = format!(
            "`read` means nothing: the component of '{provider}' is for the world blind-provider, which has no way to read"
        );
        self.dead(path, message);
    }

    fn pin(&mut self, known: &Inspected, pin: ComponentId, path: &[&str]) {
        if known.id != pin {
            let path = [path, &["sha256"]].concat();
            let actual = known.id;
            let message = format!("the component's SHA-256 is {actual} now, so it is not run");
            self.contradiction(&path, message);
        }
    }

    /// Limits that were written below `path` and stop every job, or that nothing can reach.
    fn limits(&mut self, limits: &Limits, path: &[&str], known: Option<&Inspected>) {
        let below_all = |what: &str, least: u64| format!("below the {least} that {what}");
        let never = |why: String| format!("can never be reached: {why}");
        let blind = known.is_some_and(Inspected::is_blind);
        let Limits {
            cpu_seconds: cpu,
            wall_seconds: wall,
            ..
        } = *limits;
        // Each with what makes it one: only a limit that was written is reported.
        let mut rows = Vec::new();
        let mut row = |key, wrong: bool, kind, message: String| {
            if wrong {
                rows.push((key, kind, message));
            }
        };
        use Kind::{Contradiction, DeadRule};
        let needs_memory = below_all("every provider needs", LEAST_MEMORY);
        row(
            "memory",
            limits.memory < LEAST_MEMORY,
            Contradiction,
            needs_memory,
        );
        let no_time = || "no provider gets to its first line in no time".to_owned();
        row("cpu-seconds", cpu == 0, Contradiction, no_time());
        row("wall-seconds", wall == 0, Contradiction, no_time());
        let ends = never(format!(
            "a run ends after {wall} s (wall-seconds), and has one thread"
        ));
        row("cpu-seconds", cpu > wall, DeadRule, ends);
        let one_block = below_all("one block takes", BLOCK);
        let (output, read) = (limits.output_bytes, limits.read_bytes);
        row(
            "output-bytes",
            output < BLOCK,
            Contradiction,
            one_block.clone(),
        );
        row("read-bytes", read < BLOCK, Contradiction, one_block.clone());
        let copies = never(format!(
            "a blind provider stores only what is read for it, which is at most {read} bytes (read-bytes)"
        ));
        row("output-bytes", blind && output > read, DeadRule, copies);
        let short = (1..LINE_COST).contains(&limits.log_bytes);
        row(
            "log-bytes",
            short,
            DeadRule,
            below_all("one line costs", LINE_COST),
        );
        let longest = u64::from(limits.receipt_bytes) > MAX_RECEIPT as u64;
        let at_most = never(format!("no receipt has more than {MAX_RECEIPT} bytes"));
        row("receipt-bytes", longest, DeadRule, at_most);
        let largest = never(format!("no component has more than {MAX_COMPONENT} bytes"));
        row(
            "component-bytes",
            limits.component_bytes > MAX_COMPONENT,
            DeadRule,
            largest,
        );
        if let Some(known) = known {
            let size = below_all("the component has", known.size);
            row(
                "component-bytes",
                known.size > limits.component_bytes,
                Contradiction,
                size,
            );
        }
        if let Some(fleecing) = limits.fleecing_bytes {
            row("fleecing-bytes", fleecing < BLOCK, Contradiction, one_block);
        }
        if let Some(snapshot) = limits.snapshot_seconds {
            let none = "a snapshot that lives no time cannot be read".to_owned();
            row("snapshot-seconds", snapshot == 0, Contradiction, none);
            let gone = never(format!(
                "the snapshot is gone after {snapshot} s (snapshot-seconds)"
            ));
            row("wall-seconds", wall > snapshot, DeadRule, gone);
        }
        if let Some(progress) = limits.progress_per_minute {
            let nothing = never("nothing is less than 0".into());
            row("progress-per-minute", progress == 0, DeadRule, nothing);
            if let Some(rate) = limits.bandwidth {
                let most = rate.get().saturating_mul(60);
                let message = format!(
                    "no provider can keep it: at most {most} bytes are read in a minute (bandwidth)"
                );
                row(
                    "progress-per-minute",
                    progress > most,
                    Contradiction,
                    message,
                );
            }
        }
        for (key, kind, message) in rows {
            let path = [path, &["limits", key]].concat();
            if self.lines.exact(&path).is_some() {
                self.say(kind, &path, format!("`{key}` {message}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const ACME: &str = "[vm.web]\nqmp = '/run/web.qmp'\n[archive.main]\npath = '/srv'\n\
        [tenant.acme]\nvms = ['web']\narchives = ['main']\n\
        [tenant.acme.provider.chunked]\ncomponent = 'c.wasm'\n\
        sha256 = 'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'\n\
        [[tenant.acme.grant]]\nprovider = 'chunked'\nvms = ['web']\nvolumes = 'all'\n";

    fn said(text: &str) -> Vec<String> {
        said_with(text, &Components::new())
    }

    fn said_with(text: &str, components: &Components) -> Vec<String> {
        let config = Config::parse_unchecked(text, Path::new("f")).unwrap();
        let found = findings(&config, components);
        found.iter().map(ToString::to_string).collect()
    }

    /// Some finding contains all of `parts`.
    #[track_caller]
    fn finds(text: &str, parts: &[&str]) {
        let said = said(text);
        let found = |one: &String| parts.iter().all(|part| one.contains(part));
        assert!(said.iter().any(found), "{parts:?}: {said:?}");
    }

    fn inspected(world: World) -> Components {
        let known = Inspected {
            size: 1000,
            id: ComponentId::of(b""),
            world: Some(world),
        };
        [(("acme".into(), "chunked".into()), known)].into()
    }

    #[test]
    fn a_sound_file_has_no_findings() {
        assert_eq!(said(ACME), [""; 0]);
        assert_eq!(said_with(ACME, &inspected(World::Provider)), [""; 0]);
        assert_eq!(said(""), [""; 0]);
    }

    #[test]
    fn a_vm_has_one_owner_and_a_namespace_too() {
        let second = format!("{ACME}[tenant.beta]\nvms = ['web']\narchives = ['main']\n");
        finds(&second, &["line 16: the VM 'web' belongs to tenant acme"]);
        let same =
            format!("{ACME}[tenant.beta]\nvms = []\narchives = ['main']\nnamespace = 'acme'\n");
        finds(
            &same,
            &["line 18", "namespace 'acme' is tenant acme's already"],
        );
        finds(
            &ACME.replace("archives", "namespace = 'a/b'\narchives"),
            &["line 7", "'a/b' cannot name a namespace"],
        );
        let error = Config::parse(&second, Path::new("f.toml")).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("f.toml") && error.contains("line 16"),
            "{error}"
        );
    }

    #[test]
    fn a_rule_uses_names_that_its_tenant_has_and_none_twice() {
        finds(
            &ACME.replace("vms = ['web']\nvolumes", "vms = ['web', 'db']\nvolumes"),
            &["line 13", "'db' is not among the `vms`"],
        );
        let rule = |provider: &str, vms: &str| {
            format!(
                "{ACME}[[tenant.acme.grant]]\nprovider = '{provider}'\nvms = {vms}\nvolumes = 'all'\n"
            )
        };
        finds(&rule("image", "[]"), &["line 16", "no provider 'image'"]);
        finds(
            &rule("chunked", "'all'"),
            &["line 16", "line 11 has a rule", "unclear"],
        );
        finds(
            &format!("{ACME}[provider.own]\ncomponent = 'x'\n"),
            &["line 15", "belongs to no tenant"],
        );
    }

    #[test]
    fn rules_that_mean_nothing_are_found() {
        let more = |what: &str| ACME.replace("vms = ['web']\narchives", what);
        let mail = more("vms = ['web', 'mail']\narchives");
        finds(
            &mail,
            &["line 6", "no rule grants anything on the VM 'mail'"],
        );
        finds(&mail, &["line 6", "no [vm.mail]"]);
        finds(
            &ACME.replace("['main']", "['man']"),
            &["line 7", "no [archive.man]"],
        );
        finds(&ACME.replace("['main']", "[]"), &["line 7", "no archive"]);
        finds(
            &ACME.replace("vms = ['web']\nvolumes", "vms = []\nvolumes"),
            &["line 8", "no VM may use the provider 'chunked'"],
        );
        finds(
            &ACME.replace("'all'", "[]"),
            &["line 14", "grants no volume"],
        );
        finds(
            &format!("{ACME}attachments = ['xml']\n"),
            &["line 15", "attachment 'xml'"],
        );
        let named = ACME.replace("[archive", "disks = ['scsi0']\n[archive");
        finds(
            &named.replace("'all'", "['scsi1']"),
            &["line 15", "names the disk 'scsi1'"],
        );
    }

    #[test]
    fn defaults_that_are_denied_are_found() {
        let vm = |key: &str| ACME.replace("[archive", &format!("{key}\n[archive"));
        finds(
            &vm("provider = 'image'"),
            &["line 3", "does not grant that provider"],
        );
        finds(
            &vm("archive = 'other'"),
            &["line 3", "not among the `archives`"],
        );
        let disks = vm("provider = 'chunked'\ndisks = ['a', 'b']");
        finds(
            &disks.replace("'all'", "['a']"),
            &["line 4", "the disk 'b'", "line 13"],
        );
    }

    #[test]
    fn a_component_that_can_be_looked_into_is_held_against_the_file() {
        let read = format!("{ACME}read = true\n");
        let blind = inspected(World::BlindProvider);
        let said = said_with(&read, &blind);
        assert!(
            said[0].starts_with("line 15: `read` means nothing"),
            "{said:?}"
        );
        assert_eq!(said_with(&read, &inspected(World::Provider)), [""; 0]);
        let small = format!("{ACME}limits = {{ component-bytes = 999 }}\n");
        let said = said_with(&small, &blind);
        assert!(
            said[0].contains("below the 1000 that the component has"),
            "{said:?}"
        );
        let other = ACME.replace("e3b0", "e3b1");
        let said = said_with(&other, &blind);
        assert!(
            said[0].starts_with("line 10") && said[0].contains("e3b0c442"),
            "{said:?}"
        );
    }

    #[test]
    fn a_limit_below_what_any_job_needs_or_beyond_all_reach_is_found() {
        let rows = [
            ("memory = 1000", "`memory` below the 1114112"),
            ("cpu-seconds = 0", "`cpu-seconds` no provider"),
            ("wall-seconds = 0", "`wall-seconds` no provider"),
            (
                "cpu-seconds = 61\nwall-seconds = 60",
                "`cpu-seconds` can never",
            ),
            ("output-bytes = 65535", "`output-bytes` below the 65536"),
            ("read-bytes = 65535", "`read-bytes` below the 65536"),
            ("log-bytes = 63", "`log-bytes` below the 64"),
            ("receipt-bytes = 1048577", "`receipt-bytes` can never"),
            ("component-bytes = 67108865", "`component-bytes` can never"),
            ("fleecing-bytes = 65535", "`fleecing-bytes` below"),
            ("snapshot-seconds = 0", "`snapshot-seconds` a snapshot"),
            (
                "snapshot-seconds = 5\nwall-seconds = 6",
                "`wall-seconds` can never",
            ),
            ("progress-per-minute = 0", "`progress-per-minute` can never"),
            (
                "bandwidth = 10\nprogress-per-minute = 601",
                "at most 600 bytes",
            ),
        ];
        let sound = "memory = 1114112\ncpu-seconds = 60\nwall-seconds = 60\noutput-bytes = 65536\n\
            read-bytes = 65536\nlog-bytes = 64\nreceipt-bytes = 1048576\ncomponent-bytes = 67108864\n\
            fleecing-bytes = 65536\nsnapshot-seconds = 60\nbandwidth = 10\nprogress-per-minute = 600\n";
        let limits = |text: &str| format!("{ACME}[tenant.acme.grant.limits]\n{text}\n");
        assert_eq!(said(&limits(sound)), [""; 0]);
        for (text, part) in rows {
            let said = said(&limits(text));
            assert!(
                said.len() == 1 && said[0].contains(part),
                "{text}: {said:?}"
            );
        }
        // Without tenants too.
        let own = "[provider.p]\ncomponent = 'p'\n[provider.p.limits]\nwall-seconds = 0\n";
        finds(own, &["line 4", "`wall-seconds` no provider"]);
    }
}
