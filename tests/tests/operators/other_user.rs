//! A QEMU that runs as another user, as libvirt's do: fleecing images, further files and the NBD socket lie in folders
//! that it may not enter, and reach it as descriptors over the monitor.

use std::path::Path;

use anyhow::{Result, ensure};
use fleecebox_tests::{Emulator, MIB, Proxy, QemuState, Site};
use serde_json::json;
use std::os::unix::fs::PermissionsExt;

const SIZE: u64 = 4 * MIB;
/// `nobody`.
const USER: u32 = 65534;

fn disk(folder: &Path) -> Result<Vec<String>> {
    let file = folder.join("a");
    std::fs::File::create(&file)?.set_len(SIZE)?;
    let blockdev =
        json!({"driver": "raw", "node-name": "na", "file": {"driver": "file", "filename": file}});
    let device = "virtio-blk-pci,id=va,drive=na".to_string();
    Ok(vec![
        "-blockdev".into(),
        blockdev.to_string(),
        "-device".into(),
        device,
    ])
}

#[test]
fn a_qemu_of_another_user_is_handed_what_it_may_not_open() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        fleecebox_tests::not_shown("only root can run QEMU as another user");
        return Ok(());
    }
    let site = Site::new()?;
    let mut vm = Emulator::new(disk)?;
    vm.start_as(USER)?;
    vm.write("va", 1, 0, SIZE)?;
    let secret = site.path("tpm");
    std::fs::write(&secret, vec![9; 1024])?;
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o600))?;
    std::fs::set_permissions(site.path("fleecing"), PermissionsExt::from_mode(0o700))?;
    let before = QemuState::read(vm.monitors())?;
    for (form, format) in [("job", "raw"), ("filter", "raw"), ("job", "qcow2")] {
        site.configure(&format!(
            "[vm.web]\npoint-in-time = '{form}'\nfleecing-format = '{format}'\n[vm.web.extra]\ntpm = '{}'\n",
            secret.display()
        ))?;
        let order = site.order_for(&vm.monitors().product, "chunked")?;
        let backup = site.backup(&order)?;
        let restored = site.restore(&site.archive(), &backup.id)?;
        for (volume, byte, size) in [("va", 1, SIZE), ("tpm", 9, 1024)] {
            let bytes = std::fs::read(restored.join(format!("{volume}.raw")))?;
            ensure!(
                bytes == vec![byte; size as usize],
                "{volume} by {form} differs"
            );
        }
        QemuState::read(vm.monitors())?.assert_restored(&before, |_| true);
        let sets = vm.control()?.execute("query-fdsets", json!({}))?;
        ensure!(sets == json!([]), "descriptors were left in QEMU: {sets}");
    }

    // What passes the monitor on without descriptors leaves nothing but the refusal.
    let proxy = Proxy::start(vm.monitors())?;
    site.configure("")?;
    let order = site.order_for(proxy.socket(), "chunked")?;
    let outcome = site.backup_command(&order).arg("--quiet").run()?;
    let outcome = outcome.assert_refused(2, "QEMU cannot open the fleecing image");
    ensure!(
        outcome.stderr.contains("Permission denied"),
        "{}",
        outcome.stderr
    );
    QemuState::read(vm.monitors())?.assert_restored(&before, |_| true);
    site.check_no_fleecing_images()
}
