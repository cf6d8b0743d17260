//! What the two nodes of a layer cost on a GPU, in a captured graph of 48 layers, without any work: nothing
//! cold, and everything cold with rows that are answered as they are. Needs a library with kernels.
//!
//! Prints `name<TAB>value<TAB>unit`. The machine's other threads should be idle. With `--quick` a few replays,
//! which measure nothing. With `--copy-loop` it only takes bandwidth from the link, until it is killed.

use std::{
    process::ExitCode,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use cudarc::driver::sys;
use moe_hot::{
    device::cuda::{self, CudaError, Device, Port, PortShape, Stream, VideoMemory},
    ggml::ggml_tensor,
    mailbox::Remote,
    usage::StepUsage,
};

const LAYERS: usize = 48;
const EXPERTS: usize = 64;
const USED: usize = 8;
const EMBD: usize = 2048;
/// Rounds and replays in each; few are for tools that slow everything down.
const FULL: (usize, usize) = (9, 200);
const QUICK: (usize, usize) = (1, 2);
const BOUND: Duration = Duration::from_secs(5);

/// Calls the driver and stops at an error: this is a measurement.
macro_rules! cu {
    ($f:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: the arguments are valid for the call.
        let status = unsafe { sys::$f($($arg),*) };
        assert_eq!(status, sys::CUresult::CUDA_SUCCESS, stringify!($f));
    }};
}

fn tensor(data: *mut u8, ne: [usize; 3], nb: [usize; 3]) -> ggml_tensor {
    // SAFETY: a plain C structure; what the nodes look at is set below.
    let mut t: ggml_tensor = unsafe { std::mem::zeroed() };
    t.data = data.cast();
    t.ne = [ne[0] as i64, ne[1] as i64, ne[2] as i64, 1];
    t.nb = [4, nb[0], nb[1], nb[2]];
    t
}

/// The nodes of all layers, captured.
struct Graph {
    exec: sys::CUgraphExec,
    stream: Stream,
}

impl Graph {
    fn capture(device: &Arc<Device>, port: &Port, memory: &VideoMemory, n_out: usize) -> Graph {
        let stream = Stream::new(device.clone(), false).expect("a stream");
        let raw = stream.raw();
        let at = |offset: usize| memory.ptr().wrapping_add(offset);
        let mut cur = tensor(at(0), [EMBD, 1, 1], [EMBD * 4; 3]);
        let mut ids = tensor(at(EMBD * 4), [USED, 1, 1], [EXPERTS * 4; 3]);
        let mut slots = tensor(at(EMBD * 4 + 4096), [USED, 1, 1], [USED * 4; 3]);
        slots.src[0] = &raw mut cur;
        slots.src[1] = &raw mut ids;
        let mut out =
            tensor(at(EMBD * 4 + 8192), [n_out, USED, 1], [EMBD * 4, EMBD * USED * 4, EMBD * USED * 4]);
        out.src[1] = &raw mut slots;
        cu!(cuStreamBeginCapture_v2(raw, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED));
        for layer in 0..LAYERS {
            // SAFETY: tensors as the bridge builds them, in device memory that outlives the graph.
            unsafe {
                cuda::dispatch(port, layer, &slots, raw.cast(), BOUND).expect("DISPATCH is enqueued");
                if n_out > 0 {
                    cuda::join(port, layer, &out, raw.cast(), BOUND).expect("JOIN is enqueued");
                }
            }
        }
        let mut graph = ptr::null_mut();
        cu!(cuStreamEndCapture(raw, &mut graph));
        let mut exec = ptr::null_mut();
        cu!(cuGraphInstantiateWithFlags(&mut exec, graph, 0));
        Graph { exec, stream }
    }

    /// Time of a replay, the best of some rounds, in us.
    fn time(&self, port: &Port, (rounds, replays): (usize, usize)) -> f64 {
        let mut best = f64::INFINITY;
        for _ in 0..rounds {
            let start = Instant::now();
            for _ in 0..replays {
                cu!(cuGraphLaunch(self.exec, self.stream.raw()));
                self.stream.synchronize().expect("the graph runs");
            }
            best = best.min(start.elapsed().as_secs_f64() * 1e6 / replays as f64);
            port.harvest(&mut StepUsage::new(LAYERS), &mut Vec::new(), |_| 0);
            assert_eq!(port.take_fault(), Ok(None), "JOIN gave up");
        }
        best
    }
}

/// Answers every row at once, without computing it.
fn answer(remote: &Remote, stop: &AtomicBool) {
    let mut seen = 0;
    while !stop.load(Ordering::Relaxed) {
        let epoch = remote.epoch();
        if epoch == seen {
            std::hint::spin_loop();
            continue;
        }
        seen = epoch;
        // SAFETY: seen just now, and not answered.
        let (_, _, rows) = unsafe { remote.read() };
        for (row, _) in rows {
            remote.answer(row, epoch, true);
        }
    }
}

/// The first device, bound to this thread.
fn open() -> Result<Arc<Device>, CudaError> {
    let device = Device::first()?;
    device.bind()?;
    Ok(device)
}

fn measure(repeat: (usize, usize)) -> Result<(), CudaError> {
    let device = open()?;
    let shape = PortShape {
        n_layers: LAYERS,
        n_expert: EXPERTS,
        max_tokens: 1,
        n_used: USED,
        n_in: EMBD,
        n_out: EMBD,
    };
    let port = Port::new(device.clone(), shape)?;
    let bytes = EMBD * 4 * (USED + 2) + 16384;
    let memory = VideoMemory::new(device.clone(), bytes, bytes, true)?;
    let ids: [i32; USED] = std::array::from_fn(|k| k as i32 * 7);
    cu!(cuMemcpyHtoD_v2(memory.ptr() as u64 + (EMBD * 4) as u64, ids.as_ptr().cast(), size_of_val(&ids)));

    // both nodes; both, with rows that are next to nothing; DISPATCH alone
    let graphs = [EMBD, 32, 0].map(|n_out| Graph::capture(&device, &port, &memory, n_out));
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| answer(&port.remote(), &stop));
        let mut version = 1;
        for (name, n_cold) in [("hot", 0), ("cold1", 1), ("cold2", 2), ("cold4", 4), ("cold", USED)] {
            version += 1;
            let cold: Vec<usize> = ids.iter().take(n_cold).map(|i| *i as usize).collect();
            let map = |_: usize, map: &mut [i32]| {
                for (expert, slot) in map.iter_mut().enumerate() {
                    *slot = if cold.contains(&expert) { -1 } else { expert as i32 };
                }
            };
            let tables = vec![0; LAYERS * (port.max_rows() + 1)];
            port.update((version, 0), map, &tables).expect("the map is copied");
            for (graph, what) in graphs.iter().zip(["", "_short_rows", "_dispatch"]) {
                println!("{name}{what}_us_per_layer\t{:.2}\tus", graph.time(&port, repeat) / LAYERS as f64);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    Ok(())
}

/// Copies to the device without a pause.
fn copy_loop() -> Result<(), CudaError> {
    const BYTES: usize = 64 << 20;
    let device = open()?;
    let memory = VideoMemory::new(device.clone(), BYTES, BYTES, true)?;
    let mut host = ptr::null_mut();
    cu!(cuMemHostAlloc(&mut host, BYTES, 0));
    loop {
        cu!(cuMemcpyHtoD_v2(memory.ptr() as u64, host, BYTES));
    }
}

fn main() -> ExitCode {
    if std::env::args().any(|a| a == "--copy-loop") {
        let e = copy_loop().expect_err("it ends with an error only");
        eprintln!("handoff: {e}");
        return ExitCode::FAILURE;
    }
    let quick = std::env::args().any(|a| a == "--quick");
    match measure(if quick { QUICK } else { FULL }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("handoff: {e}");
            ExitCode::FAILURE
        }
    }
}
