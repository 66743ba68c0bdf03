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
    let config = Config::parse(text, Path::new("f")).unwrap();
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
        wasi: Some(BTreeSet::new()),
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
    let same = format!("{ACME}[tenant.beta]\nvms = []\narchives = ['main']\nnamespace = 'acme'\n");
    finds(
        &same,
        &["line 18", "namespace 'acme' is tenant acme's already"],
    );
    finds(
        &ACME.replace("archives", "namespace = 'a/b'\narchives"),
        &["line 7", "'a/b' cannot name a namespace"],
    );
    let error = crate::policy::parse(&second, Path::new("f.toml")).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("f.toml") && error.contains("line 16"),
        "{error}"
    );
}

#[test]
fn names_are_such_that_folders_can_have_them_and_are_listed_once() {
    let twice = ACME.replace("vms = ['web']\narchives", "vms = ['web', 'web']\narchives");
    finds(&twice, &["line 6", "'web' is listed twice"]);
    let named = ACME.replace("tenant.acme", "tenant.'a/b'");
    finds(
        &named.replace("archives", "namespace = 'acme'\narchives"),
        &["line 5", "'a/b' cannot name a tenant"],
    );
}

#[test]
fn a_provider_without_a_tenant_is_held_against_its_component_too() {
    let said = |table: &str| {
        let mut known = inspected(World::BlindProvider);
        let known = known.pop_first().map(|(_, known)| known);
        let components = known.map(|known| ((String::new(), "p".to_owned()), known));
        said_with(
            &format!("[provider.p]\ncomponent = 'p'\n{table}"),
            &components.into_iter().collect(),
        )
    };
    assert_eq!(said(""), [""; 0]);
    let read = said("[provider.p.grant]\nread = true\n");
    assert!(
        read[0].starts_with("line 4: `read` means nothing"),
        "{read:?}"
    );
    let pin = said(&format!("sha256 = '{}'\n", "0".repeat(64)));
    assert!(
        pin[0].starts_with("line 3: the component's SHA-256"),
        "{pin:?}"
    );
    let output = said("[provider.p.limits]\noutput-bytes = 131072\nread-bytes = 65536\n");
    assert!(
        output[0].contains("a blind provider stores only"),
        "{output:?}"
    );
    let wasi = said("[provider.p.grant]\nread = false\nwasi = ['clocks']\n");
    assert!(wasi[0].contains("clocks without `read`"), "{wasi:?}");
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
fn parts_of_wasi_are_held_against_the_rule_and_the_component() {
    let clocks = format!("{ACME}wasi = ['clocks']\n");
    finds(&clocks, &["line 15", "clocks without `read`"]);
    let read = format!("{ACME}read = true\nwasi = ['clocks']\n");
    assert_eq!(said(&read), [""; 0]);
    let with = |text: &str, needs: &[Wasi]| {
        let mut components = inspected(World::Provider);
        for known in components.values_mut() {
            known.wasi = Some(needs.iter().copied().collect());
        }
        said_with(text, &components)
    };
    assert_eq!(with(&read, &[Wasi::Clocks]), [""; 0]);
    let lacks = with(&read, &[Wasi::Clocks, Wasi::Output]);
    assert!(
        lacks[0].starts_with("line 16: `wasi` lacks output"),
        "{lacks:?}"
    );
    let dead = with(&read, &[]);
    assert!(
        dead[0].starts_with("line 16: `wasi` grants clocks, which"),
        "{dead:?}"
    );
    let error = Config::parse(&format!("{ACME}wasi = ['files']\n"), Path::new("f"));
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("line 15") && error.contains("`files`"),
        "{error}"
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
        ("receipt-bytes = 65537", "`receipt-bytes` can never"),
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
        read-bytes = 65536\nlog-bytes = 64\nreceipt-bytes = 65536\ncomponent-bytes = 67108864\n\
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
