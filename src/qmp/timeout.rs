//! How long QEMU may take.

use std::time::Duration;

use crate::failpoint;

/// How long QEMU may take for one answer, or for an end that was asked for. blockdev-del flushes,
/// stop drains: on a slow disk that takes seconds, on a hung one for ever.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// How long QEMU may take for one answer, or for an end that was asked for.
pub(crate) fn answer_timeout() -> Duration {
    failpoint::answer_timeout(ANSWER_TIMEOUT)
}
