//! Further volumes of a VM are volumes like any other: what no rule grants is left out.

use std::fs;

use anyhow::{Result, ensure};
use fleecebox_tests::Backup;

use crate::scene::{INCOMPLETE, Scene};

#[test]
fn an_extra_volume_that_is_not_granted_is_not_even_opened_and_a_granted_one_is_backed_up()
-> Result<()> {
    let scene = Scene::new("chunked", "discard = true")?;
    let tpm = scene.site.path("tpm");
    fs::write(&tpm, vec![7; 4096])?;
    let rule = "provider = 'limited'\nvms = ['web', 'twin']\nvolumes = 'all'";
    let only = rule.replace("'all'", "['da', 'tpm']");
    let extra = format!(
        "[vm.web]\nextra = {{ tpm = '{}', sealed = '/nonexistent/sealed' }}\n",
        tpm.display()
    );
    scene.configure_with(|text| format!("{extra}{}", text.replace(rule, &only)))?;
    let order = scene.order("limited")?.only(&[]);
    let outcome = scene.site.backup_command(&order).run()?;
    ensure!(outcome.code() == Some(INCOMPLETE), "{}", outcome.stderr);
    ensure!(
        outcome.stderr.contains("sealed is left out"),
        "{}",
        outcome.stderr
    );
    let backup = Backup::told_by(&outcome)?;
    let names: Vec<_> = backup.volumes.iter().map(|it| &it["name"]).collect();
    assert_eq!(names, ["da", "tpm"]);
    ensure!(
        backup.said.contains("does not grant all that is `extra`"),
        "{}",
        backup.said
    );

    // Not even a disk in its place.
    scene.configure_with(|text| text.replace("['da', 'tpm']", "['tpm']"))?;
    scene.finds_mistaken(&order, "nothing but what is `extra` of the VM 'web'")?;
    scene.configure_with(|text| text.replace("['tpm']", "['da', 'tpm']"))?;

    // With everything granted the other one counts too, and is not there.
    scene.configure_with(|text| text.replace(&only, rule))?;
    scene.finds_mistaken(&order, "/nonexistent/sealed")
}
