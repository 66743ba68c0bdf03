//! Installing from a real OCI registry (Debian's docker-registry), filled by a tool that is not ours (skopeo).

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use fleecebox_tests::{Site, component};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A registry on a port of its own, which ends with this value.
struct Registry {
    process: Child,
    address: String,
    storage: PathBuf,
}

impl Registry {
    fn start(folder: &Path) -> Result<Self> {
        let storage = folder.join("storage");
        let config = folder.join("registry.yml");
        let text = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:0\n",
            storage.display()
        );
        fs::write(&config, text)?;
        let mut process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("docker-registry cannot be started")?;
        let mut lines = BufReader::new(process.stderr.take().context("no stderr")?).lines();
        let address = loop {
            let line = lines.next().context("the registry ended")??;
            let told = line.split_once("listening on ");
            if let Some(address) = told.and_then(|(_, rest)| rest.split(['"', ' ']).next()) {
                break address.to_owned();
            }
        };
        // What it says further has to go somewhere.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Self {
            process,
            address,
            storage,
        })
    }

    /// Where it keeps a blob or a manifest.
    fn blob(&self, sha256: &str) -> PathBuf {
        let folder = format!("docker/registry/v2/blobs/sha256/{}/{sha256}", &sha256[..2]);
        self.storage.join(folder).join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An OCI layout with one artefact of these layers, pushed as NAME; returns its manifest's digest.
fn push(
    folder: &Path,
    registry: &Registry,
    name: &str,
    layers: &[(&str, &[u8])],
) -> Result<String> {
    let layout = folder.join(name);
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let add = |kind: &str, bytes: &[u8]| -> Result<Value> {
        let digest = hex::encode(Sha256::digest(bytes));
        fs::write(blobs.join(&digest), bytes)?;
        Ok(json!({ "mediaType": kind, "digest": format!("sha256:{digest}"), "size": bytes.len() }))
    };
    let config = add("application/vnd.wasm.config.v0+json", b"{}")?;
    let layers = layers.iter().map(|(kind, bytes)| add(kind, bytes));
    let layers = layers.collect::<Result<Vec<_>>>()?;
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers });
    let manifest = add(kind, &serde_json::to_vec(&manifest)?)?;
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(layout.join("index.json"), index.to_string())?;
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )?;
    let copied = Command::new("skopeo")
        .args([
            "copy",
            "--insecure-policy",
            "--dest-tls-verify=false",
            "--preserve-digests",
        ])
        .arg(format!("oci:{}", layout.display()))
        .arg(format!("docker://{}/acme/{name}:1", registry.address))
        .output()
        .context("skopeo cannot be run")?;
    ensure!(
        copied.status.success(),
        "{}",
        String::from_utf8_lossy(&copied.stderr)
    );
    let digest = manifest["digest"].as_str().context("a digest")?;
    Ok(digest.trim_start_matches("sha256:").to_owned())
}

const WASM: &str = "application/wasm";

#[test]
fn a_component_is_installed_from_a_registry_by_its_digest_and_nothing_else_is() -> Result<()> {
    let site = Site::new()?;
    let folder = site.path("registry");
    fs::create_dir(&folder)?;
    let registry = Registry::start(&folder)?;
    let bytes = fs::read(component("chunked")?)?;
    let digest = push(
        &folder,
        &registry,
        "chunked",
        &[("text/plain", b"a page"), (WASM, &bytes)],
    )?;
    let reference = format!("{}/acme/chunked", registry.address);
    let install = |reference: &str, digest: &str| {
        let install = site.command(&["provider", "install", "--json"]);
        install.arg(format!("{reference}@sha256:{digest}")).run()
    };

    let told = install(&reference, &digest)?.assert_success().document()?;
    let sha256 = hex::encode(Sha256::digest(&bytes));
    ensure!(
        told["name"] == "chunked" && told["sha256"] == sha256,
        "{told}"
    );
    install(&format!("{reference}:1"), &digest)?.assert_success();
    let test = site.command(&["provider", "test", "chunked", "--only", "full"]);
    test.run()?.assert_success();

    // Neither a digest that is not there, nor a name, nor the component's own digest, nor no digest.
    install(&reference, &"0".repeat(64))?.assert_refused(2, "404");
    install(&format!("{}/acme/other", registry.address), &digest)?.assert_refused(2, "404");
    install(&reference, &sha256)?.assert_refused(2, "the registry answers");
    let install_tag = site
        .command(&["provider", "install"])
        .arg(format!("{reference}:1"));
    install_tag.run()?.assert_refused(2, "cannot be read");

    // An artefact that is no component, and one that is no provider.
    let text = push(&folder, &registry, "text", &[("text/plain", b"a page")])?;
    let named = format!("{}/acme/text", registry.address);
    install(&named, &text)?.assert_refused(2, "none of its 1 layers");
    let hollow = push(
        &folder,
        &registry,
        "hollow",
        &[(WASM, b"\0asm\x0d\0\x01\0")],
    )?;
    let named = format!("{}/acme/hollow", registry.address);
    install(&named, &hollow)?.assert_refused(2, "no provider");

    // A registry that gives other bytes than it was asked for: the layer first, then the manifest.
    for (changed, what) in [(&sha256, "component"), (&digest, "manifest")] {
        let blob = registry.blob(changed);
        let mut stored = fs::read(&blob)?;
        if let Some(last) = stored.last_mut() {
            *last ^= 1;
        }
        fs::write(blob, stored)?;
        let said = install(&reference, &digest)?;
        ensure!(said.code() == Some(2), "{what}: {}", said.stderr);
    }

    let address = registry.address.clone();
    drop(registry);
    let gone = install(&format!("{address}/acme/chunked"), &digest)?;
    gone.assert_refused(1, "the registry");
    Ok(())
}
