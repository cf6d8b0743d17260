//! What llama-server shows of the slots over HTTP, and what can be changed there while it answers.

use llama_tests::{
    replayed::assert_replays,
    server::{Answer, Request, Server, end},
};
use moe_hot::policy::PolicyKind;
use serde_json::{Value, json};

/// Layers and experts of the shipped model.
const N_LAYERS: u64 = 6;
const N_EXPERT: u64 = 64;
const K: (&str, &str) = ("LLAMA_ARG_MOE_HOT_K", "16");

fn ask(server: &Server, prompt: &str, max_tokens: usize) -> Answer {
    let request = Request { prompt: prompt.into(), max_tokens, stream: false, ignore_eos: true };
    server.ask(&request).unwrap_or_else(|e| panic!("{e}"))
}

fn view(server: &Server) -> Value {
    serde_json::from_str(&server.get("/moe-hot")).expect("JSON")
}

fn post(server: &Server, body: &str) -> (i32, Value) {
    let request =
        minreq::post(server.url("/moe-hot")).with_header("Content-Type", "application/json").with_body(body);
    let (status, text) = server.send(request);
    (status, serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")))
}

/// Resident memory of a process in bytes.
fn rss(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).expect("the process is there");
    text.split(' ').nth(1).and_then(|n| n.parse::<u64>().ok()).expect("a number of pages") * 4096
}

/// The value of a metric without regard to its labels, `None` when it is not there.
fn metric(text: &str, name: &str) -> Option<f64> {
    let line =
        text.lines().find(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// # Panics
/// When the text is not what Prometheus reads: each metric has one HELP and one TYPE, then its samples, and every
/// sample is of the metric before.
fn assert_exposition(text: &str) {
    let mut current: Option<&str> = None;
    let mut seen = std::collections::BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let name = rest.split(' ').next().unwrap();
            assert!(seen.insert(name), "{name} comes twice");
            assert!(rest.len() > name.len() + 1, "{name} has no help");
            current = Some(name);
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert_eq!(Some(name), current);
            assert!(["counter", "gauge"].contains(&kind), "{line}");
            // stock's own are not all named so
            assert!(!name.contains("moe_hot") || (kind == "counter") == name.ends_with("_total"), "{line}");
        } else {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert_eq!(name.split('{').next(), current, "{line}");
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
    assert!(!seen.is_empty());
}

#[test]
fn the_slots_are_seen_counted_and_steered_while_answers_stay_stocks() {
    let prompts = ["The train left", "fn main() {", "The results of the experiment show that", "She said"];
    let mut stock = Server::start(&[], &[]);
    let expected: Vec<_> = prompts.iter().map(|p| ask(&stock, p, 48)).collect();
    end(&mut stock);

    let profile = tempfile::tempdir().unwrap();
    let profile = profile.path().join("p.json");
    let env = [K, ("LLAMA_ARG_MOE_HOT_PROFILE_OUT", profile.to_str().unwrap())];
    let mut server = Server::start(&["--props", "--metrics"], &env);

    let props: Value = serde_json::from_str(&server.get("/props")).unwrap();
    let fixed = &props["moe_hot"][0];
    assert_eq!((fixed["k"].as_u64(), fixed["slots"].as_u64()), (Some(16), Some(16 * N_LAYERS)), "{fixed}");
    assert_eq!(fixed["classes"][0]["types"], json!(["q4_0", "q4_0", "q4_0"]));

    let before = view(&server);
    assert!(before["writable"].as_bool().unwrap());
    assert_eq!(before["models"][0]["state"], "on");
    assert_eq!(ask(&server, prompts[0], 48), expected[0]);
    let after = view(&server);
    let m = &after["models"][0];
    let s = &m["stats"];
    let tokens = s["tokens"].as_u64().unwrap();
    // the first token comes with the prompt
    assert!(tokens - before["models"][0]["stats"]["tokens"].as_u64().unwrap() >= 47, "{s}");
    let uses = s["hits"].as_u64().unwrap() + s["misses"].as_u64().unwrap();
    let used = m["classes"][0]["used"].as_u64().unwrap();
    // the last layer computes only what has an output
    assert!((47 * N_LAYERS * used..=tokens * N_LAYERS * used).contains(&uses), "{uses}");
    let of =
        |what: &str| m["classes"].as_array().unwrap().iter().map(|c| c[what].as_u64().unwrap()).sum::<u64>();
    assert_eq!(of("hits") + of("misses"), uses, "one class has all layers");
    assert!(
        s["step_seconds"].as_f64().unwrap() > 0.0 && after["now_us"].as_u64() > before["now_us"].as_u64()
    );
    let layers = m["layers"].as_array().unwrap();
    assert_eq!(layers.len() as u64, N_LAYERS);
    // a byte of heat an expert, a bit for being resident
    assert_eq!(layers[0]["heat"].as_str().unwrap().len() as u64, N_EXPERT.div_ceil(3) * 4);
    let heat = |m: &Value| {
        m["layers"]
            .as_array()
            .unwrap()
            .iter()
            .any(|l| l["heat"].as_str().unwrap().contains(|c| c != 'A' && c != '='))
    };
    assert!(heat(m), "somebody has looked, so uses were counted");
    assert!(!m["swaps"].as_array().unwrap().is_empty());

    let text = server.get("/metrics");
    assert_exposition(&text);
    let count = |text: &str, name: &str| {
        metric(text, &format!("llamacpp:moe_hot_{name}")).unwrap_or_else(|| panic!("no {name}: {text}"))
    };
    assert_eq!(count(&text, "hits_total") + count(&text, "misses_total"), uses as f64);
    assert_eq!(count(&text, "slots"), (16 * N_LAYERS) as f64);
    assert!(text.contains("state=\"on\"} 1\n"), "{text}");

    // smaller, and the memory is given back; larger than it began; and the answers stay
    ask(&server, prompts[3], 200);
    let full = view(&server);
    assert!(full["models"][0]["slots_used"].as_u64() > Some(14 * N_LAYERS), "{full}");
    let held = rss(server.pid());
    let (status, now) = post(&server, r#"{"k": 2}"#);
    assert_eq!((status, now["models"][0]["slots"].as_u64()), (200, Some(2 * N_LAYERS)), "{now}");
    let small = now["models"][0]["slot_bytes"].as_u64().unwrap();
    let freed = m["slot_bytes"].as_u64().unwrap() - small;
    assert!(rss(server.pid()) + freed / 2 < held, "of {freed} bytes not half was given back");
    assert_eq!(ask(&server, prompts[1], 48), expected[1]);
    let (status, now) = post(&server, r#"{"k": 32, "interval": 1, "policy": "lru"}"#);
    assert_eq!((status, now["models"][0]["slots"].as_u64()), (200, Some(32 * N_LAYERS)), "{now}");
    assert_eq!(
        (now["models"][0]["interval"].as_u64(), now["models"][0]["policy"].as_str()),
        (Some(1), Some("lru"))
    );
    assert_eq!(ask(&server, prompts[2], 48), expected[2]);
    let (status, now) = post(&server, r#"{"policy": "auto"}"#);
    assert_eq!((status, now["models"][0]["policy"].as_str()), (200, Some("decay")), "in host memory");
    let grown = view(&server);
    assert!(grown["models"][0]["slots_used"].as_u64() > Some(4 * N_LAYERS), "{grown}");

    let (status, now) = post(&server, r#"{"frozen": true, "save_profile": true}"#);
    assert_eq!((status, &now["models"][0]["state"]), (200, &json!("frozen")));
    assert_eq!(now["models"][0]["frozen"], true);
    assert!(profile.is_file());
    ask(&server, prompts[3], 8);
    let uploads = |v: &Value| v["models"][0]["stats"]["rebalances"].as_u64();
    let (a, answer, b) = (view(&server), ask(&server, prompts[3], 48), view(&server));
    assert_eq!(answer, expected[3]);
    assert_eq!(uploads(&a), uploads(&b), "frozen");

    for (body, why) in [
        (r#"{"k": 0}"#, "k: '0' is not allowed, expected a number of slots per layer from 1 to 64"),
        (r#"{"k": 65}"#, "k: '65' is not allowed, expected a number of slots per layer from 1 to 64"),
        (r#"{"k": 1, "vram_mib": 1}"#, "k and vram_mib: expected one of them"),
        (
            r#"{"interval": 0}"#,
            "moe-hot-rebalance-interval: '0' is not allowed, expected a number of tokens from 1 to 1048576",
        ),
        (r#"{"policy": "best"}"#, "policy: 'best' is not allowed, expected auto or one of "),
        (r#"{"model": "other"}"#, "model: 'other' is not allowed, expected one of "),
        (r#"{"path": "/etc/passwd"}"#, "the body: unknown field `path`"),
        ("[]", "the body: "),
    ] {
        let (status, answer) = post(&server, body);
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(status == 400 && message.starts_with(why), "{body}: {status} {message}");
    }
    end(&mut server);
}

#[test]
fn endpoints_obey_the_key_and_the_flag_and_the_page_is_public() {
    let mut server = Server::start(&["--api-key", "secret"], &[K]);
    let get = |path: &str| minreq::get(server.url(path));
    for path in ["/moe-hot", "/metrics", "/props"] {
        assert_eq!(server.send(get(path)).0, 401, "{path}");
    }
    let refused = server.send(minreq::post(server.url("/moe-hot")).with_body("{}"));
    assert_eq!(refused.0, 401);
    let with_key = |r: minreq::Request| server.send(r.with_header("Authorization", "Bearer secret"));
    let (status, text) = with_key(get("/moe-hot"));
    assert!(status == 200 && text.contains(r#""writable":false"#), "{status} {text}");
    let (status, text) = with_key(minreq::post(server.url("/moe-hot")).with_body("{\"frozen\": true}"));
    assert!(status == 501 && text.contains("--props"), "{status} {text}");

    let page = get("/moe-hot/").send().unwrap();
    assert_eq!(page.status_code, 200);
    let header = |name: &str| page.headers.get(name).map(String::as_str).unwrap_or_default();
    assert!(header("content-type").starts_with("text/html"));
    assert!(header("content-security-policy").starts_with("default-src 'none'; script-src 'sha256-"));
    assert!(!page.as_str().unwrap().contains("secret"));
    end(&mut server);
}

#[test]
fn without_slots_there_is_nothing_to_see() {
    let mut server = Server::start(&["--metrics", "--props"], &[]);
    assert_eq!(view(&server)["models"], json!([]));
    let props: Value = serde_json::from_str(&server.get("/props")).unwrap();
    assert_eq!(props["moe_hot"], json!([]));
    assert!(!server.get("/metrics").contains("moe_hot"));
    assert_eq!(post(&server, r#"{"k": 4}"#).1["error"]["message"], "no model has slots");
    end(&mut server);
}

#[test]
fn the_pool_is_as_large_as_there_is_memory() {
    let slots = |env: &[(&str, &str)]| {
        let mut server = Server::start(&[], env);
        let v = view(&server);
        let log = end(&mut server);
        (v["models"][0]["slots"].as_u64(), log)
    };
    // 20.25 MiB of experts, 54 KiB each
    let (n, log) = slots(&[("LLAMA_ARG_MOE_HOT_VRAM", "5")]);
    assert_eq!(n, Some(15 * N_LAYERS), "{log}");
    assert!(log.contains("moe-hot: requested 5 MiB, active: 90 slots"), "{log}");
    let auto = ("LLAMA_ARG_MOE_HOT_K", "auto");
    // 512 MiB stay free
    let (n, log) = slots(&[auto, ("MOE_HOT_FAULT", "vram=522")]);
    assert_eq!(n, Some(31 * N_LAYERS), "{log}");
    let (n, log) = slots(&[auto, ("LLAMA_ARG_MOE_HOT_VRAM", "3"), ("MOE_HOT_FAULT", "vram=522")]);
    assert_eq!(n, Some(9 * N_LAYERS), "{log}");
    let (n, log) = slots(&[auto, ("MOE_HOT_FAULT", "vram=500")]);
    assert_eq!(n, None);
    let why = "requested K = auto, not active: there is no memory for slots: one for each layer needs 0.3 MiB, there is room for 0.0 MiB";
    assert!(log.contains(why), "{log}");
}

#[test]
fn the_pool_leaves_when_others_take_the_memory_and_the_answer_stays() {
    let mut stock = Server::start(&[], &[]);
    let expected = ask(&stock, "The train left", 120);
    end(&mut stock);
    let mut server = Server::start(&["--props"], &[K, ("MOE_HOT_FAULT", "vram=100")]);
    let start = std::time::Instant::now();
    while view(&server)["models"][0]["slots"].as_u64() > Some(1) {
        assert_eq!(ask(&server, "The train left", 120), expected);
        assert!(start.elapsed().as_secs() < 60, "{}", server.log_end());
    }
    let (status, answer) = post(&server, r#"{"k": 8}"#);
    assert!(
        status == 400
            && answer["error"]["message"].as_str().unwrap().starts_with("k: there is room for 0 MiB"),
        "{answer}"
    );
    let log = end(&mut server);
    assert!(
        log.contains("moe-hot: 94 MiB are free beside 5 MiB of slots, which get 0 MiB from now on"),
        "{log}"
    );
}

#[test]
fn slots_that_do_not_pay_are_left_and_the_answer_stays() {
    let mut stock = Server::start(&[], &[]);
    let expected = ask(&stock, "The train left", 900);
    end(&mut stock);
    // every request for cold experts takes 2 ms more
    let env =
        [("LLAMA_ARG_MOE_HOT_K", "2"), ("LLAMA_ARG_MOE_HOT_AUTO_OFF", "on"), ("MOE_HOT_FAULT", "slow=2")];
    let mut server = Server::start(&[], &env);
    assert_eq!(ask(&server, "The train left", 900), expected);
    let v = view(&server);
    assert_eq!(v["models"][0]["state"], "off", "{v}");
    let log = end(&mut server);
    let said =
        log.matches("moe-hot: the slots do not pay here, and are off until they do: a token took ").count();
    assert_eq!(said, 1, "{log}");
}

#[test]
fn a_run_whose_pool_changes_replays_swap_by_swap() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace");
    let env = [K, ("LLAMA_ARG_MOE_HOT_TRACE", trace.to_str().unwrap())];
    let mut server = Server::start(&["--props"], &env);
    for body in [r#"{"k": 4}"#, r#"{"k": 40}"#, r#"{"k": 16}"#] {
        ask(&server, "The train left the station", 40);
        assert_eq!(post(&server, body).0, 200);
    }
    ask(&server, "fn main() {", 40);
    end(&mut server);
    let routing = assert_replays(&trace, PolicyKind::Decay, 16, 2);
    let sizes: Vec<u32> = routing.opens.iter().map(|o| o.2).collect();
    assert_eq!(sizes, [4, 40, 16].map(|k| k * N_LAYERS as u32));
}
