//! What several fuzz targets need. Each target says itself what it feeds to which part of the product.

pub mod json;
pub mod memory_disk;
pub mod runtime;
pub mod scratch;
