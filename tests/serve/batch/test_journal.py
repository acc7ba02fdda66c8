"""A batch goes on where it was killed: each answer is there once, whatever the last write left."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lamina.errors import ConfigError, LaminaError
from lamina.serve.batch.journal import Journal


def answer(line: int) -> dict[str, object]:
    return {"custom_id": f"id {line}", "response": {"text": "ä\n" * line}, "error": None}


def test_the_output_has_the_order_of_the_input(tmp_path: Path) -> None:
    """Answers come in any order; the output has that of the lines, and the journal is gone."""
    output = tmp_path / "out.jsonl"
    with Journal(output, "digest") as journal:
        for line in (3, 1, 2):
            journal.add(line, answer(line))
        journal.finish()

    assert [json.loads(line) for line in output.read_text().splitlines()] == [answer(1), answer(2), answer(3)]
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_every_torn_end_is_cut_off(tmp_path: Path) -> None:
    """Whatever number of bytes reached the disk: whole answers are kept, and the rest is answered again."""
    whole_output = tmp_path / "whole.jsonl"
    with Journal(whole_output, "digest") as journal:
        for line in range(1, 5):
            journal.add(line, answer(line))
        written = journal.path.read_bytes()
        journal.finish()
    ends = [at + 1 for at, byte in enumerate(written) if byte == ord("\n")]
    for nbytes in range(len(written) + 1):
        output = tmp_path / "out.jsonl"
        output.with_name("out.jsonl.partial").write_bytes(written[:nbytes])
        with Journal(output, "digest") as journal:
            assert len(journal) == max(0, sum(end <= nbytes for end in ends) - 1)
            for line in range(1, 5):
                if line not in journal:
                    journal.add(line, answer(line))
            journal.finish()
        assert output.read_bytes() == whole_output.read_bytes()


def test_a_journal_of_another_batch_is_not_touched(tmp_path: Path) -> None:
    """Another input, or another file, is refused with a sentence that says what to do."""
    output = tmp_path / "out.jsonl"
    with Journal(output, "digest") as journal:
        journal.add(1, answer(1))
        before = journal.path.read_bytes()
    with pytest.raises(ConfigError, match="of a batch with another input; remove it"), Journal(output, "other"):
        pass
    assert journal.path.read_bytes() == before
    journal.path.write_bytes(b"something else\n")
    with pytest.raises(ConfigError, match="is no journal of a batch"), Journal(output, "digest"):
        pass
    assert journal.path.read_bytes() == b"something else\n"


def test_two_runs_of_one_batch_do_not_mix(tmp_path: Path) -> None:
    """The second run is refused while the first one works."""
    with (
        Journal(tmp_path / "out.jsonl", "digest"),
        pytest.raises(ConfigError, match="running already"),
        Journal(tmp_path / "out.jsonl", "digest"),
    ):
        pass


def test_a_folder_that_is_missing_is_an_error(tmp_path: Path) -> None:
    """The error names the file and the reason."""
    with (
        pytest.raises(LaminaError, match=r"missing/out.jsonl.partial cannot be written: No such file"),
        Journal(tmp_path / "missing" / "out.jsonl", "digest"),
    ):
        pass
