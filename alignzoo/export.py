"""A checkpoint or a finished run as a plain folder that transformers loads, or peft for an adapter.

It takes the memory of the model once: the base is loaded, and the checkpoint's weights are put into it one by one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from alignzoo.checkpoint import CheckpointReader, checkpoints_in, latest_checkpoint, open_checkpoint
from alignzoo.data.template import choose_template
from alignzoo.data.tokenise import ensure_pad_token
from alignzoo.errors import AlignzooError, ModelError
from alignzoo.model import (
    DTYPES,
    Location,
    add_adapter,
    from_anywhere,
    hash_weights,
    labels_of,
    load_model,
    load_tokenizer,
    locate,
    save_model,
)  # fmt: skip
from alignzoo.progress import Say
from alignzoo.recipe import Model, Recipe, load_recipe
from alignzoo.rundir import RunDir


def export(source: Path, to: Path, *, merge: bool, dtype: str | None, say: Say) -> Path:
    """Writes the folder `to`, whole or not at all, and returns it.

    source: a run directory, a checkpoint in one, or the folder of a saved model
    merge:  fold a LoRA adapter into its base; else the adapter is written, for peft
    dtype:  "float32", "bfloat16" or "float16"; None as model.dtype has it
    Raises AlignzooError where `to` is there, where a hash does not match, or where `source` is none of these.
    """
    if to.exists():
        raise AlignzooError(f"{to} is there already", fix="nothing is overwritten: name another folder")
    wanted = _Wanted(to, merge, dtype)
    checkpoint = checkpoint_of(source, say)
    if checkpoint is None:
        folder = source / "model" if (source / "model").is_dir() else source
        say(f"exporting the saved model {folder}")
        return _from_model(folder, wanted, say)
    say(f"exporting {checkpoint.folder}")
    return _from_checkpoint(checkpoint, wanted, say)


@dataclass(frozen=True)
class _Wanted:
    """What the new folder shall be."""

    to: Path
    merge: bool
    dtype: str | None


# --- what there is ---------------------------------------------------------------------------------------------------


def checkpoint_of(source: Path, say: Say) -> CheckpointReader | None:
    """The checkpoint that is meant, its hashes checked; None for a saved model."""
    if source in checkpoints_in(source.parent):
        say(f"checking the hashes of {source}")
        return open_checkpoint(source)
    if (source / "model").is_dir() or any((source / name).is_file() for name in ("config.json", "adapter_config.json")):
        return None
    if not (source / "recipe.toml").is_file():
        raise AlignzooError(
            f"{source}: neither a run directory, nor a checkpoint, nor a saved model",
            fix="name a folder that `alignzoo run` made, or checkpoints/step-N in it",
        )
    found = latest_checkpoint(RunDir(source).checkpoints, say)
    if found is None:
        raise AlignzooError(
            f"{source}: the run did not come to its end, and there is no undamaged checkpoint in it",
            fix=f"go on with it: alignzoo run {source / 'recipe.toml'} --resume",
        )
    say(f"the run did not come to its end: step {found.step} is exported")
    return found


def _recipe_of(folder: Path) -> Recipe:
    if not (folder / "recipe.toml").is_file():
        raise AlignzooError(
            f"{folder}: no recipe.toml",
            why="a checkpoint holds what was trained; the recipe beside it tells of which model",
            fix="export the checkpoint where it was made, in its run directory",
        )
    return load_recipe(folder / "recipe.toml")


# --- from a checkpoint -----------------------------------------------------------------------------------------------


def _from_checkpoint(reader: CheckpointReader, wanted: _Wanted, say: Say) -> Path:
    model, tokenizer, recipe, where = load_checkpoint(reader, say, wanted.dtype)
    if wanted.merge and recipe.model.lora is None:
        say("merge: nothing to merge, all weights were trained")
    return _save(model, tokenizer, wanted, base=from_anywhere(recipe.model.path, where))


def load_checkpoint(reader: CheckpointReader, say: Say, dtype: str | None = None) -> tuple[Any, Any, Recipe, Location]:
    """Model, tokenizer, recipe and place of the start model. dtype: of a model without adapter, if not model.dtype."""
    run_dir = RunDir(reader.folder.resolve().parent.parent)
    recipe = _recipe_of(run_dir.path)
    lora, where = recipe.model.lora, locate(recipe.model.path, recipe.model.revision)
    _check_base(run_dir, recipe, where, say)
    settings = _plain(recipe.model, recipe.model.dtype if lora else dtype or recipe.model.dtype)
    model = load_model(where, settings, say)
    if lora is not None:
        model = add_adapter(model, lora, quantised=False)
    _fill(model, reader)
    tokenizer = load_tokenizer(where, trust_remote_code=recipe.model.trust_remote_code)
    ensure_pad_token(tokenizer)
    tokenizer.chat_template = choose_template(recipe.data, tokenizer).text or tokenizer.chat_template
    return model, tokenizer, recipe, where


def _plain(settings: Model, dtype: Any) -> Model:
    """The model itself: no adapter, and not quantised."""
    return replace(settings, lora=None, quantization=None, dtype=dtype)


def _check_base(run_dir: RunDir, recipe: Recipe, where: Location, say: Say) -> None:
    """Is the model, which an adapter belongs to, the one that the run began with?"""
    manifest = run_dir.read_manifest()
    if "model" in manifest.get("live", ()):
        raise ModelError(
            f"{run_dir.path}: its model was given from Python, so there is no base to load",
            fix="resume the run from Python to its end: model/ then holds the model",
        )
    if recipe.model.lora is None:
        return  # all weights are in the checkpoint
    then, now = manifest["weights"], hash_weights(where)
    if not then or not now:
        say("the hashes of the base model are not known: whether it is the one that was trained is not checked")
    elif then != now:
        raise ModelError(
            f"model.path = {recipe.model.path} is not the model that the run began with",
            why="its sha256 differs from the one in manifest.json",
            fix="put the model back",
        )


def _fill(model: Any, reader: CheckpointReader) -> None:
    """The checkpoint's weights into the model that trained, one by one."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    odd = sorted(set(trained) ^ set(reader.names("weights")))
    odd += [n for n, entry in reader.manifest["tensors"].get("weights", {}).items()
            if n in trained and entry["shape"] != list(trained[n].shape)]  # fmt: skip
    if odd:
        raise ModelError(
            f"{reader.folder}: its weights are not those of the model: {odd[0]} and {len(odd)} in all",
            why="another version of transformers or peft names them otherwise, or the base model changed",
            fix="use the versions in manifest.json",
        )
    with torch.no_grad():
        for name, tensor in reader.tensors("weights"):
            trained[name].copy_(tensor)


# --- from a saved model ----------------------------------------------------------------------------------------------


def _from_model(folder: Path, wanted: _Wanted, say: Say) -> Path:
    """model/ of a run, or any folder with a saved model: its files as they are where nothing is to be changed."""
    where = locate(str(folder))
    if wanted.merge and where.base is None:
        say("merge: nothing to merge, the saved model is whole")
    merges = wanted.merge and where.base is not None
    if not merges and (where.base is not None or wanted.dtype is None):
        with _writing(wanted.to) as aside:
            _copy(folder, aside, wanted.dtype)
            aside.rename(wanted.to)
        return wanted.to
    run_dir = RunDir(folder.resolve().parent)
    settings = Model(path=str(folder), head="scalar" if labels_of(where) else "lm")
    if (run_dir.path / "recipe.toml").is_file():
        recipe = load_recipe(run_dir.path / "recipe.toml")
        settings = recipe.model
        if where.base is not None:
            _check_base(run_dir, recipe, where.base, say)
    model = load_model(where, _plain(settings, settings.dtype if merges else wanted.dtype), say)
    return _save(model, load_tokenizer(where, trust_remote_code=settings.trust_remote_code), wanted)


def _copy(folder: Path, aside: Path, dtype: str | None) -> None:
    """The files; an adapter's weights in another type where one is asked for."""
    shutil.copytree(folder, aside)
    if dtype is None:
        return
    for file in aside.glob("*.safetensors"):
        tensors = {k: v.to(DTYPES[dtype]) if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


# --- writing ---------------------------------------------------------------------------------------------------------


def _save(model: Any, tokenizer: Any, wanted: _Wanted, *, base: str = "") -> Path:
    """base: of an adapter that is not merged, for model.save_model"""
    if wanted.merge and hasattr(model, "get_base_model"):
        model = model.merge_and_unload()
    if wanted.dtype is not None:
        model = model.to(DTYPES[wanted.dtype])
    with _writing(wanted.to):
        return save_model(model, tokenizer, wanted.to, base=base, merge=False)


@contextmanager
def _writing(to: Path) -> Iterator[Path]:
    """The folder beside `to` in which it is made; where that fails, nothing of it stays."""
    aside = to.with_name(f".{to.name}.partial")  # as model.save_model has it
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        yield aside
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise AlignzooError(
            f"{to}: cannot be written to", why=str(error), fix="free space, or permit writing there"
        ) from error
