//! One place for messages: they go to the callback that the bridge sets (llama.cpp's own logger).

use std::{
    ffi::{CString, c_char, c_void},
    fmt::Arguments,
};

use parking_lot::Mutex;

/// Severity; the values are ggml's (`ggml_log_level`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum Level {
    /// Details for developers.
    Debug = 1,
    /// What was asked for and what is active.
    Info = 2,
    /// Works, but not as asked for.
    Warn = 3,
    /// Does not work.
    Error = 4,
}

/// Receives a message without a line end. `level` is a `ggml_log_level`.
pub type LogFn = unsafe extern "C" fn(level: i32, text: *const c_char, user_data: *mut c_void);

struct Sink {
    f: LogFn,
    user_data: *mut c_void,
}

// SAFETY: the pointer is only handed back to the callback, whose setter vouches for it.
unsafe impl Send for Sink {}

static SINK: Mutex<Option<Sink>> = Mutex::new(None);

/// Sets or removes the receiver of messages.
pub fn set_sink(f: Option<LogFn>, user_data: *mut c_void) {
    *SINK.lock() = f.map(|f| Sink { f, user_data });
}

/// Sends one message; without a receiver it is dropped.
pub fn write(level: Level, text: Arguments<'_>) {
    let sink = SINK.lock();
    if let Some(s) = sink.as_ref() {
        let text = CString::new(text.to_string().replace('\0', " ")).expect("no zero bytes left");
        // SAFETY: the setter of the sink vouches for the callback; the text lives through the call.
        unsafe { (s.f)(level as i32, text.as_ptr(), s.user_data) };
    }
}

/// `log!(Level::Info, "{} slots", n)`
macro_rules! log {
    ($level:expr, $($arg:tt)*) => { $crate::log::write($level, format_args!($($arg)*)) };
}
pub(crate) use log;
