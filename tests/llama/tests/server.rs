//! llama-server with slots answers as stock does, over HTTP, and ends cleanly.
//!
//! One request at a time, and several prompts in one request, give both servers the same batches: there all
//! numbers are equal, to the last bit. Independent clients do not: which requests share a batch depends on
//! timing, and ggml takes other kernels for other batch sizes. On this model that changes 9 or 10 of 200 of
//! stock's own answers against those it gives one at a time (eight runs), and 9 to 14 with slots (seven runs).
//! So independent clients are compared with what stock does to itself.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    net::TcpListener,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, Sender},
    },
    time::{Duration, Instant},
};

use llama_tests::{paths, replayed::assert_replays};
use moe_hot::policy::PolicyKind;
use serde_json::{Value, json};
use tempfile::TempDir;

const N_CLIENTS: usize = 4;
const N_REQUESTS: usize = 200;
/// A llama-server on the shipped model. Killed when dropped.
struct Server {
    child: Child,
    port: u16,
    dir: TempDir,
}

const K: u32 = 16;
const INTERVAL: u32 = 4;
/// Slots a layer and interval of the server under test.
const HOT: [(&str, &str); 3] = [
    ("LLAMA_ARG_MOE_HOT_K", "16"),
    ("LLAMA_ARG_MOE_HOT_REBALANCE_INTERVAL", "4"),
    ("LLAMA_ARG_MOE_HOT_THREADS", "1"),
];

impl Server {
    fn start(hot: bool) -> Server {
        let tool = paths::tool("llama-server");
        assert!(tool.is_file(), "{} is missing: run scripts/build first", tool.display());
        let dir = tempfile::tempdir().expect("there is a folder for temporary files");
        let log = File::create(dir.path().join("log")).expect("the log can be written");
        // free a moment ago; nobody else on this machine is after it
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
        let mut command = Command::new(tool);
        command.arg("-m").arg(paths::shipped_model());
        command.args(["--host", "127.0.0.1", "--port", &port.to_string()]);
        // stock's experts stay as they are in the file, as those of the cache do
        command.args(["--parallel", "4", "-c", "4096", "-t", "2", "--no-repack", "-lv", "4"]);
        // a stream that is cut off ends at its next ping: 30 s later as stock has it
        command.args(["--sse-ping-interval", "1"]);
        for (name, _) in HOT {
            command.env_remove(name);
        }
        // threads of ggml that wait give way: tests share the machine
        command.env("OMP_WAIT_POLICY", "passive").envs(HOT.into_iter().filter(|_| hot));
        if hot {
            command.env("LLAMA_ARG_MOE_HOT_TRACE", dir.path().join("trace"));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second handle")).stderr(log);
        let child = command.spawn().expect("llama-server can be started");
        let mut server = Server { child, port, dir };
        let start = Instant::now();
        while !server.is_healthy() {
            let ended = server.child.try_wait().expect("the child can be asked");
            let late = start.elapsed() > Duration::from_secs(60);
            assert!(ended.is_none() && !late, "llama-server is not up ({ended:?}):\n{}", server.log_end());
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn is_healthy(&self) -> bool {
        let health = minreq::get(format!("http://127.0.0.1:{}/health", self.port)).with_timeout(5).send();
        health.is_ok_and(|r| r.status_code == 200)
    }

    fn log(&self) -> String {
        let log = std::fs::read(self.dir.path().join("log")).expect("the log is there");
        String::from_utf8_lossy(&log).into_owned()
    }

    fn log_end(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// Sends a chat request.
    fn ask(&self, request: &Request) -> Result<Answer, String> {
        let body = json!({
            "messages": [{"role": "user", "content": request.prompt}],
            "max_tokens": request.max_tokens,
            "stream": request.stream,
            "ignore_eos": request.ignore_eos,
            "temperature": 0,
            "cache_prompt": false,
            "logprobs": true,
            "top_logprobs": 2,
        });
        let mut answers = self.post("/v1/chat/completions", &body)?;
        answers.pop().ok_or_else(|| "there is no answer".into())
    }

    /// Sends several prompts at once, which the server starts in the same batch.
    fn complete(&self, requests: &[Request]) -> Result<Vec<Answer>, String> {
        let body = json!({
            "prompt": requests.iter().map(|r| r.prompt.as_str()).collect::<Vec<_>>(),
            "max_tokens": requests[0].max_tokens,
            "stream": requests[0].stream,
            "temperature": 0,
            "cache_prompt": false,
            "logprobs": 2,
        });
        let answers = self.post("/v1/completions", &body)?;
        if answers.len() == requests.len() { Ok(answers) } else { Err(format!("{} answers", answers.len())) }
    }

    /// Sends a request; gives its choices.
    fn post(&self, path: &str, body: &Value) -> Result<Vec<Answer>, String> {
        let url = format!("http://127.0.0.1:{}{path}", self.port);
        let sent = minreq::post(url).with_header("Content-Type", "application/json").with_timeout(120);
        let response = sent.with_body(body.to_string()).send_lazy().map_err(|e| e.to_string())?;
        let status = response.status_code;
        let mut reader = BufReader::new(response);
        if status == 200 && body["stream"] == true {
            return read_events(&mut reader);
        }
        let mut text = String::new();
        reader.read_to_string(&mut text).map_err(|e| e.to_string())?;
        if status != 200 {
            return Err(format!("status {status}: {text}"));
        }
        let value: Value = serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))?;
        let mut answers = Vec::new();
        add(&mut answers, &value);
        Ok(answers)
    }

    fn pid(&self) -> libc::pid_t {
        self.child.id() as libc::pid_t
    }

    /// Asks the server to end and waits for it.
    fn terminate(&mut self) -> (ExitStatus, Duration) {
        let start = Instant::now();
        // SAFETY: the child has not been waited for, so the id is still its own.
        let sent = unsafe { libc::kill(self.pid(), libc::SIGTERM) };
        assert_eq!(sent, 0, "SIGTERM to llama-server");
        loop {
            if let Some(status) = self.child.try_wait().expect("the child can be asked") {
                return (status, start.elapsed());
            }
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "llama-server does not end:\n{}",
                self.log_end()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // it may have ended by itself; either way it is gone afterwards
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Request {
    prompt: String,
    max_tokens: usize,
    stream: bool,
    ignore_eos: bool,
}

/// A generated token.
#[derive(Clone, PartialEq, Debug)]
struct Token {
    id: i64,
    logprob: f64,
    /// Of the most likely ones.
    top: Vec<f64>,
}

/// One choice of a response.
#[derive(Default, PartialEq, Debug)]
struct Answer {
    text: String,
    tokens: Vec<Token>,
    finish: String,
}

/// Adds what a response, or an event of one, says about its choices.
fn add(answers: &mut Vec<Answer>, response: &Value) {
    for choice in response["choices"].as_array().into_iter().flatten() {
        let index = choice["index"].as_u64().expect("a choice has an index") as usize;
        if answers.len() <= index {
            answers.resize_with(index + 1, Answer::default);
        }
        let answer = &mut answers[index];
        for text in [&choice["message"]["content"], &choice["delta"]["content"], &choice["text"]] {
            answer.text += text.as_str().unwrap_or_default();
        }
        answer.finish += choice["finish_reason"].as_str().unwrap_or_default();
        for t in choice["logprobs"]["content"].as_array().into_iter().flatten() {
            let number = |v: &Value| v.as_f64().expect("a log-probability is a number");
            let top = t["top_logprobs"].as_array().into_iter().flatten();
            answer.tokens.push(Token {
                id: t["id"].as_i64().expect("a token has an id"),
                logprob: number(&t["logprob"]),
                top: top.map(|t| number(&t["logprob"])).collect(),
            });
        }
    }
}

/// Reads server-sent events up to the last.
fn read_events(reader: &mut impl BufRead) -> Result<Vec<Answer>, String> {
    let mut answers = Vec::new();
    for line in reader.lines() {
        let line = line.map_err(|e| e.to_string())?;
        match line.strip_prefix("data: ") {
            Some("[DONE]") => return Ok(answers),
            Some(data) => add(&mut answers, &serde_json::from_str(data).map_err(|e| format!("{e}: {data}"))?),
            None if line.is_empty() => {}
            None => return Err(format!("not an event: {line}")),
        }
    }
    Err("the stream ended before it was done".into())
}

/// Prompts of different lengths from a text, short answers, every other one streamed.
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

/// Ends a server that is idle, and gives its log.
fn end(server: &mut Server) -> String {
    let (status, _) = server.terminate();
    let log = server.log();
    assert!(status.success(), "llama-server ended with {status}:\n{}", server.log_end());
    assert_no_crash(&log);
    log
}

fn assert_no_crash(log: &str) {
    for sign in [
        "panicked",
        "terminate called",
        "GGML_ASSERT",
        "Segmentation",
        "moe_hot: ",
        "double free",
        "Assertion",
    ] {
        let line = log.lines().find(|l| l.contains(sign));
        assert_eq!(line, None, "the log has a sign of a crash");
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
    let mut server = Server::start(false);
    let stock = Answers::of(&server, &requests);
    let log = end(&mut server);
    assert!(!log.contains("moe-hot"), "stock has an expert cache");

    let mut server = Server::start(true);
    let hot = Answers::of(&server, &requests);
    let log = end(&mut server);
    assert!(log.contains("moe-hot: requested K = 16, active: 96 slots"), "the cache is not active:\n{log}");
    for what in [" tokens, hit rate ", "%, ", " uploads (", " evictions,", " rebalances in"] {
        assert!(counted(&log, what) > 0.0, "there is nothing before '{what}'");
    }

    // what it decided, for all clients and prompts, is what a replay decides
    let routing = assert_replays(&server.dir.path().join("trace"), PolicyKind::default(), K, INTERVAL);
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
    let mut server = Server::start(hot);
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
