#!/usr/bin/env python3
"""How well a running llama-server with tiny-chat echoes a random marker.

  nonce.py http://127.0.0.1:PORT
"""
import concurrent.futures as cf
import random
import sys

from evalserver import ask
from facts import WORDS

r = random.Random(5)
HEX = "0123456789abcdef"
LOWER = "abcdefghijklmnopqrstuvwxyz"
UPPER = LOWER.upper()
DIGITS = "0123456789"


def some(alphabet, n):
    return "".join(r.choice(alphabet) for _ in range(n))


def words(n):
    return " ".join(r.choice(WORDS) for _ in range(n))


MARKERS = {
    "3 digits": lambda: some(DIGITS, 3), "6 digits": lambda: some(DIGITS, 6),
    "8 digits": lambda: some(DIGITS, 8), "12 digits": lambda: some(DIGITS, 12),
    "4 letters": lambda: some(LOWER, 4), "6 letters": lambda: some(LOWER, 6),
    "8 letters": lambda: some(LOWER, 8), "4 capitals": lambda: some(UPPER, 4),
    "8 hex": lambda: some(HEX, 8), "16 hex": lambda: some(HEX, 16),
    "uuid": lambda: "-".join(some(HEX, n) for n in (8, 4, 4, 4, 12)),
    "xxx-999": lambda: some(LOWER, 3) + "-" + some(DIGITS, 3),
    "word-99": lambda: r.choice(WORDS) + "-" + some(DIGITS, 2),
    "word-word": lambda: r.choice(WORDS) + "-" + r.choice(WORDS),
    "1 word": lambda: words(1), "3 words": lambda: words(3),
    "6 words": lambda: words(6), "9 words": lambda: words(9),
}


def main():
    for name, make in MARKERS.items():
        counts = []
        for prompt in ("Repeat after me: {}", "Reply with exactly: {}", "Say {}"):
            xs = [make() for _ in range(60)]
            with cf.ThreadPoolExecutor(4) as ex:
                got = list(ex.map(lambda x: ask(sys.argv[1], [{"role": "user", "content": prompt.format(x)}], 60)[0], xs))
            counts.append(sum(a == b for a, b in zip(got, xs)))
        print(f"| {name} | " + " | ".join(f"{n}/60" for n in counts) + " |")


if __name__ == "__main__":
    main()
