//! SIGKILL at any moment while a profile or a trace is written: what is there afterwards is whole, or is refused.
//!
//! The writer is this program once more, see [`writer`].

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use moe_hot::{
    policy::Routed,
    profile::{Profile, ProfileLayer},
    trace::{Step, TraceError, TraceHeader, TraceLayer, TraceReader, TraceRecord, TraceWriter},
};

const WHAT: &str = "MOE_HOT_TEST_KILL";
const PATH: &str = "MOE_HOT_TEST_KILL_PATH";
const ROUNDS: u64 = 100;
/// Longest time from the first write to the end, in us.
const LONGEST_US: u64 = 20_000;
const WROTE: &str = "wrote ";

/// Every number of it follows from `n`.
fn profile(n: u64) -> Profile {
    let heat = |il: u16| (0..128).map(|e| 1.0 / (n as f32 + f32::from(il) + e as f32 + 1.0)).collect();
    let layers = (0..24).map(|il| ProfileLayer { il, heat: heat(il) }).collect();
    Profile { model: 7, name: format!("after {n}"), tokens: n, layers }
}

const TRACE_LAYERS: u16 = 2;

fn header() -> TraceHeader {
    let layer = |il| TraceLayer { il, n_expert: 200, n_used: 2, class: 0, expert_bytes: 1 << 20 };
    TraceHeader { fingerprint: 7, k: 4, uses_per_upload: 64, layers: (0..TRACE_LAYERS).map(layer).collect() }
}

/// The `n`-th ubatch of a trace: a token or a long prompt, so that blocks are of all sizes.
fn step(n: u64) -> Step {
    let n_tokens = if n.is_multiple_of(7) { 1 << (n % 19) } else { 1 };
    let ids = |l| (0..2 * n_tokens).map(|i| ((n + l + u64::from(i)) % 200) as u16).collect();
    let ids = (0..u64::from(TRACE_LAYERS)).map(ids).collect();
    Step { n_tokens, prefill: true, runs: vec![(n_tokens, 0)], ids }
}

/// Tells how far it is, once that is written.
fn wrote(n: u64) {
    // on a line of its own, whatever the test harness says
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n{WROTE}{n}").and_then(|()| out.flush()).expect("somebody listens");
}

#[test]
#[ignore = "never ends: the other tests run it and kill it"]
fn writer() {
    let Some(path) = env::var_os(PATH) else { panic!("{PATH} is not set") };
    let path = Path::new(&path);
    match env::var(WHAT).expect("is set with the path").as_str() {
        "profile" => {
            let begin = Profile::load(path).map_or(0, |p| p.tokens);
            for n in begin + 1.. {
                profile(n).save(path).unwrap();
                wrote(n);
            }
        }
        _ => {
            let mut trace = TraceWriter::create(path, &header()).unwrap();
            for n in 0.. {
                let Step { n_tokens, prefill, ids, .. } = step(n);
                trace.routed(prefill, Routed { n_tokens, sequences: &[], ids: &ids }).unwrap();
                if n.is_multiple_of(3) {
                    trace.flush().unwrap();
                    wrote(n);
                }
            }
        }
    }
}

/// Writes until it is killed, `after` the first write; the last thing that it said to have written.
fn killed(what: &str, path: &Path, after: Duration) -> u64 {
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "writer", "--ignored", "--nocapture"])
        .env(WHAT, what)
        .env(PATH, path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut told = lines.filter_map(|line| line.ok()?.strip_prefix(WROTE)?.parse::<u64>().ok());
    let first = told.next().expect("the writer begins");
    // beside, or the moment would be that of a line, and a full pipe would hold the writer up
    let last = thread::spawn(move || told.last().unwrap_or(first));
    thread::sleep(after);
    child.kill().unwrap();
    child.wait().unwrap();
    last.join().unwrap()
}

/// Other moments every time.
fn moments() -> impl Iterator<Item = Duration> {
    let mut random = std::process::id() as u64;
    (0..ROUNDS).map(move |_| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Duration::from_micros((random >> 33) % LONGEST_US)
    })
}

#[test]
fn a_killed_writer_leaves_the_old_profile_or_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.json");
    for after in moments() {
        let told = killed("profile", &path, after);
        let there = Profile::load(&path).unwrap();
        assert!([told, told + 1].contains(&there.tokens), "{} after {told}", there.tokens);
        assert!(there == profile(there.tokens), "a part of profile {} is of another", there.tokens);
        // what was left behind is in nobody's way
        profile(there.tokens + 1).save(&path).unwrap();
        assert_eq!(Profile::load(&path).unwrap().tokens, there.tokens + 1);
    }
    let left: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "p.json")
        .collect();
    assert!(left.iter().all(|name| name.starts_with(".moe-hot-profile-")), "{left:?}");
    assert!(!left.is_empty(), "no writer was killed while it wrote");
}

#[test]
fn a_killed_writer_leaves_a_trace_that_is_whole_up_to_where_it_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.trace");
    let mut cut = 0;
    for after in moments() {
        let told = killed("trace", &path, after);
        let mut n = 0;
        for record in TraceReader::open(&path).unwrap() {
            match record {
                Ok(TraceRecord::Routed(there)) => {
                    assert!(there == step(n), "step {n}");
                    n += 1;
                }
                Ok(other) => panic!("{other:?} was not written"),
                Err(TraceError::Truncated { offset, .. }) => {
                    assert_eq!(offset, fs::metadata(&path).unwrap().len());
                    cut += 1;
                }
                Err(e) => panic!("{e}"),
            }
        }
        assert!(n > told, "{n} steps are there, {} were written", told + 1);
        // the next run begins anew
        drop(TraceWriter::create(&path, &header()).unwrap());
        assert_eq!(TraceReader::open(&path).unwrap().count(), 0);
    }
    assert!(cut > 0, "no writer was killed within a block");
}
