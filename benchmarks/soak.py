#!/usr/bin/env python3
"""Whether a server with a LenVM stays right under a mixed load in which clients leave, abort and send rubbish.

    benchmarks/soak.py --minutes 30

Workers send requests of every kind at random for the given time. Requests whose answer is known (greedy answers, asked
once before the load began; strict targets) are checked whenever they finish; the others leave: they close the stream
at a random token, break off in the middle of the body, are aborted by id, or are refused. Printed at the end: how many
of each, wrong answers, KV tokens in use afterwards, and the memory of the server's processes over time. Exit status 1
if an answer was wrong, KV did not return to zero, or memory grew by more than 3 % from the second quarter to the last.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

# not this folder: its kernels.py would stand for the package of that name, which transformers looks for
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import httpx
import psutil

from tests.sglang.conftest import Server, start
from tests.sglang.models import FAMILIES, make_pair, prompts

LIMIT = 40
FIELDS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"length_target": 20},
    {"length_target": 12, "length_mode": "at_most"},
    {"length_target": 25, "length_mode": "at_least"},
    {"length_target": 15, "length_control": "hard"},
    {"length_target": 18, "length_control": "soft"},
    {"length_bias": -3.0},
    {"return_length_values": True},
)
ALLOWED_GROWTH = 0.03


class Soak:
    """The load and its record."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.client = httpx.Client(base_url=server.url, timeout=300, limits=httpx.Limits(max_connections=None))
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.lock = threading.Lock()
        self.known: list[tuple[dict[str, Any], list[int]]] = []
        for prompt, fields in zip(prompts(48, seed, shared=40), FIELDS * 6, strict=True):
            body = self.body(prompt, fields, temperature=0)
            self.known.append((body, self.client.post("/generate", json=body).json()["output_ids"]))

    @staticmethod
    def body(prompt: list[int], fields: dict[str, Any] | None, **sampling: Any) -> dict[str, Any]:
        return {"input_ids": prompt, "sampling_params": {"max_new_tokens": LIMIT, **sampling}, **(fields or {})}

    def count(self, kind: str, wrong: str | None = None) -> None:
        with self.lock:
            self.counts[kind] += 1
            if wrong is not None:
                self.wrong.append(f"{kind}: {wrong}")

    # ----- kinds of requests --------------------------------------------------------------------------------------

    def known_answer(self, draw: random.Random) -> None:
        body, expected = draw.choice(self.known)
        answer = self.client.post("/generate", json=body)
        right = answer.status_code == 200 and answer.json()["output_ids"] == expected
        self.count("known answer", None if right else f"{body} gave {answer.text[:300]}")

    def strict(self, draw: random.Random) -> None:
        target = draw.randint(1, LIMIT)
        fields = {"length_target": target, "length_strict": True, "return_length_values": draw.random() < 0.3}
        answer = self.client.post("/generate", json=self.body(prompts(1, draw.randrange(10**6))[0], fields))
        right = answer.status_code == 200 and answer.json()["lenvm"]["achieved"] == target
        self.count("strict target", None if right else f"{target} gave {answer.text[:300]}")

    def predict(self, draw: random.Random) -> None:
        answer = self.client.post("/lenvm/predict", json={"prompt": prompts(3, draw.randrange(10**6))})
        self.count("predict", None if answer.status_code == 200 else answer.text[:300])

    def refused(self, draw: random.Random) -> None:
        bad = draw.choice([{"length_target": 0}, {"length_goal": 3}, {"length_bias": "x"}, {"length_mode": "at_most"}])
        answer = self.client.post("/generate", json=self.body([9], bad))
        self.count("refused", None if answer.status_code == 400 else f"{bad} gave {answer.status_code}")

    def leaves_stream(self, draw: random.Random) -> None:
        fields = draw.choice(FIELDS)
        body = {**self.body(prompts(1, draw.randrange(10**6))[0], fields, ignore_eos=False), "stream": True}
        body["sampling_params"]["max_new_tokens"] = 300
        last = draw.randint(0, 15)
        with self.client.stream("POST", "/generate", json=body) as response:
            for i, _ in enumerate(response.iter_lines()):
                if i >= last:
                    break
        self.count("left a stream")

    def aborted(self, draw: random.Random) -> None:
        rid = f"soak-{draw.randrange(10**12)}"
        fields = draw.choice(FIELDS)
        body = {**self.body(prompts(1, draw.randrange(10**6))[0], fields), "rid": rid}
        body["sampling_params"]["max_new_tokens"] = 300
        timer = threading.Timer(draw.random() * 0.5, lambda: self.client.post("/abort_request", json={"rid": rid}))
        timer.start()
        self.client.post("/generate", json=body)
        timer.join()
        self.count("aborted")

    def breaks_off(self, draw: random.Random) -> None:
        content = json.dumps(self.body([9, 8], {"length_target": 30})).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        whole = head + content
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=60) as connection:
            connection.sendall(whole[: draw.randint(1, len(whole))])
        self.count("broke off")

    # ----- running it ---------------------------------------------------------------------------------------------

    def worker(self, number: int, until: float) -> None:
        draw = random.Random(self.seed * 1000 + number)
        kinds = [self.known_answer, self.strict, self.leaves_stream, self.aborted, self.predict, self.refused,
                 self.breaks_off]  # fmt: skip
        while time.monotonic() < until:
            kind = draw.choices(kinds, weights=[8, 4, 4, 3, 1, 1, 1])[0]
            try:
                kind(draw)
            except httpx.HTTPError as error:
                self.count(kind.__name__, repr(error))

    def memory(self) -> float:
        """MiB of the server's processes."""
        processes = [psutil.Process(self.server.process.pid)]
        processes += processes[0].children(recursive=True)
        return sum(p.memory_info().rss for p in processes) / 2**20

    def kv_tokens(self) -> int:
        """KV tokens and requests that the scheduler still holds, the cache emptied; it reports them when it is idle for
        a while."""
        for _ in range(40):
            time.sleep(1)
            self.client.post("/flush_cache")
            loads = self.client.get("/v1/loads").json()["loads"]
            used = sum(load["num_used_tokens"] + load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)
            if used == 0:
                break
        return int(used)

    def run(self, minutes: float, workers: int) -> bool:
        """Load, then the figures; whether all was well."""
        began = time.monotonic()
        until = began + minutes * 60
        threads = [threading.Thread(target=self.worker, args=(i, until)) for i in range(workers)]
        for thread in threads:
            thread.start()
        samples: list[float] = []
        while time.monotonic() < until and self.server.process.poll() is None:
            time.sleep(min(5.0, minutes * 60 / 40))
            samples.append(self.memory())
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        alive = self.server.process.poll() is None
        used = self.kv_tokens() if alive else -1
        quarter = max(1, len(samples) // 4)
        early, late = statistics.median(samples[quarter : 2 * quarter]), statistics.median(samples[-quarter:])
        total = sum(self.counts.values())
        print(f"{total} requests in {seconds / 60:.1f} minutes, {workers} workers")
        for kind, number in self.counts.most_common():
            print(f"  {kind:<16} {number}")
        print(f"wrong answers     {len(self.wrong)}")
        print(f"server alive      {alive}")
        print(f"KV tokens in use  {used} afterwards")
        print(f"memory            {samples[0]:.0f} MiB at first, {early:.0f} in the second quarter, {late:.0f} at last")
        for line in self.wrong[:10]:
            print(f"  {line}")
        return alive and not self.wrong and used == 0 and late <= early * (1 + ALLOWED_GROWTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--workers", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pair = make_pair(Path(folder), FAMILIES["qwen2"], FAMILIES["qwen2"])
        server = start(Path(folder) / "log", pair / "base", "--lenvm-model", str(pair / "lenvm"))
        try:
            fine = Soak(server.wait(), given.seed).run(given.minutes, given.workers)
            if not fine:
                print(server.tail())
        finally:
            server.stop()
    raise SystemExit(0 if fine else 1)


if __name__ == "__main__":
    main()
