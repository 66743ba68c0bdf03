//! What is wrong with a configuration's policy: contradictions, which keep it from being used at all, and rules that
//! can never mean anything.
//!
//! Nothing here asks a VM or an archive: whether a disk exists is known only while its QEMU runs.

use crate::archive::{ComponentId, NamespaceName};
use crate::config::{Config, Limits, Lines, Names, Rule, Tenant};
use crate::contract::{MAX_COMPONENT, MAX_RECEIPT, Wasi, World};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// What the smallest provider has before its first line: 17 pages of WebAssembly, one of them the compiler's own data.
const LEAST_MEMORY: u64 = 17 << 16;

/// The unit of everything that is stored, in bytes.
const BLOCK: u64 = crate::contract::BLOCK_SIZE as u64;

/// A line of a provider's log costs at least this, in bytes.
const LINE_COST: u64 = crate::contract::LINE_COST;

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
#[derive(Debug, Clone)]
pub struct Inspected {
    /// In bytes.
    pub size: u64,
    /// Its digest.
    pub id: ComponentId,
    /// The world that it is for; none where it was not looked into or is of none.
    pub world: Option<World>,
    /// The least that it needs of WASI; none where it was not looked into.
    pub wasi: Option<BTreeSet<Wasi>>,
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
        let grant = ["provider", name, "grant"];
        check.wasi(&provider.grant.wasi, provider.grant.read, &grant, known);
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
            self.wasi(&rule.wasi, rule.read, &at, known);
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

    /// Parts of WASI that cannot come to anything, or that a component lacks.
    fn wasi(
        &mut self,
        granted: &BTreeSet<Wasi>,
        read: bool,
        rule: &[&str],
        known: Option<&Inspected>,
    ) {
        let path = [rule, &["wasi"]].concat();
        if granted.contains(&Wasi::Clocks) && !read {
            let message = "`wasi` grants clocks without `read`: by a clock, one that may not read could tell which \
                blocks are equal"
                .into();
            self.contradiction(&path, message);
        }
        let Some(needed) = known.and_then(|known| known.wasi.as_ref()) else {
            return;
        };
        for part in needed.difference(granted) {
            let message = format!(
                "`wasi` lacks {}, which the component imports, so it is not run",
                part.name()
            );
            self.contradiction(&path, message);
        }
        for part in granted.difference(needed) {
            let message = format!(
                "`wasi` grants {}, which the component does not import",
                part.name()
            );
            self.dead(&path, message);
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
mod tests;
