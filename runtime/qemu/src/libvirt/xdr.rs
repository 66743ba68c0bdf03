//! XDR (RFC 4506), as much of it as is used: whole numbers, texts, what may be missing, all in units of four bytes.

use super::Malformed;

/// Longest text that libvirt's protocol has (`VIR_NET_MESSAGE_STRING_MAX`).
pub(super) const TEXT_CAP: usize = 4 << 20;

const UNIT: usize = 4;

/// Writes values one behind the other.
#[derive(Debug, Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub(super) fn number(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(super) fn signed(self, value: i32) -> Self {
        self.number(value.cast_unsigned())
    }

    /// One that is longer than [`TEXT_CAP`] is refused by the other side.
    pub(super) fn text(self, text: &str) -> Self {
        let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
        let mut this = self.number(length);
        this.0.extend(text.bytes());
        this.0.resize(this.0.len().next_multiple_of(UNIT), 0);
        this
    }

    /// A text that could be missing, and is not.
    pub(super) fn some_text(self, text: &str) -> Self {
        self.number(1).text(text)
    }

    pub(super) fn missing(self) -> Self {
        self.number(0)
    }

    /// As they are; their number is a multiple of four.
    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    pub(super) fn done(self) -> Vec<u8> {
        self.0
    }
}

/// Reads them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// What is left.
    pub(super) fn rest(self) -> &'a [u8] {
        self.0
    }

    pub(super) fn bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(Malformed::Short)?;
        self.0 = rest;
        Ok(bytes)
    }

    pub(super) fn number(&mut self) -> Result<u32, Malformed> {
        let bytes = self.bytes(UNIT)?;
        let bytes = bytes.try_into().map_err(|_| Malformed::Short)?;
        Ok(u32::from_be_bytes(bytes))
    }

    pub(super) fn signed(&mut self) -> Result<i32, Malformed> {
        self.number().map(u32::cast_signed)
    }

    pub(super) fn long(&mut self) -> Result<u64, Malformed> {
        let (high, low) = (self.number()?, self.number()?);
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    pub(super) fn text(&mut self) -> Result<&'a str, Malformed> {
        let length = self.number()? as usize;
        if length > TEXT_CAP {
            return Err(Malformed::TooLong);
        }
        let padded = self.bytes(length.next_multiple_of(UNIT))?;
        let bytes = padded.get(..length).ok_or(Malformed::Short)?;
        str::from_utf8(bytes).map_err(|_| Malformed::NoText)
    }

    pub(super) fn optional<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Option<T>, Malformed> {
        match self.number()? {
            0 => Ok(None),
            1 => read(self).map(Some),
            _ => Err(Malformed::Unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read_again(number: u32, signed: i32, text: String, more: String) {
            let bytes = Writer::default().number(number).text(&text).signed(signed).some_text(&more).missing().done();
            prop_assert_eq!(bytes.len() % UNIT, 0);
            let mut reader = Reader::new(&bytes);
            prop_assert_eq!(reader.number(), Ok(number));
            prop_assert_eq!(reader.text(), Ok(&*text));
            prop_assert_eq!(reader.signed(), Ok(signed));
            prop_assert_eq!(reader.optional(Reader::text), Ok(Some(&*more)));
            prop_assert_eq!(reader.optional(Reader::text), Ok(None));
            prop_assert!(reader.rest().is_empty());
        }

        #[test]
        fn what_ends_too_early_is_refused(text in ".{1,40}", cut in 1usize..40) {
            let mut bytes = Writer::default().text(&text).done();
            bytes.truncate(bytes.len().saturating_sub(cut));
            prop_assert_eq!(Reader::new(&bytes).text(), Err(Malformed::Short));
        }
    }

    #[test]
    fn a_length_out_of_bounds_is_refused_before_anything_is_looked_for() {
        let bytes = Writer::default().number(u32::MAX).done();
        assert_eq!(Reader::new(&bytes).text(), Err(Malformed::TooLong));
    }
}
