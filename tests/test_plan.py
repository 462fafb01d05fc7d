"""`alignzoo plan`: exact counts, formulae against closed forms and DeepSpeed's own, a measured run, predictions."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import REPO, tiny_llama
from rich.console import Console
from runs_helpers import finished, write_recipe
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

import alignzoo
from alignzoo import attention
from alignzoo.batch import PADDED, Way
from alignzoo.cli import cli
from alignzoo.logprobs import Scorer
from alignzoo.memory import BUCKET, CUDA, GIB, Load, Setup, activation_bytes, estimate, model_states, shape_of
from alignzoo.model import DTYPES, add_adapter, set_dropout
from alignzoo.plan import PARTS, WAYS, Where, in_words, make_plan, make_row, memory_table, predict, train_tokens
from alignzoo.predictions import errors, keep, recipe_hash, settle
from alignzoo.probing import Probe, shortened, tokens_of
from alignzoo.recipe import LoRA, Model, load_recipe
from alignzoo.tree import Completion, Tree

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA, GPT2 = LlamaConfig(**SMALL), GPT2Config(vocab_size=97, n_embd=128, n_layer=4, n_head=4, n_positions=512)
LARGE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip


def settings(**changes: Any) -> Model:
    return Model(path="x", **changes)


# --- exact counts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [LLAMA, LlamaConfig(**SMALL, tie_word_embeddings=True), GPT2, Qwen3Config(**SMALL, head_dim=32)],
    ids=["Llama", "tied", "GPT-2", "Qwen3"],
)
@pytest.mark.parametrize("lora", [None, LoRA(rank=3), LoRA(rank=2, dora=True, modules_to_save=("lm_head",))])
def test_the_bytes_are_those_of_the_model(config: Any, dtype: str, lora: LoRA | None) -> None:
    if lora is not None and lora.modules_to_save and (config.tie_word_embeddings or dtype == "float32"):
        lora = replace(lora, modules_to_save=())
    chosen = settings(dtype=dtype, lora=lora)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    if lora is not None:
        model = add_adapter(model, lora, quantised=False)
    shape, own = shape_of(config, chosen), list(model.parameters())
    assert shape.parameters == sum(p.numel() for p in own)
    assert shape.trained == sum(p.numel() for p in own if p.requires_grad)
    assert shape.weight_bytes == sum(p.numel() * p.element_size() for p in own)
    assert shape.trained_bytes == sum(p.numel() * p.element_size() for p in own if p.requires_grad)


def test_a_llama_by_hand() -> None:
    h, i, v, k = 128, 352, 97, 64
    layer = h * h * 2 + 2 * h * k + 3 * h * i + 2 * h
    shape = shape_of(LLAMA, settings())
    assert shape.parameters == 2 * v * h + 4 * layer + h
    assert (shape.head, shape.layers, shape.inner, shape.gated, shape.rms) == (v * h, 4, i, True, True)
    tied = shape_of(LlamaConfig(**SMALL, tie_word_embeddings=True), settings())
    assert shape.parameters - tied.parameters == v * h


def test_quantised_weights() -> None:
    """NF4: half a byte, and a float32 scale for each 64 weights; the output and the embeddings stay as they are."""
    matrices = 4 * (128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 352)
    shape = shape_of(LLAMA, settings(quantization="4bit", lora=LoRA(rank=4)))
    assert shape.quantised == matrices and shape.quantised_bytes == matrices * 9 // 16
    assert shape.frozen == 2 * 97 * 128 + 9 * 128
    assert shape_of(LLAMA, settings(quantization="8bit", lora=LoRA(rank=4))).quantised_bytes == matrices


# --- the stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize(
    ("dtype", "zero", "per_weight"),
    [
        ("float32", 0, lambda n: 4 + 4 + 8), ("float32", 1, lambda n: 4 + 4 + 12 / n),
        ("float32", 2, lambda n: 4 + 16 / n), ("float32", 3, lambda n: 20 / n),
        ("bfloat16", 0, lambda n: 2 + 2 + 4), ("bfloat16", 1, lambda n: 2 + 4 + 16 / n),
        ("bfloat16", 2, lambda n: 2 + 16 / n), ("bfloat16", 3, lambda n: 18 / n),
    ],
)  # fmt: skip
def test_the_stages_are_those_of_the_page_on_scaling(dtype: str, zero: int, per_weight: Any, ranks: int) -> None:
    shape = shape_of(LLAMA, settings(dtype=dtype))
    states, host = model_states(shape, Setup("cuda", "bf16", ranks, zero))
    buffers = states.pop("buffers")
    assert sum(states.values()) == pytest.approx(per_weight(ranks) * shape.parameters, abs=8) and host == 0
    each = 4 if dtype == "float32" else 2
    wanted = {0: 0, 1: 4 * BUCKET, 2: each * BUCKET, 3: each * (BUCKET + shape.parameters)}
    assert buffers == wanted[zero]


def test_the_stages_are_those_of_deepspeed() -> None:
    """Its estimates are for weights in 16 bits; it leaves the buffers out, and counts a layer as gathered."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as stage_3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as stage_2

    shape = shape_of(LLAMA, settings(dtype="bfloat16"))
    total, layer = shape.parameters, 128 * 352

    def ours(**options: Any) -> int:
        states, _ = model_states(shape, Setup("cuda", "bf16", 8, **options))
        return sum(states.values()) - states["buffers"]

    def theirs(**offload: Any) -> int:
        return int(stage_3(total, layer, num_gpus_per_node=8, **offload)[1]) - 4 * layer

    assert ours(zero=3) == pytest.approx(theirs(cpu_offload=False, cpu_offload_params=False), abs=4)
    assert ours(zero=3, offload_optimizer=True) == pytest.approx(theirs(cpu_offload_params=False), abs=4)
    assert ours(zero=3, offload_optimizer=True, offload_parameters=True) == theirs() == 0
    assert ours(zero=2, offload_optimizer=True) == stage_2(total, num_gpus_per_node=8)[1]
    # at stage 2 it counts the gradients in 16 bits beside their sum in float32; they are freed bucket by bucket
    _, device = stage_2(total, num_gpus_per_node=8, cpu_offload=False)
    assert ours(zero=2) == pytest.approx(device - 2 * total / 8, abs=4)


def test_optimizers_and_the_reference() -> None:
    shape = shape_of(LLAMA, settings())
    p = shape.parameters

    def states(optimizer: str) -> int:
        return model_states(shape, Setup("cuda", "bf16", optimizer=optimizer))[0]["optimizer"]

    wanted = {"adamw_torch": 8 * p, "sgd": 0, "rmsprop": 4 * p, "adamw_8bit": 2 * p}
    assert {name: states(name) for name in wanted} == wanted
    for zero, share in ((0, 1), (2, 1), (3, 8)):
        found = estimate(shape, Setup("cuda", "bf16", 8, zero), Load(64, 64, reference=shape))
        assert found.parts["reference"] == 4 * p // share and tuple(found.parts) == PARTS


def test_the_update_takes_as_much_as_the_gradients_where_it_is_not_fused() -> None:
    shape = shape_of(LLAMA, settings())
    for optimizer, precision, when in (
        ("adamw_torch", "bf16", "update"), ("adamw_torch_fused", "bf16", "micro-batch"), ("sgd", "bf16", "update"),
        ("adamw_torch_fused", "fp16", "update"),
    ):  # fmt: skip
        assert estimate(shape, Setup("cuda", precision, optimizer=optimizer), Load(4, 4)).when == when


# --- activations -----------------------------------------------------------------------------------------------------


def saved(config: Any, chosen: Model, precision: str, packed: bool, checkpointing: bool) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward pass, weights apart, and its positions."""
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[chosen.dtype])
    set_dropout(model, 0.0)
    if chosen.lora is not None:
        model = add_adapter(model, chosen.lora, False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    scorer = Scorer(model).train()
    if packed:
        attention.enable(scorer.causal_lm)
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 97, n).astype(np.int32) for n in (40, 44, 44) * 4]
    trees = [Tree(n, ids[3 * n], (Completion(ids[3 * n + 1]), Completion(ids[3 * n + 2]))) for n in range(4)]
    layout = (Way(True, True) if packed else PADDED).layout(trees)
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that the address stays its own
        return tensor

    cast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), cast:
        scorer(layout)
    return sum(size for size, _ in kept.values()), layout.positions


CASES: dict[str, tuple[Any, Model, str, bool, bool]] = {
    "Llama": (LLAMA, settings(), "fp32", True, False),
    "padded": (LLAMA, settings(), "fp32", False, False),
    "bfloat16": (LLAMA, settings(dtype="bfloat16"), "fp32", True, False),
    "autocast": (LLAMA, settings(), "bf16", True, False),
    "LoRA": (LLAMA, settings(lora=LoRA(rank=4)), "fp32", True, False),
    "LoRA over bfloat16": (LLAMA, settings(dtype="bfloat16", lora=LoRA(rank=4)), "bf16", True, False),
    "checkpointing": (LLAMA, settings(), "fp32", True, True),
    "GPT-2": (GPT2, settings(), "fp32", True, False),
    "Qwen3": (Qwen3Config(**SMALL, head_dim=32), settings(), "fp32", True, False),
}


@pytest.mark.parametrize("case", CASES)
def test_activations_are_what_autograd_keeps(case: str) -> None:
    """Within 12 %; the formula is a little high where rows are padded, since keys are not copied there."""
    config, chosen, precision, _, checkpointing = CASES[case]
    kept, positions = saved(*CASES[case])
    shape, setup = shape_of(config, chosen), Setup("cpu", precision, checkpointing=checkpointing)
    if precision == "bf16" and chosen.dtype == "float32":
        kept -= 2 * shape.matrices  # the weights' copies, which are counted apart
    found = activation_bytes(shape, setup, Load(positions, 84))
    if checkpointing:  # one layer is computed again in the backward pass
        found -= activation_bytes(replace(shape, layers=1), replace(setup, checkpointing=False), Load(positions, 84))
        kept -= positions * 128 * 4 * 2  # the last norm
    assert found == pytest.approx(kept, rel=0.35 if checkpointing else 0.12)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def no_weights(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 7 billion weights: its configuration and tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("large")
    LlamaConfig(vocab_size=len(tokenizer), **LARGE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plan(recipe: Path, *words: str) -> Any:
    return CliRunner().invoke(cli, ["plan", str(recipe), *words], env={"COLUMNS": "250"})


def test_what_fits(no_weights: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, no_weights, model__dtype="bfloat16")
    done = plan(recipe, "--gpus", "8", "--memory", "80", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["model"]["parameters"] > 6e9 and found["device"] == "cuda" and found["ranks"] == 8
    by_way = {(r["zero"], r["offload_optimizer"], r["offload_parameters"]): r for r in found["rows"]}
    assert len(by_way) == 7 and all(r["total"] == sum(r["parts"].values()) for r in found["rows"])
    fitting = [row for row in found["rows"] if row["total"] <= 80 * GIB]
    assert [row["fits"] for row in found["rows"]] == [row in fitting for row in found["rows"]]
    assert f"engine.zero = {fitting[0]['zero']}," in found["advice"]
    told = plan(recipe, "--gpus", "8", "--memory", "25").stdout
    assert "fits in 25.0 GiB: engine.zero = 3, " in told
    tight = plan(recipe, "--gpus", "1", "--memory", "5").stdout
    assert "nothing fits in 5.0 GiB: the smallest way takes 5.9" in tight
    assert "with engine.gradient_checkpointing = true and engine.zero = 3 + offload_optimizer" in tight


def test_ways_that_alignzoo_refuses(no_weights: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model__quantization": "4bit", "model__lora": {"rank": 8}, "model__dtype": "bfloat16"}
    found = json.loads(plan(write_recipe(tmp_path, no_weights, **changes), "--gpus", "2", "--json").stdout)
    assert [bool(row["refused"]) for row in found["rows"]] == [row["zero"] == 3 for row in found["rows"]]
    assert "4bit" in found["rows"][3]["refused"] and found["advice"] == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--set", "train.batch_size=0"], "batch_size"), (["--set", "model.path=no/such/place/x"], "no folder"),
     (["--set", "engine.offload_optimizer=cpu"], "needs ZeRO stage")],
)  # fmt: skip
def test_a_wrong_recipe(words: list[str], message: str, tiny_folder: Path, tmp_path: Path) -> None:
    done = plan(write_recipe(tmp_path, tiny_folder), *words)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr


# --- a run, and what was predicted of it -----------------------------------------------------------------------------


def test_a_probe_and_the_memory_of_real_steps(tokenizer: Any, tmp_path: Path) -> None:
    """A model of 53 MB: its states are 210 MB beside the libraries, which this process measures of itself."""
    folder = tmp_path / "model"
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_key_value_heads": 4}
    tiny_llama(vocabulary=len(tokenizer), **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe = write_recipe(tmp_path / "recipe", folder, train__batch_size=2)
    out, _ = finished(tmp_path / "out", "plan", recipe, "--probe", "--json")
    found = json.loads(out)
    probe, own = found["probe"], found["rows"][0]
    assert probe["steps"] == 2 and probe["step_tokens"] > 100 and probe["eval_tokens"] > 100
    seconds = found["seconds"]
    assert all(seconds[name] > 0 for name in ("loading", "reference", "answers", "steps", "evaluation"))
    measured, computed = probe["memory"], own["total"] / GIB
    assert computed == pytest.approx(measured, rel=0.15)
    libraries = own["parts"]["libraries"] / GIB
    assert computed - libraries == pytest.approx(measured - libraries, rel=0.4)
    assert not list(tmp_path.glob("recipe/runs*"))


def test_predictions_are_compared_with_the_run(tiny_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ALIGNZOO_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(write_recipe(tmp_path / "r", tiny_folder, train__max_steps=3))
    made = make_plan(recipe, lambda _: None)
    from alignzoo.place import table_of_job

    key = recipe_hash(table_of_job(made.job))
    assert key != recipe_hash(table_of_job(replace(made.job, recipe=replace(recipe, eval=alignzoo.recipe.Eval()))))
    keep(key, Path(recipe.output.dir), made.job.steps, 1.0, 0.0, 1.0)
    keep(key, Path(recipe.output.dir), made.job.steps, 100.0, 50.0, 2.0)  # takes the place of the first
    assert settle() == []
    result = alignzoo.run(recipe, console=Console(quiet=True))
    assert train_tokens(made.job) == result.summary["tokens"]
    (answered,) = settle()
    cache = result.summary["reference_cache"]
    assert answered["took"]["run"] == str(result.run_dir) and cache["computed"] == cache["completions"]
    time_off, memory_off = errors([answered])
    assert time_off == pytest.approx(abs(150 / (result.summary["seconds"] + cache["seconds"]) - 1))
    assert memory_off == pytest.approx(abs(2.0 / result.summary["memory"] - 1))
    assert in_words(1, 0.214, 0.031) == "last 1 prediction: time off by 21%, memory off by 3%"
    told = plan(tmp_path / "r/tiny.toml", "--set", "train.max_steps=3").stdout
    assert "last 1 prediction: time off by" in told


def test_the_time_of_a_run_is_its_tokens_by_what_was_measured(tiny_folder: Path, tmp_path: Path) -> None:
    job = make_plan(load_recipe(write_recipe(tmp_path, tiny_folder)), lambda _: None).job
    probe = Probe(2, 6.0, 300, 0.0, 2.0, 100, 1.0, 50, 0.5, 3.0, 1.0)
    found = predict(job, probe)
    train, held_out = tokens_of(job.data.train), tokens_of(job.data.eval)
    lengths = [
        len(t.prompt) + len(c.ids) for side in (job.data.train, job.data.eval) for t in side for c in t.completions
    ]
    assert found == pytest.approx({
        "loading": 3.0, "answers": 1.0, "sampling": 0.0, "steps": 2 * train / 50,
        "evaluation": 4 * held_out / 50,  # before the first step, after 5, 10 and the last
        "reference": sum(lengths) / 50,
    })  # fmt: skip
    short = shortened(job)
    assert len(short.data.train) == 12 and len(short.data.eval) == 6
    sizes = [int(side.packed_positions(True).max()) for side in (short.data.train, job.data.train)]
    assert sizes[0] == sizes[1]  # the longest row is among them


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_example_of_the_page() -> None:
    """Llama 3.1 8B in bfloat16, all weights, on eight GPUs of 80 GiB."""
    config = LlamaConfig(vocab_size=128256, **LARGE)
    table = {
        "loss": {"name": "dpo"}, "model": {"path": "a/model", "dtype": "bfloat16"}, "data": {"train": "x"},
        "train": {"learning_rate": 1e-6},
    }  # fmt: skip
    recipe = load_recipe(table)
    shape, where = shape_of(config, recipe.model), Where("cuda", "bf16", 8, CUDA)
    rows = [make_row(recipe, shape, Load(8192, 1024), where, way) for way in WAYS]
    header, *lines = memory_table(rows, 80 * GIB)
    page = (REPO / "docs/plan.md").read_text(encoding="utf-8")
    for line in (header, *lines):
        assert f"| {' | '.join(line)} |" in page, f"| {' | '.join(line)} |"
    assert f"{shape.parameters:,}" in page


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of getrusage")
def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    inner = "import torch; from alignzoo.metrics import memory_gib; print(memory_gib(torch.device('cpu')))"
    outer = (
        f"import subprocess, sys; held = b'x' * 2**31; subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", outer], capture_output=True, text=True, timeout=300, check=True)
    assert 0.05 < float(done.stdout) < 1
