//! The guest's writer: one static program that keeps disks busy in ways a backup must survive.
//!
//!     writer churn DEVICE SEED [START LEN]     writes, zeroes and discards at random, for ever
//!     writer fill DEVICE SEED START LEN        writes LEN bytes of noise at START, then ends
//!     writer lockstep DEVICE DEVICE            the same counter to one disk, then to the other, for ever
//!     writer stall DEVICE                      4 KiB writes for ever; prints each new longest wait
//!
//! START and LEN are bytes, multiples of 4096. All writes are direct, one after the other: a write
//! that the guest has seen complete is in the disk before the next begins.
//!
//! `lockstep` writes block n % 256 of each disk: 4 KiB of the counter n, a little-endian u64,
//! over and over. In any consistent pair of images the highest counters differ by at most one, and
//! the second disk's is not the higher one.

use std::fs::{File, OpenOptions};
use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
const MAX_WRITE: usize = 256 * 1024;
const LOCKSTEP_BLOCKS: u64 = 256;
const O_DIRECT: i32 = 0o40000;
// From linux/fs.h; each takes a start and a length, or stores the size, in bytes.
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;
const BLKGETSIZE64: u64 = 0x8008_1272;

unsafe extern "C" {
    fn ioctl(fd: i32, request: u64, ...) -> i32;
}

/// Direct writes need memory that is aligned like the disk's blocks.
#[repr(align(4096))]
struct Buffer([u8; MAX_WRITE]);

struct Disk {
    file: File,
    size: u64,
}

impl Disk {
    fn open(path: &str) -> Result<Disk> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(path)?;
        let mut size = 0u64;
        // SAFETY: BLKGETSIZE64 stores one u64 where its argument points.
        if unsafe { ioctl(file.as_raw_fd(), BLKGETSIZE64, &mut size) } != 0 {
            return Err(Error::last_os_error());
        }
        Ok(Disk { file, size })
    }

    /// BLKDISCARD or BLKZEROOUT over a range.
    fn range(&self, request: u64, start: u64, len: u64) -> Result<()> {
        let range = [start, len];
        // SAFETY: both requests read two u64 where their argument points.
        match unsafe { ioctl(self.file.as_raw_fd(), request, &range) } {
            0 => Ok(()),
            _ => Err(Error::last_os_error()),
        }
    }
}

/// xorshift64*: the same seed makes the same disk.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
    }
}

fn churn(disk: &Disk, seed: u64, start: u64, len: u64) -> Result<()> {
    let mut random = Random(seed | 1);
    let mut buffer = Box::new(Buffer([0; MAX_WRITE]));
    let blocks = len / BLOCK as u64;
    loop {
        let first = random.below(blocks);
        let count = (1 + random.below((MAX_WRITE / BLOCK) as u64)).min(blocks - first);
        let (at, bytes) = (start + first * BLOCK as u64, count * BLOCK as u64);
        match random.below(8) {
            0 => disk.range(BLKZEROOUT, at, bytes)?,
            // A disk that cannot discard is no reason to stop.
            1 => drop(disk.range(BLKDISCARD, at, bytes)),
            _ => {
                let data = &mut buffer.0[..bytes as usize];
                random.fill(data);
                disk.file.write_all_at(data, at)?;
            }
        }
        // Leaves the one emulated processor to the agent now and then.
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn fill(disk: &Disk, seed: u64, start: u64, len: u64) -> Result<()> {
    let mut random = Random(seed | 1);
    let mut buffer = Box::new(Buffer([0; MAX_WRITE]));
    let mut done = 0;
    while done < len {
        let bytes = (len - done).min(MAX_WRITE as u64);
        let data = &mut buffer.0[..bytes as usize];
        random.fill(data);
        disk.file.write_all_at(data, start + done)?;
        done += bytes;
    }
    disk.file.sync_all()
}

fn lockstep(first: &Disk, second: &Disk) -> Result<()> {
    let mut buffer = Box::new(Buffer([0; MAX_WRITE]));
    for count in 1u64.. {
        let data = &mut buffer.0[..BLOCK];
        for word in data.chunks_exact_mut(8) {
            word.copy_from_slice(&count.to_le_bytes());
        }
        let at = count % LOCKSTEP_BLOCKS * BLOCK as u64;
        first.file.write_all_at(data, at)?;
        second.file.write_all_at(data, at)?;
    }
    Ok(())
}

fn stall(disk: &Disk) -> Result<()> {
    let mut buffer = Box::new(Buffer([0; MAX_WRITE]));
    let blocks = disk.size / BLOCK as u64;
    let mut longest = Duration::ZERO;
    for count in 1u64.. {
        let data = &mut buffer.0[..BLOCK];
        data[..8].copy_from_slice(&count.to_le_bytes());
        let before = Instant::now();
        disk.file.write_all_at(data, count % blocks * BLOCK as u64)?;
        let waited = before.elapsed();
        if waited > longest {
            longest = waited;
            println!("writer: write {count} waited {} us", waited.as_micros());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn number(text: &str) -> Result<u64> {
    text.parse().map_err(|_| Error::other(format!("not a number: {text}")))
}

fn run(args: &[&str]) -> Result<()> {
    match args {
        ["churn", device, seed] => {
            let disk = Disk::open(device)?;
            churn(&disk, number(seed)?, 0, disk.size)
        }
        ["churn", device, seed, start, len] => {
            churn(&Disk::open(device)?, number(seed)?, number(start)?, number(len)?)
        }
        ["fill", device, seed, start, len] => {
            fill(&Disk::open(device)?, number(seed)?, number(start)?, number(len)?)
        }
        ["lockstep", first, second] => lockstep(&Disk::open(first)?, &Disk::open(second)?),
        ["stall", device] => stall(&Disk::open(device)?),
        _ => Err(Error::other("usage: writer churn|fill|lockstep|stall DEVICE...")),
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    if let Err(error) = run(&args) {
        println!("writer: {}: {error}", args.join(" "));
        std::process::exit(1);
    }
}
