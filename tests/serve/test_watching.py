"""What the server offers to those who watch: the page, the view of the cluster, and names of requests in the logs."""

from __future__ import annotations

import re
import time

from lamina.config import ClusterConfig
from tests.serve.conftest import Server


def test_the_page_and_the_cluster(server: Server) -> None:
    """The page comes with a policy that lets it load nothing but its own files; the view names all nodes."""
    page = server.get("/")
    cluster = server.get("/cluster").json

    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    assert [(node["name"], node["state"]) for node in cluster["nodes"]] == [("c0", "ready"), ("m0", "ready")]


def test_a_request_has_the_same_name_in_all_logs(server: Server, cluster: ClusterConfig) -> None:
    """The id that the client gives, in the server's line and in the front's."""
    body = {"prompt": "Once upon a time", "max_tokens": 3, "temperature": 0}
    reply = server.ask("POST", "/v1/completions", body, {"X-Request-Id": "a-name-of-mine"})
    assert reply.headers["x-request-id"] == "a-name-of-mine"
    log, deadline = cluster.file.parent / "c0.log", time.monotonic() + 10
    while "request='a-name-of-mine'" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)

    (line,) = (line for line in log.read_text().splitlines() if "a-name-of-mine" in line)
    assert re.search(r"event=answered request='a-name-of-mine' reason=length prompt_tokens=\d+ .* tokens=3 ", line)
    assert "id=a-name-of-mine" in server.log.read_text()
