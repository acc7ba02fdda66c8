#!/usr/bin/env bash
# tokenizers 0.23.3: the ByteFallback decoder replaces a whole run of byte tokens when one byte of it is wrong, also the
# characters in it that are whole.
#
# One would expect what Python's own decoder and other decoders of UTF-8 do: keep the characters that are whole, and
# replace the wrong byte. A program that streams text has already shown the character that a later token takes back.
#
# Output seen:
#   3 bytes of one character: 1 character
#   the same and a wrong byte: 4 replacement characters, where Python gives the character and 1
#
# Exits with a status other than 0 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
from tokenizers import decoders

decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
whole = "\u4f60".encode()
tokens = [f"<0x{byte:02X}>" for byte in whole]
alone = decoder.decode(tokens)
assert alone == "\u4f60", alone
print(f"{len(tokens)} bytes of one character: {len(alone)} character")
found = decoder.decode([*tokens, "<0xFF>"])
assert found == "\ufffd" * 4, found
expected = (whole + b"\xff").decode(errors="replace")
assert expected == "\u4f60\ufffd", expected
print(f"the same and a wrong byte: {len(found)} replacement characters, where Python gives the character and 1")
PYTHON
