//! fleecefs: every backup point of every disk of a QEMU backup directory as a plain raw image, and
//! the making, restoring, checking and pruning of such backups.
//!
//! The modules. Each imports only from those above it, and neither files nor folders inside a module import
//! each other in a circle (`tests/it/layering.rs` checks both):
//!
//! - [`text`], [`error`], [`units`], [`progress`]: what everybody needs
//! - [`failpoint`]: hooks for tests, in no program that users have
//! - [`output`]: the one way to the terminal, and where logs go
//! - [`folder`]: the one way to reach files in folders that others may own; [`lock`] on top of it
//! - [`privileges`]: users, and giving up root's rights
//! - [`storage`], [`hash`]: positioned reads, a bounded number of open files, and the hash of a whole file
//! - [`job`]: what long work needs: workers, a way to stop, progress, a rate limit
//! - [`extent`]: the extent list and its invariant
//! - [`layer`]: one file's own map and its bytes (qcow2, raw, VMA archives, virtnbdbackup streams)
//! - [`qemu_img`]: running qemu-img on images that nobody trusts
//! - [`layout`]: how backup programs name their files: here begins what a new program's names need
//! - [`manifest`]: one per image, the commit of a point; [`journal`]: what is written down before a backup is
//!   changed, so that whoever comes after a crash can finish it
//! - [`machine`]: what a guest's hardware was, as manifests tell
//! - [`chain`]: backup directory to disks, chains and points
//! - [`image`]: layers merged into cached windows, and reads through them
//! - [`overlay`]: what is written over points, which stay as they are
//! - [`files`]: the files inside a point: partitions, volumes and file systems
//! - [`view`]: the same for a mount: points opened when somebody looks into them, and a bounded number at a time
//! - [`fs`], [`fuse`]: the file system behind the mount, and its adapter to the kernel
//! - [`qmp`], [`backup`]: talking to QEMU, and making backups of running guests
//! - [`history`]: what each run did
//! - [`restore`], [`verify`], [`prune`]: reading points out, proving them, choosing which stay
//! - [`health`]: whether all is well, for people, Nagios and Prometheus
//! - [`rewrite`]: all that changes backups in place: delete, consolidate, commit, rebase, join
//! - [`replicate`]: points copied to another backup directory, here or elsewhere
//! - [`mount`]: the processes behind a mount, and unmounting
//! - [`attach`]: points as block devices of the kernel, their file systems mounted by it
//! - [`boot`]: points as disks of a test VM, and whether it comes up
//! - [`live`]: a VM that runs again at once from a point, while its disks are copied to new storage
//! - [`config`]: the configuration file: which VMs are backed up, and how
//! - [`cli`]: arguments, output, exit codes

// The list above names all of them, for whoever reads the source.
#![allow(rustdoc::private_intra_doc_links)]
#![warn(unreachable_pub)]
#![cfg_attr(not(test), deny(clippy::disallowed_macros, clippy::disallowed_methods))]

pub(crate) mod attach;
pub mod backup;
pub(crate) mod boot;
pub mod chain;
pub mod cli;
pub(crate) mod config;
pub mod error;
pub(crate) mod extent;
pub(crate) mod failpoint;
pub mod files;
pub mod folder;
pub mod fs;
pub mod fuse;
pub(crate) mod hash;
pub(crate) mod health;
pub(crate) mod history;
pub mod image;
pub mod job;
pub mod journal;
pub mod layer;
pub mod layout;
pub(crate) mod live;
pub mod lock;
pub mod machine;
pub mod manifest;
pub(crate) mod mount;
pub(crate) mod output;
pub mod overlay;
pub(crate) mod privileges;
pub mod progress;
pub mod prune;
pub mod qemu_img;
pub mod qmp;
pub(crate) mod replicate;
pub(crate) mod restore;
pub mod rewrite;
pub mod storage;
pub mod text;
pub mod units;
pub mod verify;
pub mod view;
