//! What tests share, and nothing else: `it` and `slow` both have it.

// Each of the two uses its own part.
#![allow(dead_code)]

/// `fleecefs attach` and `detach`, undone with the test.
pub mod attached;
/// Running `fleecefs backup`: held at its frozen view, killed at a step; what it has left.
pub mod backup;
/// Directories of real chains, and the right bytes of each point.
pub mod chains;
/// A storage daemon that is backed up, and what holds after each backup.
pub mod checked;
/// File systems, filled and compared, and points of them.
pub mod file_systems;
/// Files of other backup programs.
pub mod foreign;
/// What is undone when the test is over or killed: mounts, loop devices, processes.
pub mod guard;
/// A guest with an operating system, and a client of QMP.
pub mod guest;
/// Disk images and chains of them made by qemu-img, and QEMU's own answer to what they hold.
pub mod images;
/// What has to hold after a killed backup and the next one.
pub mod killed;
/// A VM that is gone, and its return by `live-restore`.
pub mod lost_vm;
/// A mount of backups.
pub mod mount;
/// Images of file systems with bytes changed at random.
pub mod mutants;
/// A backup directory that somebody else owns.
pub mod owner;
/// The points of a backup: which there are, what they hold.
pub mod points;
/// The process behind a mount, and waiting.
pub mod process;
/// QEMUs without an operating system, and what stands between them and the program.
pub mod qemu;
/// The program where the system refuses calls that not every file system has, or asks a test about them.
pub mod refusing;
/// A disk that got another name.
pub mod renamed;
/// Backups of shut-off VMs.
pub mod shut_off;
/// A guest with one disk, and what a backup of it left.
pub mod small_guest;
/// The state folder of tests that name none.
pub mod state;
/// Block devices and file systems.
pub mod storage;
/// In which order the program syncs and names files.
pub mod synced;
/// A directory with one disk of three points.
pub mod three_points;
/// Whether the tools are there, and running them.
pub mod tools;
/// Backup directories of headers without disks: names and links alone.
pub mod tree;
/// Chains with manifests, for what rewrites them (commit, rebase, link-disk...).
pub mod verbs;
pub mod writable;
