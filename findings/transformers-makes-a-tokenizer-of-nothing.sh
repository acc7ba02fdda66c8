#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer makes a tokenizer that knows no word, without an error, of a folder
# whose vocabulary is in files that the model's tokenizer class does not read.
#
# A folder with vocab.json and merges.txt is a complete tokenizer for a Qwen2 model. With a Gemma 2 model it was
# expected to be refused, or to be read as well. All text becomes the unknown token instead.
#
# Output seen:
#   qwen2: 29 tokens, "the" is ['the']
#   gemma2: 5 tokens, "the" is ['<unk>']
#
# Exits with a status other than 0 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder" 2>"$folder/warnings" <<'PYTHON'
import json
import string
import sys
from pathlib import Path

from transformers import AutoTokenizer

found = {}
for model in ("qwen2", "gemma2"):
    path = Path(sys.argv[1]) / model
    path.mkdir()
    words = [*string.ascii_lowercase, "th", "the", "<|endoftext|>"]
    (path / "config.json").write_text(json.dumps({"model_type": model}))
    (path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    spelled = tokenizer.convert_ids_to_tokens(tokenizer("the")["input_ids"])
    found[model] = spelled
    print(f'{model}: {len(tokenizer.get_vocab())} tokens, "the" is {spelled}')
assert found["qwen2"][-1] == "the", found
assert found["gemma2"][-1] == "<unk>", found
PYTHON
