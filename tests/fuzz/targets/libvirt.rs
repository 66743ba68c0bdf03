//! What libvirt's daemon sends, and a domain's definition.
//!
//! What must hold: no panic and no hang, whatever it says, and no more memory than it sends.

#![no_main]

use arbitrary::Arbitrary;
use fleecebox::qemu::agent::Limits;
use fleecebox::qemu::libvirt::{Address, Definition, Domain};
use fleecebox::qemu::{Address as Monitors, Agent, Monitor};
use fleecebox_fuzz::runtime;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

#[derive(Debug, Arbitrary)]
struct Case {
    xml: String,
    question: Question,
    messages: Vec<Message>,
}

#[derive(Debug, Arbitrary)]
enum Question {
    Domain,
    Monitor,
    Agent,
}

#[derive(Debug, Arbitrary)]
enum Message {
    /// To the call at hand.
    Answer(Vec<Part>),
    Refusal(Vec<Part>),
    /// Of its own accord, of this program and procedure.
    Notice(bool, u8, Vec<Part>),
    Bytes(Vec<u8>),
}

/// What messages are made of.
#[derive(Debug, Arbitrary)]
enum Part {
    Number(u32),
    Small(u8),
    Text(String),
    Uuid([u8; 16]),
    /// A monitor's answer.
    Return,
}

impl Part {
    fn write(&self, into: &mut Vec<u8>) {
        let mut text = |text: &str| {
            into.extend((text.len() as u32).to_be_bytes());
            into.extend(text.bytes());
            into.resize(into.len().next_multiple_of(4), 0);
        };
        match self {
            Self::Number(number) => into.extend(number.to_be_bytes()),
            Self::Small(number) => into.extend(u32::from(*number).to_be_bytes()),
            Self::Text(some) => text(some),
            Self::Uuid(uuid) => into.extend(uuid),
            Self::Return => text("{\"return\":{}}"),
        }
    }
}

fuzz_target!(|case: Case| {
    let _ = Definition::read(&case.xml);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let socket = folder.path().join("sock");
    runtime::run(async {
        let listener = UnixListener::bind(&socket).expect("a socket can be made");
        let uri = format!("qemu+unix:///system?socket={}", socket.display());
        let address = Address {
            uri: uri.parse().expect("it is one"),
            domain: "web".into(),
        };
        // It ends with the client, however many connections that makes.
        tokio::select! {
            () = client(&case, address) => {}
            () = daemon(&case, listener) => {}
        }
    });
});

async fn client(case: &Case, address: Address) {
    match case.question {
        Question::Domain => {
            if let Ok(domain) = Domain::find(&address).await {
                let _ = domain.has_saved_memory().await;
                let _ = domain.stored_definition().await;
            }
        }
        Question::Monitor => {
            if let Ok(monitor) = Monitor::reach(&Monitors::Libvirt(address)).await {
                let _ = monitor.described().await;
                let _ = monitor.query::<serde_json::Value>("query-block", serde_json::json!({})).await;
            }
        }
        Question::Agent => {
            let address = Monitors::Libvirt(address);
            if let Ok(mut agent) = Agent::reach(&address, Limits::default()).await {
                let _ = agent.freeze().await;
            }
        }
    }
}

/// Answers the calls of each client in turn, then hangs up.
async fn daemon(case: &Case, listener: UnixListener) {
    while let Ok((stream, _)) = listener.accept().await {
        let _ = serve(case, stream).await;
    }
}

async fn serve(case: &Case, mut stream: UnixStream) -> std::io::Result<()> {
    let mut messages = case.messages.iter();
    'calls: loop {
        let mut head = [0; 28];
        stream.read_exact(&mut head).await?;
        let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four"));
        let mut rest = vec![0; (number(0) as usize).saturating_sub(28)];
        stream.read_exact(&mut rest).await?;
        for message in messages.by_ref() {
            let (kind, status, program, procedure, parts) = match message {
                Message::Answer(parts) => (1u32, 0u32, number(4), number(12), parts),
                Message::Refusal(parts) => (1, 1, number(4), number(12), parts),
                Message::Notice(qemu, procedure, parts) => {
                    let lifecycle = (0x2000_8086, 318);
                    let monitor = (0x2000_8087, u32::from(*procedure % 8));
                    let (program, procedure) = if *qemu { monitor } else { lifecycle };
                    (2, 0, program, procedure, parts)
                }
                Message::Bytes(bytes) => {
                    stream.write_all(bytes).await?;
                    continue;
                }
            };
            let mut body = Vec::new();
            for word in [program, 1, procedure, kind, number(20), status] {
                body.extend(word.to_be_bytes());
            }
            parts.iter().for_each(|part| part.write(&mut body));
            let length = body.len() as u32 + 4;
            stream.write_all(&length.to_be_bytes()).await?;
            stream.write_all(&body).await?;
            if kind == 1 {
                continue 'calls;
            }
        }
        return Ok(());
    }
}
