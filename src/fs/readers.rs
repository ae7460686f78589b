//! Which thread reads from storage, which may not answer.
//!
//! All serving threads but one may read at a time ([`Readers`]); that one is left for names and
//! attributes, which need no storage. The kernel gives it reads as well. Passing a read to a thread
//! that has to be woken takes longer than most reads do: so it leaves the read to the first of the
//! others that is done, and asks the kernel for nothing meanwhile. If none is done after `PATIENCE`,
//! storage is slow, and the read goes to a thread of the [`SlowPool`].
//!
//! The kernel gives each request to the thread that has waited longest, whose caches are cold by then: with
//! five threads one reader gets a fifth less than with two. So threads that are not needed go idle
//! (`IdleThreads`) until all others read.
//!
//! State: how many threads read; the read that was left; how many of those to come go to the slow-path pool at
//! once, since the last ones had to; which threads are idle.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::idle_threads::IdleThreads;
use super::slow_pool::{Job, SlowPool};

/// How long names may have to wait when storage stops answering: longer than a read takes, also from a disk
/// that turns or on a busy machine, and not noticed by anybody.
const PATIENCE: Duration = Duration::from_millis(10);
/// With slow storage, one read in 2 to the power of this many is left to others, to see whether it is
/// still slow.
const MOST_SLOW: u32 = 5;

/// How many serving threads may be reading from storage.
pub struct Readers {
    most: usize,
    reading: Apart<AtomicUsize>,
    left: Mutex<Option<Job>>,
    /// Whether there is something in `left`.
    is_left: AtomicBool,
    /// How often in a row nobody was done in time.
    slow: AtomicU32,
    /// How many reads go to the slow-path pool at once.
    skip: AtomicU32,
    slow_pool: Arc<SlowPool>,
    idle: IdleThreads,
}

/// In lines of the processors' caches that nothing else is in (they are fetched in pairs): all threads write
/// to it at each read, and what they only look at beside it stays in each one's cache.
#[repr(align(128))]
struct Apart<T>(T);

/// One thread's permission to read; given back when it is dropped.
struct ReadPermit<'a>(&'a AtomicUsize);

impl Drop for ReadPermit<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Readers {
    /// So many at a time; what they cannot do is done by `slow_pool`.
    pub fn new(most: usize, slow_pool: Arc<SlowPool>) -> Self {
        Readers {
            most,
            reading: Apart(AtomicUsize::new(0)),
            left: Mutex::default(),
            is_left: AtomicBool::new(false),
            slow: AtomicU32::new(0),
            skip: AtomicU32::new(0),
            slow_pool,
            idle: IdleThreads::default(),
        }
    }

    /// Does `job` with `what`, or has it done by another thread if this must be left. It must not panic.
    pub fn run<T>(&self, what: &Arc<T>, job: impl FnOnce(&Arc<T>) + Send + 'static)
    where
        T: Send + Sync + 'static,
    {
        let Some(place) = self.permit() else {
            let what = what.clone();
            return self.leave(Box::new(move || job(&what)));
        };
        if self.free() == 0 {
            self.idle.end_one();
        }
        job(what);
        drop(place);
        if !self.do_left() {
            self.idle.if_not_needed(|| self.free());
        }
    }

    /// How many threads neither read nor are idle: they wait for a request, or look for a name, which never
    /// takes long.
    fn free(&self) -> usize {
        let busy = self.reading.0.load(Ordering::SeqCst) + self.idle.idle();
        (self.most + 1).saturating_sub(busy)
    }

    /// A place, unless all are taken.
    fn permit(&self) -> Option<ReadPermit<'_>> {
        let one_more = |n| (n < self.most).then_some(n + 1);
        let taken = self.reading.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more);
        taken.ok().map(|_| ReadPermit(&self.reading.0))
    }

    /// Does what was left meanwhile; whether there was something. Whoever leaves a job looks for a place
    /// afterwards, and whoever gives up a place looks for a job afterwards: one of them sees the other.
    fn do_left(&self) -> bool {
        let mut done = false;
        while self.is_left.load(Ordering::SeqCst)
            && let Some(_place) = self.permit()
            && let Some(job) = self.take_left()
        {
            job();
            done = true;
        }
        done
    }

    fn leave(&self, job: Job) {
        if self.take_skip() {
            return self.slow_pool.run(job);
        }
        if let Err(job) = self.put_left(job) {
            return self.slow_pool.run(job);
        }
        if self.do_left() {
            return;
        }
        // Also if the job is done sooner: there are enough threads for those that come now.
        std::thread::sleep(PATIENCE);
        match self.take_left() {
            Some(job) => {
                let slow = self.slow.load(Ordering::Relaxed);
                self.skip.store((1 << slow) - 1, Ordering::Relaxed);
                self.slow.store((slow + 1).min(MOST_SLOW), Ordering::Relaxed);
                self.slow_pool.run(job);
            }
            None => self.slow.store(0, Ordering::Relaxed),
        }
    }

    fn take_skip(&self) -> bool {
        let less = |n: u32| n.checked_sub(1);
        self.skip.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    fn left(&self) -> MutexGuard<'_, Option<Job>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is room for one: there is one thread that has no place.
    fn put_left(&self, job: Job) -> Result<(), Job> {
        let mut left = self.left();
        if left.is_some() {
            return Err(job);
        }
        *left = Some(job);
        self.is_left.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn take_left(&self) -> Option<Job> {
        let mut left = self.left();
        self.is_left.store(false, Ordering::SeqCst);
        left.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    fn readers(most: usize) -> Readers {
        Readers::new(most, Arc::default())
    }

    /// A job that is done when it is told to be, and who tells it.
    fn held() -> (Sender<()>, impl FnOnce() + Send + 'static) {
        let (release, released): (Sender<()>, Receiver<()>) = channel();
        (release, move || released.recv().unwrap_or(()))
    }

    fn run(readers: &Readers, job: impl FnOnce() + Send + 'static) {
        readers.run(&Arc::new(()), |_| job());
    }

    /// Waits until as many threads read.
    fn wait_for(readers: &Readers, reading: usize) {
        while readers.reading.0.load(Ordering::SeqCst) != reading {
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_is_left_is_done_by_the_thread_that_is_done_next() {
        let readers = readers(1);
        let (release, job) = held();
        let (send, receive) = channel();
        std::thread::scope(|s| {
            let reader = s.spawn(|| {
                run(&readers, job);
                std::thread::current().id()
            });
            wait_for(&readers, 1);
            // As the thread that is left for names does it, which need not wait here.
            let put = readers.put_left(Box::new(move || {
                send.send(std::thread::current().id()).unwrap();
            }));
            assert!(put.is_ok());
            assert!(!readers.do_left(), "there is no place");
            release.send(()).unwrap();
            assert_eq!(receive.recv().unwrap(), reader.join().unwrap());
        });
        assert_eq!(readers.reading.0.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn where_no_reader_gets_on_what_is_left_is_done_all_the_same() {
        let readers = readers(2);
        let (releases, jobs): (Vec<_>, Vec<_>) = (0..2).map(|_| held()).unzip();
        let (send, receive) = channel();
        std::thread::scope(|s| {
            for job in jobs {
                s.spawn(|| run(&readers, job));
            }
            wait_for(&readers, 2);
            for i in 0..100 {
                let send = send.clone();
                run(&readers, move || send.send(i).unwrap());
            }
            let mut done: Vec<i32> = (0..100).map(|_| receive.recv().unwrap()).collect();
            done.sort();
            assert!(done.into_iter().eq(0..100));
            drop(releases);
        });
        // A few of them were waited with, the others less and less often.
        assert_eq!(readers.slow.load(Ordering::Relaxed), MOST_SLOW);
    }

    #[test]
    fn while_all_others_read_no_thread_idles() {
        let readers = readers(4);
        let (release, released) = channel::<()>();
        let (send, receive) = channel();
        let stop = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    run(&readers, || ());
                }
            });
            while readers.idle.idle() != 1 {
                std::thread::yield_now();
            }
            // Of the other four, three get something to do that takes long.
            let released = Arc::new(Mutex::new(released));
            for _ in 0..3 {
                let (send, released) = (send.clone(), released.clone());
                let readers = &readers;
                s.spawn(move || {
                    run(readers, move || {
                        send.send(()).unwrap();
                        let _ = released.lock().unwrap().recv();
                    })
                });
                receive.recv().unwrap();
            }
            run(&readers, || ());
            assert_eq!(readers.idle.idle(), 0);
            stop.store(true, Ordering::SeqCst);
            drop(release);
        });
    }

    #[test]
    fn each_job_is_done_once_and_no_more_at_a_time_than_there_are_places() {
        let readers = readers(4);
        let counts = Arc::new([const { AtomicUsize::new(0) }; 3]);
        std::thread::scope(|s| {
            for _ in 0..5 {
                s.spawn(|| {
                    for _ in 0..2000 {
                        let counts = counts.clone();
                        run(&readers, move || {
                            let [now, most, done] = &*counts;
                            if std::thread::current().name() != Some(SlowPool::THREAD) {
                                most.fetch_max(
                                    now.fetch_add(1, Ordering::SeqCst) + 1,
                                    Ordering::SeqCst,
                                );
                                std::hint::black_box([0u8; 4096]);
                                now.fetch_sub(1, Ordering::SeqCst);
                            }
                            done.fetch_add(1, Ordering::SeqCst);
                        });
                    }
                });
            }
        });
        let [_, most, done] = &*counts;
        while done.load(Ordering::SeqCst) < 10_000 {
            std::thread::yield_now();
        }
        assert!(most.load(Ordering::SeqCst) <= 4);
        assert!(readers.take_left().is_none() && readers.reading.0.load(Ordering::SeqCst) == 0);
    }
}
