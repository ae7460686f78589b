//! What a disk says of how it is booted.

use std::sync::Arc;

use crate::error::Result;
use crate::files::{Blocks, Source, TableKind, partitions};
use crate::image::Image;
use crate::storage::ReadAt;

/// The type of an EFI system partition.
const ESP: &str = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
/// Bytes of code in the first sector; behind them are the disk's signature and the partitions.
const CODE: usize = 440;
/// Memory for looking.
const MEMORY: u64 = 4 << 20;

/// How a disk can be booted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Boots {
    /// It has code in its first sector: BIOS runs that.
    pub bios: bool,
    /// It has a GPT with an EFI system partition.
    pub uefi: bool,
}

impl Boots {
    /// Whether anything on it can be booted.
    pub(crate) fn any(self) -> bool {
        self.bios || self.uefi
    }
}

/// Looks at the first sector and the partition table of a point.
///
/// # Errors
/// The point cannot be read there.
pub(crate) fn look(image: &Arc<Image>) -> Result<Boots> {
    let device: Arc<dyn ReadAt> = image.clone();
    let source = Source::new(device, "disk", &Blocks::new(MEMORY));
    if source.size() < 512 {
        return Ok(Boots::default());
    }
    let first = source.meta(0, 512)?;
    let signed = first.get(510..) == Some(&[0x55, 0xaa]);
    let code = first.get(..CODE).is_some_and(|code| code.iter().any(|b| *b != 0));
    let table = partitions(&source)?;
    let is_esp = |kind: &str| kind.eq_ignore_ascii_case(ESP);
    let esp = table.kind == TableKind::Gpt && table.partitions.iter().any(|p| is_esp(&p.kind));
    Ok(Boots { bios: signed && code, uefi: esp })
}
