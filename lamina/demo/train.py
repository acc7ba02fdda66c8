"""Train the demo checkpoint: ``python -m lamina.demo.train``, which takes less than half an hour on two cores.

Text, initial weights and the order of training come from fixed seeds, and the number of steps is fixed, so that the
same versions of the libraries on the same kind of CPU produce the same checkpoint. The number of threads is an option
with a fixed default because it determines the order in which sums are rounded.

Most steps use single tales in short rows, which are cheap. Every fourth step uses a row as long as the model's context,
mostly of books, so that the model also learns to write sentences at the end of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lamina.demo.stories import DEMO_PROMPT, documents

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The checkpoint that ships with the package."""

CONTEXT_TOKENS = 2048
VOCABULARY = 1536
BOS, EOS = "<s>", "</s>"

STEPS = 1400
LONG_EVERY = 4
"""The rows of every n-th step are as long as the context."""

SHORT_ROWS = (8, 320)
LONG_ROWS = (1, CONTEXT_TOKENS)
"""The rows in a batch, and the tokens in a row."""

PEAK_LEARNING_RATE = 3e-3
WARM_UP_STEPS = 60

app = typer.Typer(add_completion=False, rich_markup_mode=None)

TOKENIZER_SEED, SHORT_SEED, LONG_SEED, HELD_OUT_SEED = range(4)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts the beginning-of-sequence token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT_TOKENS
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama of 2.4 million parameters with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batches(
    tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], rows: int, row_tokens: int
) -> Iterator[torch.Tensor]:
    """Yield batches of token ids, int64 ``[rows, row_tokens]``.

    A row starts with a document and is filled up with further documents, of which the last one is cut off.
    """
    while True:
        batch: list[list[int]] = []
        while len(batch) < rows:
            row: list[int] = []
            while len(row) < row_tokens:
                row += [*tokenizer.encode(next(texts)), tokenizer.eos_token_id]
            batch.append(row[:row_tokens])
        yield torch.tensor(batch)


def learning_rate(step: int, steps: int) -> float:
    """Return the learning rate of ``step``: a linear warm-up, then half a cosine down to a hundredth of the peak."""
    if step < WARM_UP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return PEAK_LEARNING_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_of(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Return an AdamW that decays the matrices but not the gains of the norms."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    gains = [weight for weight in model.parameters() if weight.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, console: Console) -> None:
    """Train ``model`` in place."""
    short = batches(tokenizer, documents(SHORT_SEED, books=0.1), *SHORT_ROWS)
    long = batches(tokenizer, documents(LONG_SEED, books=0.7), *LONG_ROWS)
    optimizer = optimizer_of(model)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    model.train()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, loss=math.nan)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            rows = next(long if step % LONG_EVERY == LONG_EVERY - 1 else short)
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.update(task, advance=1, loss=loss.item())
            if not console.is_terminal and (step + 1) % 50 == 0:
                console.print(f"step {step + 1} of {steps}: loss {loss.item():.3f}")


@torch.inference_mode()
def held_out_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, rows: int, row_tokens: int, books: float
) -> float:
    """Return the mean loss of ``model``, in nats per token, over documents outside its training data."""
    tokens = next(batches(tokenizer, documents(HELD_OUT_SEED, books=books), rows, row_tokens))
    return float(model.eval()(input_ids=tokens, labels=tokens).loss)


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, *, max_new_tokens: int) -> str:
    """Return ``prompt`` and its greedy continuation, which ends before the end-of-sequence token."""
    tokens = model.eval().generate(
        **tokenizer(prompt, return_tensors="pt", return_token_type_ids=False),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a Hugging Face checkpoint with weights in bfloat16; ``model`` then holds the rounded weights."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=False
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="The directory to write the checkpoint to.")] = CHECKPOINT,
    steps: Annotated[int, typer.Option(min=1, help="The number of training steps.")] = STEPS,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; another number rounds differently.")] = 2,
) -> None:
    """Train the demo checkpoint from scratch and report its loss on stories that it has never seen."""
    console = Console()
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    tokenizer = train_tokenizer(islice(documents(TOKENIZER_SEED, books=0.3), 4000))
    model = new_model(tokenizer)
    console.print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary")

    train(model, tokenizer, steps, console)
    save(model, tokenizer, out)

    model.float()  # evaluate the rounded weights, as a user loads them, in full precision
    tales = held_out_loss(model, tokenizer, rows=64, row_tokens=SHORT_ROWS[1], books=0.0)
    books = held_out_loss(model, tokenizer, rows=8, row_tokens=CONTEXT_TOKENS, books=1.0)
    console.print(f"held-out loss: {tales:.4f} nats per token over tales, {books:.4f} over books")
    console.print(greedy(model, tokenizer, DEMO_PROMPT, max_new_tokens=400), markup=False, highlight=False)
    console.print(f"saved to {out}")


if __name__ == "__main__":
    app()
