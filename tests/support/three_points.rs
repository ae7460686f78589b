//! A backup directory with one disk of three points: data, holes, and zeros over data.

use crate::support::images::Chain;

pub const MIB: u64 = 1 << 20;
pub const SIZE: u64 = 64 * MIB;

pub fn backups() -> (tempfile::TempDir, Chain) {
    let dir = tempfile::tempdir().unwrap();
    let mut chain = Chain::new(dir.path(), "sda");
    let ops = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
    chain.point("", SIZE, &ops(&["write -P 1 0 8M", "write -P 2 32M 4M"]));
    chain.point("", SIZE, &ops(&["write -P 3 1M 64k", "write -z 33M 1M", "write -P 4 60M 128k"]));
    chain.point("", SIZE, &ops(&["write -P 5 2M 64k"]));
    (dir, chain)
}
