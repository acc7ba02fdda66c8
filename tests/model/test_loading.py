"""Reading checkpoints: layouts that must load alike, and damage that must be named."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lamina.demo.run import CHECKPOINT
from lamina.errors import CheckpointError, UnsupportedModelError
from lamina.model.capture import capture
from lamina.model.checkpoint import Checkpoint, check_checkpoint
from lamina.model.weights import load_weights
from tests.families import FAMILIES
from tests.model.compose import CPU

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy_of(saved, tmp_path):
    """A copy of a family's checkpoint that a test may damage."""
    return lambda family: shutil.copytree(saved(family), tmp_path / family)


@pytest.fixture
def load_all(blueprint):
    """Load all weights of another directory by the blueprint of a family, which is captured once."""

    def load(family, path):
        cut = blueprint(family)
        return load_weights(replace(cut.capture, checkpoint=Checkpoint.open(path)), cut.weights_of(), CPU)

    return load


def edit(path, change):
    """Apply ``change`` to the dictionary of tensors in a safetensors file."""
    tensors = load_file(path / FILE)
    change(tensors)
    save_file(tensors, path / FILE, metadata={"format": "pt"})


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def shard(path):
    """Rewrite a single file as two shards with an index."""
    tensors = load_file(path / FILE)
    (path / FILE).unlink()
    weight_map = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharded_checkpoint_is_the_same_model(saved, copy_of, load_all):
    """Splitting the file changes neither a tensor nor the fingerprint."""
    path = copy_of("qwen2")
    shard(path)

    weights, want = load_all("qwen2", path), load_all("qwen2", saved("qwen2"))

    assert weights.keys() == want.keys()
    assert all(weights[name].equal(want[name]) for name in want)
    assert Checkpoint.open(path).fingerprint == Checkpoint.open(saved("qwen2")).fingerprint


def fine_tune(tensors):
    """Other numbers in every tensor, as another training would give."""
    return {name: tensor + 1 for name, tensor in tensors.items()}


def save_over_shards(path):
    tensors = load_file(path / FILE)
    shard(path)
    save_file(fine_tune(tensors), path / FILE, metadata={"format": "pt"})


def save_in_place_of_shards(path):
    save_over_shards(path)
    for old in path.glob("model-*-of-*.safetensors"):
        old.unlink()


def repeat_in_a_later_shard(path):
    shard(path)
    first, last = sorted(path.glob("model-*-of-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(last), name: tensor + 1}, last, metadata={"format": "pt"})


def name_in_the_configuration(path):
    tensors = fine_tune(load_file(path / FILE))
    save_file(tensors, path / "tuned.safetensors", metadata={"format": "pt"})
    edit_config(path, transformers_weights="tuned.safetensors")


ORDERS = {
    "one file beside older shards": (save_over_shards, "model.safetensors"),
    "one file and an index of shards that are gone": (save_in_place_of_shards, "model.safetensors"),
    "an index that names another shard": (
        lambda path: promise("lm_head.weight", "model-00002-of-00002.safetensors")(path),
        "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors",
    ),
    "a tensor in two shards": (
        repeat_in_a_later_shard,
        "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors",
    ),
    "a file that config.json names": (name_in_the_configuration, "tuned.safetensors"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_files_are_those_that_the_library_takes(order, load_all, copy_of, caplog):
    """Where a directory holds the files of several saves, the weights are the library's, and the log names the
    files."""
    make, files = ORDERS[order]
    path = copy_of("qwen2")
    make(path)
    caplog.set_level(logging.INFO, "lamina.model")

    check_checkpoint(path)
    weights = load_all("qwen2", path)

    library = AutoModelForCausalLM.from_pretrained(path, dtype="float32").state_dict()
    assert all(weights[name].equal(library[name]) for name in weights if name in library)
    assert len(weights.keys() & library.keys()) > 20
    lines = [r.getMessage() for r in caplog.records if "event=weights" in r.getMessage()]
    assert len(lines) == 1
    assert f"files={files!r}" in lines[0]


def test_fingerprint_tells_a_fine_tune_from_its_base(saved, copy_of):
    """Other numbers in one tensor, in a file of the same size, are another model."""
    path = copy_of("llama")
    edit(path, lambda t: t["model.layers.1.mlp.up_proj.weight"].add_(0.01))

    assert Checkpoint.open(path).fingerprint != Checkpoint.open(saved("llama")).fingerprint


def test_layer_range_reads_only_its_tensors(blueprint, copy_of):
    """Slices 1 and 2 load from a checkpoint that has lost all other tensors: they ask for no others."""
    path = copy_of("llama")
    cut = blueprint("llama")
    names = cut.weights_of(1, 2)
    edit(path, lambda tensors: [tensors.pop(name) for name in list(tensors) if name not in names])

    loaded = load_weights(replace(cut.capture, checkpoint=Checkpoint.open(path)), names, CPU)

    attention = {name.split(".")[2] for name in names if "q_proj" in name}
    output = {name.split(".")[2] for name in names if "o_proj" in name}
    assert loaded.keys() == names
    assert (attention, output) == ({"1", "2"}, {"0", "1"})


def test_tied_tensor_is_one_tensor(load_all, saved):
    """A tied model stores its embedding once, and both ends of the model use it."""
    weights = load_all("llama_tied", saved("llama_tied"))

    assert "lm_head.weight" not in load_file(saved("llama_tied") / FILE)
    assert {"model.embed_tokens.weight", "lm_head.weight"} & weights.keys()


def test_tied_tensor_may_be_stored_under_its_other_name(load_all, saved, copy_of):
    """The library ties in both directions, and so do we."""
    path = copy_of("llama_tied")
    edit(path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))

    weights, want = load_all("llama_tied", path), load_all("llama_tied", saved("llama_tied"))

    assert all(weights[name].equal(want[name]) for name in want)


def test_tied_tensors_that_differ_are_refused(load_all, copy_of):
    """Two different tensors under tied names: one of them would be ignored silently."""
    path = copy_of("llama_tied")
    edit(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))

    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight and lm_head\.weight differ.* tied"):
        load_all("llama_tied", path)


def test_buffers_of_old_checkpoints_are_passed_over(load_all, copy_of):
    """Checkpoints of old stored rotary frequencies, which the library computes."""
    path = copy_of("llama")
    edit(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))

    assert load_all("llama", path)


LOADING_FAULTS = {
    "missing": (lambda t: t.pop("model.norm.weight"), r"tensor model\.norm\.weight is missing"),
    "several missing": (
        lambda t: [t.pop(n) for n in list(t) if "k_proj" in n],
        r"k_proj\.weight and 1 more are missing",
    ),
    "unused": (lambda t: t.update({"extra.weight": torch.ones(2)}), r"tensor extra\.weight .* not used by LlamaFor"),
    "wrong shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(9)}),
        r"model\.norm\.weight has shape \(9,\).*\(64,\)",
    ),
}


@pytest.mark.parametrize("fault", LOADING_FAULTS)
def test_wrong_tensors_are_named(fault, load_all, copy_of):
    """A tensor too few, too many or of another shape is an error that names it and the directory."""
    damage, message = LOADING_FAULTS[fault]
    path = copy_of("llama")
    edit(path, damage)

    with pytest.raises(CheckpointError, match=message) as caught:
        load_all("llama", path)
    assert str(path) in str(caught.value)


def test_missing_expert_is_named(load_all, copy_of):
    """One expert too few gives a fused tensor of another shape."""
    path = copy_of("mixtral")
    edit(path, lambda t: [t.pop(name) for name in list(t) if "layers.1" in name and "experts.5" in name])

    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\..* has shape \(5, .*asks for \(6, "):
        load_all("mixtral", path)


def truncate(path):
    (path / FILE).write_bytes((path / FILE).read_bytes()[:-100])


def lose_shard(path):
    shard(path)
    (path / "model-00002-of-00002.safetensors").unlink()


def edit_index(path, change):
    """Apply ``change`` to the map of the index."""
    index = path / INDEX
    found = json.loads(index.read_text())
    change(found["weight_map"])
    index.write_text(json.dumps(found))


def rewrite_index(text):
    """Shard a checkpoint, and replace the text of its index."""

    def damage(path):
        shard(path)
        (path / INDEX).write_text(text)

    return damage


def promise(name, file):
    """Shard a checkpoint, and let its index name the tensor ``name`` of a file."""

    def damage(path):
        shard(path)
        edit_index(path, lambda weight_map: weight_map.update({name: file}))

    return damage


def dangle(path):
    (path / FILE).rename(path / "blob")
    (path / FILE).symlink_to(path / "blobs" / "0123")


FILE_FAULTS = {
    "truncated": (truncate, r"model\.safetensors: not a readable safetensors file"),
    "text": (lambda p: (p / FILE).write_text("weights\n" * 9), r"model\.safetensors: not a readable"),
    "pointer": (
        lambda p: (p / FILE).write_text("version https://git-lfs\n" * 9),
        r"model\.safetensors: not a readable safetensors file but a pointer of Git LFS; run: git lfs pull",
    ),
    "empty": (lambda p: (p / FILE).write_bytes(b""), r"model\.safetensors: not a readable safetensors file"),
    "lost shard": (lose_shard, r"model-00002-of-00002\.safetensors: listed in .*index\.json but missing"),
    "truncated shard": (
        lambda p: (shard(p), os.truncate(p / "model-00002-of-00002.safetensors", 3000)),
        r"model-00002-of-00002\.safetensors: not a readable safetensors file",
    ),
    "promised tensor": (
        promise("model.extra.weight", "model-00002-of-00002.safetensors"),
        r"index\.json: tensor 'model\.extra\.weight' is in the index but in none of its files",
    ),
    "outside": (
        promise("x", "../other/model.safetensors"),
        r"index\.json: names the file '\.\./other.*, which is not in",
    ),
    "absolute": (promise("x", "/etc/passwd"), r"index\.json: names the file '/etc/passwd', which is not in this"),
    "broken link": (
        dangle,
        r"model\.safetensors: missing: it is a symbolic link to .*blobs/0123, which does not exist",
    ),
    "pickle by name": (
        lambda p: edit_config(p, transformers_weights="weights.bin"),
        r"config\.json: transformers_weights: expected a safetensors file .*'weights\.bin'",
    ),
    "no file": (lambda p: (p / FILE).unlink(), r"neither model\.safetensors nor model\.safetensors\.index\.json"),
    "pickle": (
        lambda p: (p / FILE).rename(p / "pytorch_model.bin"),
        r"pytorch_model\.bin is a pickle, which Lamina never reads",
    ),
    "damaged index": (
        rewrite_index("{"),
        r"index\.json: not readable as JSON",
    ),
    "index without map": (
        rewrite_index("{}"),
        r"index\.json: expected a weight_map",
    ),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_damaged_files_are_named(fault, load_all, copy_of):
    """Whatever is wrong with the files, the error names the file and says what is wrong."""
    damage, message = FILE_FAULTS[fault]
    path = copy_of("llama")
    damage(path)

    for look in (check_checkpoint, lambda path: load_all("llama", path)):
        with pytest.raises(CheckpointError, match=message) as caught:
            look(path)
        assert str(path) in str(caught.value)


CONFIG_FAULTS = {
    "missing": (lambda p: (p / "config.json").unlink(), CheckpointError, r"config\.json: missing"),
    "damaged": (
        lambda p: (p / "config.json").write_text('{"a": '),
        CheckpointError,
        r"config\.json: not readable as JSON",
    ),
    "binary": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00"), CheckpointError, r"not readable as JSON"),
    "list": (lambda p: (p / "config.json").write_text("[]"), CheckpointError, r"expected a JSON object, got list"),
    "quantized": (
        lambda p: edit_config(p, quantization_config={"quant_method": "gptq"}),
        UnsupportedModelError,
        r"config\.json: quantization_config \(method 'gptq'\) is not supported",
    ),
    "unknown type": (
        lambda p: edit_config(p, model_type="perceptron"),
        UnsupportedModelError,
        r"config\.json: .*model_type 'perceptron'",
    ),
    "no type": (lambda p: (p / "config.json").write_text("{}"), UnsupportedModelError, r"model_type 'missing'"),
    "wrong value": (
        lambda p: edit_config(p, hidden_size="wide"),
        UnsupportedModelError,
        r"config\.json: .*hidden_size",
    ),
    "dtype": (
        lambda p: edit_config(p, dtype="float8_e4m3fn"),
        UnsupportedModelError,
        r"'float8_e4m3fn' is not supported",
    ),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_damaged_configurations_are_named(fault, copy_of):
    """A configuration that cannot be used is refused when the directory is opened."""
    damage, error, message = CONFIG_FAULTS[fault]
    path = copy_of("llama")
    damage(path)

    with pytest.raises(error, match=message) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)


@pytest.fixture
def open_folder():
    """A folder that every user may enter; those of the tests are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.contextmanager
def as_another_user():
    """Lose the rights of root for a while: a file's mode says nothing to root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("closed", [".", "config.json", FILE, "generation_config.json", "tokenizer.json"])
def test_what_may_not_be_read_is_named(closed, saved, open_folder):
    """A directory that may not be entered, and a file that may not be read, of whatever kind."""
    path = shutil.copytree(saved("llama"), open_folder / "llama")
    shutil.copy(CHECKPOINT / "tokenizer.json", path)
    for part in (path, *path.iterdir()):
        part.chmod(0o755)
    with as_another_user():
        check_checkpoint(path)
    (path / closed).chmod(0)

    with as_another_user(), pytest.raises(CheckpointError) as caught:
        check_checkpoint(path)

    file = "config.json" if closed == "." else closed
    assert str(caught.value).startswith(f"{path / file}: cannot be read: Permission denied; give the user")
    assert "\n" not in str(caught.value)


def test_a_file_is_no_directory(copy_of):
    """A path that leads to config.json or to the weights."""
    path = copy_of("llama")
    for file in ("config.json", FILE):
        for look in (check_checkpoint, Checkpoint.open):
            with pytest.raises(CheckpointError, match=rf"{file}: not a directory; expected the checkpoint directory"):
                look(path / file)


def test_a_damaged_tokenizer_is_named(copy_of):
    """Before any weight is read; a directory without a tokenizer is whole."""
    path = copy_of("llama")
    check_checkpoint(path)
    (path / "tokenizer.json").write_text('{"version": "1.0"}')

    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the tokenizer cannot be read: "):
        check_checkpoint(path)


def test_checking_imports_neither_torch_nor_transformers():
    """Hence it takes a part of a second, also from the start of the process."""
    code = (
        "import sys, pathlib; from lamina.model.checkpoint import check_checkpoint;"
        f"check_checkpoint(pathlib.Path({str(CHECKPOINT)!r}));"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_directory_is_named(tmp_path):
    """A path that does not exist is no model name to be looked up anywhere."""
    (tmp_path / "latest").symlink_to("snapshot")
    for look in (check_checkpoint, Checkpoint.open):
        with pytest.raises(CheckpointError, match=r"meta-llama: no such checkpoint directory$"):
            look(tmp_path / "meta-llama")
        with pytest.raises(CheckpointError, match=r"latest: no such .*: it is a symbolic link to snapshot, which does"):
            look(tmp_path / "latest")


def test_null_quantization_config_is_none(copy_of):
    """Some tools write the key with null for a model that is not quantized."""
    path = copy_of("llama")
    edit_config(path, quantization_config=None)

    assert Checkpoint.open(path).dtype == "float32"


YARN = {"rope_type": "yarn", "factor": 4.0}
CONTEXTS = {
    "as model cards say": (128, {"rope_scaling": {**YARN, "original_max_position_embeddings": 128}}, 512),
    "old name of the type": (128, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 512),
    "new spelling": (128, {"rope_parameters": {**YARN, "original_max_position_embeddings": 128}}, 512),
    "original not given": (128, {"rope_parameters": YARN}, 512),
    "room for answers": (160, {"rope_scaling": {**YARN, "original_max_position_embeddings": 128}}, 512),
    "extended already": (512, {"rope_scaling": {**YARN, "original_max_position_embeddings": 128}}, 512),
    "original beside": (512, {"original_max_position_embeddings": 128, "rope_scaling": YARN}, 512),
    "no factor": (512, {"rope_scaling": {**YARN, "factor": None, "original_max_position_embeddings": 128}}, 512),
    "no yarn": (512, {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 512),
}


@pytest.mark.parametrize("case", CONTEXTS)
def test_yarn_extends_the_context(case, copy_of):
    """By its factor, of the original context, however the configuration spells them; and never twice."""
    positions, ropes, context = CONTEXTS[case]
    path = copy_of("llama")
    config = json.loads((path / "config.json").read_text())
    config.pop("rope_parameters", None)
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions, **ropes}))

    assert Checkpoint.open(path).max_context == context


def test_yarn_in_some_layers_extends_the_context(tmp_path):
    """Layers that attend within a window have no part in it."""
    ropes = {
        "full_attention": {**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 128},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = {"model_type": "gemma3_text", "max_position_embeddings": 128, "rope_parameters": ropes}
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert Checkpoint.open(tmp_path).max_context == 512


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("sharded", [False, True])
def test_without_a_dtype_the_model_runs_as_it_is_stored(dtype, sharded, tmp_path):
    """config.json of some checkpoints does not say; the tensors do, to the library too."""
    path = FAMILIES["qwen2"].save(tmp_path, dtype=dtype)
    config = json.loads((path / "config.json").read_text())
    del config["dtype"]
    (path / "config.json").write_text(json.dumps(config))
    if sharded:
        shard(path)

    assert Checkpoint.open(path).dtype == dtype
    assert AutoModelForCausalLM.from_pretrained(path, dtype="auto").dtype == getattr(torch, dtype)


def test_stop_tokens_come_from_the_generation_config_first(copy_of):
    """generation_config.json overrides config.json; either may hold one id or several."""
    path = copy_of("llama")
    edit_config(path, eos_token_id=7)
    (path / "generation_config.json").unlink()
    one = Checkpoint.open(path).stop_tokens
    (path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    several = Checkpoint.open(path).stop_tokens

    assert (one, several) == ({7}, {3, 4})


def test_loading_is_quiet(saved, load_all, capfd):
    """Neither a progress bar nor a warning of the library reaches the log of a node."""
    load_all("mixtral", saved("mixtral"))
    capture(Checkpoint.open(saved("llama")))

    assert capfd.readouterr() == ("", "")
