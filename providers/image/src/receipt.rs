//! What is kept with a backup: version (1 byte) and the name of the volume's object.

use fleecebox_guest::Error;

const VERSION: u8 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Receipt {
    pub(crate) object: String,
}

/// Why bytes are no receipt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotAReceipt {
    /// It begins with another version, or is empty.
    #[error("the receipt's version is {actual:?} and not {VERSION}")]
    Version { actual: Option<u8> },
    /// The name is not UTF-8.
    #[error("the receipt does not name an object")]
    Name,
}

impl Receipt {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        bytes.extend(self.object.as_bytes());
        bytes
    }

    pub(crate) fn from_bytes(mut bytes: Vec<u8>) -> Result<Receipt, NotAReceipt> {
        let actual = bytes.first().copied();
        if actual != Some(VERSION) {
            return Err(NotAReceipt::Version { actual });
        }
        let object = String::from_utf8(bytes.split_off(1)).map_err(|_| NotAReceipt::Name)?;
        Ok(Receipt { object })
    }
}

impl From<NotAReceipt> for Error {
    fn from(error: NotAReceipt) -> Error {
        Error::other(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receipt_reads_back_as_it_was() {
        let receipt = Receipt {
            object: "drive-scsi0".into(),
        };
        assert_eq!(Receipt::from_bytes(receipt.to_bytes()), Ok(receipt));
    }

    #[test]
    fn what_is_no_receipt_is_refused() {
        let version = |actual| Err(NotAReceipt::Version { actual });
        assert_eq!(Receipt::from_bytes(vec![]), version(None));
        assert_eq!(Receipt::from_bytes(vec![2, b'a']), version(Some(2)));
        assert_eq!(Receipt::from_bytes(vec![1, 0xff]), Err(NotAReceipt::Name));
    }
}
