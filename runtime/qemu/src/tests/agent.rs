//! Guests that are slow, that lie, and that send rubbish.

use crate::agent::{Agent, AgentError, Limits};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Reads commands as the agent does: 0xFF starts afresh, a line is a command.
pub(super) async fn next_command(guest: &mut UnixStream) -> Option<Value> {
    let mut line = Vec::new();
    loop {
        match guest.read_u8().await.ok()? {
            0xff => line.clear(),
            b'\n' => return Some(serde_json::from_slice(&line).unwrap()),
            byte => line.push(byte),
        }
    }
}

pub(super) fn sync_answer(command: &Value) -> Vec<u8> {
    let answer = json!({ "return": command["arguments"]["id"] });
    [b"\xff", answer.to_string().as_bytes(), b"\n"].concat()
}

fn limits() -> Limits {
    let answer = Duration::from_millis(300);
    Limits {
        answer,
        freeze: answer,
        thaw: Duration::from_millis(1500),
    }
}

/// What a guest sends for each command, and the commands it saw.
fn guest(
    answer: impl Fn(&str, &[String]) -> Vec<u8> + Send + 'static,
) -> (Agent, Arc<Mutex<Vec<String>>>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    tokio::spawn(async move {
        while let Some(command) = next_command(&mut theirs).await {
            let name = command["execute"].as_str().unwrap().to_owned();
            let before = log.lock().unwrap().clone();
            let bytes = match (&*name, answer(&name, &before)) {
                ("guest-sync-delimited", noise) => [noise, sync_answer(&command)].concat(),
                (_, bytes) => bytes,
            };
            log.lock().unwrap().push(name);
            if theirs.write_all(&bytes).await.is_err() {
                return;
            }
        }
    });
    (Agent::over(ours, limits()), seen)
}

fn count(seen: &[String], name: &str) -> usize {
    seen.iter().filter(|seen| *seen == name).count()
}

#[tokio::test]
async fn an_honest_guest_freezes_and_thaws() {
    let (mut agent, seen) = guest(|name, _| match name {
        "guest-fsfreeze-freeze" => b"{\"return\": 3}\n".to_vec(),
        "guest-fsfreeze-thaw" => b"{\"return\": 3}\n".to_vec(),
        "guest-fsfreeze-status" => b"{\"return\": \"thawed\"}\n".to_vec(),
        _ => Vec::new(),
    });
    assert_eq!(agent.freeze().await.unwrap(), 3);
    agent.thaw().await.unwrap();
    let expected = [
        "guest-sync-delimited",
        "guest-fsfreeze-freeze",
        "guest-fsfreeze-thaw",
        "guest-fsfreeze-status",
    ];
    assert_eq!(*seen.lock().unwrap(), expected);
}

#[tokio::test]
async fn rubbish_before_the_sync_and_old_answers_are_skipped() {
    let (mut agent, _) = guest(|name, _| match name {
        "guest-sync-delimited" => {
            b"half an ans\xff{\"return\": 17}\n\xffnonsense\n{\"return\": \"frozen\"}\n".to_vec()
        }
        "guest-fsfreeze-freeze" => b"{\"return\": 1}\n".to_vec(),
        _ => Vec::new(),
    });
    assert_eq!(agent.freeze().await.unwrap(), 1);
}

#[tokio::test]
async fn a_freeze_that_came_too_late_is_thawed_until_the_guest_says_thawed() {
    // The freeze never answers; the guest says "frozen" until it was thawed for the third time.
    let (mut agent, seen) = guest(|name, before| match name {
        "guest-fsfreeze-thaw" => b"{\"return\": 1}\n".to_vec(),
        "guest-fsfreeze-status" if count(before, "guest-fsfreeze-thaw") < 3 => {
            b"{\"return\": \"frozen\"}\n".to_vec()
        }
        "guest-fsfreeze-status" => b"{\"return\": \"thawed\"}\n".to_vec(),
        _ => Vec::new(),
    });
    let error = agent.freeze().await.unwrap_err();
    assert!(
        matches!(
            error,
            AgentError::Silent {
                command: "guest-fsfreeze-freeze",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(count(&seen.lock().unwrap(), "guest-fsfreeze-thaw"), 3);
}

#[tokio::test]
async fn a_guest_that_never_thaws_is_told_after_the_limit() {
    let (mut agent, _) = guest(|name, _| match name {
        "guest-fsfreeze-status" => b"{\"return\": \"frozen\"}\n".to_vec(),
        "guest-sync-delimited" => Vec::new(),
        _ => b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"\x1b[31mno\"}}\n".to_vec(),
    });
    let error = agent.freeze().await.unwrap_err();
    assert!(
        matches!(&error, AgentError::StillFrozen { source, .. } if matches!(**source, AgentError::SaysSo)),
        "{error}"
    );
}

#[tokio::test]
async fn a_flood_is_cut_off_and_the_guest_is_still_thawed() {
    let (mut agent, seen) = guest(|name, _| match name {
        "guest-fsfreeze-freeze" => vec![b'x'; 300 << 10],
        "guest-fsfreeze-status" => b"{\"return\": \"thawed\"}\n".to_vec(),
        "guest-fsfreeze-thaw" => b"{\"return\": 1}\n".to_vec(),
        _ => Vec::new(),
    });
    let error = agent.freeze().await.unwrap_err();
    assert!(
        matches!(
            error,
            AgentError::TooMuch {
                command: "guest-fsfreeze-freeze",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(count(&seen.lock().unwrap(), "guest-fsfreeze-thaw"), 1);
}

#[tokio::test]
async fn an_answer_that_is_none_is_no_freeze_and_its_text_is_tamed() {
    for (answer, tells) in [
        (&b"{\"return\": \"many\"}\n"[..], "something else"),
        (b"{\"return\": -1}\n", "something else"),
        (b"[]\n", "something else"),
        (b"{}\n", "something else"),
        (b"\xfe\xfe\n", "something else"),
        (
            b"{\"error\": {\"desc\": \"a\\u001b[2Jb\\nc\"}}\n",
            "a\\u{1b}[2Jb\\nc",
        ),
        (b"{\"error\": 5}\n", "refused"),
    ] {
        let (mut agent, seen) = guest(move |name, _| match name {
            "guest-fsfreeze-freeze" => answer.to_vec(),
            "guest-fsfreeze-thaw" => b"{\"return\": 0}\n".to_vec(),
            "guest-fsfreeze-status" => b"{\"return\": \"thawed\"}\n".to_vec(),
            _ => Vec::new(),
        });
        let error = agent.freeze().await.unwrap_err().to_string();
        assert!(error.contains(tells), "{error}");
        assert_eq!(count(&seen.lock().unwrap(), "guest-fsfreeze-thaw"), 1);
    }
}

#[tokio::test]
async fn an_agent_that_cannot_freeze_needs_no_thaw() {
    let (mut agent, _) = guest(|name, _| match name {
        "guest-sync-delimited" => Vec::new(),
        _ => b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"disabled\"}}\n".to_vec(),
    });
    let error = agent.freeze().await.unwrap_err();
    assert!(
        matches!(error, AgentError::Refused { known: false, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_guest_without_an_agent_is_silent_soon() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let error = Agent::over(ours, limits()).freeze().await.unwrap_err();
    assert!(
        matches!(
            error,
            AgentError::Silent {
                command: "guest-sync-delimited",
                ..
            }
        ),
        "{error}"
    );
}
