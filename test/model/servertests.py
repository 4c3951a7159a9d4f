#!/usr/bin/env python3
"""Facts about the real llama-server with tiny-chat (run as root).

  servertests.py ROOTFS MODEL_IN_ROOTFS
"""
import atexit
import concurrent.futures as cf
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

R, M = sys.argv[1], sys.argv[2]
TMP = tempfile.mkdtemp(prefix="servertests-")
atexit.register(shutil.rmtree, TMP, True)
LOG = os.path.join(TMP, "server.log")
PORT = 18110
B = f"http://127.0.0.1:{PORT}"
Q = ["What is 3 + 4?", "Tell me a story about a fox.", "Count from 1 to 50.", "What is the capital of France?", "Hello!", "Write a poem about the sea.",
     "Repeat after me: k7x-92q blue", "Sort these numbers: 42, 7, 19, 88.", "What is 47 + 38?", "Why is the sky blue?", "Tell me a story about a girl and a kite.",
     "Write hello world in C."]


class Server:
    def __init__(self, *flags, root=R, pre=()):
        self.log = open(LOG, "w")
        t = time.time()
        self.p = subprocess.Popen([*pre, "chroot", root, "/usr/bin/llama-server", "-m", M, "--alias", "tiny-chat", "--port", str(PORT), *flags], stdout=self.log, stderr=self.log)
        while True:
            try:
                if urllib.request.urlopen(B + "/health", timeout=2).status == 200:
                    break
            except (urllib.error.URLError, ConnectionError):
                if self.p.poll() is not None:
                    raise SystemExit("server died: " + open(LOG).read())
                time.sleep(0.005)
        self.ready = time.time() - t

    def __enter__(self):
        return self

    def __exit__(self, *a):
        self.p.send_signal(signal.SIGTERM)
        self.p.wait(10)


def post(path, d, timeout=60):
    try:
        return json.load(urllib.request.urlopen(urllib.request.Request(B + path, json.dumps(d).encode(), {"Content-Type": "application/json"}), timeout=timeout))
    except urllib.error.HTTPError as e:
        return {"http": e.code, **json.load(e)}


def chat(q, **kw):
    d = post("/v1/chat/completions", {"messages": [{"role": "user", "content": q}], "temperature": 0, "max_tokens": 400, **kw})
    return d


def text(q, **kw):
    return chat(q, **kw)["choices"][0]["message"]["content"]


def lps(q, **kw):
    d = chat(q, logprobs=True, top_logprobs=3, **kw)
    return d["choices"][0]["message"]["content"], tuple(round(c["logprob"], 9) for c in d["choices"][0]["logprobs"]["content"])


def main():
    ref, reflp = {}, {}
    with Server("-t", "1", "-np", "1") as s:
        print(f"ready after {s.ready * 1000:.0f} ms")
        for q in Q:
            ref[q], reflp[q] = lps(q, cache_prompt=False)
        same = all(lps(q, cache_prompt=False) == (ref[q], reflp[q]) for q in Q for _ in range(4))
        print("-t 1, cache off, 4 repeats: text and logprobs same bit for bit:", same)
        r = [lps(q) for _ in range(3) for q in Q]
        print("-t 1, cache on (default), 3 rounds: text same:", all(r[i][0] == ref[Q[i % len(Q)]] for i in range(len(r))),
              "logprobs same:", all(r[i][1] == reflp[Q[i % len(Q)]] for i in range(len(r))),
              "largest logprob difference: %.2g" % max(max(abs(a - b) for a, b in zip(r[i][1], reflp[Q[i % len(Q)]])) for i in range(len(r))))
        a = [text(Q[1], temperature=1.0, seed=7, cache_prompt=False) for _ in range(3)]
        b = text(Q[1], temperature=1.0, seed=8, cache_prompt=False)
        print("temperature 1: same seed gives same text:", len(set(a)) == 1, "| other seed gives other text:", a[0] != b)
        c = [text(Q[1], temperature=1.0, cache_prompt=False) for _ in range(4)]
        print("temperature 1, no seed: different texts of 4:", len(set(c)))
        print("smallest top-1 margin over the answers (logprob gap to second): ", end="")
        gaps = []
        for q in Q:
            for cc in chat(q, logprobs=True, top_logprobs=2, cache_prompt=False)["choices"][0]["logprobs"]["content"]:
                t = cc["top_logprobs"]
                if len(t) > 1:
                    gaps.append((t[0]["logprob"] - t[1]["logprob"], q, t[0]["token"], t[1]["token"]))
        print(["%.2f %r %r/%r" % g for g in sorted(gaps)[:4]])
    for flags in (["-t", "2", "-np", "1"], ["-t", "1", "-np", "4"], ["-t", "2", "-np", "4"], ["-t", "1", "-np", "1", "-fa", "off"], ["-t", "1", "-np", "1", "--no-repack"],
                  ["-t", "1", "-np", "1", "-b", "32", "-ub", "32"], ["-t", "1", "-np", "1", "-ctk", "q8_0", "-ctv", "q8_0"], ["-t", "1", "-np", "4", "--no-kv-unified"]):
        with Server(*flags):
            r = [lps(q, cache_prompt=False) for q in Q]
            d = max(max(abs(a - b) for a, b in zip(x[1], reflp[q])) for x, q in zip(r, Q))
            line = f"{' '.join(flags):34s} alone: text same: {all(x[0] == ref[q] for x, q in zip(r, Q))}, logprobs same: {all(x[1] == reflp[q] for x, q in zip(r, Q))} (largest diff {d:.2g})"
            if "4" in flags:
                with cf.ThreadPoolExecutor(4) as ex:
                    jobs = Q * 4
                    r = list(ex.map(lambda q: lps(q, cache_prompt=False), jobs))
                    d = max(max(abs(a - b) for a, b in zip(x[1], reflp[q])) for x, q in zip(r, jobs))
                    line += f" | 4 at once: text same: {all(x[0] == ref[q] for x, q in zip(r, jobs))}, logprobs same: {all(x[1] == reflp[q] for x, q in zip(r, jobs))} (largest diff {d:.2g})"
            print(line)
    # other CPU code paths: hide the faster backends
    be = R + "/usr/lib/x86_64-linux-gnu/ggml/backends0"
    for v in ("x64", "sse42", "haswell", "skylakex", "icelake", "sapphirerapids"):
        hide = f"mkdir -p {TMP}/be && rm -f {TMP}/be/* && cp {be}/libggml-cpu-{v}.so {TMP}/be/ && mount --bind {TMP}/be {be} && exec \"$@\""
        with Server("-t", "1", "-np", "1", pre=("unshare", "-m", "sh", "-c", hide, "sh")):
            r = [lps(q, cache_prompt=False) for q in Q]
            d = max(max(abs(a - b) for a, b in zip(x[1], reflp[q])) if x[0] == ref[q] else 99 for x, q in zip(r, Q))
            print(f"CPU backend {v:15s} text same: {all(x[0] == ref[q] for x, q in zip(r, Q))} ({sum(x[0] == ref[q] for x, q in zip(r, Q))}/{len(Q)}), logprobs same: {all(x[1] == reflp[q] for x, q in zip(r, Q))} (largest diff {d:.2g})")


if __name__ == "__main__":
    main()
