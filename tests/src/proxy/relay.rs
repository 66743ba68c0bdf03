//! The two directions of one connection.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::Value;

use super::fault::{Faults, Stage, Verdict};
use super::reference::{Prepared, References};

/// What all connections of a proxy share.
#[derive(Debug)]
pub(super) struct Relay {
    pub(super) product: PathBuf,
    pub(super) references: References,
    pub(super) faults: Faults,
    /// The actions of each transaction, as the product gave them.
    pub(super) transactions: Mutex<Vec<Value>>,
}

/// A command that QEMU has and has not answered yet. QEMU answers in order: no client here uses
/// out-of-band commands.
#[derive(Debug)]
struct Unanswered {
    number: usize,
    name: String,
    references: Vec<Prepared>,
}

type Queue = Mutex<VecDeque<Unanswered>>;

impl Relay {
    /// Runs one connection to its end. An error of either side ends both, as it would without us.
    pub(super) fn serve(self: Arc<Self>, client: UnixStream) {
        let Ok(qemu) = UnixStream::connect(&self.product) else {
            return;
        };
        let (Ok(client_writer), Ok(qemu_writer)) = (client.try_clone(), qemu.try_clone()) else {
            return;
        };
        if let (Ok(client), Ok(qemu)) = (client.try_clone(), qemu.try_clone()) {
            self.faults.watch([client, qemu]);
        }
        let queue = Arc::new(Queue::default());
        let (relay, answers) = (Arc::clone(&self), Arc::clone(&queue));
        let back = std::thread::spawn(move || {
            // Whatever ended this direction, the other one hears of it by the shutdown.
            let _ = relay.pass_answers(&qemu, &client_writer, &answers);
            cut(&qemu, &client_writer);
        });
        let _ = self.pass_commands(&client, &qemu_writer, &queue);
        cut(&client, &qemu_writer);
        let _ = back.join();
        // QEMU may still have run what it did not answer any more; whether it did shows in the
        // jobs, when the references are waited for.
        for unanswered in lock(&queue).drain(..) {
            self.references.keep(unanswered.references);
        }
    }

    fn pass_commands(
        &self,
        client: &UnixStream,
        mut qemu: &UnixStream,
        queue: &Queue,
    ) -> io::Result<()> {
        let mut lines = BufReader::new(client);
        let mut line = Vec::new();
        while {
            line.clear();
            lines.read_until(b'\n', &mut line)?
        } > 0
        {
            let mut command = serde_json::from_slice::<Value>(&line).unwrap_or_default();
            let name = command["execute"].as_str().unwrap_or_default().to_string();
            if name.is_empty() {
                // White space between commands, or something for QEMU to refuse.
                if line.iter().any(|byte| !byte.is_ascii_whitespace()) {
                    lock(queue).push_back(Unanswered {
                        number: 0,
                        name,
                        references: Vec::new(),
                    });
                }
                qemu.write_all(&line)?;
                continue;
            }
            let number = self.faults.command_came(&name);
            if self.faults.meet(number, &name, Stage::BeforeQemu) == Verdict::Cut {
                return Ok(());
            }
            if name == "transaction" {
                let actions = command["arguments"]["actions"].clone();
                lock(&self.transactions).push(actions);
            }
            let references = self.references.add_to(&mut command);
            if !references.is_empty() {
                line = format!("{command}\n").into_bytes();
            }
            lock(queue).push_back(Unanswered {
                number,
                name,
                references,
            });
            qemu.write_all(&line)?;
        }
        Ok(())
    }

    fn pass_answers(
        &self,
        qemu: &UnixStream,
        mut client: &UnixStream,
        queue: &Queue,
    ) -> io::Result<()> {
        let mut lines = BufReader::new(qemu);
        let mut line = Vec::new();
        while {
            line.clear();
            lines.read_until(b'\n', &mut line)?
        } > 0
        {
            let message = serde_json::from_slice::<Value>(&line).unwrap_or_default();
            let is_answer = message.get("return").is_some() || message.get("error").is_some();
            let answered = if is_answer {
                lock(queue).pop_front()
            } else {
                None
            };
            if let Some(answered) = answered {
                match message.get("error") {
                    Some(_) => self.references.give_up(answered.references),
                    None => self.references.keep(answered.references),
                }
                let verdict =
                    self.faults
                        .meet(answered.number, &answered.name, Stage::BeforeAnswer);
                if verdict == Verdict::Cut {
                    return Ok(());
                }
            }
            client.write_all(&line)?;
        }
        Ok(())
    }
}

fn cut(one: &UnixStream, other: &UnixStream) {
    // Closed already is what we want.
    let _ = one.shutdown(Shutdown::Both);
    let _ = other.shutdown(Shutdown::Both);
}

pub(super) fn lock<T>(list: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while it was held cannot leave a list half-changed.
    list.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
