//! Fetching a component from an OCI registry, by digest: what `provider install HOST/NAME@sha256:DIGEST` does.
//!
//! Of the distribution specification, only what pulling one artefact takes: its manifest, the one layer in it that is a
//! component, and an anonymous token where the registry wants one. Nothing that a registry says is believed: the manifest
//! has to have the digest that was asked for, and the layer the one that the manifest names.
//!
//! Registries are spoken to by HTTPS; only one on this very machine, such as a test's, by plain HTTP.
//!
//! The HTTP and TLS are ureq's. Not oci-client, which speaks all of the specification: 0.18 reads a manifest of any length
//! into memory and lets a body take any time, and a registry is as little trusted as what it serves.

use crate::contract::with_causes;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;
use ureq::http::{Response, StatusCode, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

/// Largest manifest, in bytes: what the distribution specification has registries take at least.
const MAX_MANIFEST: u64 = 4 << 20;

/// Largest answer of a token server, in bytes.
const MAX_TOKEN: u64 = 64 << 10;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// What a layer that is a component says it is: as registries' tools write it today, and as earlier ones did.
const COMPONENT: [&str; 2] = [
    "application/wasm",
    "application/vnd.wasm.content.layer.v1+wasm",
];

/// Longest time for a connection, and for the beginning of an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Longest time for one body.
const BODY_PATIENCE: Duration = Duration::from_secs(600);

/// An artefact: `HOST[:PORT]/NAME[:TAG]@sha256:DIGEST`. The digest decides; a tag is for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    host: String,
    name: String,
    sha256: String,
}

/// What names no artefact.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{}' names no artefact of a registry: use HOST[:PORT]/NAME@sha256:DIGEST, with 64 lower-case hexadecimal digits",
    .0.escape_debug()
)]
pub struct NotAReference(String);

impl FromStr for Reference {
    type Err = NotAReference;

    fn from_str(text: &str) -> Result<Self, NotAReference> {
        parse(text).ok_or_else(|| NotAReference(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Reference> {
    let (named, sha256) = text.rsplit_once("@sha256:")?;
    let (host, name) = named.split_once('/')?;
    let (bare, port) = host.split_once(':').unwrap_or((host, "443"));
    // A host without a dot is a folder.
    let known = bare == "localhost" || bare.contains('.') || host.contains(':');
    let of_a_host = |b: u8| b.is_ascii_alphanumeric() || b"-.".contains(&b);
    let sound = bare.bytes().all(of_a_host) && bare.bytes().any(|b| b.is_ascii_alphanumeric());
    if !known || !sound || port.parse::<u16>().is_err() {
        return None;
    }
    let name = name.split_once(':').map_or(name, |(name, _)| name);
    let part = |part: &str| {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
        !part.is_empty() && !part.starts_with('.') && part.bytes().all(inner)
    };
    (name.len() <= 255 && name.split('/').all(part) && is_digest(sha256)).then(|| Reference {
        host: host.to_owned(),
        name: name.to_owned(),
        sha256: sha256.to_owned(),
    })
}

fn is_digest(hex: &str) -> bool {
    hex.len() == 64
        && hex
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, name, sha256 } = self;
        write!(f, "{host}/{name}@sha256:{sha256}")
    }
}

impl Reference {
    /// The last part of its name.
    pub fn short_name(&self) -> &str {
        self.name.rsplit('/').next().unwrap_or(&self.name)
    }

    /// Whether the registry is on this very machine.
    fn is_local(&self) -> bool {
        let bare = self.host.split(':').next().unwrap_or(&self.host);
        let loopback = |address: std::net::Ipv4Addr| address.is_loopback();
        bare == "localhost" || bare.parse().is_ok_and(loopback)
    }

    fn url(&self, what: &str, sha256: &str) -> String {
        let scheme = if self.is_local() { "http" } else { "https" };
        let Self { host, name, .. } = self;
        format!("{scheme}://{host}/v2/{name}/{what}/sha256:{sha256}")
    }
}

/// Why an artefact was not fetched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The registry cannot be reached, or breaks off.
    #[error("the registry {host}")]
    Unreachable {
        /// The registry, or the server of its tokens.
        host: String,
        /// One line.
        #[source]
        reason: ureq::Error,
    },
    /// The registry has no such thing, or does not give it.
    #[error("the registry answers {status} when asked for its {what}")]
    Refused {
        /// HTTP's.
        status: StatusCode,
        /// What it was asked for.
        what: &'static str,
    },
    /// It gives something else than was asked for.
    #[error("its {what} has the digest sha256:{actual}, and sha256:{expected} was asked for")]
    OtherBytes {
        /// The manifest, or the component.
        what: &'static str,
        /// Lower-case hexadecimal.
        expected: String,
        /// Lower-case hexadecimal.
        actual: String,
    },
    /// What the digest names is no component.
    #[error("it is no component: {0}")]
    NotAComponent(String),
    /// It is larger than what is ever run.
    #[error("it has {size} bytes, and a component may have {limit}")]
    TooLarge {
        /// In bytes.
        size: u64,
        /// In bytes.
        limit: u64,
    },
    /// The registry wants to know who asks, in a way that an anonymous client cannot answer.
    #[error("the registry wants a login ({0}), and only public artefacts can be fetched")]
    Login(String),
}

#[derive(Debug, Deserialize)]
struct Manifest {
    #[serde(default)]
    layers: Vec<Layer>,
    /// Of an index: the artefacts that it offers.
    #[serde(default)]
    manifests: Vec<Offered>,
}

#[derive(Debug, Deserialize)]
struct Offered {
    digest: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layer {
    media_type: String,
    digest: String,
    size: u64,
}

#[derive(Debug, Deserialize)]
struct Token {
    #[serde(alias = "access_token")]
    token: String,
}

/// Fetches the component of an artefact: at most `limit` bytes, of the digests that were asked for. Blocks its thread.
pub fn fetch(reference: &Reference, limit: u64) -> Result<Vec<u8>, Error> {
    let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier);
    let agent: Agent = Agent::config_builder()
        .https_only(!reference.is_local())
        .http_status_as_error(false)
        .tls_config(tls.build())
        .user_agent(concat!("fleecebox/", env!("CARGO_PKG_VERSION")))
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_recv_body(Some(BODY_PATIENCE))
        .build()
        .into();
    let mut registry = Registry {
        agent,
        host: &reference.host,
        token: None,
    };
    let manifest = registry.get(
        &reference.url("manifests", &reference.sha256),
        "manifest",
        MAX_MANIFEST,
    )?;
    check("manifest", &reference.sha256, &manifest)?;
    let layer = component_layer(&manifest)?;
    if layer.size > limit {
        return Err(Error::TooLarge {
            size: layer.size,
            limit,
        });
    }
    let sha256 = layer.digest.strip_prefix("sha256:").unwrap_or_default();
    let component = registry.get(&reference.url("blobs", sha256), "component", layer.size)?;
    check("component", sha256, &component)?;
    Ok(component)
}

fn check(what: &'static str, expected: &str, bytes: &[u8]) -> Result<(), Error> {
    let actual = hex::encode(Sha256::digest(bytes));
    match actual == expected {
        true => Ok(()),
        false => Err(Error::OtherBytes {
            what,
            expected: expected.to_owned(),
            actual,
        }),
    }
}

/// The one layer that is a component.
fn component_layer(manifest: &[u8]) -> Result<Layer, Error> {
    let bad = |what: String| Error::NotAComponent(what);
    let manifest: Manifest = serde_json::from_slice(manifest)
        .map_err(|error| with_causes(&error))
        .map_err(|why| bad(format!("its manifest is none of OCI's ({why})")))?;
    if manifest.layers.is_empty() && !manifest.manifests.is_empty() {
        let offered = manifest.manifests.iter().take(4);
        let offered: Vec<_> = offered
            .map(|it| it.digest.escape_debug().to_string())
            .collect();
        return Err(bad(format!(
            "it is an index of {} artefacts; name one of them by its digest: {}",
            manifest.manifests.len(),
            offered.join(", ")
        )));
    }
    let kinds: Vec<_> = manifest
        .layers
        .iter()
        .map(|it| it.media_type.clone())
        .collect();
    let mut components = manifest
        .layers
        .into_iter()
        .filter(|layer| COMPONENT.contains(&layer.media_type.as_str()));
    match (components.next(), components.next()) {
        (Some(layer), None) if layer.digest.strip_prefix("sha256:").is_some_and(is_digest) => {
            Ok(layer)
        }
        (Some(layer), None) => Err(bad(format!(
            "its layer's digest is '{}'",
            layer.digest.escape_debug()
        ))),
        (Some(_), Some(_)) => Err(bad("it has several layers of WebAssembly".into())),
        (None, _) => Err(bad(format!(
            "none of its {} layers is of the type {}: {}",
            kinds.len(),
            COMPONENT[0],
            kinds
                .iter()
                .take(4)
                .map(|kind| kind.escape_debug().to_string())
                .collect::<Vec<_>>()
                .join(", ")
        ))),
    }
}

struct Registry<'a> {
    agent: Agent,
    host: &'a str,
    token: Option<String>,
}

impl Registry<'_> {
    /// At most `limit` bytes; the first answer of a registry is often that it wants a token.
    fn get(&mut self, url: &str, what: &'static str, limit: u64) -> Result<Vec<u8>, Error> {
        let mut answer = self.ask(url)?;
        if answer.status() == StatusCode::UNAUTHORIZED && self.token.is_none() {
            let challenge = answer.headers().get(header::WWW_AUTHENTICATE);
            let challenge = challenge
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default();
            self.token = Some(self.anonymous(challenge)?);
            answer = self.ask(url)?;
        }
        match answer.status() {
            StatusCode::OK => self.body(answer, limit),
            status => Err(Error::Refused { status, what }),
        }
    }

    fn ask(&self, url: &str) -> Result<Response<Body>, Error> {
        let mut request = self.agent.get(url).header(header::ACCEPT, MANIFEST);
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        request.call().map_err(|reason| self.unreachable(reason))
    }

    fn body(&self, answer: Response<Body>, limit: u64) -> Result<Vec<u8>, Error> {
        let mut body = answer.into_body();
        // One byte more shows that there is more; its digest is then another.
        let read = body.with_config().limit(limit + 1).read_to_vec();
        read.map_err(|reason| self.unreachable(reason))
    }

    /// A token for whoever asks, from the server that the challenge names.
    fn anonymous(&self, challenge: &str) -> Result<String, Error> {
        let login = || Error::Login(challenge.escape_debug().take(200).collect());
        let (realm, query) = token_server(challenge).ok_or_else(login)?;
        let mut request = self.agent.get(realm);
        for (key, value) in query {
            request = request.query(key, value);
        }
        let answer = request.call().map_err(|reason| self.unreachable(reason))?;
        if answer.status() != StatusCode::OK {
            return Err(login());
        }
        let answer = self.body(answer, MAX_TOKEN)?;
        let token: Token = serde_json::from_slice(&answer).map_err(|_| login())?;
        Ok(token.token)
    }

    fn unreachable(&self, reason: ureq::Error) -> Error {
        Error::Unreachable {
            host: self.host.to_owned(),
            reason,
        }
    }
}

/// Where a challenge such as `Bearer realm="https://…",service="…",scope="…"` sends a client, and with which query.
fn token_server(challenge: &str) -> Option<(&str, Vec<(&str, &str)>)> {
    let (scheme, mut rest) = challenge.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (mut realm, mut query) = (None, Vec::new());
    while let Some((key, value)) = rest.split_once("=\"") {
        let (value, after) = value.split_once('"')?;
        match key.trim_start_matches([',', ' ']) {
            "realm" => realm = Some(value),
            key @ ("service" | "scope") => query.push((key, value)),
            _ => {}
        }
        rest = after;
    }
    Some((realm?, query))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DIGEST: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    #[test]
    fn references_are_told_from_files() {
        let named = |text: &str| format!("{text}@sha256:{DIGEST}").parse::<Reference>();
        for (text, host, name, local) in [
            ("ghcr.io/acme/mirror", "ghcr.io", "acme/mirror", false),
            ("ghcr.io/acme/mirror:1.2", "ghcr.io", "acme/mirror", false),
            ("localhost:5000/a", "localhost:5000", "a", true),
            ("127.0.0.1:5000/a/b", "127.0.0.1:5000", "a/b", true),
            ("10.0.0.1/a", "10.0.0.1", "a", false),
            (
                "localhost.evil.example/a",
                "localhost.evil.example",
                "a",
                false,
            ),
        ] {
            let reference = named(text).unwrap();
            assert_eq!((&*reference.host, &*reference.name), (host, name));
            assert_eq!(reference.is_local(), local, "{text}");
            assert_eq!(reference.url("blobs", DIGEST).starts_with("https:"), !local);
        }
        for text in [
            "./mirror.wasm",
            "../a/b",
            "mirror.wasm",
            "folder/mirror",
            "a.b:x/c",
            "a.b:99999/c",
            "a.b/",
            "a.b//c",
            "a.b/../c",
            "a.b/C",
            "a.b/c?d",
            "user@a.b/c",
            "a.b#/c",
        ] {
            assert!(named(text).is_err(), "{text}");
        }
        assert!("a.b/c".parse::<Reference>().is_err());
        assert!("a.b/c@sha256:00".parse::<Reference>().is_err());
    }

    #[test]
    fn a_challenge_names_a_token_server() {
        let challenge = r#"Bearer realm="https://t.example/token",service="r.example",scope="repository:a/b:pull""#;
        let (realm, query) = token_server(challenge).unwrap();
        assert_eq!(realm, "https://t.example/token");
        assert_eq!(
            query,
            [("service", "r.example"), ("scope", "repository:a/b:pull")]
        );
        assert!(token_server(r#"Basic realm="x""#).is_none());
        assert!(token_server("Bearer").is_none());
        assert!(token_server(r#"Bearer service="a""#).is_none());
    }

    #[test]
    fn an_index_is_named_as_one_with_what_it_offers() {
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{{"digest":"sha256:{DIGEST}","mediaType":"m","size":3}}]}}"#
        );
        let error = component_layer(index.as_bytes()).unwrap_err().to_string();
        assert!(
            error.contains("index of 1 artefacts") && error.contains(DIGEST),
            "{error}"
        );
    }

    #[test]
    fn only_one_layer_of_webassembly_is_a_component() {
        let layer =
            |kind: &str| format!(r#"{{"mediaType":"{kind}","digest":"sha256:{DIGEST}","size":3}}"#);
        let manifest =
            |layers: &[String]| format!(r#"{{"schemaVersion":2,"layers":[{}]}}"#, layers.join(","));
        let read = |layers: &[String]| component_layer(manifest(layers).as_bytes());
        let (wasm, other) = (layer("application/wasm"), layer("application/x-tar"));
        assert_eq!(read(&[other.clone(), wasm.clone()]).unwrap().size, 3);
        for (layers, said) in [
            (vec![], "none of its 0 layers"),
            (vec![other], "application/x-tar"),
            (vec![wasm.clone(), wasm], "several layers"),
        ] {
            let error = read(&layers).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        assert!(
            component_layer(b"<html>")
                .unwrap_err()
                .to_string()
                .contains("none of OCI's")
        );
    }

    proptest! {
        #[test]
        fn nothing_that_is_read_from_outside_is_trusted_to_be_well_formed(text in ".{0,200}") {
            let _ = text.parse::<Reference>();
            let _ = token_server(&text);
            let _ = component_layer(text.as_bytes());
        }
    }
}
