//! Attacks least authority: an honest blind backup whose component also imports a way to the network.

use fleecebox_guest::{Archive, BlindProvider, BlindVolume, Context, Encoding, Error};

mod network {
    #![allow(missing_docs, clippy::all)]

    wit_bindgen::generate!({
        inline: r#"
            package hostile:imports-a-socket;

            world network {
                import wasi:sockets/tcp-create-socket@0.2.0;
            }

            // As much of it as it takes to be refused. The linker raises the version to that of the WASI it knows.
            package wasi:sockets@0.2.0 {
                interface tcp-create-socket {
                    enum ip-address-family { ipv4, ipv6 }
                    enum error-code { unknown, access-denied, not-supported }
                    create-tcp-socket: func(address-family: ip-address-family) -> result<u32, error-code>;
                }
            }
        "#,
        generate_all,
    });
}

use network::wasi::sockets::tcp_create_socket::{IpAddressFamily, create_tcp_socket};

struct ImportsASocket;

impl BlindProvider for ImportsASocket {
    fn run(
        job: Context,
        volume: BlindVolume,
        archive: Archive,
        _base: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let socket = create_tcp_socket(IpAddressFamily::Ipv4);
        job.info(format_args!("a socket: {}", socket.is_ok()));
        let mut object = archive.create(&volume.snapshot.info().name, Encoding::Zstd)?;
        for run in volume.dirty.data_runs() {
            object.splice(&volume.snapshot, run?)?;
        }
        object.finish()?;
        Ok(Vec::new())
    }
}

fleecebox_guest::export_blind!(ImportsASocket);
