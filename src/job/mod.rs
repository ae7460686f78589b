//! What every long work needs: workers, a way to stop, progress, a rate limit.

pub(crate) mod each;
pub(crate) mod pool;
pub(crate) mod work;

pub use self::work::{RateLimit, Work};
