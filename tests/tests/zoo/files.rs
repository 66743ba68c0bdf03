//! Files that are no provider, made by the test.

use anyhow::Result;
use fleecebox_tests::{Random, component};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Attacks the parser: random bytes behind a component's first eight.
pub(super) fn garbage(at: &Path) -> Result<PathBuf> {
    let mut bytes = vec![0; 100_000];
    Random::new(1).fill(&mut bytes);
    bytes[..8].copy_from_slice(COMPONENT);
    keep(at, &bytes)
}

/// Attacks the parser: not a byte.
pub(super) fn empty(at: &Path) -> Result<PathBuf> {
    keep(at, b"")
}

/// Attacks the parser: an honest provider that ends in the middle.
pub(super) fn truncated(at: &Path) -> Result<PathBuf> {
    let whole = fs::read(component("chunked")?)?;
    keep(at, &whole[..whole.len() / 2])
}

/// Attacks the check of what a file is: WebAssembly, but no component.
pub(super) fn core_module(at: &Path) -> Result<PathBuf> {
    keep(at, MODULE)
}

/// Attacks the memory of the job process: a component of 500 MiB, all of it one section that is skipped.
pub(super) fn half_a_gigabyte(at: &Path) -> Result<PathBuf> {
    let length = 500_u64 << 20;
    let mut header = COMPONENT.to_vec();
    // A custom section (0) with an empty name.
    header.push(0);
    leb(&mut header, length - 100);
    header.push(0);
    fs::write(at, header)?;
    File::options().write(true).open(at)?.set_len(length)?;
    Ok(at.into())
}

/// Attacks the same: a file that has no end.
pub(super) fn endless(at: &Path) -> Result<PathBuf> {
    std::os::unix::fs::symlink("/dev/zero", at)?;
    Ok(at.into())
}

/// Attacks the compiler: functions whose values all live to the end of very many branches, so that compiling one takes
/// more than in proportion to its size.
pub(super) fn compile_bomb(at: &Path) -> Result<PathBuf> {
    let (locals, turns) = (2000_u32, 20_000_u32);
    let mut body = Vec::new();
    // One group of locals, all of type i64.
    leb(&mut body, 1);
    leb(&mut body, locals.into());
    body.push(0x7e);
    for turn in 0..turns {
        // if (local = local + other) {other = other * local}
        let (a, b) = (turn % locals, turn.wrapping_mul(7919) % locals);
        for (opcode, local) in [(0x20, a), (0x20, b)] {
            body.push(opcode);
            leb(&mut body, local.into());
        }
        body.extend([0x7c, 0x22]);
        leb(&mut body, a.into());
        body.extend([0x50, 0x04, 0x40]);
        for (opcode, local) in [(0x20, a), (0x20, b)] {
            body.push(opcode);
            leb(&mut body, local.into());
        }
        body.extend([0x7e, 0x21]);
        leb(&mut body, b.into());
        body.push(0x0b);
    }
    body.push(0x0b);
    let functions = 4_u32;
    let mut module = MODULE.to_vec();
    section(&mut module, 1, &[1, 0x60, 0, 0]);
    let mut types = Vec::new();
    leb(&mut types, functions.into());
    types.extend(vec![0; functions as usize]);
    section(&mut module, 3, &types);
    let mut code = Vec::new();
    leb(&mut code, functions.into());
    for _ in 0..functions {
        leb(&mut code, body.len() as u64);
        code.extend(&body);
    }
    section(&mut module, 10, &code);
    let mut bytes = COMPONENT.to_vec();
    section(&mut bytes, 1, &module);
    keep(at, &bytes)
}

/// Magic, version 13 and layer 1 (component model, binary format).
const COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";

/// Magic and version 1 (core specification, binary format).
const MODULE: &[u8] = b"\0asm\x01\0\0\0";

fn section(out: &mut Vec<u8>, id: u8, content: &[u8]) {
    out.push(id);
    leb(out, content.len() as u64);
    out.extend(content);
}

/// Unsigned LEB128.
fn leb(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn keep(at: &Path, bytes: &[u8]) -> Result<PathBuf> {
    fs::write(at, bytes)?;
    Ok(at.into())
}
