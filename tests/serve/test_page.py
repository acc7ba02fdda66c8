"""The page in a real browser, before a real server and cluster: chat, errors, keys, the view of the cluster."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lamina.config import ClusterConfig
from lamina.demo.run import CHECKPOINT
from tests import harness
from tests.serve.conftest import Server, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

MARKUP = "<img src=x onerror=alert(1)><b>bold</b>"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (CONTRIBUTING.md)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (CONTRIBUTING.md)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A tab as wide as a phone. Neither the page nor its policy may have a complaint in the end."""
    context = browser.new_context(viewport={"width": 400, "height": 800})
    tab = context.new_page()
    tab.set_default_timeout(20_000)
    complaints: list[str] = []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: complaints.append(dialog.message))
    tab.on("console", lambda said: complaints.append(said.text) if "Content Security Policy" in said.text else None)
    yield tab
    context.close()
    assert complaints == []


def ask(tab: Any, text: str, most: int) -> None:
    """Send a text, as a user does."""
    if not tab.locator("#settings[open]").count():
        tab.click("#settings summary")
    tab.fill("#max-tokens", str(most))
    tab.fill("#temperature", "0")
    tab.fill("#input", text)
    tab.press("#input", "Enter")


def answer(tab: Any) -> Any:
    """The last answer, when it is complete."""
    tab.wait_for_selector(".turn.assistant:last-child:not(.writing)")
    return tab.locator(".turn.assistant").last


def test_a_chat(server: Server, tab: Any) -> None:
    """What the model says is shown as it is, with its speed; the next turn knows the one before."""
    tab.goto(f"{server.url}/")
    tab.wait_for_selector("#health .dot.ready")
    ask(tab, MARKUP, 20)
    expected = server.chat(MARKUP, max_tokens=20).json

    assert answer(tab).locator(".words").text_content() == expected["choices"][0]["message"]["content"]
    assert f"{expected['usage']['completion_tokens']} tokens · " in answer(tab).locator(".facts").text_content()
    assert tab.locator(".turn.user .words").text_content() == MARKUP
    assert tab.locator(".turn img, .turn b").count() == 0

    with tab.expect_request("**/v1/chat/completions") as sent:
        ask(tab, "And then?", 5)
    assert [message["role"] for message in sent.value.post_data_json["messages"]] == ["user", "assistant", "user"]
    assert answer(tab).locator(".error").text_content() == ""
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400


def test_stop_ends_an_answer(server: Server, tab: Any) -> None:
    """What has come stays, and the request is over on the cluster too."""
    tab.goto(f"{server.url}/")
    ask(tab, "Once upon a time", 400)
    tab.wait_for_selector(".turn.assistant .words:not(:empty)")
    tab.click("#stop")

    assert "stopped" in answer(tab).locator(".facts").text_content()
    assert answer(tab).locator(".words").text_content() != ""
    assert tab.is_visible("#send")
    tab.click("#tab-cluster")
    tab.locator("#running", has_text=re.compile("^0$")).wait_for()


def test_an_error_is_readable(server: Server, tab: Any) -> None:
    """The server's sentence is shown below the question."""
    tab.goto(f"{server.url}/")
    ask(tab, "Once upon a time", 10**6)

    assert "max_tokens 1000000 exceed the context" in answer(tab).locator(".error").text_content()


def test_the_view_of_the_cluster_and_one_step(server: Server, tab: Any) -> None:
    """All nodes with their loads, and what each device does in one step, recorded while an answer is written."""
    tab.goto(f"{server.url}/")
    ask(tab, "Once upon a time", 450)
    tab.click("#tab-cluster")
    tab.wait_for_selector("#nodes .node .dot.ready")
    assert tab.locator("#nodes .title b").all_text_contents() == ["c0", "m0"]
    tab.locator("#tokens", has_text=re.compile("^[1-9]")).wait_for()
    assert tab.locator("#links tbody tr td").first.text_content() == "c0 – m0"
    tab.click("#record")
    tab.wait_for_selector("#step svg rect")

    assert "1 request:" in tab.locator("#step-text").text_content()
    assert {"head", "tail", "past", "finish"} <= set(tab.locator("#legend span").all_text_contents())
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400


def test_a_key_is_asked_for(cluster: ClusterConfig, tab: Any, tmp_path: Path) -> None:
    """The page says where to enter it, keeps it for the tab alone, and shows nothing of the cluster without."""
    keys = tmp_path / "keys"
    keys.write_text("a-secret-key-of-some-length\n")
    keys.chmod(0o600)
    with serving(cluster, tmp_path / "serve.log", "--api-key-file", str(keys)) as server:
        server.headers["Authorization"] = "Bearer a-secret-key-of-some-length"
        server.ready()
        tab.goto(f"{server.url}/#cluster")
        tab.wait_for_selector("#trouble:not([hidden])")
        assert "API key" in tab.locator("#trouble").text_content()
        assert "needs an API key" in tab.locator("#health").text_content()
        tab.click("#tab-chat")
        tab.click("#settings summary")
        tab.fill("#key", "a-secret-key-of-some-length")
        tab.press("#key", "Tab")
        tab.wait_for_selector("#health .dot.ready")
        ask(tab, "Once upon a time", 5)
        assert answer(tab).locator(".words").text_content() != ""
        assert tab.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0


def test_a_model_without_a_chat_template_continues_texts(tab: Any, tmp_path: Path) -> None:
    """What was given and what comes read as one text; and a cluster that has gone is shown as such."""
    config = harness.write_config(tmp_path, CHECKPOINT, harness.free_ports(1))
    started = {node.name: harness.start_node(config, node.name) for node in config.node}
    with harness.running(*started.values()), serving(config, tmp_path / "serve.log") as server:
        server.ready()
        tab.goto(f"{server.url}/")
        ask(tab, "Once upon a time", 8)
        expected = server.complete(prompt="Once upon a time", max_tokens=8).json["choices"][0]["text"]
        assert answer(tab).locator(".words").text_content() == f"Once upon a time{expected}"
        started["c0"].kill()
        tab.click("#tab-cluster")
        tab.wait_for_selector("#nodes .dot.away")
        assert "not running" in tab.locator("#nodes .state").first.text_content()
