//! Folders that are another user's, what is there already, and file systems that cannot do everything.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Disk, MIB, Site, StorageDaemon, compare, files_below, not_shown};

use super::{LoopDevice, SIZE, Scene};

/// `nobody`.
const OTHER: u32 = 65534;

fn mode(path: &Path) -> Result<u32> {
    Ok(fs::symlink_metadata(path)?.mode() & 0o7777)
}

/// Whether root may play another user here.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        not_shown("files of another user (only root can make them)");
    }
    root
}

/// A folder of another user's, and a file that is none of his.
fn hostile(scene: &Scene) -> Result<(PathBuf, PathBuf)> {
    let (folder, secret) = (scene.site.path("theirs"), scene.site.path("secret"));
    fs::create_dir(&folder)?;
    fs::set_permissions(&folder, Permissions::from_mode(0o777))?;
    chown(&folder, Some(OTHER), Some(OTHER))?;
    fs::write(&secret, b"precious")?;
    Ok((folder, secret))
}

#[test]
fn names_that_another_user_planted_lead_nowhere_and_what_is_restored_is_private() -> Result<()> {
    let scene = Scene::new()?;
    if !is_root() {
        return Ok(());
    }
    let (folder, secret) = hostile(&scene)?;
    for (format, content) in [("raw", &scene.da), ("qcow2", &scene.da)] {
        let file = folder.join(format!("disk.{format}"));
        for planted in [".partial", ".partial-qcow2"] {
            let planted = folder.join(format!("disk.{format}{planted}"));
            symlink(&secret, &planted)?;
            lchown(&planted, Some(OTHER), Some(OTHER))?;
        }
        let restore = scene.restore(&["--volume", "da", "--force", "--format", format], &file);
        let umask = ["sh", "-c", "umask 0; exec \"$@\"", "sh"];
        restore.started_by(umask).run()?.assert_success();
        compare::same_disk(&file, content)?;
        assert_eq!(mode(&file)?, 0o600);
        assert_eq!(fs::symlink_metadata(&file)?.uid(), 0);
        assert_eq!(fs::read(&secret)?, b"precious");
        // One of theirs that is replaced does not make the new one theirs.
        chown(&file, Some(OTHER), Some(OTHER))?;
        fs::set_permissions(&file, Permissions::from_mode(0o666))?;
        let restore = scene.restore(&["--volume", "da", "--force", "--format", format], &file);
        let outcome = restore.run()?.assert_success();
        ensure!(outcome.stderr.contains("this user's alone"), "{outcome:?}");
        assert_eq!((fs::metadata(&file)?.uid(), mode(&file)?), (0, 0o600));
    }
    Ok(())
}

#[test]
fn a_link_of_another_user_is_refused_and_an_own_one_followed() -> Result<()> {
    let scene = Scene::new()?;
    if !is_root() {
        return Ok(());
    }
    let (folder, secret) = hostile(&scene)?;
    let forced = |to: &Path| scene.restore(&["--volume", "da", "--force"], to).run();
    let theirs = folder.join("link.raw");
    symlink(&secret, &theirs)?;
    lchown(&theirs, Some(OTHER), Some(OTHER))?;
    forced(&theirs)?.assert_refused(2, "a symbolic link of user 65534's");
    let way = folder.join("way");
    symlink(scene.site.path(""), &way)?;
    lchown(&way, Some(OTHER), Some(OTHER))?;
    forced(&way.join("secret"))?.assert_refused(2, "a symbolic link of user 65534's");
    assert_eq!(fs::read(&secret)?, b"precious");

    let (file, own) = (scene.site.path("file.raw"), scene.site.path("own.raw"));
    fs::write(&file, b"old")?;
    symlink("file.raw", &own)?;
    forced(&own)?.assert_success();
    ensure!(
        fs::symlink_metadata(&own)?.is_symlink(),
        "the link was replaced"
    );
    compare::same_bytes(&file, &scene.da)
}

#[test]
fn what_is_no_file_stays_what_it_is() -> Result<()> {
    let scene = Scene::new()?;
    let path = |name: &str| scene.site.path(name);
    let (fifo, socket, folder) = (path("fifo"), path("socket"), path("folder.raw"));
    ensure!(Command::new("mkfifo").arg(&fifo).status()?.success());
    let _listener = std::os::unix::net::UnixListener::bind(&socket)?;
    fs::create_dir(&folder)?;
    let forced = |to: &Path| scene.restore(&["--volume", "da", "--force"], to).run();
    forced(&fifo)?.assert_refused(2, "is a FIFO");
    ensure!(fs::symlink_metadata(&fifo)?.file_type().is_fifo());
    forced(&socket)?.assert_refused(2, "is a socket");
    ensure!(fs::symlink_metadata(&socket)?.file_type().is_socket());
    let device = path("null");
    let made = Command::new("mknod")
        .arg(&device)
        .args(["c", "1", "3"])
        .status()?;
    if made.success() {
        forced(&device)?.assert_refused(2, "is a character device");
        ensure!(fs::symlink_metadata(&device)?.file_type().is_char_device());
    }
    Ok(())
}

#[test]
fn what_force_replaces_hands_its_owner_and_mode_on() -> Result<()> {
    let scene = Scene::new()?;
    let file = scene.site.path("old.raw");
    fs::write(&file, b"old")?;
    fs::set_permissions(&file, Permissions::from_mode(0o640))?;
    let owner = if is_root() {
        (33, 34)
    } else {
        (fs::metadata(&file)?.uid(), fs::metadata(&file)?.gid())
    };
    chown(&file, Some(owner.0), Some(owner.1))?;
    for format in ["raw", "qcow2"] {
        let restore = scene.restore(&["--volume", "da", "--force", "--format", format], &file);
        restore.run()?.assert_success();
        let now = fs::metadata(&file)?;
        assert_eq!(
            ((now.uid(), now.gid()), mode(&file)?),
            (owner, 0o640),
            "{format}"
        );
    }
    compare::same_disk(&file, &scene.da)
}

#[test]
fn a_limit_on_the_size_of_files_is_named_and_leaves_nothing() -> Result<()> {
    let scene = Scene::new()?;
    let folder = scene.site.path("restored");
    for format in ["raw", "qcow2"] {
        let file = folder.join(format!("disk.{format}"));
        let restore = scene.restore(&["--volume", "da", "--format", format], &file);
        let limited = restore.started_by(["prlimit", &format!("--fsize={MIB}")]);
        limited.run()?.assert_refused(1, "ulimit -f");
        assert_eq!(fs::read_dir(&folder)?.count(), 0, "{format}");
    }
    // The converter alone meets it: qcow2 needs more than the volume has.
    let limited = scene
        .restore(
            &["--volume", "da", "--format", "qcow2"],
            &folder.join("disk.qcow2"),
        )
        .started_by(["prlimit", &format!("--fsize={SIZE}")]);
    let outcome = limited.run()?;
    ensure!(matches!(outcome.code(), Some(0 | 1)), "{outcome:?}");
    Ok(())
}

#[test]
fn a_device_of_4096_byte_sectors_takes_a_volume_with_a_short_end() -> Result<()> {
    let scene = Scene::new()?;
    let image = scene.site.path("device.img");
    let length = (SIZE + 4096).next_multiple_of(4096);
    fs::write(&image, vec![0xaa; length as usize])?;
    let Some(device) = LoopDevice::attach_with(&["--sector-size", "4096"], &image)? else {
        return Ok(());
    };
    let restore = scene.restore(&["--volume", "da", "--force"], &device.path);
    restore.run()?.assert_success();
    device.detach()?;
    let (mut written, content) = (fs::read(&image)?, fs::read(&scene.da)?);
    let beyond = written.split_off(SIZE as usize);
    ensure!(written == content, "it differs");
    ensure!(
        beyond.iter().all(|byte| *byte == 0xaa),
        "it wrote beyond the volume"
    );
    Ok(())
}

/// A file system by a program that serves it through FUSE.
struct Fuse {
    at: PathBuf,
    device: Option<LoopDevice>,
}

impl Fuse {
    /// exFAT: no hard links, no rename that replaces nothing, no unnamed files, no owners.
    fn exfat(image: &Path, at: &Path) -> Result<Option<Self>> {
        fs::File::create(image)?.set_len(256 * MIB)?;
        fs::create_dir(at)?;
        let run = |program: &str, arguments: &[&Path]| {
            let outcome = Command::new(program).args(arguments).output();
            outcome.is_ok_and(|outcome| outcome.status.success())
        };
        if !run("mkfs.exfat", &[image]) {
            not_shown("exFAT (mkfs.exfat of exfatprogs)");
            return Ok(None);
        }
        let Some(device) = LoopDevice::attach(image)? else {
            return Ok(None);
        };
        if !run("mount.exfat-fuse", &[&device.path, at]) {
            not_shown("exFAT (mount.exfat-fuse of exfat-fuse, and /dev/fuse)");
            return Ok(None);
        }
        Ok(Some(Self {
            at: at.to_owned(),
            device: Some(device),
        }))
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.at).status();
        drop(self.device.take());
    }
}

#[test]
fn a_file_system_without_links_takes_archives_and_restores_with_and_without_force() -> Result<()> {
    let scene = Scene::new()?;
    let at = scene.site.path("exfat");
    let Some(_mounted) = Fuse::exfat(&scene.site.path("exfat.img"), &at)? else {
        return Ok(());
    };
    for arguments in [&["--volume", "da"][..], &["--volume", "da", "--force"]] {
        for format in ["raw", "qcow2"] {
            let file = at.join(format!("disk.{format}"));
            let format = ["--format", format];
            scene
                .restore(&[arguments, &format].concat(), &file)
                .run()?
                .assert_success();
            compare::same_disk(&file, &scene.da)?;
        }
    }
    let again = scene.restore(&["--volume", "da"], &at.join("disk.raw"));
    again.run()?.assert_refused(2, "--force overwrites it");
    assert_eq!(fs::read_dir(&at)?.count(), 2);

    let daemon = StorageDaemon::start(&[Disk::raw("da", SIZE).holding(&scene.da)])?;
    let mut order = scene.site.order(&daemon, "chunked")?;
    order.archive = at.join("archive");
    fs::create_dir(&order.archive)?;
    for _ in 0..2 {
        let backup = scene.site.backup(&order)?;
        scene.site.verify(&order.archive, &backup.id)?;
    }
    Ok(())
}

#[test]
fn all_of_an_archive_and_of_the_state_is_its_owners_alone_whatever_the_umask() -> Result<()> {
    let site = Site::new()?;
    let daemon = StorageDaemon::start(&[Disk::raw("da", MIB)])?;
    let archive = site.path("new-archive");
    fs::create_dir(&archive)?;
    for provider in ["chunked", "image"] {
        let mut order = site.order(&daemon, provider)?;
        order.archive = archive.clone();
        let umask = ["sh", "-c", "umask 0; exec \"$@\"", "sh"];
        let backup = site.backup_command(&order).started_by(umask);
        backup.run()?.assert_success();
    }
    for top in [archive, site.path("state")] {
        for file in files_below(&top)? {
            let path = top.join(&file);
            assert_eq!(mode(&path)? & 0o077, 0, "{}", path.display());
            let folders = path.ancestors().skip(1).take_while(|folder| *folder != top);
            for folder in folders {
                assert_eq!(mode(folder)?, 0o700, "{}", folder.display());
            }
        }
    }
    Ok(())
}

#[test]
fn a_state_folder_that_others_can_write_is_refused() -> Result<()> {
    let site = Site::new()?;
    let state = site.path("state");
    let list = || site.command(&["provider", "list", "--quiet"]).run();
    fs::set_permissions(&state, Permissions::from_mode(0o777)).context("no state folder")?;
    list()?.assert_refused(2, "can be written to by others");
    fs::set_permissions(&state, Permissions::from_mode(0o700))?;
    list()?.assert_success();
    if is_root() {
        chown(&state, Some(OTHER), None)?;
        list()?.assert_refused(2, "belongs to user 65534");
    }
    Ok(())
}
