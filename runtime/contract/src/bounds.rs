//! How much the contract lets pass at once.

/// Most bytes that `run` may return (`backup.run` of the contract): it is kept in the manifest. Enough for a provider to say
/// what it did, not for the backup itself.
pub const MAX_RECEIPT: usize = 64 << 10;

/// Most bytes of a receipt that a backup may have and a `base` may be: what `run` could return before its bound was
/// [`MAX_RECEIPT`].
pub const MAX_KEPT_RECEIPT: usize = 1 << 20;

/// Most bytes in a name of an object (`writer.create` of the contract).
pub const MAX_NAME: usize = 128;

/// Most bytes of a name in a message. Of one that is too long no more is sent than shows that it is, and so what is no name
/// for its length is refused where all other names are looked at, in the same way.
pub const MAX_SENT_NAME: usize = MAX_NAME + 1;

/// Most bytes in the name of an attachment, which is the operator's. There is none with a longer one.
pub const MAX_ATTACHMENT_NAME: usize = 255;

/// Most bytes in one `log` message or in the text of one `error-code.other`; what is longer is cut.
pub const MAX_TEXT: usize = 4 << 10;

/// Most regions in one answer: about 20 bytes each inside a message.
pub const MAX_REGIONS: u32 = 4096;

/// Largest `content.reader.read` and `image.read`, in bytes: what the payload file of the channel holds.
pub const MAX_READ: u32 = 4 << 20;

/// Largest `output-stream.write`, in bytes: what the payload file of the channel holds.
pub const MAX_WRITE: u32 = 4 << 20;

/// Most bytes that a guest may pass in one call, arguments of all kinds together; a call with more traps. Well above
/// [`MAX_WRITE`], so that a write that is a little too large gets an error instead.
pub const MAX_PASSED: usize = 32 << 20;

/// Largest `writer.put`, in bytes: one frame of a pack, so that reading one block back decodes no more than this.
pub const MAX_PUT: u64 = 1 << 20;

/// Output streams open at once in one run. Each holds a file and up to a frame of bytes.
pub const MAX_STREAMS: usize = 64;

/// Largest attachment, in bytes: it travels in one payload.
pub const MAX_ATTACHMENT: usize = MAX_READ as usize;

/// Unit of digests and of dirty tracking, in bytes: QEMU's copy-before-write cluster, so that an incremental reads no
/// more than changed.
pub const BLOCK_SIZE: u32 = 64 << 10;

/// What a line costs at least, in bytes: an empty one takes as much to keep and show.
pub const LINE_COST: u64 = 64;

/// Largest component that is looked at, in bytes. Components with a whole JavaScript or Python in them have 20 MiB.
pub const MAX_COMPONENT: u64 = 64 << 20;
