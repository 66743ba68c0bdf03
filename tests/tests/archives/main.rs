//! Archives that are damaged, old, or read by the page on their format alone.

mod archive_format;
mod damage;
mod damage_heals;
mod older_archives;
