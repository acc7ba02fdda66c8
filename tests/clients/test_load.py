"""Load generators report the tokens that the server has counted, after a run of a few seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.clients import programs
from tests.clients.environments import CLIENTS, environment, python_of
from tests.clients.server import MODEL, Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

OUTPUT = 10
"""The tokens of each answer."""


class Report(NamedTuple):
    """What a load generator says of its run."""

    requests: int
    prompt_tokens: float
    generated_tokens: float
    before: int = 0
    """Requests that it sent beforehand and does not report."""


def _run(name: str, arguments: list[str], home: Path, **environ: str) -> None:
    programs.run([str(environment(name) / "bin" / name), *arguments], home, more=environ)


def guidellm(server: Server, home: Path) -> Report:
    """Chats; asks for usage in every chunk."""
    report = home / "report.json"
    arguments = {
        "--backend": f"kind=openai_http,target={server.root}",
        "--profile": "kind=concurrent,streams=2",
        "--constraint": "kind=max_requests,count=6",
        "--tokenizer": f"kind=hf_auto,model={server.checkpoint}",
        "--data": f"kind=synthetic_text,prompt_tokens=32,output_tokens={OUTPUT}",
        "--output": f"kind=json,path={report}",
    }
    _run("guidellm", ["run", *_words(arguments), "--disable-console-interactive"], home)
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    prompts, answers = (metrics[f"{kind}_token_count"]["successful"]["total_sum"] for kind in ("prompt", "output"))
    return Report(metrics["request_totals"]["successful"], prompts, answers)


def aiperf(server: Server, home: Path) -> Report:
    """Chats, after HEAD /metrics."""
    arguments = {
        "--model": MODEL,
        "--url": server.root,
        "--endpoint-type": "chat",
        "--tokenizer": str(server.checkpoint),
        "--concurrency": "2",
        "--request-count": "6",
        "--synthetic-input-tokens-mean": "32",
        "--output-tokens-mean": str(OUTPUT),
        "--extra-inputs": "ignore_eos:true",
        "--artifact-dir": str(home / "report"),
        "--ui": "none",
    }
    # When it is told to stay offline, it takes the folder of a tokenizer for the name of a repository.
    words = ["profile", *_words(arguments), "--streaming", "--use-server-token-count"]
    _run("aiperf", words, home, HF_HUB_OFFLINE="")
    found = json.loads((home / "report" / "profile_export_aiperf.json").read_text())
    return Report(found["request_count"]["avg"], found["total_isl"]["avg"], found["total_osl"]["avg"])


def genai_bench(server: Server, home: Path) -> Report:
    """Chats without ignore_eos, which may end earlier."""
    arguments = {
        "--api-backend": "openai",
        "--api-base": server.root,
        "--api-key": "unused-key",
        "--api-model-name": MODEL,
        "--model-tokenizer": str(server.checkpoint),
        "--task": "text-to-text",
        "--max-time-per-run": "1",
        "--max-requests-per-run": "6",
        "--num-concurrency": "2",
        "--traffic-scenario": f"D(40,{OUTPUT})",
        "--experiment-base-dir": str(home),
        "--experiment-folder-name": "report",
    }
    _run("genai-bench", ["benchmark", *_words(arguments)], home)
    [report] = (home / "report").glob("D*.json")
    found = json.loads(report.read_text())["aggregated_metrics"]
    assert found["num_error_requests"] == 0
    stats = found["stats"]
    return Report(found["num_completed_requests"], stats["num_input_tokens"]["sum"], stats["num_output_tokens"]["sum"])


def evalscope(server: Server, home: Path) -> Report:
    """Chats with min_tokens; tries the server with one request first."""
    arguments = {
        "--model": MODEL,
        "--url": f"{server.url}/chat/completions",
        "--api": "openai",
        "--tokenizer-path": str(server.checkpoint),
        "--dataset": "random",
        "--number": "6",
        "--parallel": "2",
        "--min-prompt-length": "30",
        "--max-prompt-length": "30",
        "--prefix-length": "0",
        "--min-tokens": str(OUTPUT),
        "--max-tokens": str(OUTPUT),
        "--outputs-dir": str(home / "report"),
    }
    _run("evalscope", ["perf", *_words(arguments), "--stream", "--no-timestamp"], home)
    [report] = (home / "report").rglob("benchmark_summary.json")
    found = json.loads(report.read_text())
    requests = found["Success Requests"]
    return Report(requests, requests * found["Avg Input Tokens"], requests * found["Avg Output Tokens"], before=1)


def inference_perf(server: Server, home: Path) -> Report:
    """Completions at a fixed rate."""
    home.mkdir(exist_ok=True)
    length, output = ({"min": n, "max": n, "mean": n, "std_dev": 0, "total_count": 20} for n in (30, OUTPUT))
    config = {
        "load": {"type": "constant", "stages": [{"rate": 4, "duration": 3}], "num_workers": 1},
        "api": {"type": "completion", "streaming": True},
        "server": {"type": "vllm", "base_url": server.root, "model_name": MODEL, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(server.checkpoint)},
        "data": {"type": "random", "input_distribution": length, "output_distribution": output},
        "report": {"request_lifecycle": {"summary": True, "per_stage": True, "per_request": True}},
        "storage": {"local_storage": {"path": str(home / "report")}},
    }
    (home / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    _run("inference-perf", ["--config_file", str(home / "config.yaml")], home)
    summary = json.loads((home / "report" / "summary_lifecycle_metrics.json").read_text())
    assert summary["failures"]["count"] == 0
    found = summary["successes"]
    return Report(found["count"], found["prompt_tokens"]["total"], found["output_tokens"]["total"])


def _words(arguments: dict[str, str]) -> list[str]:
    return [word for pair in arguments.items() for word in pair]


GENERATORS: dict[str, Callable[[Server, Path], Report]] = {
    "guidellm": guidellm,
    "aiperf": aiperf,
    "genai-bench": genai_bench,
    "evalscope": evalscope,
    "inference-perf": inference_perf,
}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_load_generator_counts_what_the_server_counts(name: str, server: Server, tmp_path: Path) -> None:
    """All tokens of prompts and answers, and every answer has as many as were asked for."""
    if python_of(CLIENTS[name]) is None:
        pytest.skip(f"{name} needs Python {CLIENTS[name].python} or newer, which this machine lacks")
    environment(name)

    before = server.counters()
    report = GENERATORS[name](server, tmp_path)
    after = server.counters()

    counted = {
        kind: after[f"lamina_http_{kind}_tokens_total"] - before[f"lamina_http_{kind}_tokens_total"]
        for kind in ("prompt", "generated")
    }
    assert report.requests >= 6
    assert report.generated_tokens == pytest.approx(report.requests * OUTPUT)
    assert counted["generated"] == pytest.approx(report.generated_tokens + report.before * OUTPUT)
    if report.before:
        assert counted["prompt"] > report.prompt_tokens
    else:
        assert counted["prompt"] == pytest.approx(report.prompt_tokens)
