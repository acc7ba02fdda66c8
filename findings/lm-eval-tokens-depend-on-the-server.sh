#!/usr/bin/env bash
# lm-eval 0.4.13: local-completions makes other tokens of a text with the same local tokenizer where the server has a
# tokenizer too: it then adds the special tokens, also with add_bos_token=False.
#
# A tokenizer that is given by its folder is expected to be used in one way. It is loaded either way, but where the server
# answers /tokenizer_info it is taken for that of the server, and asked with the defaults of its own. Scores of the same
# model behind two servers then differ, and those of the second have the beginning-of-text token before every context.
#
# Output seen:
#   the server has no tokenizer: the text is [3, 4]
#   the server has a tokenizer: the text is [1, 3, 4]
#
# Exits with a status other than 0 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'lm-eval[api]==0.4.13' transformers==5.23.0
HF_HUB_OFFLINE=1 HOME="$folder" "$folder/venv/bin/python" - "$folder/tokenizer" 2>"$folder/warnings" <<'PYTHON'
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from lm_eval.models.openai_completions import LocalCompletionsAPI
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2, "one": 3, "two": 4}, unk_token="</s>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(sys.argv[1])
answers = True


class Server(BaseHTTPRequestHandler):
    """Answers what lm-eval asks of a server about its tokenizer, or nothing."""

    def do_GET(self):
        self.answer({"bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "chat_template": None})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.answer({"tokens": words.encode(body["prompt"], add_special_tokens=body["add_special_tokens"]).ids})

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200 if answers else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1/completions"
found = {}
for answers in (False, True):
    model = LocalCompletionsAPI(base_url=url, model="m", tokenizer=sys.argv[1], add_bos_token=False)
    found[answers] = model.tok_encode("one two")
    print(f"the server has {'a' if answers else 'no'} tokenizer: the text is {found[answers]}")
assert found == {False: [3, 4], True: [1, 3, 4]}, found
PYTHON
