//! Moves expert bytes into slots, beside decode and never on its thread.
//!
//! A copy is ordered only when nothing can read its slot any more (see `slots`), and reported when its
//! last byte is in place. What fails is reported too, and leaves the slot empty: that costs speed,
//! never correctness, because the host copy of every expert stays valid.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    device::SlotMemory,
    fault,
    sync::{
        Mutex, memory,
        mpsc::{self, Receiver, Sender},
        thread::{self, JoinHandle},
    },
};

/// Bytes to move from one place to another.
#[derive(Clone, Copy, Debug)]
pub struct Move {
    /// First byte of the source.
    pub src: *const u8,
    /// First byte of the target.
    pub dst: *mut u8,
    /// How many.
    pub bytes: usize,
}

// SAFETY: the order's owner keeps source and target alive and unread until the copy is reported.
unsafe impl Send for Move {}

/// An expert on its way into a slot.
#[derive(Debug)]
pub struct Order {
    /// Given back with the report.
    pub id: u64,
    /// One a matrix.
    pub moves: Vec<Move>,
}

/// Memory of slots that is to have other sizes.
#[derive(Debug)]
pub struct Resize {
    /// Given back with the report.
    pub id: u64,
    /// Each with its bytes; nobody uses what goes.
    pub memory: Vec<(Arc<SlotMemory>, usize)>,
}

enum Job {
    Copy(Order),
    Resize(Resize),
}

/// How an order ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Of the order.
    pub id: u64,
    /// How long it took until all bytes were in place; else why they are not.
    pub result: Result<Duration, String>,
}

/// How fast copies are beside decode, which uses the same link and the same memory.
#[derive(Debug)]
pub struct Pace {
    ns_per_byte: f64,
}

/// Weight of a copy in the pace: a plan or two.
const ALPHA: f64 = 1.0 / 16.0;

impl Pace {
    /// Before there was a copy; `rate` in bytes a ns, 0 where it is not known and copies seem to take no time.
    pub fn new(rate: f64) -> Self {
        Pace { ns_per_byte: if rate > 0.0 { 1.0 / rate } else { 0.0 } }
    }

    /// Takes what a copy of `bytes` bytes took.
    pub fn observe(&mut self, bytes: usize, took: Duration) {
        if bytes > 0 {
            self.ns_per_byte += ALPHA * (took.as_nanos() as f64 / bytes as f64 - self.ns_per_byte);
        }
    }

    /// What copies of `bytes` bytes will take.
    pub fn time(&self, bytes: usize) -> Duration {
        Duration::from_nanos((bytes as f64 * self.ns_per_byte) as u64)
    }
}

/// Does the copies of one order. Tests put faults here; a device puts its stream here.
pub trait Copier: Send + 'static {
    /// Copies all of `order`, returns when the bytes are in place.
    ///
    /// # Errors
    /// Says why the slot must not be used.
    fn copy(&mut self, order: &Order) -> Result<(), String>;
}

/// Copies in host memory.
pub struct HostCopier;

impl Copier for HostCopier {
    fn copy(&mut self, order: &Order) -> Result<(), String> {
        for m in &order.moves {
            memory::writes(m.dst, m.bytes);
            // SAFETY: the order's owner vouches for both ranges; slots and weights never overlap.
            unsafe { std::ptr::copy_nonoverlapping(m.src, m.dst, m.bytes) };
        }
        Ok(())
    }
}

/// The copy thread of a model.
pub struct Transfer {
    jobs: Option<Sender<Job>>,
    reports: Arc<Mutex<Vec<Report>>>,
    thread: Option<JoinHandle<()>>,
}

impl Transfer {
    /// Starts the copy thread.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn new(copier: impl Copier) -> std::io::Result<Self> {
        let (tx, rx) = mpsc::channel();
        let reports = Arc::new(Mutex::new(Vec::new()));
        let out = reports.clone();
        fault::io("thread")?;
        let thread =
            thread::Builder::new().name("moe-hot-copy".into()).spawn(move || run(&rx, &out, copier))?;
        Ok(Transfer { jobs: Some(tx), reports, thread: Some(thread) })
    }

    /// Orders a copy. Always ends in exactly one report.
    pub fn order(&self, order: Order) {
        self.send(order.id, Job::Copy(order));
    }

    /// Orders other sizes: the driver may take its time for that, and decode does not wait. All of them or none; always
    /// ends in exactly one report.
    pub fn resize(&self, resize: Resize) {
        self.send(resize.id, Job::Resize(resize));
    }

    fn send(&self, id: u64, job: Job) {
        let sent = self.jobs.as_ref().is_some_and(|tx| tx.send(job).is_ok());
        if !sent {
            self.reports.lock().push(Report { id, result: Err("the copy thread is gone".into()) });
        }
    }

    /// Takes the reports that have come in, oldest first.
    pub fn take_reports(&self, out: &mut Vec<Report>) {
        out.append(&mut self.reports.lock());
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(t) = self.thread.take() {
            // the thread catches what a copier throws
            let _ = t.join();
        }
    }
}

fn run(jobs: &Receiver<Job>, reports: &Mutex<Vec<Report>>, mut copier: impl Copier) {
    for job in jobs {
        let start = Instant::now();
        let (id, result) = match job {
            Job::Copy(order) => (order.id, copy(order, &mut copier)),
            Job::Resize(r) => (r.id, resize(&r.memory)),
        };
        reports.lock().push(Report { id, result: result.map(|()| start.elapsed()) });
    }
}

fn copy(mut order: Order, copier: &mut impl Copier) -> Result<(), String> {
    fault::delay();
    if fault::strikes("copy") {
        return Err("a fault was injected".into());
    }
    if fault::strikes("torn") {
        order.moves.iter_mut().for_each(|m| m.bytes /= 2);
    }
    let copied = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| copier.copy(&order)));
    copied.unwrap_or_else(|_| Err("the copy panicked".into()))
}

fn resize(memory: &[(Arc<SlotMemory>, usize)]) -> Result<(), String> {
    let before: Vec<usize> = memory.iter().map(|(m, _)| m.bytes()).collect();
    for (i, (m, bytes)) in memory.iter().enumerate() {
        if let Err(why) = m.resize(*bytes) {
            for ((m, _), bytes) in memory[..i].iter().zip(before) {
                // what was there before is there: it only gets smaller again
                let _ = m.resize(bytes);
            }
            return Err(why);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    fn reports_of(t: &Transfer, n: usize) -> Vec<Report> {
        let mut got = Vec::new();
        while got.len() < n {
            t.take_reports(&mut got);
            std::thread::yield_now();
        }
        got
    }

    #[test]
    fn all_of_the_memory_grows_or_none_does() {
        let memory = |reserved| Arc::new(SlotMemory::new(&Device::Host, reserved, 4096, false).unwrap());
        let (large, small) = (memory(1 << 20), memory(8192));
        let t = Transfer::new(HostCopier).unwrap();
        let resize =
            |id, bytes| t.resize(Resize { id, memory: vec![(large.clone(), bytes), (small.clone(), bytes)] });
        resize(1, 8192);
        resize(2, 16384);
        let got: Vec<_> = reports_of(&t, 2).into_iter().map(|r| (r.id, r.result.is_ok())).collect();
        assert_eq!(got, [(1, true), (2, false)], "the small one has addresses for two pages");
        assert_eq!((large.bytes(), small.bytes()), (8192, 8192));
    }

    #[test]
    fn bytes_arrive_and_are_reported_in_order() {
        let src: Vec<u8> = (0..=255).collect();
        let mut dst = vec![0u8; 256];
        let t = Transfer::new(HostCopier).unwrap();
        let half = |at: usize, dst: &mut [u8]| Move {
            src: src[at..].as_ptr(),
            dst: dst[at..].as_mut_ptr(),
            bytes: 128,
        };
        let (a, b) = (half(0, &mut dst), half(128, &mut dst));
        t.order(Order { id: 1, moves: vec![a] });
        t.order(Order { id: 2, moves: vec![b] });
        let got: Vec<_> = reports_of(&t, 2).into_iter().map(|r| (r.id, r.result.is_ok())).collect();
        assert_eq!(got, [(1, true), (2, true)]);
        drop(t);
        assert_eq!(src, dst);
    }

    #[test]
    fn a_failing_copier_is_reported_and_does_not_end_the_thread() {
        struct Faulty(u32);
        impl Copier for Faulty {
            fn copy(&mut self, _: &Order) -> Result<(), String> {
                self.0 += 1;
                match self.0 {
                    1 => Err("no".into()),
                    2 => panic!("injected"),
                    _ => Ok(()),
                }
            }
        }
        let t = Transfer::new(Faulty(0)).unwrap();
        for id in 0..3 {
            t.order(Order { id, moves: vec![] });
        }
        let got: Vec<_> = reports_of(&t, 3).into_iter().map(|r| r.result.map(|_| ())).collect();
        assert_eq!(got, [Err("no".into()), Err("the copy panicked".into()), Ok(())]);
    }

    #[test]
    fn a_report_tells_what_the_copy_took() {
        struct Slow;
        impl Copier for Slow {
            fn copy(&mut self, _: &Order) -> Result<(), String> {
                std::thread::sleep(Duration::from_millis(5));
                Ok(())
            }
        }
        let t = Transfer::new(Slow).unwrap();
        t.order(Order { id: 1, moves: vec![] });
        let took = reports_of(&t, 1).remove(0).result.unwrap();
        assert!(took >= Duration::from_millis(5), "{took:?}");
    }

    #[test]
    fn the_pace_goes_from_the_links_to_what_copies_take_beside_decode() {
        let mut p = Pace::new(50.0);
        assert_eq!(p.time(50_000_000), Duration::from_millis(1));
        (0..200).for_each(|_| p.observe(3_500_000, Duration::from_micros(140)));
        let ns = p.time(25_000_000).as_nanos();
        assert!((990_000..1_010_000).contains(&ns), "{ns}");
        assert_eq!(
            Pace::new(0.0).time(1 << 30),
            Duration::ZERO,
            "no link that copies could be in the way of"
        );
    }
}
