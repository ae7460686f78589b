//! What is asked of the kernel when a mount begins.

use fuser::{InitFlags, KernelConfig};

/// The largest request; also the most that current kernels send at once.
pub(super) const MAX_REQUEST: u32 = 1 << 20;
/// Read-ahead and other background requests in flight.
const MAX_BACKGROUND: u16 = 64;

/// Asks the kernel for what a mount wants of it; with `access_lists`, to obey those of files.
pub fn negotiate(config: &mut KernelConfig, access_lists: bool) {
    // Each is a wish: an older kernel goes without.
    for capability in [
        InitFlags::FUSE_ASYNC_DIO,
        InitFlags::FUSE_PARALLEL_DIROPS,
        InitFlags::FUSE_DO_READDIRPLUS,
        InitFlags::FUSE_READDIRPLUS_AUTO,
        InitFlags::FUSE_CACHE_SYMLINKS,
        // NFS servers ask for what the kernel has forgotten.
        InitFlags::FUSE_EXPORT_SUPPORT,
    ] {
        let _ = config.add_capabilities(capability);
    }
    if access_lists {
        let _ = config.add_capabilities(InitFlags::FUSE_POSIX_ACL);
    }
    let _ = config.set_max_write(MAX_REQUEST);
    if let Err(most) = config.set_max_readahead(4 * MAX_REQUEST) {
        let _ = config.set_max_readahead(most);
    }
    let _ = config.set_max_background(MAX_BACKGROUND);
}
