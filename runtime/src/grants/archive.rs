//! `archive`: chunks, objects, and what is claimed to be in them.

use super::names;
use super::put;
use super::run::{Run, refused};
use super::stream::{Failed, Stream};
use crate::archive::{self, ObjectName};
use crate::channel::Answer;
use crate::contract::{Encoding, ErrorCode, MAX_PUT, MAX_STREAMS, Quota, RawRange, World};
use crate::digest::{self, Digest};
use crate::extent::Extent;
use crate::volume::coverage::Cover;
use crate::volume::reader::PIECE;
use std::sync::Arc;

impl Run {
    pub(super) async fn put(
        &mut self,
        range: RawRange,
        encoding: Encoding,
    ) -> Result<Answer, ErrorCode> {
        self.check_host()?;
        if range.length > MAX_PUT {
            return Err(ErrorCode::TooLarge);
        }
        let extent = self.whole_blocks(range)?;
        self.reserve(Cover::Put, extent)?;
        put::start(&self.target, extent, encoding).await;
        Ok(Answer::Unit)
    }

    pub(super) async fn create(
        &mut self,
        name: &str,
        encoding: Encoding,
    ) -> Result<Answer, ErrorCode> {
        self.check_host()?;
        let mut name: ObjectName = name.parse().map_err(|_| ErrorCode::InvalidName)?;
        if let Some(volume) = self.terms.own_names {
            name = names::of_volume(volume, &name).map_err(|_| ErrorCode::InvalidName)?;
        }
        if self.streams.len() >= MAX_STREAMS {
            return Err(ErrorCode::QuotaExceeded(Quota::Objects));
        }
        self.account.object()?;
        let created = self
            .target
            .encode(move |target| match target.archive.create(&name, encoding) {
                Ok(writer) => Ok(Some(writer)),
                Err(archive::Error::Exists { .. }) => Ok(None),
                Err(error) => Err(error.into()),
            })
            .await;
        match created {
            Ok(Some(writer)) => {
                let number = self.next_stream;
                self.next_stream += 1;
                self.streams
                    .insert(number, Stream::start(Arc::clone(&self.target), writer));
                Ok(Answer::Stream(number))
            }
            Ok(None) => Err(ErrorCode::Exists),
            Err(failure) => Err(self.failed(failure)),
        }
    }

    pub(super) async fn write(&mut self, stream: u32, bytes: Vec<u8>) -> Result<Answer, ErrorCode> {
        self.check_host()?;
        let stream = self.streams.get(&stream).ok_or(ErrorCode::NotFound)?;
        self.account.output(bytes.len() as u64)?;
        if !bytes.is_empty() {
            stream.write(bytes).await.map_err(io)?;
        }
        Ok(Answer::Unit)
    }

    pub(super) async fn splice(
        &mut self,
        number: u32,
        range: RawRange,
    ) -> Result<Answer, ErrorCode> {
        self.check_host()?;
        let extent = self.whole_blocks(range)?;
        let stream = self.streams.get(&number).ok_or(ErrorCode::NotFound)?;
        self.reserve(Cover::Stream(number), extent)?;
        stream.splice(extent).await.map_err(io)?;
        Ok(Answer::Unit)
    }

    pub(super) async fn claim(
        &mut self,
        number: u32,
        range: RawRange,
    ) -> Result<Answer, ErrorCode> {
        self.check_host()?;
        if self.terms.world == World::BlindProvider {
            return Err(ErrorCode::Other(Some(
                "a blind provider cannot claim: it exports no restore".into(),
            )));
        }
        // Its proof would answer guesses at what may not be read.
        if !self.terms.reader {
            return Err(ErrorCode::Other(Some(
                "nothing can be claimed that may not be read: no reader is granted".into(),
            )));
        }
        let extent = self.whole_blocks(range)?;
        if !self.streams.contains_key(&number) {
            return Err(ErrorCode::NotFound);
        }
        let checked = self.target.books().check(&self.target.frozen.plan, extent);
        checked.map_err(refused)?;
        // Entered in the books only when every digest is in the table: a claim that fails half-way must not count.
        for piece in extent.pieces(PIECE) {
            self.enter_digests(piece).await?;
        }
        self.target
            .books()
            .begin_claim(&self.target.frozen.plan, number, extent)
            .map_err(refused)?;
        self.target.advance(extent);
        Ok(Answer::Unit)
    }

    /// Enters the digests of blocks as of the point in time: from what the provider read, else read anew.
    async fn enter_digests(&mut self, piece: Extent) -> Result<(), ErrorCode> {
        let plan = &self.target.frozen.plan;
        let block = plan.block();
        let first = piece.start() / u64::from(block);
        let count = piece.len().div_ceil(block.into());
        let known: Option<Vec<Digest>> = (first..first + count)
            .map(|index| match self.target.is_zero(index) {
                true => Some(Digest::of(&[])),
                false => self.read_ahead.take_digest(index),
            })
            .collect();
        let digests = match known {
            Some(digests) => digests,
            None => {
                self.account.read(piece.len())?;
                let held = self.target.frozen.bytes(piece).await;
                let held = held.map_err(|error| self.failed(error.into()))?;
                digest::of_blocks(&held.bytes, block)
            }
        };
        // Writing a full page of the table is file work.
        let entered = self.target.encode(move |target| {
            let mut entries = (first..).zip(digests);
            entries.try_for_each(|(index, digest)| target.claim(index, digest))
        });
        entered.await.map_err(|failure| self.failed(failure))
    }

    pub(super) async fn finish(&mut self, number: u32) -> Result<Answer, ErrorCode> {
        let stream = self.streams.remove(&number).ok_or(ErrorCode::NotFound)?;
        let info = match stream.finish().await {
            Ok(info) => info,
            Err(Failed) => {
                self.target.books().drop_stream(number);
                return Err(ErrorCode::Io);
            }
        };
        let done = self.target.books().finish_stream(number);
        for extent in done.iter() {
            self.target
                .finished(extent)
                .await
                .map_err(|failure| self.failed(failure))?;
        }
        Ok(Answer::Size(info.size))
    }

    pub(super) async fn drop_stream(&mut self, number: u32) -> Result<Answer, ErrorCode> {
        if let Some(stream) = self.streams.remove(&number) {
            stream.discard().await;
            self.target.books().drop_stream(number);
        }
        Ok(Answer::Unit)
    }

    /// Checks, charges and enters that the host copies `extent`.
    fn reserve(&self, cover: Cover, extent: Extent) -> Result<(), ErrorCode> {
        let plan = &self.target.frozen.plan;
        let mut books = self.target.books();
        books.check(plan, extent).map_err(refused)?;
        self.account.copy(extent.len())?;
        books.begin(plan, cover, extent).map_err(refused)
    }
}

fn io(_: Failed) -> ErrorCode {
    ErrorCode::Io
}
