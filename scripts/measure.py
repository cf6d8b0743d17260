"""What scripts/gpu-check and scripts/bench share: commands with a time limit, facts of the machine, texts and models,
runs of llama-bench and what nvidia-smi shows of them, and the bound of a token."""

import glob
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = pathlib.Path(sys.argv[0]).name
MODEL = ROOT / "models/moe-e64-Q4_0.gguf"
TEXTS = ROOT / "models/texts"


def say(text):
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


def fail(text):
    sys.exit(f"{PROGRAM}: error: {text}")


class OutOfTime(Exception):
    """The step's time is over."""


class Broken(Exception):
    """A command failed; the text says which and why."""


class Session:
    """Commands with a time limit, under the number that a report lists them by, and what is to be cleaned up."""

    def __init__(self, programs, lib_path):
        self.programs = programs
        self.start = time.monotonic()
        self.patience = 1  # what limits are multiplied with
        self.step, self.deadline, self.log = None, None, None
        self.commands = []
        self.temp = pathlib.Path(tempfile.mkdtemp(prefix=f"moe-hot-{PROGRAM}-"))
        self.made = []
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_")}
        self.env["LLAMA_ARG_MOE_HOT_AUTO_OFF"] = "off"  # what is named is measured, whether it pays or not
        libraries = [str(programs), *lib_path]
        # the toolkit that scripts/build fetches where there is none
        libraries += sorted(glob.glob(str(ROOT / ".cache/cuda/lib/python3*/site-packages/nvidia/*/lib")))
        self.env["LD_LIBRARY_PATH"] = ":".join(libraries + [p for p in (self.env.get("LD_LIBRARY_PATH"),) if p])
        # one GPU, the one that nvidia-smi calls 0
        self.env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        self.env.setdefault("CUDA_VISIBLE_DEVICES", "0")

    def begin(self, step, seconds, logs):
        self.step, self.deadline = step, time.monotonic() + seconds * self.patience
        self.log = logs / f"{step}.log"
        self.log.write_text("")

    def left(self):
        return self.deadline - time.monotonic()

    def spent(self):
        return time.monotonic() - self.start

    def command(self, argv, env=None):
        """The number under which the report lists a command."""
        line = " ".join([f"{k}={shlex.quote(v)}" for k, v in (env or {}).items()] + [shlex.quote(str(a)) for a in argv])
        line = line.replace(str(ROOT) + "/", "")
        if line not in self.commands:
            self.commands.append(line)
        return self.commands.index(line) + 1

    def run(self, argv, limit, env=None, name=None):
        """Runs a command in the step's log. Returns its status (None: it took too long) and its output."""
        limit = min(limit * self.patience, self.left())
        if limit < 3:
            raise OutOfTime
        number, name = self.command(argv, env), name or pathlib.Path(argv[0]).name
        say(f"{self.step}: [{number}] {name} ...")
        started = time.monotonic()
        with open(self.temp / "out", "w+b") as out, open(self.temp / "err", "w+b") as err:
            try:
                p = subprocess.Popen([str(a) for a in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                     cwd=ROOT, env={**self.env, **(env or {})}, start_new_session=True)
            except OSError as e:
                raise Broken(f"{argv[0]} cannot be started: {e.strerror}") from None
            try:
                status = p.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
                stop(p, signal.SIGINT, 3)
            finally:
                stop(p, signal.SIGKILL, 5)
            out.seek(0), err.seek(0)
            stdout, stderr = out.read().decode(errors="replace"), err.read().decode(errors="replace")
        seconds = time.monotonic() - started
        with self.log.open("a") as f:
            f.write(f"$ {self.commands[number - 1]}\n{stderr}{stdout}\n"
                    f"--- {'ended' if status is not None else 'stopped'} after {seconds:.1f} s"
                    f"{f' with status {status}' if status is not None else ''}\n\n")
        return status, stdout, stderr, number

    def need(self, argv, limit, env=None, name=None):
        """As run, and anything but status 0 is an error."""
        status, stdout, stderr, number = self.run(argv, limit, env, name)
        if status is None:
            if self.left() < 1:
                raise OutOfTime
            raise Broken(f"[{number}] took longer than {limit * self.patience:.0f} s")
        if status != 0:
            raise Broken(f"[{number}] failed with status {status}: {reason(stderr or stdout)}")
        return stdout, stderr, number

    def bin(self, name):
        path = self.programs / name
        if not path.exists():
            raise Broken(f"{path} is missing")
        return path

    def cleanup(self):
        for path in self.made:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.temp, ignore_errors=True)


def stop(p, how, seconds):
    """Signals a command and all that it started."""
    try:
        os.killpg(p.pid, how)
    except (ProcessLookupError, PermissionError):
        pass
    try:
        p.wait(seconds)
    except subprocess.TimeoutExpired:
        pass


def reason(log):
    lines = [l.strip() for l in log.splitlines() if l.strip()]
    bad = [l for l in lines if re.search(r"(^|[^a-z])(error|fatal)\b|GGML_ASSERT|moe-hot:.*(gave up|fail)", l, re.I)]
    return (bad or lines or ["no output"])[-1][:200]


def middle(values):
    values = list(values)
    return statistics.median(values) if values else None


def spread(values, digits=1):
    """median (lowest to highest)"""
    values = list(values)
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def quantile(values, q):
    """Nearest rank, of any order."""
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


# ---------------------------------------------------------------------------------------------------------------
# Texts and models
# ---------------------------------------------------------------------------------------------------------------


def mixed_text(run, name, size, first=1600, slice=1600):
    """A file with slices of all texts in turn, so that the domain changes every 400 tokens or so. Cut at spaces."""
    parts = []
    for i, path in enumerate(run.args.texts):
        text, slices, at = path.read_text(errors="ignore"), [], 0
        while at < len(text):
            end = text.find(" ", at + (first if at == 0 and i == 0 else slice)) + 1 or len(text)
            slices.append(text[at:end])
            at = end
        parts.append(slices)
    out, turn = "", 0
    while len(out) < size and any(turn < len(p) for p in parts):
        out += "".join(p[turn] for p in parts if turn < len(p))
        turn += 1
    path = run.args.models / f"moe-hot-check-{name}.txt"
    path.write_text(out)
    run.made.append(path)
    return path


def gguf(path):
    """Keys of a GGUF file, without the name of the architecture, and the bytes of its tensors."""
    scalars = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    with open(path, "rb") as f:
        def take(fmt):
            return struct.unpack("<" + fmt, f.read(struct.calcsize("<" + fmt)))

        def value(kind):
            if kind == 8:
                return f.read(take("Q")[0])
            if kind == 9:
                kind, n = take("IQ")
                for _ in range(n) if kind in (8, 9) else ():
                    value(kind)
                return None if kind in (8, 9) else f.seek(n * scalars[kind], 1)
            return int.from_bytes(f.read(scalars[kind]), "little")

        _, _, n_tensors, n_keys = take("4sIQQ")
        found = {}
        for _ in range(n_keys):
            key = value(8).decode()
            found[key.split(".", 1)[-1]] = value(take("I")[0])
        offsets = {}
        for _ in range(n_tensors):
            name = value(8).decode()
            take(f"{take('I')[0]}QI")
            offsets[name], = take("Q")
        data = -(-f.tell() // 32) * 32
    # a tensor ends where the next one begins
    order = sorted(offsets, key=offsets.get)
    ends = [offsets[name] for name in order[1:]] + [os.path.getsize(path) - data]
    return found, {name: end - offsets[name] for name, end in zip(order, ends)}


def shape(path):
    """Layers and experts a layer."""
    keys, _ = gguf(path)
    return keys["block_count"], keys["expert_count"]


def slots_mib(path, k):
    """MiB of K slots a layer."""
    keys, tensors = gguf(path)
    experts = sum(size for name, size in tensors.items() if "_exps." in name)
    return -(-experts * k // keys["expert_count"] >> 20)


def wide_model(run):
    """The shipped model widened to 11.2 GB, in --models, where it stays with --keep."""
    path = run.args.models / "moe-hot-check-wide.gguf"
    widen = ROOT / "scripts/widen"
    fresh = path.exists() and path.stat().st_mtime > max(MODEL.stat().st_mtime, widen.stat().st_mtime)
    if not fresh:
        status, _, stderr, _ = run.run([sys.executable, widen, MODEL, path, "-r", "8", "-s", "8", "-t", "8"], 90, name="widening the model")
        if status != 0:
            raise Broken(f"scripts/widen: {reason(stderr) if status is not None else 'took too long'}")
    if path not in run.made and not run.args.keep:
        run.made.append(path)
    return path


def generated_model(run, shape, layers, skew, name="geometry"):
    """A synthetic model of a shape of scripts/gen-moe-gguf, of `layers` layers or as many as fit into --models and three fifths of the memory."""
    gen = ROOT / "scripts/gen-moe-gguf"
    path = run.args.models / f"moe-hot-check-{name}.gguf"
    if not layers:
        out, err, _ = run.need([sys.executable, gen, path, "--shape", shape, "--dry-run"], 30, name="size of the model")
        whole, size = re.search(r"(\d+) layers, ([\d.]+) GB", out + err).groups()
        room = min(shutil.disk_usage(run.args.models).free, 1e9 * meminfo("MemAvailable") * 0.6)
        layers = min(int(whole), int(int(whole) * room / (1e9 * float(size))))
        if layers < 1:
            raise Broken(f"{run.args.models} and the memory have no room for a layer of {shape}")
        say(f"{layers} of {whole} layers of {shape}")
    run.made.append(path)
    status, _, stderr, number = run.run([sys.executable, gen, path, "--shape", shape, "--layers", layers, "--skew", skew], 120, name="generating the model")
    if status != 0:
        raise Broken(f"[{number}] {reason(stderr) if status is not None else 'took too long'}")
    return path


# ---------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------


def first_line(argv, env=None):
    try:
        r = subprocess.run(argv, capture_output=True, text=True, timeout=20, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (r.stdout.strip().splitlines() or [None])[0] if r.returncode == 0 else None


def meminfo(key):
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1e6
    return 0.0


def nvidia(query):
    """What nvidia-smi says of the first GPU, values with commas; None where there is none."""
    return first_line(["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader,nounits"])


def machine(run):
    """Facts of the machine and the build as pairs, and whether there is a GPU that llama.cpp uses."""
    query = "name,driver_version,memory.total,memory.free,pcie.link.gen.max,pcie.link.width.max,compute_cap"
    line = nvidia(query)
    info = []
    if line:
        name, driver, total, free, gen, width, cap = (x.strip() for x in line.split(","))
        info.append(("GPU", f"{name}, {total} MiB ({free} free), compute capability {cap}, PCIe {gen} x{width}, driver {driver}"))
        busy = first_line(["nvidia-smi", "--query-compute-apps=pid,name", "--format=csv,noheader"])
        if busy:
            info.append(("others on the GPU", busy))
    cpu = next((l.split(":", 1)[1].strip() for l in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
                if l.startswith("model name")), platform.processor())
    info.append(("CPU", f"{cpu}, {os.cpu_count()} cores"))
    info.append(("memory", f"{meminfo('MemTotal'):.0f} GB, {meminfo('MemAvailable'):.0f} GB available; {run.args.models} "
                           f"{shutil.disk_usage(run.args.models).free / 1e9:.0f} GB free"))
    info.append(("system", f"{platform.system()} {platform.release()}"))
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20).stdout
        info.append(("nvcc", re.search(r"release [^\n]*", text).group(0)))
    except (OSError, AttributeError, subprocess.TimeoutExpired):
        info.append(("nvcc", "none"))
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]
    commit = first_line([*git, "rev-parse", "--short", "HEAD"])
    changed = commit and first_line([*git, "status", "--porcelain", "-uno"])
    packed = run.programs / "COMMIT"  # from scripts/pack
    # what was built counts, not what lies beside it
    info.append(("commit", packed.read_text().strip() if packed.exists() else
                 commit + (" with changes" if changed else "") if commit else "unknown"))
    devices = ""
    if (run.programs / "llama-bench").exists():
        _, out, err, _ = run.run([run.bin("llama-bench"), "--list-devices"], 40)
        devices = next((l.strip() for l in (out + err).splitlines() if re.match(r"\s*CUDA\d", l)), "")
        info.append(("llama.cpp sees", devices or "no CUDA device"))
    return info, bool(line and devices)


# ---------------------------------------------------------------------------------------------------------------
# llama-bench
# ---------------------------------------------------------------------------------------------------------------


class Vram:
    """The most memory in use on the first GPU while a command runs, in MiB over what was in use before."""

    def __init__(self, on):
        self.process, self.before, self.most = None, 0, None
        query = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        if on and shutil.which("nvidia-smi"):
            self.before = int(first_line(query) or 0)
            self.process = subprocess.Popen([*query, "-lms", "250"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            if line.strip().isdigit():
                self.most = max(self.most or 0, int(line) - self.before)

    def end(self):
        if self.process:
            self.process.kill()
            self.process.wait()
        return self.most


def bench(run, name, argv, limit=90, env=None, program=None):
    """The rows of our llama-bench, or of another one."""
    out, err, number = run.need([program or run.bin("llama-bench"), "-o", "jsonl", *argv], limit, env, name)
    if m := re.search(r"warning: --moe-hot-k \d+ is not active[^\n]*", err):
        raise Broken(f"[{number}] {m.group(0)}")
    rows = [json.loads(l) for l in out.splitlines() if l.startswith("{")]
    if not rows:
        raise Broken(f"[{number}] {name}: llama-bench printed no rows: {reason(err)}")
    # upstream's cache tells its hits when a context ends, and uploads every miss
    cached = [r for r in rows if r.get("moe_cache_mib")]
    told = re.findall(r"ubatch <= 8: hits = (\d+), misses = (\d+)", err)
    if len(cached) != len(told):
        raise Broken(f"[{number}] upstream's cache was not active: {next((l for l in err.splitlines() if 'MoE cache' in l), reason(err))}")
    for r, (hits, misses) in zip(cached, told):
        r["hit_rate"], r["uploads"] = int(hits) / (int(hits) + int(misses)), int(misses)
    return rows, number


def kept(row):
    """Samples of a row without the first, which warms slots, caches and clocks up."""
    return row["samples_ts"][1:] or row["samples_ts"]


def rounds(run, most, once):
    """Calls once(round) as often as the step's time allows, at least once; yields how many rounds are whole."""
    done, longest = 0, 0.0
    while done < most and (done == 0 or run.left() > longest * 1.1 + 2):
        started = time.monotonic()
        once(done + 1)
        longest = max(longest, time.monotonic() - started)
        done += 1
        yield done


def fastest(run, table, name, modes, counts, argv, start, program=None):
    """tok/s, load mode and threads with which a configuration decodes fastest; `start` if none runs. A mode after the first is tried with the
    threads that were best so far, and with the others where it is faster."""
    best = (0.0, *start)

    def attempt(mode, counts):
        nonlocal best
        try:
            rows, number = bench(run, f"{name}, threads, {mode}", [*argv, "-lm", mode, "-t", ",".join(map(str, counts))], 120, program=program)
        except Broken as e:
            run.check(f"tuning {name}, {mode}", str(e), "runs", False)
            return
        for r in rows:
            speed = middle(kept(r))
            table.append([name, mode, r["n_threads"], f"{speed:.1f}", f"[{number}]"])
            run.row(f"tune {name} {mode} t={r['n_threads']}", "tok_s", speed, "tok/s", number)
            # loading without mmap costs seconds each time: less than 2 % is not worth them
            if speed > best[0] * (1.02 if mode != best[1] else 1.0):
                best = (speed, mode, r["n_threads"])

    for mode in modes:
        if not best[0]:
            attempt(mode, counts)
            continue
        _, _, tried = best
        attempt(mode, [tried])
        if best[1] == mode and (rest := [n for n in counts if n != tried]):
            attempt(mode, rest)
    return best


class Bound:
    """The least time of a token (DESIGN 6): in a layer the GPU's reading of hot experts in VRAM runs together with the reading of cold ones in host
    memory, by the CPU and over the link at once. Its dense weights come first: they decide which experts the layer uses."""

    def __init__(self, model):
        keys, tensors = gguf(model)
        experts = {name: size for name, size in tensors.items() if "_exps." in name}
        self.all_experts = sum(experts.values())
        self.experts = self.all_experts * keys["expert_used_count"] / keys["expert_count"]
        # of the embedding a token reads a row, unless it is the output matrix, too
        embedding = tensors.get("token_embd.weight", 0) if "output.weight" in tensors else 0
        self.dense = sum(tensors.values()) - self.all_experts - embedding
        self.host, self.vram, self.how, self.probe, self.number = None, None, "not measured", None, None  # bytes/s

    def measure(self, run):
        """What moe-hot probe finds: both readers of host memory at once, since each alone would count it twice."""
        out, _, self.number = run.need([run.bin("moe-hot"), "probe", "--json"], 90, name="what the machine reads")
        self.probe = json.loads(out)
        gpu = self.probe["gpu"]
        alone = max(r["gb_s"] for r in self.probe["cpu_read"])
        both = gpu["both_at_once"] if gpu else {"cpu_gb_s": 0, "gpu_gb_s": 0}
        self.host = 1e9 * max(alone, both["cpu_gb_s"] + both["gpu_gb_s"])
        for name, value in (("cpu_read", alone), ("both_cpu", both["cpu_gb_s"]), ("both_gpu", both["gpu_gb_s"])):
            run.row("bound", name, value, "GB/s", self.number)
        if gpu:
            self.vram, self.how = 1e9 * gpu["vram_read_gb_s"], f"what a kernel reads of VRAM ([{self.number}])"
            run.row("bound", "vram_read", gpu["vram_read_gb_s"], "GB/s", self.number)

    def all_in_vram(self, speed):
        """From here on: what the GPU reads when it decodes everything, at `speed` tok/s."""
        self.vram, self.how = (self.dense + self.experts) * speed, "the bytes of a token times the tok/s of everything in VRAM"

    def speed(self, hit_rate):
        """tok/s that a share of uses in VRAM allows; without a GPU everything is read from host memory."""
        if not self.host or hit_rate is None:
            return None
        if not self.vram:
            return self.host / (self.dense + self.experts)
        hot = self.experts * hit_rate
        return 1 / (self.dense / self.vram + max(hot / self.vram, (self.experts - hot) / self.host))

    def caption(self):
        gb = lambda value: "not measured" if value is None else f"{value / 1e9:.1f} GB/s"
        token = f"E = {self.experts / 1e6:.0f} MB of experts and D = {self.dense / 1e6:.0f} MB of other weights that a token reads"
        host = f"{gb(self.host)} ([{self.number}])"
        if not self.vram:
            return f"Of the bound: tok/s over those of H / (D + E), with {token}, and H, what all threads read of memory: {host}."
        return (f"Of the bound: tok/s over those of 1 / (D / V + max(h E / V, (1 - h) E / H)), with h the share of uses that VRAM serves, {token}; H, what the CPU and the GPU "
                f"over the link read of host memory at once: {host}; V, {self.how}: {gb(self.vram)}. It is the sum over all layers, which is no more than the sum of each layer's own.")
