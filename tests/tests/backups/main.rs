//! Backups as they should be: full, incremental, by tools that are not ours, and what is said of them beforehand.

mod backup;
mod disk_names;
mod disks;
mod dry_run;
mod export;
mod progress;
