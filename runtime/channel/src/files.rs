//! Files on their way into a fresh sandbox process.
//!
//! They are sent over the socket itself (`SCM_RIGHTS`, unix(7)) with one byte beside them, before the first message.
//! So the process is started with nothing but its socket.

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The payload, and the compiled component where there is one.
const MOST_FILES: usize = 2;

/// A stream socket needs at least one byte to carry files along; its value says nothing.
const CARRIER: [u8; 1] = [b'F'];

/// Sends `files`, one or two. Never blocks on a socket on which nothing was sent before.
pub fn hand_over(socket: impl AsFd, files: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(Errno::TOOBIG);
    }
    sendmsg(
        socket,
        &[IoSlice::new(&CARRIER)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Waits for what [`hand_over`] sent, in the same order.
pub fn take_over(socket: impl AsFd) -> Result<Vec<OwnedFd>, Errno> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut carrier = [0];
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut carrier)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if received.bytes != 1 || received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(Errno::PROTO);
    }
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    Ok(files.flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Payload;
    use std::os::unix::net::UnixStream;

    #[test]
    fn files_arrive_in_their_order_and_before_the_first_message() {
        let (here, there) = UnixStream::pair().unwrap();
        let (first, second) = (Payload::create(10).unwrap(), Payload::create(20).unwrap());
        hand_over(&here, &[first.as_fd(), second.as_fd()]).unwrap();
        std::io::Write::write_all(&mut (&here), b"message").unwrap();
        let sizes: Vec<_> = take_over(&there)
            .unwrap()
            .into_iter()
            .map(|file| Payload::adopt(file).unwrap().size())
            .collect();
        assert_eq!(sizes, [10, 20]);
        let mut rest = [0; 7];
        std::io::Read::read_exact(&mut (&there), &mut rest).unwrap();
        assert_eq!(&rest, b"message");
    }

    #[test]
    fn a_socket_that_closes_instead_is_an_error() {
        let (here, there) = UnixStream::pair().unwrap();
        drop(here);
        assert_eq!(take_over(&there).unwrap_err(), Errno::PROTO);
    }
}
