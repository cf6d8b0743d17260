//! llama-server with slots answers as stock does, over HTTP, and ends cleanly.
//!
//! One request at a time, and several prompts in one request, give both servers the same batches: there all
//! numbers are equal, to the last bit. Independent clients do not: which requests share a batch depends on
//! timing, and ggml takes other kernels for other batch sizes. On this model that changes 9 or 10 of 200 of
//! stock's own answers against those it gives one at a time (eight runs), and 9 to 14 with slots (seven runs).
//! So independent clients are compared with what stock does to itself.

use std::{
    io::{BufRead, BufReader},
    process::ExitStatus,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, Sender},
    },
    time::Duration,
};

use llama_tests::{
    paths,
    replayed::assert_replays,
    server::{Answer, Request, Server, assert_no_crash, end},
};
use moe_hot::policy::PolicyKind;
use serde_json::json;

const N_CLIENTS: usize = 4;
const N_REQUESTS: usize = 200;
const K: u32 = 16;
const INTERVAL: u32 = 4;
/// Slots a layer and interval of the server under test.
const HOT: [(&str, &str); 3] = [
    ("LLAMA_ARG_MOE_HOT_K", "16"),
    ("LLAMA_ARG_MOE_HOT_REBALANCE_INTERVAL", "4"),
    ("LLAMA_ARG_MOE_HOT_THREADS", "1"),
];

/// Stock, or with slots and a trace of what they do.
fn start(hot: bool) -> Server {
    let dir = tempfile::tempdir().expect("there is a folder for temporary files");
    let trace = dir.path().join("trace").display().to_string();
    let env = [&HOT[..], &[("LLAMA_ARG_MOE_HOT_TRACE", &trace)]].concat();
    Server::start_in(dir, &[], if hot { &env } else { &[] })
}

fn requests(n: usize) -> Vec<Request> {
    let path = paths::root().join("models/texts/fiction.txt");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let words: Vec<&str> = text.split_whitespace().collect();
    let request = |i: usize| {
        let start = i * 37 % (words.len() - 64);
        Request {
            prompt: words[start..start + 4 + i * 7 % 40].join(" "),
            max_tokens: 8 + i % 17,
            stream: i % 2 == 1,
            ignore_eos: false,
        }
    };
    (0..n).map(request).collect()
}

/// All answers to `requests`, from `N_CLIENTS` clients at a time.
fn ask_in_parallel(server: &Server, requests: &[Request]) -> Vec<Answer> {
    let next = AtomicUsize::new(0);
    let client = || {
        let mut answers = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(request) = requests.get(i) else { return answers };
            let answer = server.ask(request);
            answers.push((i, answer.unwrap_or_else(|e| panic!("request {i}: {e}\n{}", server.log_end()))));
        }
    };
    let mut answers: Vec<_> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..N_CLIENTS).map(|_| scope.spawn(client)).collect();
        clients.into_iter().flat_map(|c| c.join().expect("a client does not fail")).collect()
    });
    answers.sort_by_key(|(i, _)| *i);
    answers.into_iter().map(|(_, a)| a).collect()
}

/// What a server gives to the same requests in three ways.
struct Answers {
    one_at_a_time: Vec<Answer>,
    four_in_one: Vec<Vec<Answer>>,
    from_four_clients: Vec<Answer>,
}

impl Answers {
    fn of(server: &Server, requests: &[Request]) -> Answers {
        let ask = |r| server.ask(r).unwrap_or_else(|e| panic!("{e}\n{}", server.log_end()));
        let complete = |r| server.complete(r).unwrap_or_else(|e| panic!("{e}\n{}", server.log_end()));
        Answers {
            one_at_a_time: requests.iter().map(ask).collect(),
            four_in_one: requests[..80].chunks(4).map(complete).collect(),
            from_four_clients: ask_in_parallel(server, requests),
        }
    }

    /// Answers to four clients whose text is not the one given to one client.
    fn changed_by_company(&self) -> usize {
        self.one_at_a_time.iter().zip(&self.from_four_clients).filter(|(a, b)| a.text != b.text).count()
    }
}

/// The last number before `what` in the log's line of counters.
fn counted(log: &str, what: &str) -> f64 {
    let line = log.lines().rev().find(|l| l.contains("moe-hot: ") && l.contains(" tokens, hit rate "));
    let line = line.unwrap_or_else(|| panic!("the log has no counters of the expert cache"));
    let before = line.split(what).next().unwrap_or_default();
    let number = before.rsplit(' ').next().unwrap_or_default();
    number.parse().unwrap_or_else(|_| panic!("no number before '{what}' in: {line}"))
}

#[test]
fn answers_equal_stocks() {
    let requests = requests(N_REQUESTS);
    let mut server = start(false);
    let stock = Answers::of(&server, &requests);
    let log = end(&mut server);
    assert!(!log.contains("moe-hot"), "stock has an expert cache");

    let mut server = start(true);
    let hot = Answers::of(&server, &requests);
    let log = end(&mut server);
    assert!(log.contains("moe-hot: requested K = 16, active: 96 slots"), "the cache is not active:\n{log}");
    for what in [" tokens, hit rate ", "%, ", " uploads (", " evictions,", " rebalances in"] {
        assert!(counted(&log, what) > 0.0, "there is nothing before '{what}'");
    }

    // what it decided, for all clients and prompts, is what a replay decides
    let routing = assert_replays(&server.dir.path().join("trace"), PolicyKind::Decay, K, INTERVAL);
    assert!(routing.steps.iter().any(|s| s.prefill), "no prompt in the trace");
    let sequences: std::collections::BTreeSet<_> =
        routing.steps.iter().flat_map(|s| s.runs.iter().map(|r| r.1)).collect();
    assert_eq!(sequences.len(), N_CLIENTS, "{sequences:?}");

    for (i, (s, h)) in stock.one_at_a_time.iter().zip(&hot.one_at_a_time).enumerate() {
        assert!(!s.tokens.is_empty(), "request {i}: an empty answer");
        assert_eq!(s, h, "request {i}, one at a time");
    }
    for (i, (s, h)) in stock.four_in_one.iter().zip(&hot.four_in_one).enumerate() {
        assert_eq!(s, h, "prompts {} to {}, in one request", 4 * i, 4 * i + 3);
    }
    let (of_stock, of_hot) = (stock.changed_by_company(), hot.changed_by_company());
    eprintln!(
        "from four clients: {of_stock} of stock's answers change, {of_hot} with slots, of {N_REQUESTS}"
    );
    // both are about 10; twice that and 5 standard deviations of a count of 10 are no coincidence
    let bound = 2 * of_stock.max(5) + 8;
    assert!(
        of_hot <= bound,
        "{of_hot} answers change when clients share batches, only {of_stock} of stock's do"
    );
}

/// One request after the other, until the server hangs up. `started` hears of the first tokens.
fn keep_busy(port: u16, prompt: &str, started: &Sender<()>) {
    let body =
        json!({"prompt": prompt, "max_tokens": 500, "stream": true, "ignore_eos": true, "temperature": 0});
    let url = format!("http://127.0.0.1:{port}/v1/completions");
    loop {
        let request = minreq::post(&url).with_body(body.to_string()).with_timeout(60);
        let Ok(response) = request.send_lazy() else { return };
        let mut n_events = 0;
        let mut done = false;
        for line in BufReader::new(response).lines().map_while(Result::ok) {
            done |= line == "data: [DONE]";
            n_events += usize::from(line.starts_with("data: "));
            if n_events == 5 {
                // nobody listens any more once all have started
                let _ = started.send(());
            }
        }
        if !done {
            return;
        }
    }
}

/// Sends SIGTERM while four streams run. Exit status, time to end, log.
fn terminate_while_busy(hot: bool) -> (ExitStatus, Duration, String) {
    let mut server = start(hot);
    std::thread::scope(|scope| {
        let (port, mut starts) = (server.port, Vec::new());
        for i in 0..N_CLIENTS {
            let (started, starts_here) = mpsc::channel();
            starts.push(starts_here);
            scope.spawn(move || keep_busy(port, &format!("{i} In the beginning"), &started));
        }
        let all = starts.iter().all(|s| s.recv_timeout(Duration::from_secs(60)).is_ok());
        let (status, took) = server.terminate();
        let log = server.log();
        assert!(all, "a stream does not start:\n{}", server.log_end());
        (status, took, log)
    })
}

#[test]
fn it_ends_cleanly_while_requests_run() {
    let (stock_status, stock_took, _) = terminate_while_busy(false);
    for round in 0..3 {
        let (status, took, log) = terminate_while_busy(true);
        eprintln!("round {round}: {status} after {took:?}; stock: {stock_status} after {stock_took:?}");
        assert_eq!(status, stock_status);
        assert!(took < Duration::from_secs(10), "it took {took:?} to end, stock {stock_took:?}");
        assert_no_crash(&log);
        assert!(counted(&log, " tokens, hit rate ") > 0.0);
    }
}
