"""llama.cpp: its ``llama-batched-bench``, in a process for each measurement. The arguments are the checkpoint, the
program, the folder of its Python package ``gguf``, and a folder for the converted checkpoint.

Each measurement prefills one prompt and copies its cache into the stream of every sequence (``-pps``). Weights are
bfloat16 and the cache is float16, which is faster there than bfloat16. The first measurement of each shape tries flash
attention on and off, and later ones use the faster setting.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from lines import Answer, serve  # type: ignore[import-not-found]  # in the folder of this script

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TRIES = 3
"""How often the program is run: a thread of its own writes its log, and sometimes loses the last lines."""
SPARE_TOKENS = 64
"""The room in each stream beyond the tokens that are decoded."""


class _LlamaCppDecoder:
    """Runs the benchmark program, and remembers for each shape whether flash attention is faster."""

    def __init__(self, program: Path, model: Path) -> None:
        self._program = program
        self._model = model
        self._flash: dict[tuple[int, int], str] = {}

    def measure(self, batch: int, context: int, warm: int, steps: int, threads: int) -> Answer:
        shape = (batch, context)
        # The program warms up by itself.
        tried = {
            flash: self._run(batch, context, steps, threads, flash)
            for flash in ((self._flash[shape],) if shape in self._flash else ("on", "off"))
        }
        self._flash[shape] = best = min(tried, key=lambda flash: tried[flash])
        return {"seconds": tried[best], "detail": f"flash attention {best}"}

    def _run(self, batch: int, context: int, steps: int, threads: int, flash: str) -> float:
        room = batch * (context + steps + SPARE_TOKENS)
        options = {"m": self._model, "c": room, "npp": context, "ntg": steps, "npl": batch, "t": threads, "fa": flash}
        command = [str(self._program), *(str(part) for key, value in options.items() for part in (f"-{key}", value))]
        command += ["-pps", "--output-format", "jsonl"]
        for _ in range(TRIES):
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            for line in (done.stdout + "\n" + done.stderr).splitlines():
                if "{" in line and '"t_tg"' in line:
                    return float(json.loads(line[line.index("{") :])["t_tg"])
            if done.returncode:
                break
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise RuntimeError(f"{self._program.name} ended with status {done.returncode} and no result: {' '.join(last)}")


def convert(path: Path, into: Path) -> None:
    """Write a Llama checkpoint in bfloat16 as GGUF, with llama.cpp's own package, without a tokenizer."""
    import gguf

    config = json.loads((path / "config.json").read_text())
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    writer = gguf.GGUFWriter(into, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    for name, raw in _tensors(path / "model.safetensors").items():
        if raw.ndim == 1:
            writer.add_tensor(_gguf_name(name), (raw.astype(np.uint32) << 16).view(np.float32))
            continue
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours, not halves
            count = heads if "q_proj" in name else kv_heads
            raw = raw.reshape(count, 2, dim // 2, -1).swapaxes(1, 2).reshape(raw.shape)
        stored = np.ascontiguousarray(raw).view(np.uint8)
        writer.add_tensor(_gguf_name(name), stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[part]}.weight"


def _tensors(file: Path) -> dict[str, Any]:
    """Return the bfloat16 tensors of a safetensors file as 16-bit integers, mapped into memory."""
    content = np.memmap(file, dtype=np.uint8, mode="r")
    length = int(content[:8].view(np.uint64)[0])
    entries = json.loads(bytes(content[8 : 8 + length]))
    entries.pop("__metadata__", None)
    data = content[8 + length :]
    return {
        name: data[slice(*entry["data_offsets"])].view(np.uint16).reshape(entry["shape"])
        for name, entry in entries.items()
    }


def _start() -> tuple[Answer, Any]:
    path, program, package, folder = map(Path, sys.argv[1:])
    sys.path.insert(0, str(package))
    model = folder / f"{path.name}.gguf"
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        half = model.with_suffix(".half")
        convert(path, half)
        half.rename(model)
    version = subprocess.run([str(program), "--version"], capture_output=True, text=True, errors="replace")
    return {"version": (version.stdout + version.stderr).strip().split("\n")[0]}, _LlamaCppDecoder(
        program, model
    ).measure


serve(_start)
