//! Layers read ahead into a fixed number of slots.
//!
//! A sweep computes on one layer while the next ones come from the disk. [`Stream`] has a thread
//! that reads whole layers (jobs) in the order asked for, each into a free slot, and waits when
//! none is free: memory is bounded by the slots, whatever the speed of either side.
//!
//! ```text
//! free ─reader→ ready ─next()→ leased ─release()→ free
//! ```
//!
//! Slots are handed out first released, first filled, so with one consumer the slot of a job does
//! not depend on timing. Whatever ends the reading, a failed read or a panic, arrives as an error
//! after the jobs read before it; nobody is left waiting for a thread that is gone.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crate::layout::Range;
use crate::reader::Reader;
use crate::{Error, Result};

/// Memory of the caller that holds one layer at a time.
#[derive(Debug)]
pub struct Slot {
    first: *mut u8,
    bytes: usize,
}

// SAFETY: whoever made the slot has promised that the memory is the stream's alone.
unsafe impl Send for Slot {}

impl Slot {
    /// The `bytes` bytes at `first`; direct reads want `first` to be a multiple of 4096.
    ///
    /// # Safety
    /// The memory is valid for reads and writes until the [`Stream`] that gets the slot has been
    /// dropped, and nobody else touches it, save a holder of its [`Lease`] between
    /// [`Stream::next`] and [`Stream::release`].
    #[must_use]
    pub unsafe fn new(first: *mut u8, bytes: usize) -> Self {
        Self { first, bytes }
    }

    fn memory(&mut self) -> &mut [u8] {
        // SAFETY: as promised to `new`. The reading thread owns the slot and calls this only
        // while the slot is neither ready nor leased, so no consumer looks at the memory.
        unsafe { slice::from_raw_parts_mut(self.first, self.bytes) }
    }
}

/// A job that has been read, and the slot that holds it until it is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Index of the job.
    pub job: usize,
    /// Index of the slot.
    pub slot: usize,
}

/// What a stream has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Bytes of the jobs that have been read.
    pub bytes: u64,
    /// Seconds spent reading them.
    pub read_seconds: f64,
    /// Times a consumer had to wait for the disk.
    pub stalls: u64,
    /// Seconds consumers waited for it.
    pub stall_seconds: f64,
    /// Seconds the reader waited for a free slot.
    pub idle_seconds: f64,
}

/// Reads jobs ahead of their consumers, as far as there are slots.
#[derive(Debug)]
pub struct Stream {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Stream {
    /// Starts to read `jobs` in order into `slots`, any job into any slot.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are no slots, or a job does not fit into the smallest or asks
    /// for what the files do not hold; [`Error::Thread`] if the system grants no thread.
    pub fn start(reader: Arc<Reader>, slots: Vec<Slot>, jobs: Vec<Vec<Range>>) -> Result<Self> {
        let Some(smallest) = slots.iter().map(|slot| slot.bytes).min() else {
            return Err(Error::Invalid("a stream needs at least one slot".into()));
        };
        for (job, ranges) in jobs.iter().enumerate() {
            if let Err(error) = reader.verified(ranges, smallest) {
                return Err(Error::Invalid(format!("job {job}: {error}")));
            }
        }
        Self::start_with(slots, jobs, move |ranges, memory, stop| reader.read(ranges, memory, stop))
    }

    fn start_with(
        slots: Vec<Slot>,
        jobs: Vec<Vec<Range>>,
        read: impl Fn(&[Range], &mut [u8], &AtomicBool) -> Result<Option<u64>> + Send + 'static,
    ) -> Result<Self> {
        let shared = Arc::new(Shared::new(slots.len()));
        let theirs = Arc::clone(&shared);
        let run = move || {
            let all = AssertUnwindSafe(|| theirs.read_all(slots, &jobs, read));
            let end = catch_unwind(all).unwrap_or_else(|panic| Err(panicked(panic.as_ref())));
            theirs.finish(end);
        };
        let thread = thread::Builder::new()
            .name("pkt-stream".into())
            .spawn(run)
            .map_err(|error| Error::Thread(format!("cannot start the reading thread: {error}")))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The next job, waiting until it is read; `None` after the last.
    ///
    /// Where every slot is leased this waits for another thread to release one.
    ///
    /// # Errors
    /// The one that ended the reading, once and after all jobs read before it; `None` from then.
    pub fn next(&self) -> Result<Option<Lease>> {
        let mut state = self.shared.lock();
        if state.must_wait() {
            let begin = Instant::now();
            state.counts.stalls += 1;
            let filled = self.shared.filled.wait_while(state, |state| state.must_wait());
            state = filled.unwrap_or_else(PoisonError::into_inner);
            state.counts.stall_seconds += begin.elapsed().as_secs_f64();
        }
        if let Some(lease) = state.ready.pop_front() {
            state.leased[lease.slot] = true;
            return Ok(Some(lease));
        }
        state.failure.take().map_or(Ok(None), Err)
    }

    /// Gives a slot back to the reader, which overwrites it.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the slot is not leased.
    pub fn release(&self, slot: usize) -> Result<()> {
        let mut state = self.shared.lock();
        match state.leased.get_mut(slot) {
            Some(leased @ true) => *leased = false,
            _ => return Err(Error::Invalid(format!("slot {slot} is released but not leased"))),
        }
        state.free.push_back(slot);
        self.shared.freed.notify_one();
        Ok(())
    }

    /// What has been read and waited for; what is under way is not counted yet.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.shared.lock().counts
    }
}

impl Drop for Stream {
    /// Ends the reading after the chunks under way.
    fn drop(&mut self) {
        self.shared.stop();
        // A panic has been caught within the thread, so joining cannot fail.
        self.thread.take().map(JoinHandle::join);
    }
}

/// What consumers and the reading thread have in common.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// A job became ready, or the reading ended.
    filled: Condvar,
    /// A slot became free, or the stream is being dropped.
    freed: Condvar,
    stop: AtomicBool,
}

#[derive(Debug)]
struct State {
    free: VecDeque<usize>,
    ready: VecDeque<Lease>,
    leased: Vec<bool>,
    ended: bool,
    failure: Option<Error>,
    counts: Counts,
}

impl State {
    fn must_wait(&self) -> bool {
        self.ready.is_empty() && !self.ended
    }
}

impl Shared {
    fn new(slots: usize) -> Self {
        let state = State {
            free: (0..slots).collect(),
            ready: VecDeque::new(),
            leased: vec![false; slots],
            ended: false,
            failure: None,
            counts: Counts::default(),
        };
        Self {
            state: Mutex::new(state),
            filled: Condvar::new(),
            freed: Condvar::new(),
            stop: AtomicBool::new(false),
        }
    }

    /// A poisoned lock is as good as any: nothing between lock and unlock leaves half a change.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The body of the reading thread: until the last job, an error or a stop.
    fn read_all(
        &self,
        mut slots: Vec<Slot>,
        jobs: &[Vec<Range>],
        read: impl Fn(&[Range], &mut [u8], &AtomicBool) -> Result<Option<u64>>,
    ) -> Result<()> {
        for (job, ranges) in jobs.iter().enumerate() {
            let Some(slot) = self.free_slot() else { break };
            let begin = Instant::now();
            let Some(bytes) = read(ranges, slots[slot].memory(), &self.stop)? else { break };
            let mut state = self.lock();
            state.counts.bytes += bytes;
            state.counts.read_seconds += begin.elapsed().as_secs_f64();
            state.ready.push_back(Lease { job, slot });
            self.filled.notify_one();
        }
        Ok(())
    }

    /// The slot that has been free longest, waiting for one; `None` on a stop.
    fn free_slot(&self) -> Option<usize> {
        let begin = Instant::now();
        let stopped = || self.stop.load(Ordering::Relaxed);
        let freed = self.freed.wait_while(self.lock(), |state| state.free.is_empty() && !stopped());
        let mut state = freed.unwrap_or_else(PoisonError::into_inner);
        state.counts.idle_seconds += begin.elapsed().as_secs_f64();
        if stopped() { None } else { state.free.pop_front() }
    }

    fn finish(&self, end: Result<()>) {
        let mut state = self.lock();
        state.failure = end.err();
        state.ended = true;
        self.filled.notify_all();
    }

    /// Under the lock, lest it falls between the reader's look at `stop` and its sleep.
    fn stop(&self) {
        let _state = self.lock();
        self.stop.store(true, Ordering::Relaxed);
        self.freed.notify_all();
    }
}

fn panicked(panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    Error::Thread(format!("the reading thread panicked: {}", text.unwrap_or("no message")))
}

#[cfg(test)]
mod tests;
