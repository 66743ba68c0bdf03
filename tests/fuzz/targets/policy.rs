//! The text of a policy.
//!
//! What must hold: no panic; every finding is one line about a line that the file has; an accepted file has no
//! contradiction; and nothing is granted that no rule names.

#![no_main]

use fleecebox::config::Config;
use fleecebox::config::Names;
use fleecebox::policy::check::{Components, contradictions, findings};
use fleecebox::policy::explain::explain;
use fleecebox::policy::{self, Restores, decide};
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|text: &str| {
    let file = Path::new("some.toml");
    let Ok(config) = Config::parse(text, file) else {
        assert!(policy::parse(text, file).is_err());
        return;
    };
    let contradictions = contradictions(&config);
    assert_eq!(policy::parse(text, file).is_ok(), contradictions.is_empty());
    let lines = text.matches('\n').count() + 1;
    for finding in findings(&config, &Components::new()) {
        assert!((1..=lines).contains(&finding.line), "{finding}");
        assert!(!finding.to_string().contains('\n'), "{finding}");
    }
    for (name, tenant) in &config.tenant {
        for vm in tenant.vms.iter().map(String::as_str).chain(["web"]) {
            for provider in tenant.provider.keys().map(String::as_str).chain(["p"]) {
                let said = explain(&config, name, vm, provider).expect("there is such a tenant");
                assert!(!said.is_empty());
                if !contradictions.is_empty() {
                    continue;
                }
                let rule = tenant
                    .grant
                    .iter()
                    .find(|rule| rule.provider == provider && rule.vms.covers(vm));
                let granted = tenant.vms.iter().any(|owned| owned == vm) && rule.is_some();
                if let Ok(decision) = decide(&config, vm, provider) {
                    let owner = decision.tenant.as_ref().expect("there are tenants");
                    if owner.name != *name {
                        continue;
                    }
                    let rule = rule.expect("nothing is granted without a rule");
                    assert!(granted);
                    assert_eq!(decision.provider.grant.read, rule.read);
                    assert_eq!(decision.provider.grant.discard, rule.discard);
                    assert_eq!(decision.volumes, rule.volumes);
                    if rule.volumes == Names::default() {
                        assert!(decision.disks(Vec::new()).is_err());
                    }
                }
                let restores = Restores::new(&config, tenant.namespace(name));
                assert_eq!(restores.limits(vm, provider).is_ok(), granted);
            }
        }
    }
});
