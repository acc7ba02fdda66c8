"""Tokenizers with the special tokens of common models, and templates in their style."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lamina.chat.template import ChatTemplate
from lamina.demo.run import CHECKPOINT
from lamina.model.tokenizer import Tokenizer

CONTEXT = 4096

TEMPLATES = Path(__file__).parent / "templates"

STYLES: dict[str, tuple[list[str], list[str]]] = {
    "llama": (
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"],
        [],
    ),
    "qwen": (
        ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
        ["<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>"],
    ),
    "qwen_coder": (
        ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
        ["<tool_call>", "</tool_call>"],
    ),
    "mistral": (
        ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
         "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
        [],
    ),
    "mistral_args": (
        ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
         "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]", "[THINK]", "[/THINK]"],
        [],
    ),
    "deepseek": (
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
        ["<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
         "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
         "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<think>", "</think>"],
    ),
    "harmony": (
        ["<|startoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>",
         "<|call|>"],
        [],
    ),
    "phi": (["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"], []),
}  # fmt: skip
"""The special tokens of each style, of which the first begins a text and the second ends it, and other tokens that were
added to its vocabulary."""


def save(path: Path, style: str, template: Any = None) -> PreTrainedTokenizerFast:
    """Write the tokenizer of a style into a folder, and return it as the library has it."""
    special, others = STYLES[style]
    library = Library.from_file(str(CHECKPOINT / "tokenizer.json"))
    description = json.loads(library.to_str())
    description["added_tokens"] = []
    library = Library.from_str(json.dumps(description))
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    library.add_tokens([AddedToken(token, special=False, normalized=False) for token in others])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, bos_token=special[0], eos_token=special[1])
    tokenizer.chat_template = template or (TEMPLATES / f"{style}.jinja").read_text()
    tokenizer.save_pretrained(path)
    return tokenizer


def load(path: Path, source: str | None = None) -> ChatTemplate:
    """Return the template of a checkpoint, or another in its place."""
    library = AutoTokenizer.from_pretrained(path)
    return ChatTemplate(Tokenizer(path, CONTEXT), source or library.chat_template, library.special_tokens_map)
