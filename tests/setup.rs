//! scripts/setup and scripts/export-patches, run for real in scratch projects whose upstream is a repository of two
//! files: no network, nothing outside the scratch folder. Only the last test takes the real llama.cpp/ and patches/.

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A project with scripts/, an empty patches/ and an environment .venv that needs no installing.
struct Project {
    dir: TempDir,
    env: Vec<(String, String)>,
}

struct Outcome {
    ok: bool,
    stderr: String,
}

impl Outcome {
    /// Success, and `text` was said.
    #[track_caller]
    fn says(&self, text: &str) {
        assert!(self.ok && self.stderr.contains(text), "expected success and '{text}' in:\n{}", self.stderr);
    }

    /// Failure with exactly one line that calls itself an error, which has every one of `texts`.
    #[track_caller]
    fn fails(&self, texts: &[&str]) {
        assert!(!self.ok, "expected a failure:\n{}", self.stderr);
        let errors: Vec<_> = self.stderr.lines().filter(|line| line.contains(": error: ")).collect();
        assert_eq!(errors.len(), 1, "expected one error line:\n{}", self.stderr);
        assert_eq!(self.stderr.lines().last(), Some(errors[0]), "expected the error last:\n{}", self.stderr);
        for text in texts {
            assert!(errors[0].contains(text), "expected '{text}' in: {}", errors[0]);
        }
    }
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().expect("a file has a folder")).expect("folder");
    fs::write(path, text).expect("write");
}

fn write_script(path: &Path, text: &str) {
    write(path, &format!("#!/bin/sh\n{text}\n"));
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("chmod");
}

#[track_caller]
fn git(dir: &Path, args: &[&str]) -> String {
    let out = Command::new("git")
        .args(["-c", "user.name=A. User", "-c", "user.email=user@example.org", "-C"])
        .arg(dir)
        .args(args)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .output()
        .expect("git runs");
    assert!(out.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

fn which(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").expect("PATH");
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.exists()).expect(name)
}

impl Project {
    /// Scripts with the project's own pin.
    fn with_real_pin() -> Self {
        let project =
            Self { dir: TempDir::with_prefix("moe hot ").expect("scratch folder"), env: Vec::new() };
        for name in ["lib.sh", "setup", "export-patches", "requirements.txt"] {
            fs::create_dir_all(project.path("scripts")).expect("folder");
            fs::copy(format!("{ROOT}/scripts/{name}"), project.path("scripts").join(name)).expect(name);
        }
        fs::copy(format!("{ROOT}/Cargo.toml"), project.path("Cargo.toml")).expect("Cargo.toml");
        fs::create_dir(project.path("patches")).expect("folder");
        project.python("echo 'ERROR: no such luck'; exit 1");
        let requirements =
            fs::read_to_string(project.path("scripts/requirements.txt")).expect("requirements");
        write(
            &project.path(".venv/.moe-hot"),
            &format!("# {}\n{requirements}", project.path(".venv").display()),
        );
        project
    }

    /// Scripts whose pin is the commit of a repository in upstream/.
    fn new() -> Self {
        let project = Self::with_real_pin();
        let upstream = project.path("upstream");
        write(&upstream.join("a.txt"), "one\ntwo\nthree\n");
        write(&upstream.join("sub/run.sh"), "echo\r\n");
        write(&upstream.join(".gitignore"), "*.log\n");
        git(&upstream, &["init", "-q"]);
        git(&upstream, &["add", "-A"]);
        git(&upstream, &["-c", "core.autocrlf=false", "commit", "-qm", "upstream", "--date=@1 +0000"]);
        project.pin("PIN_COMMIT", &git(&upstream, &["rev-parse", "HEAD"]));
        project.pin("PIN_TREE", &git(&upstream, &["rev-parse", "HEAD^{tree}"]));
        project
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn llama(&self) -> PathBuf {
        self.path("llama.cpp")
    }

    fn head(&self) -> String {
        git(&self.llama(), &["rev-parse", "HEAD"])
    }

    fn pin(&self, name: &str, value: &str) {
        let lib = self.path("scripts/lib.sh");
        let text = fs::read_to_string(&lib).expect("lib.sh");
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        let line = lines.iter_mut().find(|line| line.starts_with(&format!("{name}="))).expect(name);
        *line = format!("{name}={value}");
        write(&lib, &(lines.join("\n") + "\n"));
    }

    /// What runs in place of the environment's Python.
    fn python(&self, text: &str) {
        write_script(&self.path(".venv/bin/python"), text);
    }

    /// A command that is found before the machine's own.
    fn shadow(&mut self, name: &str, text: &str) {
        write_script(&self.path("shadow").join(name), text);
        let path = std::env::var("PATH").expect("PATH");
        self.env.push(("PATH".into(), format!("{}:{path}", self.path("shadow").display())));
    }

    fn command(&self, script: &str, args: &[&str]) -> Command {
        let mut command = Command::new(self.path("scripts").join(script));
        command
            .args(args)
            .current_dir(self.dir.path())
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("LC_ALL", "C");
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, script: &str, args: &[&str]) -> Outcome {
        let out = self.command(script, args).output().expect("script runs");
        Outcome { ok: out.status.success(), stderr: String::from_utf8_lossy(&out.stderr).into_owned() }
    }

    fn setup(&self) -> Outcome {
        self.run("setup", &["--from", "upstream"])
    }

    fn export(&self) -> Outcome {
        self.run("export-patches", &[])
    }

    fn edit(&self, name: &str, text: &str) {
        write(&self.llama().join(name), text);
    }

    fn commit(&self, name: &str, text: &str, message: &str) {
        self.edit(name, text);
        git(&self.llama(), &["add", "-A"]);
        git(&self.llama(), &["commit", "-qm", message, "--date=@1700000000 +0530"]);
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).expect(name)
    }

    fn patches(&self) -> Vec<(String, String)> {
        let mut files: Vec<_> = fs::read_dir(self.path("patches"))
            .expect("patches/")
            .map(|entry| entry.expect("entry").file_name().into_string().expect("UTF-8"))
            .map(|name| (name.clone(), self.read(&format!("patches/{name}"))))
            .collect();
        files.sort();
        files
    }

    /// Puts patches in place of what patches/ has.
    fn set_patches(&self, patches: &[(String, String)]) {
        fs::remove_dir_all(self.path("patches")).expect("patches/");
        fs::create_dir(self.path("patches")).expect("patches/");
        for (name, text) in patches {
            write(&self.path("patches").join(name), text);
        }
    }

    /// Nothing half-made is left, and no llama.cpp/ either.
    #[track_caller]
    fn has_no_tree(&self) {
        let left: Vec<_> = fs::read_dir(self.dir.path())
            .expect("entries")
            .chain(fs::read_dir(self.path(".cache")).into_iter().flatten())
            .map(|entry| entry.expect("entry").file_name().into_string().expect("UTF-8"))
            .filter(|name| {
                name.starts_with("llama.cpp") || ["part", "unpacked", "tree"].contains(&name.as_str())
            })
            .collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}

/// The patches of two commits: a changed line with CRLF ends beside, and a new file; with a subject that `git am` likes
/// to shorten and letters beyond ASCII.
fn two_patches() -> Vec<(String, String)> {
    let project = Project::new();
    project.setup().says("ready");
    project.commit("sub/run.sh", "echo two\r\n", "[sub] say two: größer");
    project.commit("b.txt", "new\n", "b: add\n\nA body.\n\nAnd more of it.");
    project.export().says("wrote 2 patches");
    project.patches()
}

#[test]
fn no_patches() {
    let project = Project::new();
    project.setup().says("llama.cpp/ is ready: ");
    assert_eq!(git(&project.llama(), &["rev-parse", "--abbrev-ref", "HEAD"]), "moe-hot");
    assert_eq!(git(&project.llama(), &["rev-parse", "moe-hot-pin"]), project.head());
    assert_eq!(project.head(), git(&project.path("upstream"), &["rev-parse", "HEAD"]));
    // the source is not needed again
    project.run("setup", &[]).says("0 commits");
    project.run("export-patches", &["--check"]).says("equals the 0 commits");
}

#[test]
fn series_is_applied_with_the_same_hashes_whatever_the_users_settings() {
    let patches = two_patches();
    let mut heads = Vec::new();
    for hostile in [false, true] {
        let mut project = Project::new();
        if hostile {
            write(
                &project.path("gitconfig"),
                "[commit]\ngpgsign = true\n[core]\nautocrlf = true\nhooksPath = /nowhere\nabbrev = 20\n[diff]\n\
                 noprefix = true\n[format]\nnumbered = true\nattach = true\nsignature = me\n[apply]\nwhitespace = fix\n",
            );
            project.env.push(("GIT_CONFIG_GLOBAL".into(), project.path("gitconfig").display().to_string()));
            project.env.push(("GIT_COMMITTER_NAME".into(), "Someone".into()));
            project.env.push(("GIT_DIR".into(), "/nowhere".into()));
        }
        project.set_patches(&patches);
        project.setup().says("2 commits");
        assert_eq!(project.read("llama.cpp/sub/run.sh"), "echo two\r\n");
        assert_eq!(git(&project.llama(), &["log", "-1", "--format=%s", "HEAD~1"]), "[sub] say two: größer");
        project.run("export-patches", &["--check"]).says("equals the 2 commits");
        project.export().says("wrote 2 patches");
        assert_eq!(project.patches(), patches);
        project.setup().says("2 commits");
        heads.push(project.head());
    }
    // the pins of the two projects differ in their committer date only by chance, so compare what does not
    assert_eq!(heads.len(), 2);
}

#[test]
fn commits_are_reproducible() {
    let project = Project::new();
    project.set_patches(&two_patches());
    project.setup().says("2 commits");
    let head = project.head();
    fs::remove_dir_all(project.llama()).expect("remove");
    thread::sleep(Duration::from_millis(1100)); // another committer date, were it taken from the clock
    project.setup().says("2 commits");
    assert_eq!(project.head(), head);
    assert_eq!(
        git(&project.llama(), &["log", "-1", "--format=%an <%ae> %cn %ct"]),
        "A. User <user@example.org> moe-hot 1700000000"
    );
}

#[test]
fn changed_series_is_applied_anew() {
    let patches = two_patches();
    let project = Project::new();
    project.set_patches(&patches[..1]);
    project.setup().says("1 commits");
    project.edit("notes.md", "untracked");
    project.set_patches(&patches);
    project.setup().says("patches/ has changed: applying it");
    assert_eq!(project.read("llama.cpp/b.txt"), "new\n");
    assert_eq!(project.read("llama.cpp/notes.md"), "untracked");
    project.set_patches(&[]);
    project.run("setup", &["--keep-edits"]).says("0 commits");
    assert!(!project.llama().join("b.txt").exists());
    // a series seen before
    project.set_patches(&patches);
    project.setup().says("2 commits");
    assert_eq!(git(&project.llama(), &["rev-parse", "--abbrev-ref", "HEAD"]), "moe-hot");
    assert_eq!(git(&project.llama(), &["worktree", "list"]).lines().count(), 1);
}

#[test]
fn edits_are_never_touched() {
    let patches = two_patches();
    let project = Project::new();
    project.set_patches(&patches[..1]);
    project.setup().says("ready");
    project.edit("a.txt", "mine\n");
    project.setup().fails(&[
        "setup: error: llama.cpp/ has edits (files that are not committed)",
        "scripts/export-patches",
        "move llama.cpp/ away",
    ]);
    project.run("setup", &["--keep-edits"]).says("they stay");
    project.set_patches(&patches);
    project.run("setup", &["--keep-edits"]).fails(&["llama.cpp/ has edits"]);
    assert_eq!(project.read("llama.cpp/a.txt"), "mine\n");

    git(&project.llama(), &["commit", "-qam", "mine"]);
    let mine = project.head();
    project.setup().fails(&["commits that are not in patches/"]);
    // exporting would drop the patch that llama.cpp/ has not seen
    project.export().fails(&["patches/ has changed since llama.cpp/ was made from it", "--force"]);
    assert_eq!(project.patches(), patches);
    // hidden behind a detached HEAD they are still the user's
    git(&project.llama(), &["checkout", "-q", "--detach", "moe-hot-pin"]);
    project.setup().fails(&["commits that are not in patches/"]);
    assert_eq!(git(&project.llama(), &["rev-parse", "moe-hot"]), mine);

    git(&project.llama(), &["checkout", "-q", "moe-hot"]);
    project.run("export-patches", &["--force"]).says("wrote 2 patches");
    project.setup().says("2 commits");
    assert_eq!(project.head(), mine);
}

#[test]
fn untracked_file_in_the_way_is_kept() {
    let project = Project::new();
    project.setup().says("ready");
    project.edit("b.txt", "mine\n");
    project.set_patches(&two_patches());
    project.setup().fails(&["cannot take the new patches"]);
    assert_eq!(project.read("llama.cpp/b.txt"), "mine\n");
    fs::remove_file(project.llama().join("b.txt")).expect("remove");
    project.setup().says("2 commits");
}

#[test]
fn unfinished_rebase_is_kept() {
    let project = Project::new();
    project.setup().says("ready");
    fs::create_dir(project.llama().join(".git/rebase-merge")).expect("folder");
    project.setup().fails(&["an unfinished rebase or am"]);
}

#[test]
fn checkout_that_setup_did_not_make() {
    let project = Project::new();
    git(project.dir.path(), &["clone", "-q", "upstream", "llama.cpp"]);
    project.edit("a.txt", "mine\n");
    project.setup().fails(&["files that are not committed"]);
    project.run("setup", &["--keep-edits"]).says("they stay");
    git(&project.llama(), &["commit", "-qam", "a: mine"]);
    project.export().says("wrote 1 patches");
    project.setup().says("1 commits");
    project.run("export-patches", &["--check"]).says("equals the 1 commits");

    let other = Project::new();
    git(other.dir.path(), &["init", "-q", "llama.cpp"]);
    other.commit("x", "x", "x");
    other.setup().fails(&["does not contain the pinned commit"]);
    fs::remove_dir_all(other.llama().join(".git")).expect("remove");
    other.setup().fails(&["llama.cpp/ is no git repository: move it away"]);
}

#[test]
fn patch_that_does_not_apply() {
    let mut patches = two_patches();
    let good = Project::new();
    good.set_patches(&patches[..1]);
    good.setup().says("1 commits");
    let head = good.head();

    patches[1].1 = patches[0].1.clone(); // what it takes away is gone already
    let name = patches[1].0.clone();
    let fresh = Project::new();
    fresh.set_patches(&patches);
    fresh.setup().fails(&[&format!("setup: error: patches/{name} does not apply to llama.cpp")]);
    fresh.has_no_tree();

    good.set_patches(&patches);
    good.setup().fails(&[&format!("patches/{name} does not apply")]);
    assert_eq!(good.head(), head);
    assert_eq!(git(&good.llama(), &["status", "--porcelain"]), "");
    good.set_patches(&patches[..1]);
    good.setup().says("1 commits");
}

#[test]
fn export_tells_differences() {
    let patches = two_patches();
    let project = Project::new();
    project.set_patches(&patches);
    project.run("export-patches", &["--check"]).fails(&["there is no llama.cpp/", "run scripts/setup"]);
    project.setup().says("ready");
    project.edit("notes.md", "untracked");
    project.run("export-patches", &["--check"]).says("equals");

    project.edit("a.txt", "mine\n");
    project.run("export-patches", &["--check"]).fails(&["edits in 1 files that are not committed"]);
    project.export().says("note: edits in 1 files of llama.cpp/ are not committed");
    assert_eq!(project.patches(), patches);
    git(&project.llama(), &["commit", "-qam", "a: mine"]);
    project
        .run("export-patches", &["--check"])
        .fails(&["patches/ differs from the 3 commits", "run scripts/export-patches"]);
    project.export().says("wrote 3 patches");

    // a renamed commit leaves no stale file
    git(&project.llama(), &["commit", "-q", "--amend", "-m", "a: another name"]);
    project.export().says("wrote 3 patches");
    let names: Vec<_> = project.patches().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), 3);
    assert_eq!(names[2], "0003-a-another-name.patch");
    let text = project.read("patches/0003-a-another-name.patch");
    assert!(text.starts_with(&format!("From {} ", "0".repeat(40))), "{text}");
    project.run("export-patches", &["--check"]).says("equals the 3 commits");
    project.run("export-patches", &["--chekc"]).fails(&["unknown argument '--chekc'"]);
}

#[test]
fn sources() {
    let project = Project::new();
    for (args, text) in [
        (
            &["--from", "nowhere"][..],
            "--from 'nowhere' is not allowed: expected package, git, git=URL or a directory that exists",
        ),
        (&["--from"], "--from '' is not allowed"),
        (&["--form", "x"], "unknown argument '--form'"),
        (&["--from", "git=/nowhere"], "fetching llama.cpp from /nowhere failed: fatal: "),
    ] {
        project.run("setup", args).fails(&["setup: error: ", text]);
        project.has_no_tree();
    }

    project.run("setup", &[&format!("--from=git={}", project.path("upstream").display())]).says("ready");
    let pin = project.head();
    fs::remove_dir_all(project.llama()).expect("remove");

    // an unpacked tree has the hash of the tree, and always the same commit
    fs::rename(project.path("upstream"), project.path("plain")).expect("rename");
    fs::remove_dir_all(project.path("plain/.git")).expect("remove");
    let mut heads = Vec::new();
    for _ in 0..2 {
        project.run("setup", &["--from", "plain"]).says("ready");
        heads.push(project.head());
        fs::remove_dir_all(project.llama()).expect("remove");
    }
    assert_eq!(heads[0], heads[1]);
    assert_ne!(heads[0], pin);

    write(&project.path("plain/a.txt"), "changed");
    project.run("setup", &["--from", "plain"]).fails(&["the tree from 'plain' is ", ", not the pinned "]);
    project.has_no_tree();
}

#[test]
fn source_distribution() {
    let mut project = Project::new();
    project.run("setup", &[]).fails(&[
        "setup: error: downloading llama-cpp-python",
        "ERROR: no such luck",
        "check the network",
        "--from git",
    ]);
    project.has_no_tree();

    // as published: the tree is a submodule, its settings are of another machine
    let packed = project.path("pack/llama_cpp_python-0.3.36");
    fs::create_dir_all(packed.join("vendor")).expect("folder");
    fs::create_dir_all(packed.join(".git/modules/vendor")).expect("folder");
    git(&project.path("upstream"), &["clone", "-q", ".", "../pack/llama_cpp_python-0.3.36/vendor/llama.cpp"]);
    let module = packed.join(".git/modules/vendor/llama.cpp");
    fs::rename(packed.join("vendor/llama.cpp/.git"), &module).expect("rename");
    write(&packed.join("vendor/llama.cpp/.git"), "gitdir: ../../.git/modules/vendor/llama.cpp\n");
    let config = fs::read_to_string(module.join("config")).expect("config");
    let foreign = "[core]\n\tworktree = /github/workspace\n[includeIf \"gitdir:/github/workspace/.git\"]\n\tpath = /nowhere\n";
    write(&module.join("config"), &(config + foreign));
    let archive = project.path("made.tar.gz");
    let status =
        Command::new("tar").arg("czf").arg(&archive).arg("-C").arg(project.path("pack")).arg(".").status();
    assert!(status.expect("tar runs").success());
    let sum = Command::new("sha256sum").arg(&archive).output().expect("sha256sum runs").stdout;

    let cached = project.path(".cache/llama_cpp_python-0.3.36.tar.gz");
    // --strip-components=1 drops the folder of the archive: the leading "." must not count
    let status = Command::new("tar")
        .args([
            "czf",
            archive.to_str().expect("UTF-8"),
            "-C",
            project.path("pack").to_str().expect("UTF-8"),
            "llama_cpp_python-0.3.36",
        ])
        .status();
    assert!(status.expect("tar runs").success());
    drop(sum);
    let sum = Command::new("sha256sum").arg(&archive).output().expect("sha256sum runs").stdout;
    fs::copy(&archive, &cached).expect("copy");
    project
        .run("setup", &[])
        .fails(&["llama_cpp_python-0.3.36.tar.gz has the wrong sha256", "delete it and run again"]);
    project.has_no_tree();

    project.pin("PIN_SHA256", &String::from_utf8_lossy(&sum)[..64]);
    project.env.push(("http_proxy".into(), "http://127.0.0.1:9".into()));
    project.run("setup", &[]).says("0 commits");
    assert_eq!(git(&project.llama(), &["status", "--porcelain"]), "");
    assert!(!project.read("llama.cpp/.git/config").contains("workspace"));
}

#[test]
fn tools_are_installed_once() {
    let project = Project::new();
    // the stand-in for Python notes how it is called
    project.python(&format!("echo \"$*\" >> '{}'", project.path("calls").display()));
    fs::remove_file(project.path(".venv/.moe-hot")).expect("remove");
    project.setup().says("installing cmake, ninja, libclang, numpy and gguf");
    project.setup().says("ready");
    let calls = project.read("calls");
    assert_eq!(calls.matches("pip install").count(), 1, "{calls}");

    project.python("case $* in *pip\\ install*) echo 'ERROR: No matching distribution'; exit 1;; esac");
    write(&project.path(".venv/.moe-hot"), "of an older set-up");
    fs::write(project.path("scripts/requirements.txt"), "another").expect("write");
    write(&project.path(".venv/.moe-hot"), &format!("# {}\nold", project.path(".venv").display()));
    project.setup().fails(&["installing cmake, ninja, libclang, numpy and gguf into .venv failed: ERROR: No matching distribution", "check the network"]);
}

#[test]
fn what_is_missing_is_named() {
    let tools = ["git", "python3", "c++", "cc", "cargo"];
    for (missing, advice) in [
        ("git", "git is missing: install git"),
        ("python3", "python3 is missing: install Python 3"),
        ("c++", "c++ is missing: install a C++ compiler"),
        ("cargo", "cargo is missing: install a Rust toolchain"),
    ] {
        let mut project = Project::new();
        let bin = project.path("bin");
        fs::create_dir(&bin).expect("folder");
        let others =
            ["bash", "env", "dirname", "basename", "sed", "cut", "sort", "grep", "awk", "df", "cat", "mkdir"];
        for tool in others.iter().chain(&tools).filter(|tool| **tool != missing) {
            symlink(which(tool), bin.join(tool)).expect("symlink");
        }
        project.env.push(("PATH".into(), bin.display().to_string()));
        project.setup().fails(&["setup: error: ", advice]);
        project.has_no_tree();
    }

    for (tool, text, error) in [
        (
            "python3",
            "case $2 in *venv*) exit 1;; esac",
            "python3 has no module venv: install it (on Debian and Ubuntu: apt-get install python3-venv)",
        ),
        ("python3", "case $2 in *version*) exit 1;; esac", "python3 is older than 3.10"),
        ("cargo", "echo cargo 1.63.0", "cargo is version 1.63.0, Rust 1."),
        ("cargo", "echo no toolchain >&2; exit 1", "cargo is version unknown, Rust 1."),
        ("df", "echo head; echo fs 9000 8000 1000 90% /", "only 1000 MiB are free in "),
    ] {
        let mut project = Project::new();
        project.shadow(tool, text);
        project.setup().fails(&["setup: error: ", error]);
        project.has_no_tree();
    }
}

#[test]
fn interrupt_leaves_nothing_half_made() {
    let patches = two_patches();
    for again in [false, true] {
        let mut project = Project::new();
        if again {
            project.setup().says("ready");
        }
        let git_path = which("git");
        let reached = project.path("reached");
        project.shadow(
            "git",
            &format!(
                "case \" $* \" in *\" am \"*) touch '{}'; sleep 60;; esac\nexec {} \"$@\"",
                reached.display(),
                git_path.display()
            ),
        );
        project.set_patches(&patches);
        let child =
            project.command("setup", &["--from", "upstream"]).process_group(0).spawn().expect("script runs");
        let start = Instant::now();
        while !reached.exists() {
            assert!(start.elapsed() < Duration::from_secs(30), "set-up does not get to the patches");
            thread::sleep(Duration::from_millis(10));
        }
        // as the terminal does at Ctrl-C: to the whole group
        let group = i32::try_from(child.id()).expect("pid");
        // SAFETY: kill touches no memory of this process; the group is that of the child, which is not reaped yet.
        assert_eq!(unsafe { libc::kill(-group, libc::SIGINT) }, 0);
        let out = child.wait_with_output().expect("wait");
        assert!(!out.status.success());
        project.env.clear();
        if again {
            assert_eq!(project.head(), git(&project.path("upstream"), &["rev-parse", "HEAD"]));
            assert!(!project.path(".cache/tree").exists());
        } else {
            project.has_no_tree();
        }
        project.setup().says("2 commits");
    }
}

#[test]
fn the_projects_own_patches_apply_to_the_pin() {
    let project = Project::with_real_pin();
    for entry in fs::read_dir(format!("{ROOT}/patches")).expect("patches/") {
        let entry = entry.expect("entry");
        fs::copy(entry.path(), project.path("patches").join(entry.file_name())).expect("copy");
    }
    project.run("setup", &["--from", &format!("{ROOT}/llama.cpp")]).says("llama.cpp/ is ready: ");
    // and are what scripts/export-patches writes: nobody has edited them by hand
    project.run("export-patches", &["--check"]).says("patches/ equals");
}
