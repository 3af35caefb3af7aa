import contextlib
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import cramfast
from cramfast.config import ModelConfig, OptimizerOptions
from cramfast.data.tokenizer import SPECIAL_TOKENS
from cramfast.errors import UserError
from cramfast.model import Bert
from cramfast.train import checkpoint as module
from cramfast.train.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_model,
    write_json,
)
from cramfast.train.optimizer import Optimizer
from cramfast.train.weights import Weights

CONFIG = ModelConfig(vocab_size=61, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, norm_bias=True)
STATE = {"step": 7, "spent": {"seconds": 0.1 + 0.2, "tokens": 2**53 + 1, "flops": 1e300}, "cursor": [1, 2, 3]}


def make_model(seed: int = 0, config: ModelConfig = CONFIG) -> tuple[Bert, Optimizer]:
    torch.manual_seed(seed)
    model = Bert(config)
    return model, Optimizer(Weights(model, torch.float32), OptimizerOptions(lr=1e-3, weight_decay=0.01, clip=1.0))


def update(model: Bert, optimizer: Optimizer) -> None:
    """One update from tokens that the random state decides."""
    weights = optimizer.weights
    ids = torch.randint(CONFIG.vocab_size, (24,))
    loss = model(ids, torch.tensor([0, 10, 24], dtype=torch.int32), 14, torch.arange(0, 24, 4), ids[::4])
    weights.start_gradient(anew=True)
    weights.take(torch.autograd.grad(loss, [*weights.leaves.values()], allow_unused=True))
    optimizer.update(torch.tensor(1e-3), loss.detach(), torch.ones(()), torch.zeros(3))


def trained(updates: int = 3) -> tuple[Bert, Optimizer]:
    model, optimizer = make_model()
    for _ in range(updates):
        update(model, optimizer)
    return model, optimizer


def everything(model: Bert, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    tensors = {**model.state_dict(), **optimizer.tensors(), "random": torch.get_rng_state()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same_bits(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def save(run, step: int, model=None, optimizer=None, keep: int = 100):
    if model is None:
        model, optimizer = trained(1)
    return save_checkpoint(run, step, model, optimizer.tensors(), STATE | {"step": step}, keep)


def load(path, seed: int = 1) -> dict:
    model, optimizer = make_model(seed)
    return load_checkpoint(path, model, optimizer.tensors())


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(run, *arguments) -> str:
    with pytest.raises(UserError) as error:
        run(*arguments)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "any-tokenizer.json"
    entries = [*SPECIAL_TOKENS, *map(str, range(CONFIG.vocab_size - len(SPECIAL_TOKENS)))]
    numbers = {entry: number for number, entry in enumerate(entries)}
    Tokenizer(models.WordPiece(numbers, unk_token="[UNK]")).save(str(path))
    return path


def test_a_checkpoint_brings_back_every_bit(tmp_path):
    model, optimizer = trained()
    extra = {"loss_scale": torch.tensor(2.0**15), "good_steps": torch.tensor(123.0)}
    before = everything(model, optimizer)
    path = save_checkpoint(tmp_path, 7, model, optimizer.tensors() | extra, STATE, keep=2)
    assert path == tmp_path / "checkpoint-7"
    assert same_bits(everything(model, optimizer), before)

    other_model, other_optimizer = make_model(seed=1)
    extra_again = {name: torch.zeros(()) for name in extra}
    state_again = load_checkpoint(path, other_model, other_optimizer.tensors() | extra_again)
    assert same_bits(everything(other_model, other_optimizer), before)
    assert same_bits(extra_again, extra)
    assert state_again == STATE


@pytest.mark.skipif(os.name != "posix", reason="permissions of files are posix's")
def test_who_may_read_a_folder_may_read_its_files(tmp_path):
    model, optimizer = trained(1)
    target = save_checkpoint(tmp_path, 1, model, optimizer.tensors(), {}, keep=1)
    modes = {path.name: path.stat().st_mode & 0o777 for path in target.iterdir()}
    assert len(modes) == 4
    assert set(modes.values()) == {target.stat().st_mode & 0o666}


def test_what_is_loaded_stays_where_it_was(tmp_path):
    path = save(tmp_path, 3)
    model, optimizer = make_model(seed=1)
    tensors = model.state_dict() | optimizer.tensors()
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    load_checkpoint(path, model, optimizer.tensors())
    assert places == {name: tensor.data_ptr() for name, tensor in (model.state_dict() | optimizer.tensors()).items()}
    assert torch.equal(optimizer.weights.master, trained(1)[1].weights.master)
    assert torch.equal(optimizer.first, trained(1)[1].first)


@pytest.mark.parametrize("updates", [0, 3])
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path, updates):
    model, optimizer = trained(updates)
    path = save(tmp_path, updates, model, optimizer)
    for _ in range(3):
        update(model, optimizer)
    wanted = everything(model, optimizer)

    again, optimizer_again = make_model(seed=1)
    load_checkpoint(path, again, optimizer_again.tensors())
    for _ in range(3):
        update(again, optimizer_again)
    assert same_bits(everything(again, optimizer_again), wanted)


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (9, 100, 20):
        save(tmp_path, step)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_only_whole_checkpoints_count(tmp_path):
    save(tmp_path, 3)
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / ".checkpoint-6.partial")
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-best")
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-9.old")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


@pytest.mark.parametrize("step", [3, 2])
def test_what_a_killed_save_left_goes_with_the_next(tmp_path, step):
    aside = tmp_path / f".checkpoint-{step}.partial"
    aside.mkdir()
    (aside / "model.safetensors").write_bytes(b"half")
    (aside / "left.over").write_bytes(b"half")
    path = save(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-3"]
    assert names(path) == ["config.json", "model.safetensors", "trainer.json", "trainer.safetensors"]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_only_the_newest_are_kept(tmp_path, keep):
    for step in (2, 4, 8, 16):
        save(tmp_path, step, keep=keep)
    assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in (2, 4, 8, 16)[-keep:])


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    model, optimizer = trained()
    whole = save(tmp_path, 3, model, optimizer, keep=1)
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    monkeypatch.setattr(module, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 6, model, optimizer, keep=1)
    assert names(tmp_path) == ["checkpoint-3"]
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


class Killed(BaseException):
    pass


def test_killed_while_a_checkpoint_is_replaced_there_is_always_a_whole_one(tmp_path, monkeypatch):
    model, optimizer = trained()
    save(tmp_path, 3, model, optimizer, keep=1)

    def killed_midway(folder, *_, **__):
        if os.path.isdir(folder):
            os.remove(folder / "trainer.safetensors")
            raise Killed

    monkeypatch.setattr(module.shutil, "rmtree", killed_midway)
    with contextlib.suppress(Killed):
        save(tmp_path, 3, model, optimizer, keep=1)
    monkeypatch.undo()
    assert load(latest_checkpoint(tmp_path))["step"] == 3
    save(tmp_path, 3, model, optimizer, keep=1)
    assert names(tmp_path) == ["checkpoint-3"]


def test_json_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(module, "_sync", lambda _: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "last bytes lost": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "garbage in front": lambda path: path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:]),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 4),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["model.safetensors", "trainer.safetensors", "trainer.json"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, file, damage):
    path = save(tmp_path, 3)
    DAMAGE[damage](path / file)
    assert str(path / file) in refusal(load, path)


@pytest.mark.parametrize("text", ["[]", "null", '"text"'])
def test_json_of_another_kind_is_refused_by_name(tmp_path, text):
    path = save(tmp_path, 3)
    (path / "trainer.json").write_text(text)
    assert str(path / "trainer.json") in refusal(load, path)
    (path / "config.json").write_text(text)
    assert str(path / "config.json") in refusal(cramfast.load, path)


def test_a_trainer_state_of_another_model_is_refused_by_name(tmp_path):
    path = save(tmp_path, 3)
    whole = load_file(path / "trainer.safetensors")
    moment = "exp_avg.final_norm.weight"
    changes = {
        "random.": {name: tensor for name, tensor in whole.items() if name != "random.cpu"},
        moment: {name: tensor for name, tensor in whole.items() if name != moment},
        "exp_avg.stranger.weight": whole | {"exp_avg.stranger.weight": torch.zeros(2)},
        "updates": whole | {"updates": torch.zeros(1)},
        "embeddings.norm.bias": load_file(path / "model.safetensors"),
    }
    for name, other in changes.items():
        save_file(other, path / "trainer.safetensors")
        message = refusal(load, path)
        assert str(path / "trainer.safetensors") in message
        assert name in message
    save_file(whole, path / "trainer.safetensors")
    assert load(path)["step"] == 3


@pytest.fixture
def run(tmp_path, tokenizer):
    """A finished run's folder; its checkpoints and its `final` differ."""
    folder = tmp_path / "run"
    for step in (3, 20):
        save(folder, step, *trained(step))
    save_model(folder / "final", trained(25)[0], tokenizer)
    return folder


@pytest.mark.parametrize(("path", "updates"), [(".", 25), ("final", 25), ("checkpoint-3", 3), ("checkpoint-20", 20)])
def test_load_takes_a_run_a_checkpoint_or_final(run, path, updates):
    model = cramfast.load(str(run / path))
    assert not model.training
    assert model.config == CONFIG
    assert same_bits(model.state_dict(), trained(updates)[0].state_dict())


def test_load_takes_the_newest_checkpoint_of_a_run_that_has_not_ended(run):
    shutil.rmtree(run / "final")
    assert same_bits(cramfast.load(run).state_dict(), trained(20)[0].state_dict())


def test_final_holds_the_model_and_its_tokenizer(run, tokenizer):
    assert names(run / "final") == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (run / "final" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


@pytest.mark.parametrize("exists", [True, False])
def test_load_refuses_a_folder_without_a_model(tmp_path, exists):
    folder = tmp_path / "nothing"
    if exists:
        folder.mkdir()
    assert str(folder) in refusal(cramfast.load, folder)


def test_load_refuses_the_config_of_another_library(run):
    (run / "final" / "config.json").write_text('{"model_type": "gpt2"}')
    message = refusal(cramfast.load, run)
    assert str(run / "final" / "config.json") in message and "gpt2" in message


def test_load_names_the_settings_it_does_not_know(run):
    path = run / "final" / "config.json"
    settings = json.loads(path.read_text())
    settings["cramfast"]["experts"] = 8
    path.write_text(json.dumps(settings))
    message = refusal(cramfast.load, run)
    assert str(path) in message
    assert "experts" in message


@pytest.mark.parametrize("damage", DAMAGE)
def test_load_refuses_damaged_weights_by_name(run, damage):
    DAMAGE[damage](run / "checkpoint-20" / "model.safetensors")
    shutil.rmtree(run / "final")
    message = refusal(cramfast.load, run)
    assert str(run / "checkpoint-20" / "model.safetensors") in message


def rename(tensors: dict) -> list[str]:
    tensors["stranger.weight"] = tensors.pop("final_norm.weight")
    return ["stranger.weight", "final_norm.weight"]


def drop(tensors: dict) -> list[str]:
    del tensors["layers.1.mlp.2.weight"], tensors["layers.0.attention.qkv.weight"]
    return ["layers.1.mlp.2.weight", "layers.0.attention.qkv.weight"]


def reshape(tensors: dict) -> list[str]:
    tensors["head.transform.0.weight"] = torch.zeros(32, 31)
    return ["head.transform.0.weight", "32, 31", "32, 32"]


@pytest.mark.parametrize("change", [rename, drop, reshape])
def test_load_lists_the_weights_that_do_not_fit(run, change):
    path = run / "final" / "model.safetensors"
    tensors = load_file(path)
    wanted = change(tensors)
    save_file(tensors, path)
    message = refusal(cramfast.load, run)
    assert str(path) in message
    assert all(re.search(re.escape(part), message) for part in wanted)
