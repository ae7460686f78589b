//! QEMUs that run, none of them with an operating system. (One with it is `support/guest.rs`.)

/// qemu-system with the devices that the test names.
pub mod any_devices;
/// A man in the middle and a guest agent that lie at an answer of choice.
pub mod liar;
/// qemu-system with one disk, which is shut down and started again.
pub mod one_disk;
/// What another backup program does in the same QEMU.
pub mod other_program;
/// A man in the middle: reads along, answers by itself, changes answers.
pub mod proxy;
/// qemu-storage-daemon with disks that the test writes to.
pub mod storage_daemon;
/// qemu-system with two disks, of which the test knows each byte.
pub mod two_disks;
