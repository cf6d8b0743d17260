//! A llama-server on the shipped model, asked over HTTP.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    net::TcpListener,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::paths;

/// A llama-server on the shipped model. Killed when dropped.
pub struct Server {
    child: Child,
    /// Where it listens.
    pub port: u16,
    /// Its log, and what else it writes.
    pub dir: TempDir,
}

impl Server {
    /// Starts one with more arguments and environment, and waits until it is up.
    pub fn start(args: &[&str], env: &[(&str, &str)]) -> Server {
        let tool = paths::tool("llama-server");
        assert!(tool.is_file(), "{} is missing: run scripts/build first", tool.display());
        let dir = tempfile::tempdir().expect("there is a folder for temporary files");
        Server::start_in(dir, args, env)
    }

    /// As [`Server::start`], with a folder for its files.
    pub fn start_in(dir: TempDir, args: &[&str], env: &[(&str, &str)]) -> Server {
        let tool = paths::tool("llama-server");
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
        command.args(args);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("LLAMA_") {
                command.env_remove(name);
            }
        }
        // threads of ggml that wait give way: tests share the machine
        command.env("OMP_WAIT_POLICY", "passive").envs(env.iter().copied());
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

    /// What it has logged.
    pub fn log(&self) -> String {
        let log = std::fs::read(self.dir.path().join("log")).expect("the log is there");
        String::from_utf8_lossy(&log).into_owned()
    }

    /// The last lines of that.
    pub fn log_end(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// Sends a chat request.
    pub fn ask(&self, request: &Request) -> Result<Answer, String> {
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
    pub fn complete(&self, requests: &[Request]) -> Result<Vec<Answer>, String> {
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

    /// Sends a request with a JSON body and gives status and answer, whatever it is.
    pub fn send(&self, request: minreq::Request) -> (i32, String) {
        let answer = request.with_timeout(60).send().expect("the server answers");
        (answer.status_code, answer.as_str().unwrap_or_default().to_string())
    }

    /// The URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// What a GET of `path` gives, which must succeed.
    pub fn get(&self, path: &str) -> String {
        let (status, text) = self.send(minreq::get(self.url(path)));
        assert_eq!(status, 200, "{path}: {text}");
        text
    }

    /// Sends a request; gives its choices.
    pub fn post(&self, path: &str, body: &Value) -> Result<Vec<Answer>, String> {
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

    /// The process.
    pub fn pid(&self) -> libc::pid_t {
        self.child.id() as libc::pid_t
    }

    /// Asks the server to end and waits for it.
    pub fn terminate(&mut self) -> (ExitStatus, Duration) {
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

/// What a client asks for.
pub struct Request {
    /// Its text.
    pub prompt: String,
    /// Most tokens of the answer.
    pub max_tokens: usize,
    /// Whether the answer comes token by token.
    pub stream: bool,
    /// Whether it has that many tokens in any case.
    pub ignore_eos: bool,
}

/// A generated token.
#[derive(Clone, PartialEq, Debug)]
pub struct Token {
    /// Its number.
    pub id: i64,
    /// Its log probability.
    pub logprob: f64,
    /// Of the most likely ones.
    pub top: Vec<f64>,
}

/// One choice of a response.
#[derive(Default, PartialEq, Debug)]
pub struct Answer {
    /// All of it.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<Token>,
    /// Why it ended.
    pub finish: String,
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
            // a line that begins with a colon is a ping
            None if line.is_empty() || line.starts_with(':') => {}
            None => return Err(format!("not an event: {line}")),
        }
    }
    Err("the stream ended before it was done".into())
}

/// Prompts of different lengths from a text, short answers, every other one streamed.
/// Ends a server that is idle, and gives its log.
pub fn end(server: &mut Server) -> String {
    let (status, _) = server.terminate();
    let log = server.log();
    assert!(status.success(), "llama-server ended with {status}:\n{}", server.log_end());
    assert_no_crash(&log);
    log
}

/// # Panics
/// When the log has a sign of a crash.
pub fn assert_no_crash(log: &str) {
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
