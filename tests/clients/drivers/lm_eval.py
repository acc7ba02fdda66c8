"""lm-eval: three tasks of a local file, with its own backend and through the server."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

DOCUMENTS = [
    {"text": "Once upon a time there was a little", "choices": [" dog", " girl named Lily", " and"], "answer": 0},
    {"text": "The dog was very", "choices": [" happy.", " sad and wanted to go home.", " q"], "answer": 1},
    {"text": "She said: \u201cnot today\u201d and went", "choices": [" away", " home", " caf\u00e9"], "answer": 2},
    {"text": "Tom saw", "choices": [" a bird", " him", " the the the"], "answer": 0},
]
TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "weigh": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "continue": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [".", "\n\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def _evaluate(model: str, arguments: dict[str, Any], tasks: list[str], **more: Any) -> Any:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = folder / "documents.json"
        documents.write_text("\n".join(map(json.dumps, DOCUMENTS)))
        for task in tasks:
            about = {"task": task, "dataset_path": "json", "test_split": "test", **TASKS[task]}
            about["dataset_kwargs"] = {"data_files": {"test": str(documents)}}
            (folder / f"{task}.yaml").write_text(json.dumps(about))
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=model, model_args=arguments, tasks=tasks, task_manager=manager, log_samples=True, **more
        )
    assert found is not None
    return {
        task: {
            "answers": [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])],
            "scores": {name: value for name, value in found["results"][task].items() if isinstance(value, float)},
        }
        for task, samples in found["samples"].items()
    }


def _through_server(server: SimpleNamespace, **more: Any) -> Any:
    os.environ["OPENAI_API_KEY"] = server.key
    arguments = {"model": server.model, "base_url": f"{server.url}/completions", **more}
    return _evaluate("local-completions", arguments, list(TASKS))


def own(server: SimpleNamespace) -> Any:
    # By default it would begin prompts as the tokenizer does, which it never does through a server.
    arguments = {"pretrained": server.checkpoint, "dtype": "float32", "device": "cpu", "add_bos_token": False}
    return _evaluate("hf", arguments, list(TASKS), batch_size=1)


def own_with_begin(server: SimpleNamespace) -> Any:
    arguments = {"pretrained": server.checkpoint, "dtype": "float32", "device": "cpu", "add_bos_token": True}
    return _evaluate("hf", arguments, list(TASKS), batch_size=1)


def server_tokenizer(server: SimpleNamespace) -> Any:
    # It takes a token whose id is 0, as that of the beginning is here, for none.
    return _through_server(server, custom_prefix_token_id=0)


def local_tokenizer(server: SimpleNamespace) -> Any:
    return _through_server(server, tokenizer=server.checkpoint, tokenizer_backend="huggingface")


def local_tokenizer_with_begin(server: SimpleNamespace) -> Any:
    return _through_server(server, tokenizer=server.checkpoint, tokenizer_backend="huggingface", add_bos_token=True)


def many_at_a_time(server: SimpleNamespace) -> Any:
    return _through_server(server, custom_prefix_token_id=0, batch_size=4, num_concurrent=2)


def _chat(model: str, arguments: dict[str, Any], **more: Any) -> Any:
    return _evaluate(model, arguments, ["continue"], apply_chat_template=True, **more)["continue"]["answers"]


def own_chat(server: SimpleNamespace) -> Any:
    arguments = {"pretrained": server.checkpoint, "dtype": "float32", "device": "cpu"}
    return _chat("hf", arguments, batch_size=1)


def chat(server: SimpleNamespace) -> Any:
    os.environ["OPENAI_API_KEY"] = server.key
    return _chat("local-chat-completions", {"model": server.model, "base_url": f"{server.url}/chat/completions"})
