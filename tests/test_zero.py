"""DeepSpeed's configuration as a dictionary: what the recipe says, what the user's JSON adds, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignzoo.errors import RecipeError
from alignzoo.recipe import Recipe, load_recipe
from alignzoo.zero import additions, additions_in_words, check_zero, compiled_ops, deepspeed_config

BASE: dict[str, Any] = {
    "loss": {"name": "dpo"},
    "model": {"path": "m"},
    "data": {"train": "d.jsonl"},
    "train": {"learning_rate": 1e-3, "max_grad_norm": 0.5, "batch_size": 16},
}


def recipe(zero: int = 2, **overrides: Any) -> Recipe:
    """BASE with engine.zero and dotted keys, `__` for the dot."""
    return load_recipe(BASE, {"engine.zero": zero, **{k.replace("__", "."): v for k, v in overrides.items()}})


def config(of: Recipe, precision: str = "fp32", ranks: int = 2, dtype: str = "float32", **more: Any) -> dict[str, Any]:
    return deepspeed_config(of, precision=precision, ranks=ranks, model_dtype=dtype, **more)


def with_json(tmp_path: Path, content: Any, **overrides: Any) -> Recipe:
    """A recipe file with a DeepSpeed JSON beside it."""
    (tmp_path / "my_ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
    lines = ['[engine]', 'zero = 3', 'config = "my_ds.json"', '[loss]', 'name = "dpo"', '[model]', 'path = "m"',
             '[data]', 'train = "d.jsonl"', '[train]', 'learning_rate = 1e-3', 'batch_size = 16']  # fmt: skip
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    return load_recipe(tmp_path / "mine.toml", {k.replace("__", "."): v for k, v in overrides.items()})


def refused(of: Recipe, **more: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        config(of, **more)
    assert caught.value.fix and caught.value.exit_code == 2
    return str(caught.value)


# --- from the recipe -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_engine_keeps_accumulation_clipping_and_optimizer_to_itself(zero: int) -> None:
    made = config(recipe(zero))
    assert made["train_micro_batch_size_per_gpu"] == made["gradient_accumulation_steps"] == 1
    assert made["gradient_clipping"] == 0.5 and "train_batch_size" not in made and "optimizer" not in made
    assert made["zero_allow_untested_optimizer"] is True and made["zero_force_ds_cpu_optimizer"] is False
    assert made["zero_optimization"]["stage"] == zero
    assert made["bf16"] == made["fp16"] == {"enabled": False} and "torch_autocast" not in made
    json.dumps(made, allow_nan=False)
    assert config(recipe(zero)) is not made and config(recipe(zero)) == made


def test_clipping_is_written_when_it_is_off() -> None:
    assert config(recipe(train__max_grad_norm=0))["gradient_clipping"] == 0.0


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(
    ("precision", "dtype", "bf16", "fp16", "autocast"),
    [
        ("fp32", "float32", False, False, None),
        ("fp32", "bfloat16", True, False, None),
        ("bf16", "float32", False, False, "bfloat16"),
        ("bf16", "bfloat16", True, False, None),
        ("fp16", "float32", False, True, None),
        ("fp16", "float16", False, True, None),
    ],
)
def test_precision(zero: int, precision: str, dtype: str, bf16: bool, fp16: bool, autocast: str | None) -> None:
    made = config(recipe(zero), precision, dtype=dtype)
    assert (made["bf16"]["enabled"], made["fp16"]["enabled"]) == (bf16, fp16)
    assert made.get("torch_autocast", {}).get("dtype") == autocast
    assert made.get("data_types") == ({"grad_accum_dtype": "fp32"} if bf16 or fp16 else None)
    if fp16:
        assert made["fp16"]["loss_scale"] == 0  # dynamic
    if autocast:
        assert made["torch_autocast"]["lower_precision_safe_modules"] == []  # gradients are summed in float32


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float16"), ("bf16", "float16"), ("fp16", "bfloat16")])
def test_precisions_that_do_not_fit_the_weights(precision: str, dtype: str) -> None:
    assert f"{dtype} weights cannot train in {precision}" in refused(recipe(), precision=precision, dtype=dtype)


def test_the_type_of_the_weights_must_be_known() -> None:
    assert 'model.dtype = "auto" cannot run with engine.zero = 2' in refused(recipe(), dtype="auto")


def test_an_adapter_trains_in_float32_whatever_its_base_is() -> None:
    lora = {"model__lora": {}}
    assert config(recipe(2, **lora), "bf16", dtype="bfloat16")["torch_autocast"]["enabled"]
    assert config(recipe(3, **lora), "bf16", dtype="bfloat16")["bf16"]["enabled"]  # the base is DeepSpeed's too


def test_offload_and_hpz(tmp_path: Path) -> None:
    made = config(recipe(1, engine__offload_optimizer="cpu"))["zero_optimization"]
    assert made["offload_optimizer"]["device"] == "cpu" and "nvme_path" not in made["offload_optimizer"]
    assert "offload_param" not in made and "zero_hpz_partition_size" not in made
    nvme = {"engine__offload_optimizer": "nvme", "engine__offload_parameters": "nvme", "engine__nvme_path": "/disk"}
    made = config(recipe(3, engine__hpz=2, **nvme), ranks=4)["zero_optimization"]
    for block in ("offload_optimizer", "offload_param"):
        assert made[block] | {"device": "nvme", "nvme_path": "/disk"} == made[block]
    assert made["zero_hpz_partition_size"] == 2


def test_a_frozen_reference_has_weights_to_share_and_no_optimizer(tmp_path: Path) -> None:
    of = recipe(3, engine__offload_optimizer="cpu", engine__offload_parameters="cpu")
    made = config(of, trained=False)
    zero = made["zero_optimization"]
    assert zero["stage"] == 3 and "offload_optimizer" not in zero and zero["offload_param"]["device"] == "cpu"
    assert made["gradient_clipping"] == 0.0
    assert config(of, "bf16", trained=False)["torch_autocast"] == config(of, "bf16")["torch_autocast"]
    assert config(recipe(2), trained=False)["zero_optimization"] == {"stage": 0}
    ours = with_json(tmp_path, {"zero_optimization": {
        "stage3_param_persistence_threshold": 7, "offload_optimizer": {"buffer_count": 5},
    }}, engine__offload_optimizer="cpu")  # fmt: skip
    assert config(ours)["zero_optimization"]["offload_optimizer"]["buffer_count"] == 5
    zero = config(ours, trained=False)["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == 7 and "offload_optimizer" not in zero


# --- what makes no sense ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "overrides", "said"),
    [
        (0, {"engine__offload_optimizer": "cpu"}, 'offload_optimizer = "cpu" needs ZeRO stage 1 or higher'),
        (2, {"engine__offload_optimizer": "nvme", "engine__nvme_path": "/d"}, 'optimizer = "nvme" needs ZeRO stage 3'),
        (2, {"engine__offload_parameters": "cpu"}, 'offload_parameters = "cpu" needs ZeRO stage 3'),
        (3, {"engine__offload_parameters": "nvme"}, "nvme_path is missing"),
        (3, {"engine__nvme_path": "/d"}, "nvme_path has no effect"),
        (2, {"engine__hpz": 2}, "engine.hpz = 2 needs ZeRO stage 3"),
        (0, {"engine__config": "x.json"}, 'engine.config = "x.json" needs ZeRO stage 1'),
        (1, {"train__optimizer": "adafactor"}, 'train.optimizer = "adafactor" cannot run with engine.zero = 1'),
        (2, {"train__optimizer": "adamw_8bit"}, "look"),
        (3, {"model__quantization": "4bit", "model__lora": {}}, "model.quantization"),
        (3, {"engine__config": "nowhere.json"}, "nowhere.json: cannot be read"),
    ],
)
def test_settings_that_do_not_fit(zero: int, overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_zero(recipe(zero, **overrides))
    assert said in str(caught.value) and caught.value.fix


def test_settings_that_do_fit() -> None:
    check_zero(recipe(0, train__optimizer="adafactor"))
    check_zero(recipe(0, model__quantization="4bit", model__lora={}))
    check_zero(recipe(2, model__quantization="4bit", model__lora={}, train__optimizer="sgd"))
    check_zero(recipe(3, engine__hpz=2))


def test_hpz_divides_the_ranks() -> None:
    assert "engine.hpz = 3 does not divide 4 processes" in refused(recipe(3, engine__hpz=3), ranks=4)
    check_zero(recipe(3, engine__hpz=2), ranks=4)


def test_deepspeed_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignzoo.zero.find_spec", lambda name: None)
    assert "DeepSpeed is not installed" in refused(recipe(1))
    check_zero(recipe(0))


# --- the user's JSON -------------------------------------------------------------------------------------------------


def test_a_json_file_adds_what_has_no_key(tmp_path: Path) -> None:
    mine = with_json(tmp_path, {
        "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0,
                              "reduce_bucket_size": "auto", "offload_param": {"device": "none"}},
        "activation_checkpointing": {"cpu_checkpointing": True},
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
        "optimizer": {"params": {"lr": "auto"}}, "scheduler": None, "fp16": {"enabled": "auto"},
        "communication_dtpe": "fp32",
    })  # fmt: skip
    made, plain = config(mine), config(recipe(3, train__max_grad_norm=1.0))
    assert additions(mine) == {
        "zero_optimization.overlap_comm": False,
        "zero_optimization.stage3_param_persistence_threshold": 0,
        "activation_checkpointing.cpu_checkpointing": True,
        "communication_dtpe": "fp32",
    }
    assert made["zero_optimization"].pop("stage3_param_persistence_threshold") == 0
    assert made["zero_optimization"].pop("overlap_comm") is not plain["zero_optimization"].pop("overlap_comm")
    assert made.pop("activation_checkpointing") == {"cpu_checkpointing": True}
    assert made.pop("communication_dtpe") == "fp32" and made == plain
    lines = additions_in_words(mine)
    assert lines[0] == "DeepSpeed: zero_optimization.overlap_comm = false (my_ds.json)"
    assert "unknown here" in lines[-1] and 'did you mean "communication_data_type"' in lines[-1]


def test_without_a_json_file_nothing_is_added() -> None:
    assert additions(recipe(3)) == {} and additions_in_words(recipe(3)) == []


@pytest.mark.parametrize(
    ("content", "theirs", "ours"),
    [
        ({"train_batch_size": 32}, "train_batch_size = 32", "train.batch_size = 16"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu = 4", "tokens_per_device is not set"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps = 8", "engine.tokens_per_device"),
        ({"gradient_clipping": 0.25}, "gradient_clipping = 0.25", "train.max_grad_norm = 1.0"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage = 2", "engine.zero = 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, 'device = "cpu"', "engine.offload_optimizer"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, 'device = "cpu"', "engine.offload_parameters"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "partition_size = 8", "engine.hpz = 1"),
        ({"zero_optimization": True}, "zero_optimization = true", "it is an object"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = true", 'engine.precision = "bf16"'),
        ({"bf16": {"enabled": False}}, "bf16.enabled = false", 'engine.precision = "bf16"'),
        ({"torch_autocast": {"dtype": "float16"}}, 'torch_autocast.dtype = "float16"', 'engine.precision = "bf16"'),
        ({"optimizer": {"type": "AdamW"}}, 'optimizer.type = "AdamW"', 'train.optimizer = "adamw_torch_fused"'),
        ({"scheduler": {"type": "WarmupLR"}}, 'scheduler.type = "WarmupLR"', 'train.lr_scheduler = "cosine"'),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer = false", "train.optimizer"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency.enabled = true", "data.train"),
        ({"elasticity": {"enabled": True}}, "elasticity.enabled = true", "train.batch_size"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op = "sum"', "train.batch_size"),
    ],
)
def test_contradictions_name_both_values_and_both_places(
    tmp_path: Path, content: dict[str, Any], theirs: str, ours: str
) -> None:
    mine = with_json(tmp_path, content, engine__precision="bf16")
    for check in (lambda: check_zero(mine), lambda: additions(mine), lambda: config(mine, "bf16")):
        with pytest.raises(RecipeError) as caught:
            check()
        said = str(caught.value)
        assert said.startswith(f"{tmp_path / 'mine.toml'}:3: {tmp_path / 'my_ds.json'} contradicts the recipe:")
        assert theirs in said and ours in said
        place = said.partition(ours)[2]
        assert ours == "it is an object" or "mine.toml" in place or "overrides[" in place


def test_all_contradictions_are_told_at_once(tmp_path: Path) -> None:
    mine = with_json(tmp_path, {"train_batch_size": 32, "gradient_clipping": 0.25})
    said = refused(mine)
    assert "train_batch_size = 32" in said and "gradient_clipping = 0.25" in said


def test_a_file_may_repeat_the_recipe(tmp_path: Path) -> None:
    same = {
        "train_batch_size": 16, "gradient_clipping": 1, "gradient_accumulation_steps": 1, "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}, "zero_hpz_partition_size": 1},
        "data_efficiency": {"enabled": False, "seed": 3},
    }  # fmt: skip
    mine = with_json(tmp_path, same)
    assert additions(mine) == {"data_efficiency.enabled": False, "data_efficiency.seed": 3}
    assert config(mine, "bf16")["bf16"] == {"enabled": False}  # our way of doing it


def test_precision_by_the_machine_is_compared_once_it_is_known(tmp_path: Path) -> None:
    mine = with_json(tmp_path, {"fp16": {"enabled": True}})
    check_zero(mine)
    assert 'engine.precision = "auto"' in (said := refused(mine, precision="bf16")) and "bf16 on this machine" in said
    config(mine, "fp16")


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1, "a": 2}', "\x00"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    assert f"{tmp_path / 'my_ds.json'}: cannot be read" in refused(with_json(tmp_path, text))


# --- ops and imports -------------------------------------------------------------------------------------------------


def test_nothing_is_compiled_by_default() -> None:
    for zero in (1, 2, 3):
        assert compiled_ops(config(recipe(zero, engine__offload_optimizer="cpu"))) == []


def test_ops_that_will_be_compiled(tmp_path: Path) -> None:
    nvme = {"engine__offload_optimizer": "nvme", "engine__nvme_path": "/disk"}
    assert compiled_ops(config(recipe(3, **nvme))) == ["async_io"]
    fast = {"zero_force_ds_cpu_optimizer": True, "zero_optimization": {"zero_quantized_weights": True}}
    mine = with_json(tmp_path, fast, engine__offload_optimizer="cpu")
    assert compiled_ops(config(mine)) == ["cpu_adam", "quantizer"]
    assert compiled_ops(config(with_json(tmp_path, {"zero_force_ds_cpu_optimizer": True}))) == []


def test_it_imports_neither_torch_nor_deepspeed() -> None:
    code = "import sys, alignzoo.zero; print([n for n in ('torch', 'deepspeed', 'accelerate') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
