//! A blocking NBD client with one request in flight, enough to write to a live disk.
//!
//! From the NBD project's `doc/proto.md`: the fixed newstyle handshake, `NBD_OPT_GO`, simple
//! replies. Nothing else is negotiated.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

const HANDSHAKE_MAGIC: &[u8; 8] = b"NBDMAGIC";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// `NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES`.
const CLIENT_FLAGS: u32 = 3;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
/// A longer option reply is a mistake in the stream, not an information about an export.
const OPTION_REPLY_LIMIT: u32 = 64 << 10;

#[derive(Clone, Copy)]
#[repr(u16)]
enum Command {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
}

/// Why a request or the handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The server has no such export or does not give it.
    #[error("the NBD server refused the export (reply {reply:#x})")]
    Refused {
        /// The type of the option reply.
        reply: u32,
    },
    /// The server answered a request with an error.
    #[error("the NBD server answered with error {0}")]
    Failed(u32),
    /// A magic number or cookie is wrong.
    #[error("not NBD: {what} is {actual:#x}, expected {expected:#x}")]
    Protocol {
        /// The field.
        what: &'static str,
        /// Its value by the protocol.
        expected: u64,
        /// Its value as it came.
        actual: u64,
    },
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A connection to one export.
#[derive(Debug)]
pub struct NbdClient {
    stream: UnixStream,
    size: u64,
    cookie: u64,
}

impl NbdClient {
    /// Connects to the export `name` of the server on `socket`.
    ///
    /// # Errors
    /// When nobody listens, it is no NBD server or it refuses the export.
    pub fn connect(socket: &Path, name: &str) -> Result<Self, NbdError> {
        let mut stream = UnixStream::connect(socket)?;
        let mut hello = [0; 18];
        stream.read_exact(&mut hello)?;
        expect("handshake", be64(HANDSHAKE_MAGIC), be64(&hello[..8]))?;
        expect("newstyle magic", be64(OPTION_MAGIC), be64(&hello[8..16]))?;
        let mut request = CLIENT_FLAGS.to_be_bytes().to_vec();
        request.extend_from_slice(OPTION_MAGIC);
        request.extend_from_slice(&OPT_GO.to_be_bytes());
        let name_length = name.len() as u32;
        request.extend_from_slice(&(4 + name_length + 2).to_be_bytes());
        request.extend_from_slice(&name_length.to_be_bytes());
        request.extend_from_slice(name.as_bytes());
        request.extend_from_slice(&0u16.to_be_bytes());
        stream.write_all(&request)?;
        let size = go_replies(&mut stream)?;
        Ok(Self {
            stream,
            size,
            cookie: 0,
        })
    }

    /// The export's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    /// As the server answers, for all requests here.
    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<(), NbdError> {
        self.request(Command::Read, offset, bytes.len() as u32, &[])?;
        Ok(self.stream.read_exact(bytes)?)
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// As the server answers.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), NbdError> {
        self.request(Command::Write, offset, bytes.len() as u32, bytes)
    }

    /// Makes a range read as zeroes; the server may punch a hole.
    ///
    /// # Errors
    /// As the server answers.
    pub fn write_zeroes(&mut self, offset: u64, length: u32) -> Result<(), NbdError> {
        self.request(Command::WriteZeroes, offset, length, &[])
    }

    /// Gives a range up.
    ///
    /// # Errors
    /// As the server answers.
    pub fn trim(&mut self, offset: u64, length: u32) -> Result<(), NbdError> {
        self.request(Command::Trim, offset, length, &[])
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// As the server answers.
    pub fn flush(&mut self) -> Result<(), NbdError> {
        self.request(Command::Flush, 0, 0, &[])
    }

    fn request(
        &mut self,
        command: Command,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> Result<(), NbdError> {
        self.cookie += 1;
        self.send(command, offset, length, payload)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        expect(
            "reply magic",
            SIMPLE_REPLY_MAGIC.into(),
            be32(&reply[..4]).into(),
        )?;
        expect("cookie", self.cookie, be64(&reply[8..]))?;
        match be32(&reply[4..8]) {
            0 => Ok(()),
            error => Err(NbdError::Failed(error)),
        }
    }

    fn send(
        &mut self,
        command: Command,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> io::Result<()> {
        let mut header = [0; 28];
        header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[6..8].copy_from_slice(&(command as u16).to_be_bytes());
        header[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        header[16..24].copy_from_slice(&offset.to_be_bytes());
        header[24..].copy_from_slice(&length.to_be_bytes());
        self.stream.write_all(&header)?;
        self.stream.write_all(payload)
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        // A courtesy that the server needs no answer to; it may be gone already.
        let _ = self.send(Command::Disconnect, 0, 0, &[]);
    }
}

fn go_replies(stream: &mut UnixStream) -> Result<u64, NbdError> {
    let mut size = None;
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header)?;
        expect("option reply magic", OPTION_REPLY_MAGIC, be64(&header[..8]))?;
        let (reply, length) = (be32(&header[12..16]), be32(&header[16..]));
        if length > OPTION_REPLY_LIMIT {
            let expected = OPTION_REPLY_LIMIT.into();
            let actual = length.into();
            return Err(NbdError::Protocol {
                what: "option reply length",
                expected,
                actual,
            });
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        match (reply, size) {
            (REP_INFO, _) if data.len() >= 12 && data[..2] == INFO_EXPORT.to_be_bytes() => {
                size = Some(be64(&data[2..10]));
            }
            (REP_INFO, _) => {}
            (REP_ACK, Some(size)) => return Ok(size),
            (reply, _) => return Err(NbdError::Refused { reply }),
        }
    }
}

fn expect(what: &'static str, expected: u64, actual: u64) -> Result<(), NbdError> {
    if expected == actual {
        Ok(())
    } else {
        Err(NbdError::Protocol {
            what,
            expected,
            actual,
        })
    }
}

fn be64(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .take(8)
        .fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn be32(bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .take(4)
        .fold(0, |value, &byte| value << 8 | u32::from(byte))
}
