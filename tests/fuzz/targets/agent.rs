//! What a guest sends in place of its agent's answers.
//!
//! What must hold: no panic, no hang, and no success that the guest did not state.

#![no_main]

use arbitrary::Arbitrary;
use fleecebox::qemu::Agent;
use fleecebox::qemu::agent::Limits;
use fleecebox_fuzz::runtime;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

#[derive(Debug, Arbitrary)]
struct Case {
    answers: Vec<Vec<Answer>>,
}

/// A part of what is sent when a command has come.
#[derive(Debug, Arbitrary)]
enum Answer {
    Bytes(Vec<u8>),
    /// The right answer to a synchronisation.
    Sync,
    Mark,
    Newline,
    Count(i64),
    Thawed,
    Frozen,
    Unknown(String),
}

fuzz_target!(|case: Case| {
    runtime::run(async {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets can be made");
        let (frozen, said) = tokio::join!(
            async {
                let mut agent = Agent::over(ours, Limits::default());
                let frozen = agent.freeze().await;
                let thawed = agent.thaw().await;
                if let Err(error) = &thawed {
                    let _ = error.to_string();
                }
                frozen.ok()
            },
            guest(&case, theirs)
        );
        // No number of file systems comes out of nowhere.
        if let Some(count) = frozen {
            assert!(said.contains(&count.to_string()));
        }
    });
});

/// Answers each command with the next list; returns all that it said, as text.
async fn guest(case: &Case, mut stream: UnixStream) -> String {
    let mut said = Vec::new();
    for answers in &case.answers {
        let Some(command) = command(&mut stream).await else {
            break;
        };
        let mut bytes = Vec::new();
        for answer in answers {
            answer.render(&command, &mut bytes);
        }
        if stream.write_all(&bytes).await.is_err() {
            break;
        }
        said.extend(bytes);
    }
    String::from_utf8_lossy(&said).into_owned()
}

impl Answer {
    fn render(&self, command: &Value, out: &mut Vec<u8>) {
        let line = match self {
            Self::Bytes(bytes) => return out.extend(bytes),
            Self::Mark => return out.push(0xff),
            Self::Newline => return out.push(b'\n'),
            Self::Sync => {
                out.push(0xff);
                format!("{{\"return\":{}}}", command["arguments"]["id"])
            }
            Self::Count(count) => format!("{{\"return\":{count}}}"),
            Self::Thawed => "{\"return\":\"thawed\"}".into(),
            Self::Frozen => "{\"return\":\"frozen\"}".into(),
            Self::Unknown(text) => {
                format!(
                    "{{\"error\":{{\"class\":\"CommandNotFound\",\"desc\":{}}}}}",
                    Value::from(text.as_str())
                )
            }
        };
        out.extend(line.bytes());
        out.push(b'\n');
    }
}

/// The next command. One that follows a mark is on its own.
async fn command(stream: &mut UnixStream) -> Option<Value> {
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await.ok()? {
            0xff => line.clear(),
            b'\n' => return serde_json::from_slice(&line).ok(),
            byte => line.push(byte),
        }
    }
}
