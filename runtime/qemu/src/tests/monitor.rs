//! Monitors that are newer than we are, and sockets that are no monitors.

use crate::monitor::{Monitor, MonitorError, NotQmp};
use qapi::qmp::{query_jobs, query_status};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 99}, "package": ""}, "capabilities": ["oob", "invented-later"]}}"#;

/// The other end of [`serve`].
pub(super) fn fake(script: impl Fn(&Value) -> String + Send + 'static) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    tokio::spawn(serve(theirs, script));
    ours
}

/// A server that greets, takes `qmp_capabilities`, and then answers each command with what `script`
/// returns for it, where `ID` stands for the command's id.
pub(super) async fn serve(client: UnixStream, script: impl Fn(&Value) -> String) {
    let (reader, mut writer) = client.into_split();
    let greeting = format!("{GREETING}\r\n");
    writer.write_all(greeting.as_bytes()).await.unwrap();
    let mut lines = BufReader::new(reader).lines();
    while let Some(line) = lines.next_line().await.unwrap() {
        let command: Value = serde_json::from_str(&line).unwrap();
        let answer = match command["execute"].as_str().unwrap() {
            "qmp_capabilities" => r#"{"return": {}, "id": ID}"#.to_owned(),
            _ => script(&command),
        };
        if answer == "CLOSE" {
            return;
        }
        let answer = answer.replace("ID", &command["id"].to_string()) + "\r\n";
        if writer.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

async fn connect(script: impl Fn(&str) -> String + Send + 'static) -> Monitor {
    let by_name = move |command: &Value| script(command["execute"].as_str().unwrap());
    Monitor::over(fake(by_name), "fake").await.unwrap()
}

#[tokio::test]
async fn unknown_events_fields_and_garbage_around_an_answer_do_no_harm() {
    let monitor = connect(|_| {
        [
            r#"{"event": "INVENTED_LATER", "data": {"what": ["ever"]}, "timestamp": {"seconds": 1, "microseconds": 2}, "new": 1}"#,
            "this is no JSON",
            "[1, 2, 3]",
            r#"{"return": {"status": "of another client"}, "id": "x-1"}"#,
            r#"{"error": {"class": "GenericError", "desc": "without an id"}}"#,
            r#"{"invented": "later"}"#,
            r#"{"return": {"running": true, "status": "running", "new-field": {}}, "id": ID, "new": 1}"#,
        ]
        .join("\r\n")
    })
    .await;
    let mut events = monitor.events();
    assert!(monitor.execute(query_status {}).await.unwrap().running);
    let event = events
        .wait_for(Duration::from_secs(5), |_| true)
        .await
        .unwrap();
    assert_eq!(
        (event.name.as_str(), event.data),
        ("INVENTED_LATER", json!({ "what": ["ever"] }))
    );
}

#[tokio::test]
async fn an_unknown_enum_value_fails_only_the_command_that_asked_with_a_closed_type() {
    let monitor = connect(|_| {
        r#"{"return": [{"id": "j", "type": "invented-later", "status": "daydreaming", "current-progress": 0, "total-progress": 0}], "id": ID}"#.into()
    })
    .await;
    assert!(matches!(
        monitor.execute(query_jobs {}).await,
        Err(MonitorError::Answer { .. })
    ));
    let jobs: Vec<Value> = monitor.query("query-jobs", json!({})).await.unwrap();
    assert_eq!(jobs[0]["status"], "daydreaming");
}

#[tokio::test]
async fn a_refusal_carries_qemus_words_and_its_class() {
    let monitor = connect(|name| {
        format!(
            r#"{{"error": {{"class": "InventedLater", "desc": "not today, {name}"}}, "id": ID}}"#
        )
    })
    .await;
    match monitor.execute_raw("stop", json!({})).await {
        Err(e @ MonitorError::Refused { .. }) => {
            assert_eq!(e.to_string(), "QEMU refused stop: not today, stop");
            assert!(e.is_refusal() && !e.is_lost());
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn commands_of_several_tasks_get_their_own_answers() {
    let monitor = connect(|name| format!(r#"{{"return": "{name}", "id": ID}}"#)).await;
    let asked = (0..100).map(|i| {
        let monitor = &monitor;
        async move {
            let name = format!("command-{i}");
            assert_eq!(
                monitor.execute_raw(&name, json!({})).await.unwrap(),
                json!(name)
            );
        }
    });
    futures_util::future::join_all(asked).await;
}

#[tokio::test]
async fn a_lost_connection_fails_those_who_wait_and_those_who_come() {
    let monitor = connect(|_| "CLOSE".into()).await;
    let mut events = monitor.events();
    let (command, event) = tokio::join!(
        monitor.execute_raw("stop", json!({})),
        events.wait_for(Duration::from_secs(20), |_| true),
    );
    assert!(command.unwrap_err().is_lost());
    assert!(event.unwrap_err().is_lost());
    assert!(
        monitor
            .execute_raw("stop", json!({}))
            .await
            .unwrap_err()
            .is_lost()
    );
    assert!(
        monitor
            .events()
            .wait_for(Duration::from_secs(20), |_| true)
            .await
            .unwrap_err()
            .is_lost()
    );
}

#[tokio::test]
async fn a_line_without_end_ends_the_connection_instead_of_our_memory() {
    let monitor = connect(|_| "x".repeat((16 << 20) + 1)).await;
    let error = monitor.execute_raw("stop", json!({})).await.unwrap_err();
    assert!(
        error.is_lost() && error.to_string().contains("more than"),
        "{error}"
    );
}

#[tokio::test]
async fn a_missed_event_times_out_and_too_many_are_told() {
    let monitor = connect(|_| {
        let flood = "{\"event\": \"E\"}\r\n".repeat(2000);
        flood + r#"{"return": {}, "id": ID}"#
    })
    .await;
    let mut quiet = monitor.events();
    let limit = Duration::from_millis(20);
    assert!(matches!(
        quiet.wait_for(limit, |_| true).await,
        Err(MonitorError::TimedOut { .. })
    ));
    monitor.execute_raw("stop", json!({})).await.unwrap();
    assert!(
        matches!(quiet.wait_for(limit, |_| true).await, Err(MonitorError::EventsMissed { count }) if count > 0)
    );
}

#[tokio::test]
async fn a_socket_that_is_no_monitor_is_told_apart() {
    async fn error_of(sent: &'static [u8]) -> NotQmp {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(sent).await.unwrap();
        theirs.shutdown().await.unwrap();
        let reader = tokio::spawn(async move {
            let mut all = Vec::new();
            let _ = theirs.read_to_end(&mut all).await;
        });
        let error = Monitor::over(ours, "some.sock").await.unwrap_err();
        reader.await.unwrap();
        assert!(
            error.to_string().contains("some.sock is not a QMP monitor"),
            "{error}"
        );
        match error {
            MonitorError::NotQmp { reason, .. } => reason,
            other => panic!("{other}"),
        }
    }
    assert!(matches!(
        error_of(b"SSH-2.0-OpenSSH\r\n").await,
        NotQmp::OtherGreeting
    ));
    assert!(matches!(
        error_of(b"{\"qmp\": 1}\r\n").await,
        NotQmp::OtherGreeting
    ));
    assert!(matches!(error_of(b"NBDMAGIC").await, NotQmp::Closed));
    assert!(matches!(
        error_of(&[b' '; 70_000]).await,
        NotQmp::OtherGreeting
    ));
}

/// It is no mistake of the user's, who has named a monitor.
#[tokio::test]
async fn a_monitor_that_goes_in_its_handshake_is_lost() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"{\"QMP\": {}}\r\n").await.unwrap();
    theirs.shutdown().await.unwrap();
    let error = Monitor::over(ours, "some.sock").await.unwrap_err();
    assert!(error.is_lost(), "{error}");
}

#[tokio::test]
async fn a_silent_socket_and_a_missing_one_are_errors_that_name_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("silent.sock");
    let missing = Monitor::connect(&path).await.unwrap_err();
    assert!(
        matches!(missing, MonitorError::Connect { .. })
            && missing.to_string().contains("silent.sock")
    );
    let _listener = UnixListener::bind(&path).unwrap();
    let silent = Monitor::connect(&path).await.unwrap_err();
    assert!(matches!(
        silent,
        MonitorError::NotQmp {
            reason: NotQmp::Silent { .. },
            ..
        }
    ));
}

#[tokio::test]
async fn a_monitor_that_closes_at_once_is_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = tokio::spawn(async move {
        drop(listener.accept().await.unwrap());
        serve(listener.accept().await.unwrap().0, |_| {
            r#"{"return": {}, "id": ID}"#.into()
        })
        .await;
    });
    let monitor = Monitor::connect(&path).await.unwrap();
    monitor.execute_raw("stop", json!({})).await.unwrap();
    drop(monitor);
    server.await.unwrap();
}
