//! A VM that runs again at once, on a point of its backup, while its disks are copied to new storage.
//!
//! - Each disk is a new qcow2 image in the storage folder over the point: all that the guest writes goes there, from the first moment.
//!   QEMU copies the rest into it (`block-stream`) and then forgets the point. All that the guest ever writes goes to this
//!   one file, so there is no other side that could be newer, and nothing that is flushed can be lost at any moment.
//! - The point is the layer files themselves, each spelled out and read-only ([`crate::boot::graph`]): no mount or process
//!   of ours is between QEMU and the backup, and none has to live on. They are opened here, by the folder gate, and handed
//!   over as descriptors: whoever owns the backup cannot have QEMU open another file.
//! - Before QEMU forgets the point, all that it has of the image is written out (`blockdev-reopen`, which tells errors).
//! - While it is unfinished the image names a backing file of a kind that no QEMU knows ([`storage`]): whoever opens it by
//!   itself is refused instead of reading zeros. QEMU takes the name away in the same step in which it forgets the point,
//!   so this name, in the image itself, says whether the image still needs the point. A journal cannot be wrong about it.
//! - The journal in the storage folder says what was begun ([`journal`]). Until its record `Started` is on disk the guest
//!   does not run (QEMU is started stopped): whatever was made before that is thrown away and made anew. Afterwards it is
//!   never thrown away; the bitmap for the next backup, too, is only ever added before.
//! - QEMU is its own process, in a session of its own ([`start`]), and outlives this one. It holds a lock on a file, so
//!   whether it lives is known for certain. This process only watches ([`copy`]): it may end at any time, and whoever runs
//!   the same command again finds QEMU and goes on, or starts it again over the same images.
//! - A disk that cannot be read or written stops the guest (`rerror=stop`, `werror=stop`) and pauses the copying; the
//!   watcher lets both go on again and again until that works.

mod copy;
mod journal;
pub(crate) mod mark;
mod nodes;
mod run;
mod start;
mod storage;
mod surroundings;

pub(crate) use journal::{
    BackupDirectory, Begun, CopiedVars, LiveFile, LivePoint, NewDisk, Recording, Stage,
};
pub(crate) use nodes::{Base, base_name, shown};
pub(crate) use run::{Bases, Live, finish, is_running, resume, start, unprotect};
pub(crate) use storage::{Storage, check_empty};
pub(crate) use surroundings::Surroundings;
