//! Tiny providers, written as core WebAssembly text against the flat signatures of the contract (canonical ABI) and
//! wrapped into components. So these tests need no toolchain for guests.

use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

/// What every guest starts with: memory, and an allocator that hands out ever new addresses from 64 KiB on, and
/// grows the memory where needed.
const PRELUDE: &str = r#"
  (memory (export "memory") 2)
  (global $heap (mut i32) (i32.const 65536))
  (func $alloc (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $heap) (i32.const 7)) (i32.const -8)))
    (global.set $heap (i32.add (local.get $at) (local.get 3)))
    (block $enough
      (loop $more
        (br_if $enough (i32.le_u (global.get $heap) (i32.shl (memory.size) (i32.const 16))))
        (br_if $more (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))
        unreachable))
    (local.get $at))
  ;; A result at address 0: ok with a list, or an error without a text.
  (func $ok (param $at i32) (param $length i32) (result i32)
    (i32.store8 (i32.const 0) (i32.const 0))
    (i32.store (i32.const 4) (local.get $at))
    (i32.store (i32.const 8) (local.get $length))
    (i32.const 0))
  (func $error (param $code i32) (result i32)
    (i32.store8 (i32.const 0) (i32.const 1))
    (i32.store8 (i32.const 4) (local.get $code))
    (i32.const 0))
"#;

/// What a guest may import, under short names. Only what its code uses is kept.
const IMPORTS: &[(&str, &str, &str, &str)] = &[
    (
        "next",
        "volume",
        "[method]dirty-regions.next",
        "i32 i32 i32",
    ),
    (
        "discard",
        "volume",
        "[method]discarder.discard",
        "i32 i64 i64 i32",
    ),
    ("info", "volume", "[method]snapshot.info", "i32 i32"),
    ("read", "content", "[method]reader.read", "i32 i64 i32 i32"),
    (
        "put",
        "archive",
        "[method]writer.put",
        "i32 i32 i64 i64 i32 i32",
    ),
    (
        "create",
        "archive",
        "[method]writer.create",
        "i32 i32 i32 i32 i32",
    ),
    (
        "write",
        "archive",
        "[method]output-stream.write",
        "i32 i32 i32 i32",
    ),
    (
        "finish",
        "archive",
        "[static]output-stream.finish",
        "i32 i32",
    ),
    (
        "drop-stream",
        "archive",
        "[resource-drop]output-stream",
        "i32",
    ),
    ("log", "job", "[method]context.log", "i32 i32 i32 i32"),
    ("settings", "job", "[method]context.settings", "i32 i32"),
    (
        "object-read",
        "stored",
        "[method]objects.read",
        "i32 i32 i32 i64 i32 i32",
    ),
];

/// Parameters of `backup.run`, flattened: `$job $snapshot $dirty $has-reader $reader $has-discarder $discarder
/// $writer $has-base $base $base-length`.
const RUN: &str = "(param $job i32) (param $snapshot i32) (param $dirty i32) (param $has-reader i32) \
    (param $reader i32) (param $has-discarder i32) (param $discarder i32) (param $writer i32) \
    (param $has-base i32) (param $base i32) (param $base-length i32) (result i32)";

/// The same of `blind-backup.run`.
const BLIND_RUN: &str = "(param $job i32) (param $snapshot i32) (param $dirty i32) \
    (param $has-discarder i32) (param $discarder i32) (param $writer i32) \
    (param $has-base i32) (param $base i32) (param $base-length i32) (result i32)";

/// A provider with the given body of `run`, and an `image` that opens with its receipt and reads nothing.
pub(crate) fn provider(run: &str) -> Vec<u8> {
    provider_with_image(run, "(call $ok (i32.const 0) (i32.const 0))")
}

/// A provider with the given bodies of `run` and of `image.read`; the latter has `$objects`, `$receipt` and
/// `$receipt-length` as globals and `$offset`, `$length` as parameters.
pub(crate) fn provider_with_image(run: &str, read: &str) -> Vec<u8> {
    component(
        &sighted_core(run, read, ""),
        "fleecebox:provider/provider",
        "",
    )
}

/// A provider with the given body of `run` that also imports parts of WASI, under short names.
#[allow(dead_code)] // for tests elsewhere
pub(crate) fn provider_with_wasi(run: &str) -> Vec<u8> {
    provider_with_wasi_of("0.2.0", run, "(call $ok (i32.const 0) (i32.const 0))")
}

/// The same built for that version of WASI, and with the given body of `image.read`.
#[allow(dead_code)] // for tests elsewhere
pub(crate) fn provider_with_wasi_of(version: &str, run: &str, read: &str) -> Vec<u8> {
    let called = |name| {
        let call = format!("call ${name} ");
        [run, read]
            .iter()
            .any(|body| body.replace(')', " ").contains(&call))
    };
    let imports: String = WASI
        .iter()
        .filter(|(name, ..)| called(*name))
        .map(|(name, interface, function, signature)| {
            format!(
                r#"(import "wasi:{interface}@{version}" "{function}" (func ${name} {signature}))"#
            )
        })
        .collect();
    let wit = include_str!("wasi.wit").replacen(
        "world parts {",
        "world with-wasi { include fleecebox:provider/provider@0.1.0; include parts; }\nworld parts {",
        1,
    );
    let wit = wit.replace("@0.2.0", &format!("@{version}"));
    component(
        &sighted_core(run, read, &imports),
        "fleecebox:wasi/with-wasi",
        &wit,
    )
}

/// What a guest may import of WASI, under short names.
const WASI: &[(&str, &str, &str, &str)] = &[
    ("wall", "clocks/wall-clock", "now", "(param i32)"),
    ("monotonic", "clocks/monotonic-clock", "now", "(result i64)"),
    (
        "timer",
        "clocks/monotonic-clock",
        "subscribe-duration",
        "(param i64) (result i32)",
    ),
    ("block", "io/poll", "[method]pollable.block", "(param i32)"),
    ("poll", "io/poll", "poll", "(param i32 i32 i32)"),
    (
        "drop-timer",
        "io/poll",
        "[resource-drop]pollable",
        "(param i32)",
    ),
    ("random", "random/random", "get-random-u64", "(result i64)"),
    (
        "random-bytes",
        "random/random",
        "get-random-bytes",
        "(param i64 i32)",
    ),
    ("stdout", "cli/stdout", "get-stdout", "(result i32)"),
    ("stderr", "cli/stderr", "get-stderr", "(result i32)"),
    (
        "print",
        "io/streams",
        "[method]output-stream.blocking-write-and-flush",
        "(param i32 i32 i32 i32)",
    ),
    (
        "write-now",
        "io/streams",
        "[method]output-stream.write",
        "(param i32 i32 i32 i32)",
    ),
    (
        "write-zeroes",
        "io/streams",
        "[method]output-stream.write-zeroes",
        "(param i32 i64 i32)",
    ),
    ("exit", "cli/exit", "exit", "(param i32)"),
];

fn sighted_core(run: &str, read: &str, more_imports: &str) -> String {
    format!(
        r#"(module {imports} {more_imports}
        (import "[export]fleecebox:provider/restore@0.1.0" "[resource-new]image" (func $new-image (param i32) (result i32)))
        {PRELUDE}
        (global $objects (mut i32) (i32.const 0))
        (global $receipt (mut i32) (i32.const 0))
        (global $receipt-length (mut i32) (i32.const 0))
        (func (export "fleecebox:provider/backup@0.1.0#run") {RUN} {run})
        (func (export "fleecebox:provider/restore@0.1.0#[static]image.open")
          (param $job i32) (param $given i32) (param $at i32) (param $length i32) (result i32)
          (global.set $objects (local.get $given))
          (global.set $receipt (local.get $at))
          (global.set $receipt-length (local.get $length))
          (call $ok (call $new-image (i32.const 1)) (i32.const 0)))
        (func (export "fleecebox:provider/restore@0.1.0#[method]image.read")
          (param $self i32) (param $offset i64) (param $length i32) (result i32) {read}))"#,
        imports = imports(&[run, read]),
    )
}

/// A blind provider with the given body of `run`.
pub(crate) fn blind_provider(run: &str) -> Vec<u8> {
    component(&blind_core(run), "fleecebox:provider/blind-provider", "")
}

/// A blind provider with the given body of `run`, and more fields in its module.
#[allow(dead_code)] // for tests elsewhere
pub(crate) fn blind_provider_with_more(run: &str, fields: &str) -> Vec<u8> {
    let core = blind_core(run);
    let core = core.strip_suffix(')').unwrap_or_default();
    component(
        &format!("{core} {fields})"),
        "fleecebox:provider/blind-provider",
        "",
    )
}

/// A blind provider that also imports a socket.
pub(crate) fn provider_with_a_socket() -> Vec<u8> {
    let core = blind_core("(call $connect) (call $ok (i32.const 0) (i32.const 0))").replacen(
        "(module",
        r#"(module (import "wasi:sockets/tcp@0.2.0" "connect" (func $connect))"#,
        1,
    );
    let wit = "package hostile:provider;
        world reaching-out {
            import wasi:sockets/tcp@0.2.0;
            include fleecebox:provider/blind-provider@0.1.0;
        }
        package wasi:sockets@0.2.0 { interface tcp { connect: func(); } }";
    component(&core, "hostile:provider/reaching-out", wit)
}

/// A core module.
pub(crate) fn module() -> Vec<u8> {
    wat::parse_str("(module)").unwrap()
}

/// A component that exports nothing.
pub(crate) fn empty() -> Vec<u8> {
    wat::parse_str("(component)").unwrap()
}

/// A component that has the name of what a blind provider exports, with a function of another type.
pub(crate) fn of_other_types() -> Vec<u8> {
    let text = r#"(component
        (core module $code (func (export "run") (result i32) (i32.const 7)))
        (core instance $core (instantiate $code))
        (func $run (result u32) (canon lift (core func $core "run")))
        (instance $exports (export "run" (func $run)))
        (export "fleecebox:provider/blind-backup@0.1.0" (instance $exports)))"#;
    wat::parse_str(text).unwrap()
}

fn blind_core(run: &str) -> String {
    format!(
        r#"(module {imports} {PRELUDE} (func (export "fleecebox:provider/blind-backup@0.1.0#run") {BLIND_RUN} {run}))"#,
        imports = imports(&[run]),
    )
}

fn imports(bodies: &[&str]) -> String {
    IMPORTS
        .iter()
        .filter(|(name, ..)| bodies.iter().any(|body| body.contains(&format!("call ${name} "))))
        .map(|(name, interface, function, parameters)| {
            format!(
                r#"(import "fleecebox:provider/{interface}@0.1.0" "{function}" (func ${name} (param {parameters})))"#
            )
        })
        .collect()
}

fn component(core: &str, world: &str, more_wit: &str) -> Vec<u8> {
    let mut resolve = Resolve::default();
    let (package, _) = resolve
        .push_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../wit"))
        .unwrap();
    let package = match more_wit {
        "" => package,
        wit => resolve.push_str("more.wit", wit).unwrap(),
    };
    let (_, name) = world.rsplit_once('/').unwrap();
    let world = resolve.select_world(&[package], Some(name)).unwrap();
    let mut module = wat::parse_str(core).unwrap_or_else(|error| panic!("{error}"));
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).unwrap();
    let mut encoder = ComponentEncoder::default();
    let encoder = encoder.validate(true).module(&module).unwrap();
    encoder.encode().unwrap_or_else(|error| panic!("{error:#}"))
}
