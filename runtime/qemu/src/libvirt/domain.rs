//! A domain, and what is asked of libvirt about it.

use super::connection::{Connection, Ears, Procedure, qemu, remote};
use super::message::UUID;
use super::xdr::{Reader, Writer};
use super::{Address, LibvirtError, Malformed, NO_DOMAIN};
use serde_json::Value;
use std::fmt::Write as _;
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long QEMU may take to write what it holds and end.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// How long libvirt waits for the agent to show that it is there, before it hands on a command.
const SYNC_LIMIT: Duration = Duration::from_secs(5);

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(200);

const DESTROY_FLAGS: Procedure = remote(234, "to stop the domain");
const XML: Procedure = remote(14, "for the domain's definition");
const LOOK_UP_BY_NAME: Procedure = remote(23, "for the domain");
const LOOK_UP_BY_UUID: Procedure = remote(24, "for the domain");
const HAS_SAVED_MEMORY: Procedure = remote(183, "whether the domain has saved memory");
const CREATE_WITH_FLAGS: Procedure = remote(196, "to start the domain");
const STATE: Procedure = remote(212, "for the domain's state");
const REGISTER_EVENT: Procedure = remote(316, "to tell of the domain's end");
const COMMAND: Procedure = qemu(1, "to hand a command to QEMU's monitor");
const AGENT_COMMAND: Procedure = qemu(3, "to hand a command to the guest agent");
const REGISTER_MONITOR_EVENTS: Procedure = qemu(4, "to tell of QEMU's events");
const COMMAND_WITH_FILES: Procedure = qemu(7, "to hand a descriptor to QEMU's monitor");

/// `VIR_DOMAIN_START_PAUSED`.
const PAUSED: u32 = 1;
/// `VIR_DOMAIN_DESTROY_GRACEFUL`: QEMU is told to end, and not killed.
const GRACEFUL: u32 = 1;
/// `VIR_DOMAIN_SHUTOFF`, and `VIR_DOMAIN_CRASHED`, in which there is no QEMU either.
const OFF: [i32; 2] = [5, 6];
/// `VIR_DOMAIN_XML_INACTIVE`.
const INACTIVE: u32 = 2;
/// `VIR_DOMAIN_EVENT_ID_LIFECYCLE`.
const LIFECYCLE: i32 = 0;

/// A domain, over a connection of its own.
#[derive(Debug)]
pub struct Domain {
    connection: Connection,
    name: String,
    uuid: [u8; UUID],
    /// libvirt's number of this run of it; below zero where it does not run.
    id: i32,
}

impl Domain {
    /// Connects, and looks it up.
    ///
    /// # Errors
    /// A [`LibvirtError`]; one that says so where there is no such domain.
    pub async fn find(address: &Address) -> Result<Self, LibvirtError> {
        Self::find_heard(address, None).await
    }

    pub(super) async fn find_heard(
        address: &Address,
        ears: Option<Ears>,
    ) -> Result<Self, LibvirtError> {
        let connection = Connection::open(&address.uri, ears).await?;
        let arguments = Writer::default();
        let found = match parse_uuid(&address.domain) {
            Some(uuid) => {
                let arguments = arguments.bytes(&uuid).done();
                connection.call(LOOK_UP_BY_UUID, arguments).await
            }
            None => {
                let arguments = arguments.text(&address.domain).done();
                connection.call(LOOK_UP_BY_NAME, arguments).await
            }
        };
        let found = found.map_err(|error| match error {
            LibvirtError::Refused { code, .. } if code == NO_DOMAIN => LibvirtError::NoDomain {
                domain: address.domain.escape_debug().to_string(),
                uri: address.uri.clone(),
            },
            error => error,
        })?;
        let mut reader = Reader::new(&found);
        let name = reader.text()?.to_owned();
        let uuid = reader.bytes(UUID)?;
        let uuid = uuid.try_into().map_err(|_| Malformed::Short)?;
        let id = reader.signed()?;
        Ok(Self {
            connection,
            name,
            uuid,
            id,
        })
    }

    /// Its name at this time.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What stays the same when it is given another name.
    pub fn uuid(&self) -> String {
        let mut text = String::new();
        for (index, byte) in self.uuid.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                text.push('-');
            }
            let _ = write!(text, "{byte:02x}");
        }
        text
    }

    pub(super) fn id(&self) -> i32 {
        self.id
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.connection.is_lost()
    }

    pub(super) async fn ended(&self) {
        self.connection.ended().await;
    }

    /// Whether it has a QEMU.
    ///
    /// # Errors
    /// A [`LibvirtError`].
    pub async fn has_qemu(&self) -> Result<bool, LibvirtError> {
        let answer = self.connection.call(STATE, self.with_flags(0)).await?;
        let state = Reader::new(&answer).signed()?;
        Ok(!OFF.contains(&state))
    }

    /// Whether a start would go on from memory that `virsh managedsave` saved, and consume it.
    ///
    /// # Errors
    /// A [`LibvirtError`].
    pub async fn has_saved_memory(&self) -> Result<bool, LibvirtError> {
        let asked = self.connection.call(HAS_SAVED_MEMORY, self.with_flags(0));
        Ok(Reader::new(&asked.await?).signed()? != 0)
    }

    /// Starts it with its processors stopped.
    ///
    /// # Errors
    /// A [`LibvirtError`].
    pub async fn start_paused(&self) -> Result<(), LibvirtError> {
        let arguments = self.with_flags(PAUSED);
        let started = self.connection.call(CREATE_WITH_FLAGS, arguments).await;
        started.map(drop)
    }

    /// Ends its QEMU, which writes what it holds first. One that does not end by itself is not killed.
    ///
    /// # Errors
    /// A [`LibvirtError`].
    pub async fn stop(&self) -> Result<(), LibvirtError> {
        let deadline = Instant::now() + STOP_LIMIT;
        loop {
            let arguments = self.with_flags(GRACEFUL);
            let stopped = self.connection.call(DESTROY_FLAGS, arguments).await;
            match stopped {
                Ok(_) => return Ok(()),
                Err(_) if !self.is_lost() && !self.has_qemu().await? => return Ok(()),
                Err(LibvirtError::Refused { .. }) if Instant::now() < deadline => {
                    sleep(PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Its definition as it runs at this time.
    ///
    /// # Errors
    /// A [`LibvirtError`].
    pub async fn running_definition(&self) -> Result<String, LibvirtError> {
        self.xml(0).await
    }

    /// Its definition as it is started by the next time, without passwords.
    ///
    /// # Errors
    /// A [`LibvirtError`].
    pub async fn stored_definition(&self) -> Result<String, LibvirtError> {
        self.xml(INACTIVE).await
    }

    async fn xml(&self, flags: u32) -> Result<String, LibvirtError> {
        let answer = self.connection.call(XML, self.with_flags(flags)).await?;
        Ok(Reader::new(&answer).text()?.to_owned())
    }

    /// Asks to be told of its end and of its monitor's events. Who may not hear the latter does without.
    pub(super) async fn listen(&self) -> Result<(), LibvirtError> {
        let arguments = self.write(Writer::default().signed(LIFECYCLE).number(1));
        let arguments = arguments.done();
        self.connection.call(REGISTER_EVENT, arguments).await?;
        let all = self.write(Writer::default().number(1)).missing().number(0);
        match self
            .connection
            .call(REGISTER_MONITOR_EVENTS, all.done())
            .await
        {
            Err(LibvirtError::Refused { .. }) => Ok(()),
            registered => registered.map(drop),
        }
    }

    /// Hands a command to the monitor of its QEMU, and returns what that answered, an error of QEMU's included. It takes
    /// as long as QEMU does.
    pub(super) async fn command(
        &self,
        command: &str,
        descriptor: Option<OwnedFd>,
    ) -> Result<Value, LibvirtError> {
        let procedure = match descriptor {
            None => COMMAND,
            Some(_) => COMMAND_WITH_FILES,
        };
        let arguments = self.write(Writer::default()).text(command).number(0);
        let called = self
            .connection
            .call_with(procedure, arguments.done(), descriptor);
        let answer = called.await?;
        let text = Reader::new(&answer).text()?;
        Ok(serde_json::from_str(text).map_err(|_| Malformed::NoText)?)
    }

    /// Hands a command to the guest agent, which may take `limit` for it, and returns what that answered.
    ///
    /// # Errors
    /// A [`LibvirtError`], which is also how an error of the agent's comes.
    pub(crate) async fn agent_command(
        &self,
        command: &str,
        limit: Duration,
    ) -> Result<String, LibvirtError> {
        let seconds = i32::try_from(limit.as_secs().max(1)).unwrap_or(i32::MAX);
        let arguments = self.write(Writer::default());
        let arguments = arguments.text(command).signed(seconds).number(0).done();
        let patience = limit + SYNC_LIMIT;
        let called = self
            .connection
            .call_within(patience, AGENT_COMMAND, arguments);
        let answer = called.await?;
        let text = Reader::new(&answer).optional(Reader::text)?;
        Ok(text.unwrap_or_default().to_owned())
    }

    fn with_flags(&self, flags: u32) -> Vec<u8> {
        self.write(Writer::default()).number(flags).done()
    }

    fn write(&self, writer: Writer) -> Writer {
        writer.text(&self.name).bytes(&self.uuid).signed(self.id)
    }
}

/// The usual way to write one: 8-4-4-4-12 hexadecimal digits.
fn parse_uuid(text: &str) -> Option<[u8; UUID]> {
    let groups: Vec<usize> = text.split('-').map(str::len).collect();
    if groups != [8, 4, 4, 4, 12] {
        return None;
    }
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
    let mut uuid = [0; UUID];
    for (byte, pair) in uuid.iter_mut().zip(digits.chunks(2)) {
        let pair = str::from_utf8(pair).ok()?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_told_from_a_name() {
        let uuid = parse_uuid("20fec80d-a309-4aba-9565-d73325c73f12").unwrap();
        assert_eq!(uuid[..4], [0x20, 0xfe, 0xc8, 0x0d]);
        for name in [
            "web",
            "20fec80d",
            "20fec80d-a309-4aba-9565-d73325c73f1x",
            "",
            "-",
        ] {
            assert_eq!(parse_uuid(name), None, "{name}");
        }
    }
}
