"""Files and batches, with the client that most programs use; and ``lamina batch``, which is killed again and again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import openai
import pytest

from lamina.config import ClusterConfig
from tests.serve.conftest import Server, serving

KEYS = "first-key-0000\nsecond-key-000\n"


@pytest.fixture(scope="module")
def keyed(cluster: ClusterConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two keys and a folder of its own."""
    folder = tmp_path_factory.mktemp("files")
    keys = folder / "keys"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    options = ("--files", str(folder / "files"), "--api-key-file", str(keys))
    with serving(cluster, folder / "serve.log", *options) as server:
        server.headers["authorization"] = "Bearer first-key-0000"
        server.ready()
        yield server


def client_of(server: Server, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def requests(count: int) -> list[dict[str, Any]]:
    return [
        {
            "custom_id": f"id {i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"Once upon a time {i % 5}", "max_tokens": 4 + i % 5, "temperature": 0},
        }
        for i in range(count)
    ]


def as_jsonl(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def test_a_batch_gives_what_requests_give(keyed: Server) -> None:
    """Upload, run, download: each answer is that of the endpoint, and the failed line is in a file of its own."""
    wanted = requests(20)
    bad = {"custom_id": "bad", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "best_of": 2}}
    with client_of(keyed, "first-key-0000") as client, client_of(keyed, "second-key-000") as other:
        file = client.files.create(file=("in.jsonl", as_jsonl([*wanted, bad])), purpose="batch")
        assert (file.filename, file.purpose, file.bytes) == ("in.jsonl", "batch", len(as_jsonl([*wanted, bad])))
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"for": "a test"}
        )
        deadline = time.monotonic() + 60
        while client.batches.retrieve(batch.id).status != "completed":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"total": 21, "completed": 20, "failed": 1}
        assert batch.output_file_id is not None
        assert batch.error_file_id is not None

        answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
        assert [answer["custom_id"] for answer in answers] == [f"id {i}" for i in range(20)]
        for answer, request in zip(answers, wanted, strict=True):
            alone = keyed.complete(**request["body"]).json
            assert answer["response"]["body"]["choices"] == alone["choices"]
        (error,) = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
        assert error["response"]["status_code"] == 400
        assert error["response"]["body"]["error"]["param"] == "best_of"

        assert [entry.id for entry in client.batches.list()] == [batch.id]
        assert {entry.id for entry in client.files.list(limit=1)} == {
            file.id,
            batch.output_file_id,
            batch.error_file_id,
        }
        assert not list(other.files.list())
        assert not list(other.batches.list())
        with pytest.raises(openai.NotFoundError):
            other.files.content(file.id)
        with pytest.raises(openai.NotFoundError):
            other.batches.retrieve(batch.id)
        with pytest.raises(openai.BadRequestError, match="is completed already"):
            client.batches.cancel(batch.id)
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)


@pytest.mark.parametrize(
    ("body", "kind", "status", "reason"),
    [
        (b"{}", "application/json", 415, "expected multipart/form-data"),
        (b"x", "multipart/form-data", 400, "Missing boundary"),
        (b"--a\r\n\r\n", "multipart/form-data; boundary=a", 400, ""),
        (
            b'--a\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--a--\r\n',
            "multipart/form-data; boundary=a",
            400,
            "file: missing",
        ),
        (
            b'--a\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nx\r\n--a--\r\n',
            "multipart/form-data; boundary=a",
            400,
            "purpose: expected one of batch",
        ),
    ],
)
def test_a_wrong_upload_is_refused(keyed: Server, body: bytes, kind: str, status: int, reason: str) -> None:
    """The answer says what is wrong with the form."""
    reply = keyed.ask("POST", "/v1/files", body, {"Content-Type": kind})
    assert reply.status == status
    assert reason in reply.error["message"]


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=", "limit"),
        ("limit=10001", "limit"),
        ("limit=" + "1" * 5000, "limit"),
        ("limit=1&limit=2", "limit"),
        ("after=nothing", "after"),
        ("&".join(f"a{i}=1" for i in range(40)), "a0"),
    ],
)
def test_a_wrong_query_is_refused(keyed: Server, path: str, query: str, param: str) -> None:
    reply = keyed.ask("GET", f"{path}?{query}")
    assert (reply.status, reply.error["param"]) == (400, param)


def test_a_second_server_does_without_the_folder(keyed: Server, cluster: ClusterConfig, tmp_path: Path) -> None:
    """Two servers do not run the same batches: the second one says whose folder it is and ends."""
    folder = keyed.log.parent / "files"
    command = [sys.executable, "-P", "-m", "lamina", "serve", str(cluster.file), "--port", "0", "--files", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        f"lamina: --files: {folder} is in use by another server; name another folder with --files"
    )


def batch_command(cluster: ClusterConfig, source: Path, output: Path) -> list[str]:
    return [sys.executable, "-P", "-m", "lamina", "batch", str(cluster.file), str(source), "-o", str(output)]


def test_lamina_batch_answers_a_file(cluster: ClusterConfig, server: Server, tmp_path: Path) -> None:
    """The output has an answer for each line, in order; a second run does not replace it."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    wanted = requests(12)
    source.write_bytes(as_jsonl(wanted) + b"{\n")
    command = batch_command(cluster, source, output)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.splitlines()[-1].startswith("answered 13 lines, 1 of them with an error; ")
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [*(request["custom_id"] for request in wanted), None]
    for answer, request in zip(answers, wanted, strict=False):
        assert answer["response"]["body"]["choices"] == server.complete(**request["body"]).json["choices"]

    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 2
    assert again.stderr == f"lamina: --output: {output} exists already; remove it, or name another file\n"
    nameless = subprocess.run(batch_command(cluster, source, Path("-")), capture_output=True, text=True, check=False)
    assert nameless.returncode == 2
    assert nameless.stderr.startswith("lamina: --output: standard output is not possible here; name a file")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_batch_that_is_killed_again_and_again_is_complete(cluster: ClusterConfig, tmp_path: Path) -> None:
    """Killed twenty times at random moments, the batch has each answer once, and the same as without."""
    source, output, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    source.write_bytes(as_jsonl(requests(4000)))
    subprocess.run(batch_command(cluster, source, whole), capture_output=True, timeout=300, check=True)
    random, kills = Random(7), 0
    partial = output.with_name("out.jsonl.partial")
    while not output.exists():
        process = subprocess.Popen(batch_command(cluster, source, output), stderr=subprocess.DEVNULL)
        before = partial.stat().st_size if partial.exists() else 0
        deadline = time.monotonic() + 60
        while kills < 20 and process.poll() is None and (not partial.exists() or partial.stat().st_size == before):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if kills < 20:
            time.sleep(random.random() * 0.3)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        process.wait(timeout=120)
    assert kills == 20

    def texts(path: Path) -> list[tuple[str, str]]:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [(one["custom_id"], one["response"]["body"]["choices"][0]["text"]) for one in found]

    assert texts(output) == texts(whole)
    assert not partial.exists()
