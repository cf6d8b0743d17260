//! Every dependency has a licence that deny.toml allows, and comes from the default registry or from this repository.

use std::{env, fs, path::Path, process::Command};

use serde_json::Value;
use spdx::{Expression, ParseMode};

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn texts(value: &toml::Value) -> Vec<&str> {
    value.as_array().expect("a list").iter().map(|v| v.as_str().expect("a string")).collect()
}

#[test]
fn every_dependency_may_be_used() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let deny: toml::Table = fs::read_to_string(root.join("deny.toml")).unwrap().parse().unwrap();
    let licences = &deny["licenses"];
    let exceptions = licences["exceptions"].as_array().unwrap();

    let run = Command::new(env::var_os("CARGO").expect("set by cargo"))
        .args([
            "metadata",
            "--format-version=1",
            "--locked",
            "--offline",
            "--all-features",
            "--filter-platform",
        ])
        .arg(format!("{}-unknown-linux-gnu", env::consts::ARCH))
        .current_dir(root)
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let metadata: Value = serde_json::from_slice(&run.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let (mut refused, mut n_foreign) = (Vec::new(), 0);
    for package in packages.iter().filter(|p| !p["source"].is_null()) {
        n_foreign += 1;
        let (name, licence, source) =
            (text(package, "name"), text(package, "license"), text(package, "source"));
        let mut allowed = texts(&licences["allow"]);
        let own = exceptions.iter().find(|e| e["crate"].as_str() == Some(name));
        allowed.extend(own.map(|e| texts(&e["allow"])).unwrap_or_default());
        // some still write `MIT/Apache-2.0`
        let fits = Expression::parse_mode(licence, ParseMode::LAX).is_ok_and(|e| {
            e.evaluate(|r| {
                r.addition.is_none() && r.license.id().is_some_and(|id| allowed.contains(&id.name))
            })
        });
        if !fits || !source.starts_with("registry+") {
            refused.push(format!("{name}: licence '{licence}', source {source}"));
        }
    }
    assert!(n_foreign > 20, "{n_foreign} packages");
    assert!(refused.is_empty(), "deny.toml does not allow:\n{}", refused.join("\n"));
}
