//! Stands for Proxmox's QEMU: a process of its own that speaks QMP, passes what every QEMU knows on to a real storage
//! daemon, and does there what Proxmox's own commands would do. It is as strict as the real one: arguments that it does
//! not know, fleecing images of another size, and a second set-up of whichever program are refused. And it is as frail:
//! the disks are frozen one after the other, what a set-up that fails had done stays, and an empty list of devices, or a
//! disk that is gone at the end, aborts it.
//!
//! Along with each point in time QEMU makes an independent full copy of each disk, for the tests to compare with.

mod access;

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use clap::Parser;
use serde_json::{Value, json};

use access::Access;

/// What it stands for, and where.
#[derive(Debug, Clone, Parser)]
struct Arguments {
    /// Where to listen
    #[arg(long)]
    listen: PathBuf,
    /// The storage daemon's monitor that clients are passed on to
    #[arg(long)]
    qemu: PathBuf,
    /// The storage daemon's monitor for what this process does there
    #[arg(long)]
    own: PathBuf,
    /// Folder for the copies, `NUMBER-DEVICE.raw`
    #[arg(long)]
    copies: PathBuf,
    /// File to which each of Proxmox's commands is appended as a line of JSON
    #[arg(long)]
    log: PathBuf,
    /// Fail the set-up with these words, when it is done with the first disk
    #[arg(long)]
    fail: Option<String>,
    /// Tell of this bitmap action, whatever was asked for
    #[arg(long)]
    action: Option<String>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let listener = UnixListener::bind(&arguments.listen)?;
    let access = Arc::new(Mutex::new(Access::default()));
    // As QEMU's own monitor, it serves one client after the other.
    for client in listener.incoming() {
        let client = client?;
        if let Err(error) = serve(&arguments, &access, &client) {
            eprintln!("{error:#}");
        }
        let _ = client.shutdown(std::net::Shutdown::Both);
    }
    Ok(())
}

fn serve(arguments: &Arguments, access: &Mutex<Access>, client: &UnixStream) -> Result<()> {
    let qemu = UnixStream::connect(&arguments.qemu).context("the storage daemon is gone")?;
    let served = exchange(arguments, access, client, &qemu);
    // Whatever ended it: QEMU waits with the next one for as long as this one is there.
    let _ = qemu.shutdown(std::net::Shutdown::Both);
    served
}

fn exchange(
    arguments: &Arguments,
    access: &Mutex<Access>,
    client: &UnixStream,
    mut qemu: &UnixStream,
) -> Result<()> {
    let (answered, answers) = channel();
    // Events come in between, and no line may be cut by another.
    let writer = Arc::new(Mutex::new(client.try_clone()?));
    let (back, shared) = (qemu.try_clone()?, Arc::clone(&writer));
    std::thread::spawn(move || pass_back(&back, &shared, &answered));
    for line in BufReader::new(client).lines() {
        let line = line?;
        let command: Value = serde_json::from_str(&line).unwrap_or_default();
        match answer(arguments, access, &command)? {
            Some(mut answer) => {
                if let Some(id) = command.get("id") {
                    answer["id"] = id.clone();
                }
                write_line(&writer, &answer.to_string())?;
            }
            // The next command waits for its answer, so that answers come in the order of the commands.
            None => {
                qemu.write_all(format!("{line}\n").as_bytes())?;
                if command.is_object() {
                    answers.recv().context("the storage daemon is gone")?;
                }
            }
        }
    }
    Ok(())
}

/// Says each time that a command was answered. Ends, and with it the client's connection, when the daemon ends.
fn pass_back(qemu: &UnixStream, client: &Mutex<UnixStream>, answered: &Sender<()>) {
    for line in BufReader::new(qemu).lines() {
        let Ok(line) = line else { break };
        let message: Value = serde_json::from_str(&line).unwrap_or_default();
        if write_line(client, &line).is_err() {
            break;
        }
        let is_answer = message.get("return").is_some() || message.get("error").is_some();
        if is_answer && answered.send(()).is_err() {
            break;
        }
    }
    let client = client.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = client.shutdown(std::net::Shutdown::Both);
}

fn write_line(client: &Mutex<UnixStream>, line: &str) -> std::io::Result<()> {
    let mut client = client.lock().unwrap_or_else(PoisonError::into_inner);
    client.write_all(format!("{line}\n").as_bytes())
}

/// What Proxmox's QEMU answers; none to a command that every QEMU knows.
fn answer(arguments: &Arguments, access: &Mutex<Access>, command: &Value) -> Result<Option<Value>> {
    let name = command["execute"].as_str().unwrap_or_default();
    let given = &command["arguments"];
    let mut access = access.lock().unwrap_or_else(PoisonError::into_inner);
    let done = match name {
        "query-qmp-schema" => access::schema(arguments),
        "query-proxmox-support" => Ok(json!({"backup-access-api": true, "pbs-dirty-bitmap": true})),
        "backup-access-setup" => access.set_up(arguments, given),
        "backup-access-teardown" => access.tear_down(arguments, given),
        "query-pbs-bitmap-info" => Ok(access.bitmap_info()),
        _ => return Ok(None),
    };
    let mut log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&arguments.log)?;
    if name != "query-qmp-schema" {
        writeln!(log, "{}", json!({"execute": name, "arguments": given}))?;
    }
    Ok(Some(match done {
        Ok(done) => json!({ "return": done }),
        Err(error) => {
            json!({"error": {"class": "GenericError", "desc": format!("{error:#}")}})
        }
    }))
}
