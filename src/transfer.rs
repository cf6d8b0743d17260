//! Moves expert bytes into slots, beside decode and never on its thread.
//!
//! A copy is ordered only when nothing can read its slot any more (see `slots`), and reported when its
//! last byte is in place. What fails is reported too, and leaves the slot empty: that costs speed,
//! never correctness, because the host copy of every expert stays valid.

use std::{
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
    thread::JoinHandle,
};

use parking_lot::Mutex;

use crate::fault;

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

/// How an order ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Of the order.
    pub id: u64,
    /// Whether all bytes are in place; else why not.
    pub result: Result<(), String>,
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
            // SAFETY: the order's owner vouches for both ranges; slots and weights never overlap.
            unsafe { std::ptr::copy_nonoverlapping(m.src, m.dst, m.bytes) };
        }
        Ok(())
    }
}

/// The copy thread of a model.
pub struct Transfer {
    orders: Option<Sender<Order>>,
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
        let thread =
            std::thread::Builder::new().name("moe-hot-copy".into()).spawn(move || run(&rx, &out, copier))?;
        Ok(Transfer { orders: Some(tx), reports, thread: Some(thread) })
    }

    /// Orders a copy. Always ends in exactly one report.
    pub fn order(&self, order: Order) {
        let id = order.id;
        let sent = self.orders.as_ref().is_some_and(|tx| tx.send(order).is_ok());
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
        self.orders = None;
        if let Some(t) = self.thread.take() {
            // the thread catches what a copier throws
            let _ = t.join();
        }
    }
}

fn run(orders: &Receiver<Order>, reports: &Mutex<Vec<Report>>, mut copier: impl Copier) {
    for order in orders {
        if fault::strikes("copy") {
            reports.lock().push(Report { id: order.id, result: Err("a fault was injected".into()) });
            continue;
        }
        let copied = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| copier.copy(&order)));
        let result = copied.unwrap_or_else(|_| Err("the copy panicked".into()));
        reports.lock().push(Report { id: order.id, result });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reports_of(t: &Transfer, n: usize) -> Vec<Report> {
        let mut got = Vec::new();
        while got.len() < n {
            t.take_reports(&mut got);
            std::thread::yield_now();
        }
        got
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
        let got = reports_of(&t, 2);
        assert_eq!(got, [Report { id: 1, result: Ok(()) }, Report { id: 2, result: Ok(()) }]);
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
        let got: Vec<_> = reports_of(&t, 3).into_iter().map(|r| r.result).collect();
        assert_eq!(got, [Err("no".into()), Err("the copy panicked".into()), Ok(())]);
    }
}
