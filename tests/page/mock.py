#!/usr/bin/env python3
"""Answers /moe-hot and /moe-hot/ as llama-server does (docs/live-view.md), with made-up models that decode all the
time: for work on the page and its check without a model.

usage: tests/page/mock.py [--port N] [--key KEY] [--read-only] [--hostile]
"""

import argparse
import base64
import hashlib
import http.server
import json
import pathlib
import random
import re
import socket
import threading
import time

PAGE = pathlib.Path(__file__).resolve().parents[2] / "src/view/page.html"
POLICIES = ("decay", "lru", "lfu", "static", "lfru", "s3fifo", "predict")
HOSTILE = "<img src=x onerror=\"document.title='executed'\">"


def security_policy(page):
    def sha256(tag):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S).group(1)
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; script-src {sha256('script')}; style-src {sha256('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Refused(Exception):
    """A change that is not allowed; the text says why."""


class Model:
    """A model whose router has favourites that change with the text, and slots that follow them."""

    def __init__(self, name, layers=24, experts=128, used=8, k=32, speed=38.0, first=0, skipped=(), seed=7):
        self.name, self.experts, self.used, self.speed = name, experts, used, speed
        self.k, self.interval, self.policy, self.frozen = k, 4, "decay", False
        self.requested = {"k": k, "vram_mib": None, "auto": False}
        self.expert_bytes = 2654208
        self.skipped = list(skipped)
        self.rng = random.Random(seed)
        self.layers = list(range(first, first + layers))
        self.taste = [[self.rng.gammavariate(0.35, 1) for _ in range(experts)] for _ in self.layers]
        self.heat = [[0.0] * experts for _ in self.layers]
        self.resident = [set() for _ in self.layers]
        self.swaps = []
        self.stats = dict.fromkeys(
            ("steps", "tokens", "hits", "misses", "linked", "uploads", "upload_bytes", "evictions", "copy_failures",
             "rebalances"), 0)
        self.stats |= dict.fromkeys(
            ("rebalance_seconds", "join_wait_seconds", "worker_busy_seconds", "step_seconds"), 0.0)
        self.rest = 0.0

    def advance(self, seconds):
        """Decodes for a while, in steps of half a second."""
        while seconds > 0:
            span, seconds = min(seconds, 0.5), seconds - 0.5
            tokens = span * self.speed * self.rng.uniform(0.8, 1.2) + self.rest
            self.rest = tokens % 1
            if tokens >= 1:
                self.decode(int(tokens), span)

    def decode(self, tokens, span):
        s = self.stats
        s["steps"] += tokens
        s["tokens"] += tokens
        hits = misses = 0
        for il, taste in enumerate(self.taste):
            if self.rng.random() < 0.03:  # the text moves on
                taste[self.rng.randrange(self.experts)] = self.rng.gammavariate(0.35, 3)
            heat, resident = self.heat[il], self.resident[il]
            for e in range(self.experts):
                heat[e] *= 0.5 ** (tokens / 64)
            for e in self.rng.choices(range(self.experts), taste, k=tokens * self.used):
                heat[e] += 1
                hits, misses = hits + (e in resident), misses + (e not in resident)
        s["hits"] += hits
        s["misses"] += misses
        s["linked"] += misses // 3
        s["step_seconds"] += span
        s["join_wait_seconds"] += span * 0.5 * misses / (hits + misses)
        s["worker_busy_seconds"] += span * misses / (hits + misses)
        if not self.frozen:
            self.swap(tokens)

    def swap(self, tokens):
        s = self.stats
        s["rebalances"] += max(1, tokens // self.interval)
        s["rebalance_seconds"] += 2e-5
        for i, heat in enumerate(self.heat):
            resident = self.resident[i]
            for _ in range(2 + 6 * (len(resident) < self.k // 2)):
                cold = [e for e in range(self.experts) if e not in resident]
                if not cold:
                    break
                best = max(cold, key=heat.__getitem__)
                out = min(resident, key=heat.__getitem__) if len(resident) >= self.k else None
                if heat[best] < 2 or (out is not None and heat[best] < 1.3 * heat[out] + 1):
                    break
                resident.discard(out)
                resident.add(best)
                s["uploads"] += 1
                s["upload_bytes"] += self.expert_bytes
                s["evictions"] += out is not None
                il = self.layers[i]
                self.swaps.insert(0, {"token": s["tokens"], "il": il, "expert": best,
                                      "evicted_il": -1 if out is None else il, "evicted": -1 if out is None else out})
        del self.swaps[32:]

    def change(self, wanted):
        for name in wanted:
            if name not in ("model", "k", "vram_mib", "interval", "policy", "frozen", "save_profile"):
                raise Refused(f"the body: unknown field `{name}`")
        k = wanted.get("k", self.k)
        if "k" in wanted and "vram_mib" in wanted:
            raise Refused("k and vram_mib: expected one of them")
        if type(k) is not int or not 1 <= k <= self.experts:
            raise Refused(f"k: '{k}' is not allowed, expected a number of slots per layer from 1 to {self.experts}")
        if "vram_mib" in wanted:
            k = wanted["vram_mib"] * 2**20 // (self.expert_bytes * len(self.layers))
        interval = wanted.get("interval", self.interval)
        if type(interval) is not int or interval < 1:
            raise Refused(f"interval: '{interval}' is not allowed, expected a number of tokens from 1 to 1048576")
        policy = wanted.get("policy", self.policy)
        if policy != "auto" and policy.split(":")[0] not in POLICIES:
            raise Refused(f"policy: '{policy}' is not allowed, expected auto or one of {', '.join(POLICIES)}")
        self.k, self.interval, self.policy = k, interval, policy
        self.frozen = wanted.get("frozen", self.frozen)
        for i, resident in enumerate(self.resident):
            self.resident[i] = set(sorted(resident, key=self.heat[i].__getitem__, reverse=True)[:k])

    def state(self):
        hottest = max(1.0, *(max(h) for h in self.heat))
        used = sum(map(len, self.resident))
        slots, most = self.k * len(self.layers), self.experts * len(self.layers)
        layers = []
        for il, heat, resident in zip(self.layers, self.heat, self.resident):
            bits = bytearray((self.experts + 7) // 8)
            for e in resident:
                bits[e // 8] |= 1 << e % 8
            layers.append({
                "il": il, "class": 0, "experts": self.experts,
                "heat": base64.b64encode(bytes(round(255 * h / hottest) for h in heat)).decode(),
                "resident": base64.b64encode(bits).decode(),
            })
        return {
            "name": self.name,
            "state": "frozen" if self.frozen else "on", "why": "no swaps, on request" if self.frozen else "", "frozen": self.frozen,
            "requested": self.requested, "k": self.k, "interval": self.interval, "policy": self.policy,
            "link": True, "threads": 15, "device": "CUDA0 mock",
            "slots": slots, "slots_max": most, "slots_used": used,
            "slot_bytes": slots * self.expert_bytes, "slot_bytes_max": most * self.expert_bytes,
            "registered_bytes": most * self.expert_bytes, "free_bytes": 3 * 2**30 - used * 4096,
            "stats": self.stats,
            "classes": [{
                "layers": f"{self.layers[0]}-{self.layers[-1]}", "types": ["q4_K", "q4_K", "q6_K"],
                "experts": self.experts, "used": self.used, "expert_bytes": self.expert_bytes,
                "slots": slots, "slots_max": most, "slots_used": used,
                "hits": self.stats["hits"], "misses": self.stats["misses"],
            }],
            "skipped": self.skipped,
            "layers": layers,
            "swaps": self.swaps,
        }


class Mock:
    """The server. `broken`: None, "silent" (closes connections without an answer), or a status to answer with."""

    def __init__(self, models, port=0, key=None, writable=True):
        self.models, self.key, self.writable, self.broken = models, key, writable, None
        self.lock = threading.Lock()
        self.start = self.now = time.monotonic()
        self.gets = 0
        mock = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                mock.answer(self, None)

            def do_POST(self):
                mock.answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, request, body):
        path = request.path.split("?")[0]
        if path == "/moe-hot/" and body is None:
            page = PAGE.read_text()
            return self.send(request, 200, page, "text/html; charset=utf-8", security_policy(page))
        if path != "/moe-hot":
            return self.error(request, 404, "not_found_error", "File Not Found")
        if self.broken == "silent":
            request.close_connection = True
            return request.connection.shutdown(socket.SHUT_RDWR)
        if self.broken:
            return self.error(request, self.broken, "unavailable_error", "Loading model")
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return self.error(request, 401, "authentication_error", "Invalid API Key")
        if body is not None and not self.writable:
            why = "This server does not support changing the expert cache. Start it with `--props`"
            return self.error(request, 501, "not_supported_error", why)
        with self.lock:
            if body is None:
                self.gets += 1
            else:
                try:
                    self.change(json.loads(body))
                except (Refused, ValueError) as e:
                    return self.error(request, 400, "invalid_request_error", str(e))
            return self.send(request, 200, json.dumps(self.seen()), "application/json; charset=utf-8")

    def change(self, wanted):
        models = [m for m in self.models if wanted.get("model", m.name) == m.name]
        if len(models) != 1:
            raise Refused(f"model: expected one of {', '.join(m.name for m in self.models)}")
        models[0].change(wanted)

    def seen(self):
        now = time.monotonic()
        for model in self.models:
            model.advance(min(now - self.now, 2))  # a slow machine must keep up
        self.now = now
        return {"version": 1, "now_us": int((now - self.start) * 1e6), "writable": self.writable,
                "models": [m.state() for m in self.models]}

    def error(self, request, status, kind, message):
        body = {"error": {"code": status, "message": message, "type": kind}}
        self.send(request, status, json.dumps(body), "application/json; charset=utf-8")

    def send(self, request, status, text, kind, policy=None):
        body = text.encode()
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body)))
        if policy:
            request.send_header("Content-Security-Policy", policy)
        try:
            request.end_headers()
            request.wfile.write(body)
        except ConnectionError:
            pass  # the page was closed


def large():
    return Model("mock-24x128", skipped=[{"layers": "24", "reason": "experts with biases"}])


def small(name="mock-6x64"):
    return Model(name, layers=6, experts=64, used=4, k=24, speed=120, seed=3)


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("usage: ")[1], description=__doc__.split("\n\n")[0])
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--key")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--hostile", action="store_true", help="a model whose name is markup")
    args = parser.parse_args()
    models = [large(), small(HOSTILE if args.hostile else "mock-6x64")]
    mock = Mock(models, args.port, args.key, not args.read_only)
    print(f"{mock.url}/moe-hot/", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
