//! End-to-end tests against real QEMU.
