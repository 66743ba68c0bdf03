//! Against a daemon that goes away, lies, or wants a login.

use super::link::Link;
use super::message::{Program, UUID};
use super::xdr::{Reader, Writer};
use super::{Address, Domain, LibvirtError};
use crate::monitor::MonitorError;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);

/// What a fake daemon does with a call.
enum Does {
    Answers(Vec<u8>),
    Refuses(i32, &'static str),
    /// Closes the connection instead.
    Goes,
    /// Says that the domain stopped, and nothing else.
    TellsOfTheEnd,
}

/// A call: of which connection it is, from 0, and what it asks for.
struct Call {
    connection: usize,
    program: u32,
    procedure: u32,
    arguments: Vec<u8>,
}

impl Call {
    fn is(&self, program: Program, procedure: u32) -> bool {
        (self.program, self.procedure) == (program as u32, procedure)
    }

    /// The monitor's command.
    fn command(&self) -> String {
        let mut reader = Reader::new(&self.arguments);
        reader.text().unwrap();
        reader.bytes(UUID).unwrap();
        reader.signed().unwrap();
        let command: Value = serde_json::from_str(reader.text().unwrap()).unwrap();
        command["execute"].as_str().unwrap().to_owned()
    }
}

struct Daemon {
    folder: TempDir,
    connections: Arc<AtomicUsize>,
}

impl Daemon {
    /// One that does with each call as `script` says, or what a good one would.
    fn start(script: impl Fn(&Call) -> Option<Does> + Send + Sync + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("sock")).unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let connection = counted.fetch_add(1, Ordering::SeqCst);
                // One after the other, as all of these tests have one client.
                let _ = serve(stream, connection, &script).await;
            }
        });
        Self {
            folder,
            connections,
        }
    }

    fn address(&self) -> Address {
        let socket = self.folder.path().join("sock");
        let uri = format!("qemu+unix:///system?socket={}", socket.display());
        Address {
            uri: uri.parse().unwrap(),
            domain: "web".into(),
        }
    }
}

async fn serve(
    mut stream: UnixStream,
    connection: usize,
    script: &impl Fn(&Call) -> Option<Does>,
) -> std::io::Result<()> {
    loop {
        let length = stream.read_u32().await? as usize;
        let mut message = vec![0; length - 4];
        stream.read_exact(&mut message).await?;
        let word = |at: usize| u32::from_be_bytes(message[at..at + 4].try_into().unwrap());
        let call = Call {
            connection,
            program: word(0),
            procedure: word(8),
            arguments: message[24..].to_vec(),
        };
        let (kind, procedure, status, body) = match script(&call).unwrap_or_else(|| usual(&call)) {
            Does::Answers(body) => (1, call.procedure, 0, body),
            Does::Refuses(code, words) => {
                let error = Writer::default().signed(code).signed(10).some_text(words);
                (1, call.procedure, 1, error.done())
            }
            Does::Goes => return Ok(()),
            Does::TellsOfTheEnd => {
                let event = domain(Writer::default().signed(1), 1).number(5).number(0);
                (2, 318, 0, event.done())
            }
        };
        let serial = if kind == 1 { word(16) } else { 0 };
        let program = if kind == 1 {
            call.program
        } else {
            Program::Remote as u32
        };
        let mut head = Writer::default().number(28 + body.len() as u32);
        for word in [program, 1, procedure, kind, serial, status] {
            head = head.number(word);
        }
        stream.write_all(&head.bytes(&body).done()).await?;
    }
}

fn domain(writer: Writer, id: i32) -> Writer {
    writer.text("web").bytes(&[7; UUID]).signed(id)
}

/// Nobody has to log in, and the domain runs.
fn usual(call: &Call) -> Does {
    let answer = match (call.program, call.procedure) {
        (_, 66) => Writer::default().number(1).number(0),
        (_, 23 | 24) => domain(Writer::default(), 1),
        (_, 212) => Writer::default().number(1).number(1),
        (_, 316 | 4) => Writer::default().number(1),
        (_, 1) if call.is(Program::Qemu, 1) => {
            let answer = json!({ "return": { "command": call.command() }, "id": "libvirt-1" });
            Writer::default().text(&answer.to_string())
        }
        _ => Writer::default(),
    };
    Does::Answers(answer.done())
}

async fn exchange(link: &Link, command: &str) -> Result<Value, MonitorError> {
    let exchanged = link.exchange(command, json!({}), None);
    timeout(SOON, exchanged).await.expect("it hangs")
}

#[tokio::test]
async fn a_daemon_that_comes_back_is_asked_again_and_whoever_gave_an_order_is_told() {
    let daemon = Daemon::start(|call| {
        let goes = call.connection < 2 && call.is(Program::Qemu, 1);
        goes.then_some(Does::Goes)
    });
    let link = Link::open(&daemon.address(), 8).await.unwrap();
    let order = exchange(&link, "stop").await.unwrap_err();
    assert!(
        matches!(&order, MonitorError::Unanswered { what } if what == "stop"),
        "{order}"
    );
    assert!(!order.is_refusal() && !link.is_lost());
    let answer = exchange(&link, "query-status").await.unwrap();
    assert_eq!(answer["command"], "query-status");
    assert_eq!(daemon.connections.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_domain_that_stops_takes_its_monitor_with_it() {
    let daemon = Daemon::start(|call| {
        let ends = call.is(Program::Qemu, 1);
        ends.then_some(Does::TellsOfTheEnd)
    });
    let link = Link::open(&daemon.address(), 8).await.unwrap();
    let mut events = link.events().unwrap();
    for _ in 0..2 {
        let error = exchange(&link, "query-status").await.unwrap_err();
        assert!(error.is_lost() && link.is_lost(), "{error}");
        assert!(error.to_string().contains("the domain stopped"), "{error}");
    }
    let heard = timeout(SOON, events.recv()).await.expect("it hangs");
    assert!(heard.is_err() && link.events().is_none());
}

#[tokio::test]
async fn a_domain_that_was_started_anew_is_not_the_one_that_was() {
    let daemon = Daemon::start(|call| match call.connection {
        0 if call.is(Program::Qemu, 1) => Some(Does::Goes),
        1 if call.is(Program::Remote, 24) => {
            Some(Does::Answers(domain(Writer::default(), 2).done()))
        }
        _ => None,
    });
    let link = Link::open(&daemon.address(), 8).await.unwrap();
    let error = exchange(&link, "query-status").await.unwrap_err();
    assert!(error.is_lost() && link.is_lost(), "{error}");
    assert!(error.to_string().contains("started anew"), "{error}");
}

#[tokio::test]
async fn what_libvirt_refuses_by_itself_left_qemu_as_it_was_and_what_failed_later_may_not_have() {
    let daemon = Daemon::start(|call| {
        let command = call.is(Program::Qemu, 1).then(|| call.command())?;
        Some(match &*command {
            "busy" => Does::Refuses(68, "cannot acquire state change lock"),
            _ => Does::Refuses(1, "internal error: monitor is gone"),
        })
    });
    let link = Link::open(&daemon.address(), 8).await.unwrap();
    let busy = exchange(&link, "busy").await.unwrap_err();
    assert!(busy.is_refusal(), "{busy}");
    assert!(busy.to_string().contains("state change lock"), "{busy}");
    let failed = exchange(&link, "failed").await.unwrap_err();
    assert!(!failed.is_refusal() && !failed.is_lost(), "{failed}");
}

#[tokio::test]
async fn a_login_is_for_polkit_to_grant() {
    let logins = |logins: &'static [u32], granted: bool| {
        Daemon::start(move |call| {
            let list = || {
                let count = Writer::default().number(logins.len() as u32);
                logins
                    .iter()
                    .fold(count, |list, way| list.number(*way))
                    .done()
            };
            match call.procedure {
                66 => Some(Does::Answers(list())),
                70 if !granted => Some(Does::Refuses(45, "authentication failed")),
                _ => None,
            }
        })
    };
    let found = async |daemon: Daemon| Domain::find(&daemon.address()).await;
    assert!(found(logins(&[2], true)).await.is_ok());
    for (ways, granted) in [(&[2][..], false), (&[1], true)] {
        let refused = found(logins(ways, granted)).await.unwrap_err();
        assert!(matches!(refused, LibvirtError::Login), "{refused}");
    }
}

#[tokio::test]
async fn a_domain_without_a_qemu_and_one_that_is_none_are_told_apart() {
    let off = Daemon::start(|call| {
        let off = || Does::Answers(Writer::default().number(5).number(1).done());
        (call.procedure == 212).then(off)
    });
    let error = Link::open(&off.address(), 8).await.unwrap_err();
    assert!(error.is_nobody() && error.is_gone(), "{error}");
    let none = Daemon::start(|call| {
        (call.procedure == 23).then_some(Does::Refuses(42, "Domain not found"))
    });
    let error = Link::open(&none.address(), 8).await.unwrap_err();
    assert!(!error.is_nobody() && error.is_gone(), "{error}");
    assert!(error.to_string().contains("has no domain 'web'"), "{error}");
}

#[tokio::test]
async fn a_daemon_that_is_none_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("sock");
    let uri = format!("qemu+unix:///system?socket={}", socket.display());
    let address = Address {
        uri: uri.parse().unwrap(),
        domain: "web".into(),
    };
    let error = Domain::find(&address).await.unwrap_err();
    assert!(error.is_away() && error.is_mistake(), "{error}");
    let listener = UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"{\"QMP\": {}}\r\n").await.unwrap();
        // Until the other side lets go.
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    let error = timeout(SOON, Domain::find(&address)).await.unwrap();
    assert!(error.unwrap_err().is_lost());
}
