//! What clients of llama-server see of the slots, and change: GET and POST /moe-hot, the page GET /moe-hot/, and the parts
//! of GET /props and GET /metrics. The server asks for all of them here, so that its own code stays as it is.

mod metrics;

use std::{
    borrow::Cow,
    sync::{Arc, LazyLock},
    time::Instant,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::{
    model::{
        Model,
        state::{Change, State},
    },
    registry,
};

/// Largest body of a request: what can be changed fits many times.
const MAX_BODY: usize = 16 << 10;

const PAGE: &str = include_str!("page.html");

/// Allows the page its own script and style, and requests to where it comes from, and nothing else.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = |tag: &str| {
        let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
        let text =
            PAGE.split_once(&open).and_then(|(_, rest)| rest.split_once(&close)).map_or("", |(text, _)| text);
        format!("'sha256-{}'", BASE64_STANDARD.encode(Sha256::digest(text)))
    };
    format!(
        "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
        hash("script"),
        hash("style")
    )
});

/// The clock of `now_us`.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// An answer.
#[derive(Debug)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// Type of the body.
    pub content_type: &'static str,
    /// Value of the header Content-Security-Policy, where there is one.
    pub security_policy: Option<&'static str>,
    /// The body.
    pub body: Cow<'static, str>,
}

impl Response {
    fn json(status: u16, body: &serde_json::Value) -> Self {
        Response {
            status,
            content_type: "application/json; charset=utf-8",
            security_policy: None,
            body: body.to_string().into(),
        }
    }

    /// As llama-server tells errors.
    fn error(status: u16, kind: &str, message: &str) -> Self {
        Response::json(status, &json!({ "error": { "code": status, "message": message, "type": kind } }))
    }
}

/// Answers a request; `writable`: whether the server was started with the flag that allows changes.
pub fn request(method: &str, path: &str, body: &[u8], writable: bool) -> Response {
    match (method, path) {
        ("GET", "/moe-hot/") => Response {
            status: 200,
            content_type: "text/html; charset=utf-8",
            security_policy: Some(&POLICY),
            body: PAGE.into(),
        },
        ("GET", "/moe-hot") => Response::json(200, &seen(writable)),
        ("GET", "/props") => Response::json(200, &json!(states(false).iter().map(fixed).collect::<Vec<_>>())),
        ("GET", "/metrics") => Response {
            status: 200,
            content_type: "text/plain; version=0.0.4",
            security_policy: None,
            body: metrics::text(&states(false)).into(),
        },
        ("POST", "/moe-hot") if !writable => Response::error(
            501,
            "not_supported_error",
            "This server does not support changing the expert cache. Start it with `--props`",
        ),
        ("POST", "/moe-hot") => match change(body) {
            Ok(()) => Response::json(200, &seen(writable)),
            Err(why) => Response::error(400, "invalid_request_error", &why),
        },
        _ => Response::error(404, "not_found_error", &format!("there is no {method} {path}")),
    }
}

fn states(look: bool) -> Vec<State> {
    registry::visit(|models| models.iter().filter_map(|m| m.state(look)).collect())
}

fn seen(writable: bool) -> serde_json::Value {
    json!({
        "version": 1,
        "now_us": START.elapsed().as_micros() as u64,
        "writable": writable,
        "models": states(true),
    })
}

/// What does not change from token to token.
fn fixed(s: &State) -> serde_json::Value {
    json!({
        "name": s.name,
        "state": s.state,
        "why": s.why,
        "requested": s.requested,
        "k": s.k,
        "interval": s.interval,
        "policy": s.policy,
        "link": s.link,
        "threads": s.threads,
        "device": s.device,
        "slots": s.slots,
        "slot_bytes": s.slot_bytes,
        "registered_bytes": s.registered_bytes,
        "classes": s.classes.iter().map(|c| json!({
            "layers": c.layers,
            "types": c.types,
            "experts": c.experts,
            "used": c.used,
            "expert_bytes": c.expert_bytes,
            "slots": c.slots,
        })).collect::<Vec<_>>(),
        "skipped": s.skipped,
    })
}

fn change(body: &[u8]) -> Result<(), String> {
    if body.len() > MAX_BODY {
        return Err(format!("the body has {} bytes, expected at most {MAX_BODY}", body.len()));
    }
    // a list would be read, too, as the fields in their order
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err("the body: expected a JSON object".into());
    }
    let change: Change = serde_json::from_slice(body).map_err(|e| format!("the body: {e}"))?;
    registry::visit(|models| {
        let names = || models.iter().filter_map(|m| m.name()).collect::<Vec<_>>().join(", ");
        let meant: Vec<&Arc<Model>> = models
            .iter()
            .filter(|m| change.model.as_deref().is_none_or(|name| m.name() == Some(name)))
            .collect();
        match (meant.as_slice(), &change.model) {
            ([model], _) => model.steer(&change),
            ([], None) => Err("no model has slots".into()),
            (_, None) => Err(format!("model: expected one of {}", names())),
            (_, Some(name)) => Err(format!("model: '{name}' is not allowed, expected one of {}", names())),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(r: &Response) -> serde_json::Value {
        serde_json::from_str(&r.body).unwrap()
    }

    #[test]
    fn without_slots_there_is_an_empty_list() {
        let r = request("GET", "/moe-hot", b"", false);
        assert_eq!((r.status, text(&r)["version"].as_u64()), (200, Some(1)));
        assert!(text(&r)["models"].as_array().unwrap().is_empty());
        assert_eq!(request("GET", "/props", b"", false).body, "[]");
        assert_eq!(request("GET", "/metrics", b"", false).body, "");
    }

    #[test]
    fn what_cannot_be_changed_is_refused_with_the_reason() {
        let refused = |body: &[u8], writable| {
            let r = request("POST", "/moe-hot", body, writable);
            (r.status, text(&r)["error"]["message"].as_str().unwrap().to_string())
        };
        assert_eq!(refused(b"{}", false).0, 501);
        assert_eq!(refused(b"{}", true), (400, "no model has slots".into()));
        let (status, why) = refused(b"{\"slots\": 3}", true);
        assert!(
            status == 400
                && why.starts_with("the body: unknown field `slots`, expected one of `model`, `k`, "),
            "{why}"
        );
        assert!(refused(b"{\"k\": -1}", true).1.contains("invalid value: integer `-1`, expected u32"));
        assert!(refused(&[b' '; MAX_BODY + 1], true).1.ends_with("expected at most 16384"));
        assert!(refused(b"\xff", true).1.starts_with("the body: "));
        let list = b"[null, 1, null, null, null, null, false]";
        assert_eq!(refused(list, true).1, "the body: expected a JSON object");
    }

    #[test]
    fn other_paths_are_not_found() {
        assert_eq!(request("GET", "/moe-hot/x", b"", true).status, 404);
        assert_eq!(request("DELETE", "/moe-hot", b"", true).status, 404);
    }

    #[test]
    fn the_page_allows_its_own_script_and_style_alone() {
        let r = request("GET", "/moe-hot/", b"", false);
        assert_eq!(PAGE.matches("<script").count(), 1, "one script, whose hash is known");
        assert_eq!(PAGE.matches("<style").count(), 1);
        assert_eq!(r.security_policy.unwrap().matches("'sha256-").count(), 2);
        let empty = BASE64_STANDARD.encode(Sha256::digest(""));
        assert!(!r.security_policy.unwrap().contains(&empty));
        for outside in ["http://", "https://", "innerHTML", " style=", " onclick="] {
            assert!(!PAGE.contains(outside), "{outside}");
        }
    }
}
