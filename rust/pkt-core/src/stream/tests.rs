use std::fs;
use std::sync::mpsc;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::cases;
use crate::reader::tests::MODES;
use crate::reader::{File, Mode};

const SLOT_BYTES: usize = 16;

/// Slots that outlive the stream they are lent to, and can be looked at while leased.
struct Memory(Vec<Vec<u8>>);

impl Memory {
    fn new(slots: usize, bytes: usize) -> Self {
        Self((0..slots).map(|_| vec![0; bytes]).collect())
    }

    fn slots(&mut self) -> Vec<Slot> {
        let slot = |memory: &mut Vec<u8>| {
            // SAFETY: every test drops the stream before its `Memory`.
            unsafe { Slot::new(memory.as_mut_ptr(), memory.len()) }
        };
        self.0.iter_mut().map(slot).collect()
    }
}

/// Job `i` asks for one range that begins at `i`.
fn jobs(count: usize) -> Vec<Vec<Range>> {
    (0..count as u64).map(|i| vec![Range { file: 0, begin: i, bytes: 1, at: 0 }]).collect()
}

#[expect(clippy::unnecessary_wraps, reason = "it stands in for `Reader::read`")]
fn copy_number(ranges: &[Range], memory: &mut [u8], _: &AtomicBool) -> Result<Option<u64>> {
    memory[0] = ranges[0].begin as u8;
    Ok(Some(1))
}

fn wait_until(condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_secs(60), "waited in vain");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn jobs_come_in_order_and_end() {
    let mut memory = Memory::new(2, SLOT_BYTES);
    let stream = Stream::start_with(memory.slots(), jobs(5), copy_number).unwrap();
    for job in 0..5 {
        let lease = stream.next().unwrap().unwrap();
        assert_eq!(lease, Lease { job, slot: job % 2 });
        stream.release(lease.slot).unwrap();
    }
    assert_eq!(stream.next().unwrap(), None);
    assert_eq!(stream.next().unwrap(), None);
    assert_eq!(stream.counts().bytes, 5);
}

#[test]
fn no_jobs_end_at_once() {
    let mut memory = Memory::new(1, SLOT_BYTES);
    let stream = Stream::start_with(memory.slots(), vec![], copy_number).unwrap();
    assert_eq!(stream.next().unwrap(), None);
}

#[test]
fn the_reader_does_not_run_ahead_of_free_slots() {
    let mut memory = Memory::new(3, SLOT_BYTES);
    let stream = Stream::start_with(memory.slots(), jobs(9), copy_number).unwrap();
    wait_until(|| stream.counts().bytes == 3);
    thread::sleep(Duration::from_millis(30));
    assert_eq!(stream.counts().bytes, 3);
    let leases: Vec<_> = (0..3).map(|_| stream.next().unwrap().unwrap()).collect();
    assert_eq!(stream.counts().bytes, 3);
    stream.release(leases[1].slot).unwrap();
    wait_until(|| stream.counts().bytes == 4);
    assert_eq!(stream.next().unwrap(), Some(Lease { job: 3, slot: leases[1].slot }));
    assert!(stream.counts().idle_seconds > 0.0);
}

#[test]
fn only_a_leased_slot_can_be_released() {
    let mut memory = Memory::new(2, SLOT_BYTES);
    let stream = Stream::start_with(memory.slots(), jobs(2), copy_number).unwrap();
    wait_until(|| stream.counts().bytes == 2);
    assert!(stream.release(0).is_err(), "read, not leased");
    assert!(stream.release(7).is_err(), "no such slot");
    let slot = stream.next().unwrap().unwrap().slot;
    stream.release(slot).unwrap();
    assert!(stream.release(slot).is_err(), "released before");
}

#[test]
fn an_error_comes_once_and_after_the_jobs_before_it() {
    let mut memory = Memory::new(4, SLOT_BYTES);
    let read = |ranges: &[Range], memory: &mut [u8], stop: &AtomicBool| match ranges[0].begin {
        2 => Err(Error::Invalid("the disk is gone".into())),
        _ => copy_number(ranges, memory, stop),
    };
    let stream = Stream::start_with(memory.slots(), jobs(5), read).unwrap();
    wait_until(|| stream.shared.lock().ended);
    assert_eq!(stream.next().unwrap(), Some(Lease { job: 0, slot: 0 }));
    assert_eq!(stream.next().unwrap(), Some(Lease { job: 1, slot: 1 }));
    assert_eq!(stream.next().unwrap_err().to_string(), "the disk is gone");
    assert_eq!(stream.next().unwrap(), None);
    assert_eq!(stream.counts().bytes, 2);
}

#[test]
fn a_panic_in_the_reading_thread_is_an_error() {
    let mut memory = Memory::new(1, SLOT_BYTES);
    let read = |_: &[Range], _: &mut [u8], _: &AtomicBool| panic!("slot {}", "on fire");
    let stream = Stream::start_with(memory.slots(), jobs(1), read).unwrap();
    let error = stream.next().unwrap_err();
    assert_eq!(error.to_string(), "the reading thread panicked: slot on fire");
}

#[test]
fn a_waiting_consumer_is_counted() {
    let (go, wait) = mpsc::channel();
    let mut memory = Memory::new(1, SLOT_BYTES);
    let read = move |ranges: &[Range], memory: &mut [u8], stop: &AtomicBool| {
        wait.recv().unwrap();
        copy_number(ranges, memory, stop)
    };
    let stream = Stream::start_with(memory.slots(), jobs(1), read).unwrap();
    thread::scope(|scope| {
        let consumer = scope.spawn(|| stream.next().unwrap());
        wait_until(|| stream.counts().stalls == 1);
        thread::sleep(Duration::from_millis(10));
        go.send(()).unwrap();
        assert_eq!(consumer.join().unwrap(), Some(Lease { job: 0, slot: 0 }));
    });
    let counts = stream.counts();
    assert_eq!(counts.stalls, 1);
    assert!(counts.stall_seconds >= 0.01 && counts.read_seconds > 0.0);
}

#[test]
fn a_drop_ends_a_read_under_way() {
    let (started, reading) = mpsc::channel();
    let mut memory = Memory::new(1, SLOT_BYTES);
    let read = move |_: &[Range], _: &mut [u8], stop: &AtomicBool| {
        started.send(()).unwrap();
        wait_until(|| stop.load(Ordering::Relaxed));
        Ok(None)
    };
    let stream = Stream::start_with(memory.slots(), jobs(2), read).unwrap();
    reading.recv().unwrap();
    drop(stream);
    assert!(reading.recv().is_err(), "no second read, and the thread is gone");
}

#[test]
fn a_drop_ends_the_wait_for_a_free_slot() {
    let mut memory = Memory::new(1, SLOT_BYTES);
    let stream = Stream::start_with(memory.slots(), jobs(2), copy_number).unwrap();
    stream.next().unwrap();
    drop(stream);
}

/// A sparse file of `bytes` zeros behind `head`.
fn sparse(head: &[u8], bytes: u64) -> (TempDir, File) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("shard");
    fs::write(&path, head).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(bytes).unwrap();
    (folder, File { path, bytes })
}

#[test]
#[cfg_attr(miri, ignore = "of its size")]
fn a_drop_in_the_middle_of_a_big_file_returns() {
    let bytes = 64 << 20;
    let (_folder, file) = sparse(&[], bytes as u64);
    let reader = Arc::new(Reader::open(&[file], Mode::Buffered, 2).unwrap().0);
    let mut memory = Memory::new(2, bytes);
    let job = vec![Range { file: 0, begin: 0, bytes, at: 0 }];
    let stream = Stream::start(reader, memory.slots(), vec![job; 10_000]).unwrap();
    stream.next().unwrap();
    drop(stream);
}

#[test]
fn impossible_streams_do_not_start() {
    let (_folder, file) = sparse(&[], 100);
    let reader = Arc::new(Reader::open(&[file], MODES[0], 1).unwrap().0);
    let start = |slots, bytes| {
        let job = vec![Range { file: 0, begin: 0, bytes, at: 0 }];
        Stream::start(Arc::clone(&reader), slots, vec![job]).unwrap_err().to_string()
    };
    assert_eq!(start(vec![], 1), "a stream needs at least one slot");
    let (mut small, mut large) = (Memory::new(1, 10), Memory::new(1, 200));
    let slots = small.slots().into_iter().chain(large.slots()).collect();
    assert_eq!(start(slots, 11), "job 0: 11 bytes do not fit at byte 0 of a target of 10 bytes");
    assert!(start(large.slots(), 101).ends_with("the file has 100"));
}

#[test]
fn a_file_cut_while_streaming_is_an_error_that_names_it() {
    let (_folder, file) = sparse(&[1; 8], 8);
    let reader = Arc::new(Reader::open(std::slice::from_ref(&file), MODES[0], 1).unwrap().0);
    let mut memory = Memory::new(1, 8);
    let job = vec![Range { file: 0, begin: 0, bytes: 8, at: 0 }];
    let stream = Stream::start(reader, memory.slots(), vec![job; 3]).unwrap();
    let lease = stream.next().unwrap().unwrap();
    assert_eq!(memory.0[lease.slot], [1; 8]);
    fs::write(&file.path, [1; 4]).unwrap();
    stream.release(lease.slot).unwrap();
    let error = stream.next().unwrap_err().to_string();
    assert!(error.ends_with("expected 8 bytes, found 4 bytes"), "{error}");
}

#[test]
fn two_consumers_share_all_jobs() {
    let mut memory = Memory::new(2, SLOT_BYTES);
    let stream = Stream::start_with(memory.slots(), jobs(500), copy_number).unwrap();
    let consume = || {
        let mut seen = Vec::new();
        while let Some(lease) = stream.next().unwrap() {
            seen.push(lease.job);
            stream.release(lease.slot).unwrap();
        }
        seen
    };
    let mut seen = thread::scope(|scope| {
        let consumers = [scope.spawn(consume), scope.spawn(consume)];
        consumers.map(|consumer| consumer.join().unwrap()).concat()
    });
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..500));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(64)))]

    #[test]
    fn each_lease_holds_its_job_whatever_the_order_of_release(
        lengths in vec(0..300_usize, 0..40),
        slots in 1..5_usize,
        choices in vec(any::<prop::sample::Index>(), 80),
    ) {
        let content: Vec<u8> = (0..600_u32).map(|i| ((i * 37) >> 3) as u8).collect();
        let (_folder, file) = sparse(&content, content.len() as u64);
        let reader = Arc::new(Reader::open(&[file], Mode::Buffered, 2).unwrap().0);
        let job = |(i, &bytes)| vec![Range { file: 0, begin: i as u64, bytes, at: i % 7 }];
        let jobs: Vec<_> = lengths.iter().enumerate().map(job).collect();
        let mut memory = Memory::new(slots, 310);
        let stream = Stream::start(reader, memory.slots(), jobs.clone()).unwrap();
        let (mut held, mut choices) = (Vec::<Lease>::new(), choices.iter().cycle());
        for job in 0..jobs.len() {
            while held.len() == slots || (!held.is_empty() && choices.next().unwrap().index(2) == 0) {
                let lease = held.swap_remove(choices.next().unwrap().index(held.len()));
                stream.release(lease.slot).unwrap();
            }
            let lease = stream.next().unwrap().unwrap();
            prop_assert_eq!(lease.job, job);
            prop_assert!(held.iter().all(|other| other.slot != lease.slot));
            held.push(lease);
            for lease in &held {
                let Range { begin, bytes, at, .. } = jobs[lease.job][0];
                let found = &memory.0[lease.slot][at..at + bytes];
                prop_assert_eq!(found, &content[begin as usize..begin as usize + bytes]);
            }
        }
        prop_assert_eq!(stream.next().unwrap(), None);
        prop_assert_eq!(stream.counts().bytes, lengths.iter().sum::<usize>() as u64);
    }
}
