//! A server under other people's requests: short and long ones, streams that are cut off, several at once, in domains that
//! change, while the pool gets another size every few seconds and every token has a plan.
//!
//! Memory and descriptors must stay flat, and of the answers a tenth is compared with stock's, to the last bit; for those
//! the other clients pause, because which requests share a batch changes the last bits of any llama-server.
//!
//! `MOE_HOT_SOAK_SECONDS` says how long, 30 if it does not. docs/trust.md has the figures of a long run.

use std::{
    io::Read,
    net::TcpStream,
    sync::{
        RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use llama_tests::{
    paths,
    server::{Answer, Request, Server, end},
};
use serde_json::Value;

const CLIENTS: u64 = 4;
/// Different requests; their answers by stock are known.
const REQUESTS: usize = 24;
const RESIZE_EVERY: Duration = Duration::from_secs(3);
/// From this part of the run on, memory has to be flat.
const SETTLED: f64 = 0.3;
/// What may be added after that, in bytes: fragmentation, caches of llama-server.
const GROWTH: u64 = 24 << 20;

fn requests() -> Vec<Request> {
    let text =
        |name: &str| std::fs::read_to_string(paths::root().join("models/texts").join(name)).expect("a text");
    let texts: Vec<Vec<char>> = ["fiction.txt", "code.txt", "tech.txt"]
        .iter()
        .filter(|name| paths::root().join("models/texts").join(name).is_file())
        .map(|name| text(name).chars().collect())
        .collect();
    (0..REQUESTS)
        .map(|i| {
            let text = &texts[i % texts.len()];
            let (length, max_tokens) = [(60, 8), (400, 24), (900, 60)][i % 3];
            let at = i * 997 % (text.len() - length);
            let prompt = text[at..at + length].iter().collect();
            Request { prompt, max_tokens, stream: i % 2 == 0, ignore_eos: false }
        })
        .collect()
}

/// Begins a request and hangs up after its first bytes.
fn cut_off(port: u16, prompt: &str) {
    use std::io::Write;
    let body = serde_json::json!({"prompt": prompt, "max_tokens": 300, "stream": true, "ignore_eos": true})
        .to_string();
    let Ok(mut s) = TcpStream::connect(("127.0.0.1", port)) else { return };
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json";
    if write!(s, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).is_ok() {
        let _ = s.read(&mut [0; 64]);
    }
}

fn idle(server: &Server) -> bool {
    let text = server.get("/metrics");
    let busy = text.lines().find_map(|l| l.strip_prefix("llamacpp:requests_processing "));
    busy.is_some_and(|n| n.trim() == "0")
}

/// Private memory in bytes, and open descriptors.
fn held(pid: i32) -> (u64, usize) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is there");
    let kib = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).expect("a line");
    let kib: u64 = kib.trim().trim_end_matches("kB").trim().parse().expect("a number");
    (kib << 10, std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors").count())
}

fn percentile(sorted: &[f64], p: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * p) as usize]
}

#[test]
fn a_server_in_use_stays_as_it_is() {
    let seconds =
        std::env::var("MOE_HOT_SOAK_SECONDS").map_or(30, |s| s.parse().expect("a number of seconds"));
    let bound = Duration::from_secs(seconds);
    let requests = requests();
    let ask = |server: &Server, i: usize| -> Answer {
        server.ask(&requests[i]).unwrap_or_else(|e| panic!("request {i}: {e}"))
    };
    let mut stock = Server::start(&[], &[]);
    let expected: Vec<Answer> = (0..REQUESTS).map(|i| ask(&stock, i)).collect();
    end(&mut stock);

    let env = [
        ("LLAMA_ARG_MOE_HOT_K", "16"),
        ("LLAMA_ARG_MOE_HOT_REBALANCE_INTERVAL", "1"),
        ("LLAMA_ARG_MOE_HOT_THREADS", "1"),
    ];
    let mut server = Server::start(&["--props", "--metrics"], &env);
    let (start, gate, over) = (Instant::now(), RwLock::new(()), AtomicBool::new(false));
    let (compared, cut) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut sizes = 0u64;
    let mut samples: Vec<(f64, u64, usize)> = Vec::new();
    let latencies: Vec<(f64, f64)> = std::thread::scope(|s| {
        let client = |n: u64| {
            let (server, gate, over, compared, cut, expected, requests) =
                (&server, &gate, &over, &compared, &cut, &expected, &requests);
            move || {
                let mut times = Vec::new();
                for turn in 0u64.. {
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                    let i = ((n * 7 + turn * 5) % REQUESTS as u64) as usize;
                    if turn % 10 == n {
                        let _alone = gate.write().expect("no client has panicked");
                        while !idle(server) {
                            std::thread::sleep(Duration::from_millis(5));
                        }
                        assert_eq!(ask(server, i), expected[i], "request {i} after {:?}", start.elapsed());
                        compared.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    let _together = gate.read().expect("no client has panicked");
                    if turn % 10 == 5 {
                        cut_off(server.port, &requests[i].prompt);
                        cut.fetch_add(1, Ordering::Relaxed);
                    } else {
                        let asked = Instant::now();
                        // what it says depends on who shares the batch; that it is an answer does not
                        assert!(!ask(server, i).tokens.is_empty());
                        if i % 3 == 1 {
                            times.push((start.elapsed().as_secs_f64(), asked.elapsed().as_secs_f64()));
                        }
                    }
                }
                times
            }
        };
        let clients: Vec<_> = (0..CLIENTS).map(|n| s.spawn(client(n))).collect();
        while start.elapsed() < bound && clients.iter().all(|c| !c.is_finished()) {
            std::thread::sleep(RESIZE_EVERY);
            let k = [2, 40, 16, 64, 8, 24][sizes as usize % 6];
            let body = format!("{{\"k\": {k}}}");
            let (status, text) = server.send(minreq::post(server.url("/moe-hot")).with_body(body));
            assert_eq!(status, 200, "{text}");
            sizes += 1;
            if sizes % 6 == 3 {
                let (bytes, files) = held(server.pid());
                samples.push((start.elapsed().as_secs_f64(), bytes, files));
            }
        }
        over.store(true, Ordering::Relaxed);
        clients.into_iter().flat_map(|c| c.join().expect("a client")).collect()
    });
    while !idle(&server) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let state: Value = serde_json::from_str(&server.get("/moe-hot")).expect("JSON");
    let pool = &state["models"][0];
    let total = start.elapsed().as_secs_f64();
    let settled: Vec<_> = samples.iter().filter(|s| s.0 > SETTLED * total).collect();
    let (first, last) = (settled.first().expect("a sample"), settled.last().expect("a sample"));
    let half = |late: bool| {
        let mut of: Vec<f64> =
            latencies.iter().filter(|(at, _)| (*at > total / 2.0) == late).map(|l| l.1).collect();
        of.sort_by(f64::total_cmp);
        if of.is_empty() { [0.0; 2] } else { [percentile(&of, 0.5), percentile(&of, 0.95)] }
    };
    eprintln!(
        "{total:.0} s: {} answers timed, {} compared, {} cut off, {sizes} sizes; memory {} -> {} MiB, descriptors {} -> {}; \
         24 tokens took {:.2} s, 95% within {:.2} s in the first half, {:.2} and {:.2} in the second; {}",
        latencies.len(),
        compared.load(Ordering::Relaxed),
        cut.load(Ordering::Relaxed),
        first.1 >> 20,
        last.1 >> 20,
        first.2,
        last.2,
        half(false)[0],
        half(false)[1],
        half(true)[0],
        half(true)[1],
        pool["stats"],
    );
    // ThreadSanitizer remembers more and more
    let sanitized = std::env::var_os("TSAN_OPTIONS").is_some();
    assert!(sanitized || last.1 <= first.1 + GROWTH, "memory grows: {samples:?}");
    assert!(last.2 <= first.2 + 4, "descriptors leak: {samples:?}");
    assert!(compared.load(Ordering::Relaxed) >= 4 && sizes >= 6);
    assert!(pool["slots_used"].as_u64() <= pool["slots"].as_u64(), "{pool}");
    end(&mut server);
}
