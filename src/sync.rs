//! What threads share, from one place: the real thing, or under `cfg(loom)` the stand-ins by which loom runs a model in
//! every order of its threads and with every value that weak memory may show. The code that is modelled is the code that
//! runs: it names these, and nothing of `std` that loom would have to know of.
//!
//! `Arc` is not among them. What it counts orders nothing here, and loom's knows neither slices nor `dyn`.

#[cfg(loom)]
pub use modelled::*;
#[cfg(not(loom))]
pub use real::*;

#[cfg(not(loom))]
mod real {
    pub use std::{
        hint,
        sync::{atomic, mpsc},
        thread,
    };

    pub use parking_lot::{Condvar, Mutex, MutexGuard};

    /// As that of `std`, with loom's way to reach what is in it.
    #[derive(Default)]
    pub struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        /// To be read in `f`.
        #[inline(always)]
        pub fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
            f(self.0.get())
        }

        /// To be written in `f`.
        #[inline(always)]
        pub fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
            f(self.0.get())
        }
    }

    /// Memory that is reached through pointers: who accesses it says so here, for loom to see.
    pub mod memory {
        /// Threads will share `bytes` bytes from `at` on.
        #[inline(always)]
        pub fn watch<T>(_at: *const T, _bytes: usize) {}

        /// This thread reads them.
        #[inline(always)]
        pub fn reads<T>(_at: *const T, _bytes: usize) {}

        /// This thread writes them.
        #[inline(always)]
        pub fn writes<T>(_at: *const T, _bytes: usize) {}
    }
}

#[cfg(loom)]
#[expect(missing_docs, reason = "as what they stand for")]
mod modelled {
    use std::{
        cell::Cell,
        ops::{Deref, DerefMut},
    };

    pub use loom::{cell::UnsafeCell, sync::atomic};

    std::thread_local! {
        static WAITS: Cell<u32> = const { Cell::new(0) };
    }

    /// Explores `n` more turns of loops that wait, and of what comes later one order, a fair one. Two threads that wait
    /// could keep a third from running forever: without a bound that would be tried to the end.
    pub fn explore_waits(n: u32) {
        WAITS.set(n);
    }

    fn wait() {
        match WAITS.get() {
            0 => loom::skip_branch(),
            n => WAITS.set(n - 1),
        }
        loom::thread::yield_now();
    }

    pub mod hint {
        pub fn spin_loop() {
            super::wait();
        }
    }

    /// With the interface of parking_lot.
    #[derive(Default)]
    pub struct Mutex<T>(loom::sync::Mutex<T>);

    /// `None` only while it waits.
    pub struct MutexGuard<'a, T>(Option<loom::sync::MutexGuard<'a, T>>);

    impl<T> Mutex<T> {
        pub fn new(value: T) -> Self {
            Mutex(loom::sync::Mutex::new(value))
        }

        pub fn lock(&self) -> MutexGuard<'_, T> {
            MutexGuard(Some(self.0.lock().expect("loom's locks are not poisoned")))
        }

        pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            self.0.try_lock().ok().map(|guard| MutexGuard(Some(guard)))
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.0.as_deref().expect("is locked")
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.0.as_deref_mut().expect("is locked")
        }
    }

    #[derive(Default)]
    pub struct Condvar(loom::sync::Condvar);

    impl Condvar {
        pub fn new() -> Self {
            Condvar(loom::sync::Condvar::new())
        }

        pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            let locked = guard.0.take().expect("is locked");
            guard.0 = Some(self.0.wait(locked).expect("loom's locks are not poisoned"));
        }

        pub fn notify_all(&self) {
            self.0.notify_all();
        }
    }

    pub mod thread {
        use std::{
            io,
            sync::{
                Arc,
                atomic::{AtomicBool, Ordering},
            },
            time::Duration,
        };

        pub use loom::thread::Thread;

        pub fn yield_now() {
            super::wait();
        }

        /// loom knows no time: others run meanwhile.
        pub fn sleep(_: Duration) {
            yield_now();
        }

        pub struct Builder(loom::thread::Builder);

        pub struct JoinHandle<T> {
            thread: loom::thread::JoinHandle<T>,
            /// Nothing of the models': who sees it set still joins the thread.
            finished: Arc<AtomicBool>,
        }

        impl Builder {
            #[expect(clippy::new_without_default, reason = "as std's")]
            pub fn new() -> Self {
                Builder(loom::thread::Builder::new())
            }

            pub fn name(self, name: String) -> Self {
                Builder(self.0.name(name))
            }

            pub fn spawn<T: Send + 'static>(
                self,
                f: impl FnOnce() -> T + Send + 'static,
            ) -> io::Result<JoinHandle<T>> {
                let finished = Arc::new(AtomicBool::new(false));
                let told = finished.clone();
                let run = move || {
                    let result = f();
                    told.store(true, Ordering::Relaxed);
                    result
                };
                Ok(JoinHandle { thread: self.0.spawn(run)?, finished })
            }
        }

        pub fn spawn<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
            Builder::new().spawn(f).expect("loom has threads")
        }

        impl<T> JoinHandle<T> {
            pub fn is_finished(&self) -> bool {
                self.finished.load(Ordering::Relaxed)
            }

            pub fn join(self) -> std::thread::Result<T> {
                self.thread.join()
            }

            pub fn thread(&self) -> &Thread {
                self.thread.thread()
            }
        }
    }

    /// loom's own channel does not tell a receiver that its sender is gone.
    pub mod mpsc {
        use std::{collections::VecDeque, sync::Arc};

        use super::{Condvar, Mutex};

        struct Channel<T> {
            /// Nothing else comes after `None`.
            queue: Mutex<VecDeque<Option<T>>>,
            filled: Condvar,
        }

        pub struct Sender<T>(Arc<Channel<T>>);
        pub struct Receiver<T>(Arc<Channel<T>>);

        pub fn channel<T>() -> (Sender<T>, Receiver<T>) {
            let channel = Arc::new(Channel { queue: Mutex::default(), filled: Condvar::new() });
            (Sender(channel.clone()), Receiver(channel))
        }

        impl<T> Channel<T> {
            fn put(&self, value: Option<T>) {
                self.queue.lock().push_back(value);
                self.filled.notify_all();
            }
        }

        impl<T> Sender<T> {
            pub fn send(&self, value: T) -> Result<(), std::sync::mpsc::SendError<T>> {
                self.0.put(Some(value));
                Ok(())
            }
        }

        impl<T> Drop for Sender<T> {
            fn drop(&mut self) {
                self.0.put(None);
            }
        }

        impl<T> Iterator for &Receiver<T> {
            type Item = T;

            fn next(&mut self) -> Option<T> {
                let mut queue = self.0.queue.lock();
                loop {
                    match queue.pop_front() {
                        Some(value) => return value,
                        None => self.0.filled.wait(&mut queue),
                    }
                }
            }
        }
    }

    /// A cell of loom's stands for each line that is watched. That an access happens at one moment is no loss: loom
    /// asks what came before what, and not what was at the same time.
    pub mod memory {
        use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

        use loom::cell::UnsafeCell;

        const LINE: usize = 64;

        thread_local! {
            /// Of the model that runs: loom runs all of its threads on one of the system's.
            static LINES: RefCell<BTreeMap<usize, Rc<UnsafeCell<()>>>> = const { RefCell::new(BTreeMap::new()) };
        }

        /// A model begins.
        pub fn forget() {
            LINES.with_borrow_mut(BTreeMap::clear);
        }

        fn lines<T>(at: *const T, bytes: usize) -> std::ops::Range<usize> {
            at.addr() / LINE..(at.addr() + bytes).div_ceil(LINE)
        }

        pub fn watch<T>(at: *const T, bytes: usize) {
            for line in lines(at, bytes) {
                LINES.with_borrow_mut(|l| l.insert(line, Rc::new(UnsafeCell::new(()))));
            }
        }

        fn each<T>(at: *const T, bytes: usize, access: impl Fn(&UnsafeCell<()>)) {
            for line in lines(at, bytes) {
                let cell = LINES.with_borrow(|l| l.get(&line).cloned());
                access(&cell.expect("memory that threads share is watched"));
            }
        }

        pub fn reads<T>(at: *const T, bytes: usize) {
            each(at, bytes, |cell| cell.with(|_| ()));
        }

        pub fn writes<T>(at: *const T, bytes: usize) {
            each(at, bytes, |cell| cell.with_mut(|_| ()));
        }
    }
}
