//! Tests that take long: kills at every step, matrices of all with all, guests with an operating system, a release
//! build, QEMUs and archives that lie at every place.

#[path = "../support/mod.rs"]
mod support;

mod any_order;
mod backup_guest;
mod backup_qemu;
mod beside;
mod boot;
mod crash;
mod crash_guest;
mod exchanged;
mod forty_nights;
mod guards;
mod guest;
mod guest_commands;
mod hardware;
mod hostile_qemu;
mod matrix;
mod mutated;
mod nights;
mod odd_disks;
mod prune_crash;
mod recover;
mod release;
mod thirty_vms;
mod verbs_crash;
mod watermark;
