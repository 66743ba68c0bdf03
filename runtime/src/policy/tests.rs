//! Properties of the parser and of what it decides: whatever stands in the file, nothing is granted that it does not
//! say.

use super::check::{Components, findings};
use super::explain::explain;
use super::{decide, parse};
use crate::config::{Config, Limits, Names};
use proptest::prelude::*;
use std::path::Path;

const NAMES: [&str; 3] = ["web", "db", "mail"];
const TENANTS: [&str; 2] = ["acme", "beta"];
const PIN: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// A file with the shape of a policy, right or wrong, and whom it grants what, read off the way it was made.
#[derive(Debug, Clone)]
struct Made {
    text: String,
    /// Tenant, provider, VM, disk.
    granted: Vec<(usize, usize, usize, Option<usize>)>,
    owned: Vec<(usize, usize)>,
}

fn list(chosen: &[usize]) -> String {
    let names: Vec<_> = chosen
        .iter()
        .map(|&name| format!("'{}'", NAMES[name]))
        .collect();
    format!("[{}]", names.join(", "))
}

fn some_names() -> impl Strategy<Value = Vec<usize>> {
    proptest::sample::subsequence(vec![0, 1, 2], 0..=3)
}

prop_compose! {
    fn rule()(provider in 0..3usize, vms in some_names(), volumes in proptest::option::of(some_names())) -> (usize, Vec<usize>, Option<Vec<usize>>) {
        (provider, vms, volumes)
    }
}

prop_compose! {
    fn policy()(
        tenants in proptest::collection::vec((some_names(), some_names(), proptest::collection::vec(rule(), 0..3)), 1..=2),
    ) -> Made {
        let mut made = Made { text: String::new(), granted: Vec::new(), owned: Vec::new() };
        for (tenant, (vms, providers, rules)) in tenants.into_iter().enumerate() {
            let name = TENANTS[tenant];
            made.text += &format!("[tenant.{name}]\nvms = {}\narchives = ['main']\n", list(&vms));
            made.owned.extend(vms.iter().map(|&vm| (tenant, vm)));
            for provider in providers {
                made.text += &format!(
                    "[tenant.{name}.provider.{}]\ncomponent = 'c'\nsha256 = '{PIN}'\n", NAMES[provider]
                );
            }
            for (provider, vms, volumes) in rules {
                made.text += &format!(
                    "[[tenant.{name}.grant]]\nprovider = '{}'\nvms = {}\nvolumes = {}\n",
                    NAMES[provider], list(&vms),
                    volumes.as_ref().map_or("'all'".into(), |volumes| list(volumes)),
                );
                for vm in vms {
                    match &volumes {
                        None => made.granted.push((tenant, provider, vm, None)),
                        Some(volumes) => made.granted.extend(
                            volumes.iter().map(|&disk| (tenant, provider, vm, Some(disk)))
                        ),
                    }
                }
            }
        }
        made
    }
}

proptest! {
    #[test]
    fn whatever_is_decided_was_granted(made in policy()) {
        let Ok(config) = parse(&made.text, Path::new("f")) else {
            // Then there is something to be said about it.
            let config = Config::parse(&made.text, Path::new("f")).unwrap();
            prop_assert!(!findings(&config, &Components::new()).is_empty());
            return Ok(());
        };
        for (vm, vm_name) in NAMES.iter().enumerate() {
            for (provider, provider_name) in NAMES.iter().enumerate() {
                let Ok(decision) = decide(&config, vm_name, provider_name) else { continue };
                let tenant = decision.tenant.clone().unwrap();
                let owner = TENANTS.iter().position(|name| **name == *tenant.name).unwrap();
                prop_assert!(made.owned.contains(&(owner, vm)));
                prop_assert!(!decision.provider.grant.read && !decision.provider.grant.discard);
                prop_assert_eq!(decision.namespace.as_str(), TENANTS[owner]);
                prop_assert_eq!(&decision.attachments, &Names::default());
                prop_assert!(decision.archive(&config, Some("other".into())).is_err());
                for (disk, disk_name) in NAMES.iter().enumerate() {
                    let wanted = decision.disks(vec![(*disk_name).to_owned()]).is_ok();
                    let granted = made.granted.contains(&(owner, provider, vm, Some(disk)))
                        || made.granted.contains(&(owner, provider, vm, None));
                    prop_assert_eq!(wanted, granted);
                }
            }
        }
    }

    #[test]
    fn any_change_to_a_file_is_parsed_or_refused_with_a_line_that_it_has(
        made in policy(), at in any::<prop::sample::Index>(), with in "\\PC{0,6}|\n|'|\\[|\\]|= 1\n",
    ) {
        let mut text = made.text;
        let at = at.index(text.len());
        if text.is_char_boundary(at) {
            text.insert_str(at, &with);
        }
        let lines = text.lines().count() + 1;
        if let Ok(config) = Config::parse(&text, Path::new("f")) {
            for finding in findings(&config, &Components::new()) {
                prop_assert!((1..=lines).contains(&finding.line), "{}", finding);
                prop_assert!(!finding.message.contains('\n'), "{}", finding);
            }
            for tenant in config.tenant.keys() {
                let said = explain(&config, tenant, "web", "db").unwrap();
                prop_assert!(said.iter().all(|clause| clause.line.is_none_or(|line| line <= lines)));
            }
        }
    }
}

#[test]
fn an_empty_list_of_volumes_grants_no_disk_rather_than_all() {
    let text = format!(
        "[tenant.acme]\nvms = ['web']\narchives = ['main']\n[tenant.acme.provider.c]\ncomponent = 'c'\n\
         sha256 = '{PIN}'\n[[tenant.acme.grant]]\nprovider = 'c'\nvms = 'all'\nvolumes = []\n"
    );
    let config = parse(&text, Path::new("f")).unwrap();
    let decision = decide(&config, "web", "c").unwrap();
    assert!(decision.disks(Vec::new()).is_err());
}

#[test]
fn a_tenant_with_several_archives_names_one_and_a_namespace_is_a_plain_name() {
    let text = format!(
        "[tenant.acme]\nvms = ['web']\narchives = ['main', 'spare']\n[tenant.acme.provider.c]\ncomponent = 'c'\n\
         sha256 = '{PIN}'\n[[tenant.acme.grant]]\nprovider = 'c'\nvms = 'all'\nvolumes = 'all'\n"
    );
    let config = parse(&text, Path::new("f")).unwrap();
    let decision = decide(&config, "web", "c").unwrap();
    let unnamed = decision.archive(&config, None).unwrap_err().to_string();
    assert!(unnamed.contains("line 3 grants main, spare"), "{unnamed}");
    let named = decision.archive(&config, Some("spare".into()));
    assert_eq!(named.unwrap().as_deref(), Some("spare"));
    let config = parse("[provider.'a/b']\ncomponent = 'c'\n", Path::new("f")).unwrap();
    let error = decide(&config, "web", "a/b").unwrap_err().to_string();
    assert!(error.contains("'a/b' cannot name a namespace"), "{error}");
}

#[test]
fn a_pin_that_is_no_digest_is_refused_with_what_it_should_be() {
    for (pin, line) in [("abc", 2), (&PIN.to_uppercase()[..], 2)] {
        let text = format!("[provider.p]\nsha256 = '{pin}'\ncomponent = 'p'\n");
        let error = parse(&text, Path::new("f")).unwrap_err().to_string();
        assert!(
            error.contains(&format!("line {line}")) && error.contains("sha256sum"),
            "{error}"
        );
    }
}

#[test]
fn no_number_of_seconds_is_too_large_for_a_clock() {
    let limits = Limits {
        wall_seconds: u64::MAX,
        cpu_seconds: u64::MAX,
        ..Limits::default()
    };
    for limit in [limits.wall(), limits.cpu()] {
        assert!(std::time::Instant::now().checked_add(2 * limit).is_some());
    }
}
