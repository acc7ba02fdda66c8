"""Reading checkpoints: layouts that must load alike, and damage that must be named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamina.errors import CheckpointError, UnsupportedModelError
from lamina.model.capture import capture
from lamina.model.checkpoint import Checkpoint
from lamina.model.weights import load_weights
from tests.model.compose import CPU

FILE = "model.safetensors"


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
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded_checkpoint_is_the_same_model(saved, copy_of, load_all):
    """Splitting the file changes neither a tensor nor the fingerprint."""
    path = copy_of("qwen2")
    shard(path)

    weights, want = load_all("qwen2", path), load_all("qwen2", saved("qwen2"))

    assert weights.keys() == want.keys()
    assert all(weights[name].equal(want[name]) for name in want)
    assert Checkpoint.open(path).fingerprint == Checkpoint.open(saved("qwen2")).fingerprint


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


def misplace_tensor(path):
    shard(path)
    index = path / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(found))


FILE_FAULTS = {
    "truncated": (truncate, r"model\.safetensors: not a readable safetensors file"),
    "text": (lambda p: (p / FILE).write_text("version https://git-lfs\n" * 9), r"model\.safetensors: not a readable"),
    "empty": (lambda p: (p / FILE).write_bytes(b""), r"model\.safetensors: not a readable safetensors file"),
    "lost shard": (lose_shard, r"model-00002-of-00002\.safetensors: listed in .*index\.json but missing"),
    "misplaced": (
        misplace_tensor,
        r"model-00002-of-00002\.safetensors: tensor 'lm_head\.weight' is in the index but not in the file",
    ),
    "no file": (lambda p: (p / FILE).unlink(), r"neither model\.safetensors nor model\.safetensors\.index\.json"),
    "pickle": (
        lambda p: (p / FILE).rename(p / "pytorch_model.bin"),
        r"pytorch_model\.bin is a pickle, which Lamina never reads",
    ),
    "damaged index": (
        lambda p: (p / "model.safetensors.index.json").write_text("{"),
        r"index\.json: not readable as JSON",
    ),
    "index without map": (
        lambda p: (p / "model.safetensors.index.json").write_text("{}"),
        r"index\.json: expected a weight_map",
    ),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_damaged_files_are_named(fault, load_all, copy_of):
    """Whatever is wrong with the files, the error names the file and says what is wrong."""
    damage, message = FILE_FAULTS[fault]
    path = copy_of("llama")
    damage(path)

    with pytest.raises(CheckpointError, match=message) as caught:
        load_all("llama", path)
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


def test_missing_directory_is_named(tmp_path):
    """A path that does not exist is no model name to be looked up anywhere."""
    with pytest.raises(CheckpointError, match=r"meta-llama.*no such checkpoint directory"):
        Checkpoint.open(tmp_path / "meta-llama")


def test_null_quantization_config_is_none(copy_of):
    """Some tools write the key with null for a model that is not quantized."""
    path = copy_of("llama")
    edit_config(path, quantization_config=None)

    assert Checkpoint.open(path).dtype == "float32"


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
