//! What the operator may choose.

use fleecebox_guest::{Encoding, Error, MAX_PUT};

/// Small enough that a small change makes a small chunk, large enough that chunks are few.
const DEFAULT_CHUNK_SIZE: u32 = 1 << 20;

#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct Settings {
    chunk_size: Option<u32>,
    pub(crate) encoding: Encoding,
    pub(crate) discard: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            chunk_size: None,
            encoding: Encoding::Zstd,
            discard: false,
        }
    }
}

impl Settings {
    /// Length of a chunk in bytes, for a volume of that block size.
    pub(crate) fn chunk_size(&self, block_size: u32) -> Result<u32, Error> {
        let Some(chosen) = self.chunk_size else {
            return Ok(DEFAULT_CHUNK_SIZE.max(block_size));
        };
        if chosen == 0 || chosen % block_size != 0 || u64::from(chosen) > MAX_PUT {
            return Err(Error::other(format_args!(
                "settings: `chunk-size` is {chosen}, and must be a multiple of the volume's block size \
                 {block_size} from {block_size} to {MAX_PUT}"
            )));
        }
        Ok(chosen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_chunk_size(chunk_size: impl Into<Option<u32>>) -> Settings {
        Settings {
            chunk_size: chunk_size.into(),
            ..Settings::default()
        }
    }

    #[test]
    fn a_chunk_is_a_mebibyte_unless_a_block_is_more() {
        assert_eq!(with_chunk_size(None).chunk_size(65536), Ok(1 << 20));
        assert_eq!(with_chunk_size(None).chunk_size(2 << 20), Ok(2 << 20));
    }

    #[test]
    fn a_chunk_of_whole_blocks_is_taken_up_to_what_one_put_takes() {
        assert_eq!(with_chunk_size(65536).chunk_size(65536), Ok(65536));
        assert_eq!(with_chunk_size(3 * 65536).chunk_size(65536), Ok(3 * 65536));
        assert_eq!(with_chunk_size(1 << 20).chunk_size(65536), Ok(1 << 20));
    }

    #[test]
    fn any_other_chunk_is_refused_by_name() {
        for chunk_size in [0, 1, 65535, 65537, (1 << 20) + 65536] {
            let error = with_chunk_size(chunk_size).chunk_size(65536).unwrap_err();
            assert!(error.to_string().contains("`chunk-size`"), "{error}");
        }
    }
}
