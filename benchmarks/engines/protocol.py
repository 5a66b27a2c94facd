"""How a worker talks to `python benchmarks/engines`: a line of JSON in, a line of JSON out. Standard library only.

A request `{"context": n, "tokens": m}` asks for a prompt of n tokens, then m tokens one by one; the answer is
`{"prefill_s": s, "ms": [one number a token]}` (or one number, the mean of all of them, where an engine shows no single tokens).
"""

import json
import os
import random
import sys
from collections.abc import Callable

Answer = dict[str, object]


def prompt(num_tokens: int, vocabulary: int) -> list[int]:
    """The same pseudo-random prompt in every engine."""
    source = random.Random(num_tokens)
    return [source.randrange(vocabulary) for _ in range(num_tokens)]


def serve(describe: Answer, run: Callable[[int, int], Answer], answers: int) -> None:
    """Answers requests until the input ends, to a file descriptor of its own: engines print to stdout as they like."""
    with os.fdopen(answers, "w") as out:
        print(json.dumps(describe), file=out, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(run(request["context"], request["tokens"])), file=out, flush=True)
