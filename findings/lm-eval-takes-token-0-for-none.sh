#!/usr/bin/env bash
# lm-eval 0.4.13: with the tokenizer of a server, a beginning-of-text token with the id 0 counts as none, and texts are
# scored behind the end-of-text token instead.
#
# local-completions uses a server's tokenizer by itself where the server answers /tokenizer_info. A text is then expected
# to be scored behind the beginning-of-text token, as with the same tokenizer in a local folder. With the id 0, which
# several families of models have, perplexities differ from those of the local tokenizer, without a word.
#
# Output seen:
#   <s> is 1 and </s> is 2: texts begin with 1
#   <s> is 0 and </s> is 2: texts begin with 2
#
# Exits with a status other than 0 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'lm-eval[api]==0.4.13'
HF_HUB_OFFLINE=1 HOME="$folder" "$folder/venv/bin/python" - 2>"$folder/warnings" <<'PYTHON'
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from lm_eval.models.openai_completions import LocalCompletionsAPI

ids = {"<s>": 1, "</s>": 2}


class Tokenizer(BaseHTTPRequestHandler):
    """What lm-eval asks of a server: its special tokens, and the ids of a text."""

    def do_GET(self):
        self.answer({"bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "chat_template": None})

    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["content-length"])))["prompt"]
        self.answer({"tokens": [ids[text]] if text in ids else [3 + ord(letter) for letter in text]})

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Tokenizer)
threading.Thread(target=server.serve_forever, daemon=True).start()
found = {}
for begin in (1, 0):
    ids["<s>"] = begin
    model = LocalCompletionsAPI(base_url=f"http://127.0.0.1:{server.server_port}/v1/completions", model="m")
    assert model.tokenizer_backend == "remote", model.tokenizer_backend
    found[begin] = model.prefix_token_id
    print(f"<s> is {begin} and </s> is 2: texts begin with {found[begin]}")
assert found == {1: 1, 0: 2}, found
PYTHON
