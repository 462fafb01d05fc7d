"""The sections of a recipe: every key with its type, bounds and meaning. It imports no torch.

[train] holds what the result depends on; [engine] what the machine needs and what changes nothing but rounding.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any, Literal

from alignzoo.schema import setting

REQUIRED: Any = MISSING


@dataclass(frozen=True)
class LoRA:
    rank: int = setting(64, "rank of the adapter", ge=1)
    alpha: float | None = setting(None, "scale of the adapter; twice the rank if not given", gt=0)
    dropout: float = setting(0.0, "dropout on the adapter's input", ge=0, lt=1)
    target: str | tuple[str, ...] = setting("all-linear", 'module names, a regular expression, or "all-linear"')
    modules_to_save: tuple[str, ...] = setting((), "modules trained whole and saved beside the adapter")
    dora: bool = setting(False, "weight-decomposed LoRA (arXiv:2402.09353)")
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) (arXiv:2312.03732)")


@dataclass(frozen=True)
class Model:
    path: str = setting(
        REQUIRED,
        "a local folder, a hub id, a .gguf file, package:NAME/FILE.gguf, or run:DIR for a finished run's model",
    )
    revision: str | None = setting(None, "branch, tag or commit on the hub")
    head: Literal["lm", "scalar"] = setting(
        "lm",
        "lm: a language model; scalar: one output, read at the last token: a reward model, for losses of scores",
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = setting(
        "float32", "type of the stored weights; auto: as they were saved"
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = setting(
        "auto", "attention implementation of transformers"
    )
    dropout: float = setting(0.0, "every dropout of the model; 0 switches them off", ge=0, lt=1)
    router_loss: float = setting(0.0, "weight of the load-balancing loss of a mixture-of-experts model; 0: none", ge=0)
    lora: LoRA | None = setting(None, "train an adapter instead of all weights: a table, {} for its defaults")
    quantization: Literal["4bit", "8bit"] | None = setting(
        None, "load the base quantised by bitsandbytes (extra qlora); needs model.lora"
    )
    trust_remote_code: bool = setting(False, "run code that comes with the model")


@dataclass(frozen=True)
class Reference:
    mode: Literal["auto", "cache", "live"] = setting(
        "auto",
        "auto: adapter off under LoRA if the reference is its base, a frozen copy where it moves, else the cache; "
        "cache: log-probs computed once and kept on disk, see cache.md; live: a frozen copy",
    )
    path: str | None = setting(None, "reference model, as model.path; the start model if not given")
    revision: str | None = setting(None, "branch, tag or commit of reference.path on the hub")
    sync_every_steps: int | None = setting(
        None, "move the reference towards the policy every so many steps (TR-DPO, arXiv:2404.09656)", ge=1
    )
    sync_alpha: float = setting(0.6, "how far it moves: 1 copies the policy", gt=0, le=1)


@dataclass(frozen=True)
class Source:
    path: str = setting(REQUIRED, "json, jsonl, parquet or csv file, a folder saved by datasets, or a hub id")
    split: str | None = setting(None, "split of a saved or hub data set, e.g. train")
    weight: float = setting(1.0, "how often each row counts: 0.5 takes half of the rows, 2 each row twice", gt=0)
    limit: int | None = setting(None, "the first rows only", ge=1)
    format: str = setting("auto", "format of the rows; auto: data.format, or found from the columns")
    columns: dict[str, str] = setting({}, 'our column = the file\'s, e.g. {chosen = "good"}; added to data.columns')


@dataclass(frozen=True)
class Data:
    train: str | tuple[Source, ...] = setting(REQUIRED, "training rows: a path, or a list of tables")
    eval: str | tuple[Source, ...] | None = setting(None, "held-out rows: a path, or a list of tables")
    eval_fraction: float = setting(0.0, "without data.eval: the part of the rows that is held out", ge=0, lt=1)
    max_length: int = setting(1024, "tokens of prompt and completion together", ge=2)
    max_prompt_length: int | None = setting(None, "tokens of the prompt", ge=1)
    max_completion_length: int | None = setting(None, "tokens of a completion", ge=1)
    truncation: Literal["drop", "prompt_left", "completion_right"] = setting(
        "drop", "what is too long: drop the row, cut the prompt's start, or cut the completion's end"
    )
    chat_template: str = setting(
        "auto",
        "auto: the tokenizer's, also for strings; none: raw text; a bundled name, e.g. chatml; or a path",
    )
    chat_template_kwargs: dict[str, Any] = setting({}, "passed to the chat template, e.g. {enable_thinking = false}")
    system: str | None = setting(None, "system turn of rows that have none")
    train_on: Literal["every", "last"] = setting(
        "every", "of a conversation to imitate: every assistant turn is learned, or the last only"
    )
    format: str = setting("auto", "format of the rows of sources that name none; auto: found from the columns")
    columns: dict[str, str] = setting({}, 'our column = the file\'s, e.g. {chosen = "good"}')
    keep: tuple[str, ...] = setting((), "numeric columns that the loss gets as batch.extra")
    on_bad_row: Literal["fail", "skip"] = setting(
        "fail", "a row that cannot be used: stop, or leave it out and count it"
    )


@dataclass(frozen=True)
class Train:
    learning_rate: float = setting(REQUIRED, "peak learning rate", ge=0)
    batch_size: int = setting(16, "examples in one optimizer step, over all micro-batches and ranks", ge=1)
    epochs: int = setting(1, "passes over the training rows", ge=1)
    max_steps: int | None = setting(None, "at most so many optimizer steps", ge=1)
    optimizer: str = setting("adamw_torch_fused", "by its name in transformers, e.g. adamw_torch, sgd, adafactor")
    lr_scheduler: str = setting("cosine", "by its name in transformers, e.g. cosine, linear, constant_with_warmup")
    warmup_ratio: float = setting(0.1, "part of the steps for the warm-up", ge=0, le=1)
    warmup_steps: int | None = setting(None, "steps of the warm-up; beats warmup_ratio", ge=0)
    weight_decay: float = setting(0.0, "decoupled weight decay; not for biases and norms", ge=0)
    adam_betas: tuple[float, float] = setting((0.9, 0.999), "Adam's decay rates", ge=0, lt=1)
    adam_epsilon: float = setting(1e-8, "Adam's epsilon", gt=0)
    max_grad_norm: float = setting(1.0, "clip the gradient's L2 norm; 0: off", ge=0)
    seed: int = setting(
        42, "seed of the data order, the start of adapters and of a scalar head, and every dropout", ge=0
    )


@dataclass(frozen=True)
class Engine:
    tokens_per_device: int | None = setting(
        None, "positions forwarded at once, padding included; 2048 on a CPU, 8192 on a GPU if not given", ge=1
    )
    packing: Literal["auto", "on", "off"] = setting(
        "auto", "rows without padding; auto: where the model can, else padded, with the reason said"
    )
    prefix_sharing: Literal["auto", "on", "off"] = setting(
        "auto", "a prompt forwarded once for all its completions; needs packing; auto: where the model can"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "of the computation; auto: bf16 on a GPU that has it, else fp32"
    )
    gradient_checkpointing: bool = setting(False, "less memory for activations, about a third more time")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")
    zero: int = setting(
        0, "ZeRO stage: what the ranks share out: 0 nothing, 1 optimizer states, 2 and gradients, 3 and weights",
        ge=0, le=3,
    )  # fmt: skip
    offload_optimizer: Literal["none", "cpu", "nvme"] = setting("none", "where optimizer states lie; needs zero >= 1")
    offload_parameters: Literal["none", "cpu", "nvme"] = setting("none", "where weights lie; needs zero = 3")
    nvme_path: str | None = setting(None, "folder on a fast disk, for nvme")
    hpz: int = setting(1, "with zero = 3: each group of so many ranks holds a second copy of the weights", ge=1)
    config: str | None = setting(None, "a DeepSpeed JSON file, for what has no key here; merged with the keys above")
    hang_timeout: float = setting(
        1800.0, "seconds without progress until every rank writes its stack and ends; 0: never", ge=0
    )


@dataclass(frozen=True)
class Checkpoint:
    every_steps: int | None = setting(None, "save all that a run needs to go on, every so many steps", ge=1)
    keep: int = setting(2, "how many of them stay", ge=1)


@dataclass(frozen=True)
class Eval:
    every_steps: int | None = setting(None, "evaluate every so many steps; start and end if not given", ge=1)
    at_start: bool = setting(True, "evaluate before the first step")
    best_metric: str | None = setting(
        None, "keep the model of the best evaluation in best/, e.g. eval_loss or eval_rewards/accuracies"
    )
    best: Literal["auto", "lowest", "highest"] = setting(
        "auto", "what is best; auto: the lowest loss, else the highest"
    )
    patience: int | None = setting(None, "stop after so many evaluations that are not better; needs best_metric", ge=1)
    max_kl: float | None = setting(None, "stop where an evaluation's max_kl_metric is further from 0 than this", gt=0)
    max_kl_metric: str = setting("kl/chosen", "mean log-ratio of policy and reference that max_kl looks at, in nats")


Rule = Literal[
    "start", "margin", "accuracy", "kl", "loss", "chosen_logps", "saturated", "length", "zero_spread", "truncated"
]


@dataclass(frozen=True)
class Watch:
    off: tuple[Rule, ...] = setting((), "rules that are not looked at, see watch.md")
    stop: tuple[Rule, ...] = setting((), "rules that end the run, in order and with the model saved")
    after: int | None = setting(
        None, "steps in which only the start is judged; the warm-up, and at least 10, if not given", ge=0
    )
    patience: int = setting(
        2, "evaluations in a row that a rule must hold for, at the end fewer do; of the loss: times loss_steps", ge=1
    )
    window: int = setting(20, "logged lines whose mean is judged, where no held-out rows have the metric", ge=1)
    repeat: int = setting(3, "how often a rule is told at most; again only where it got much worse", ge=1)
    start_loss: float = setting(
        0.02, "start: how far the loss may be from theory; relative, or absolute where theory is below 1", ge=0
    )
    start_kl: float = setting(0.5, "start: nats that policy and reference may differ by", ge=0)
    min_margin: float = setting(
        0.01, "margin: of rewards; and of log-ratios in nats, where there are some, below ten times this", ge=0
    )
    min_accuracy: float = setting(0.55, "accuracy: guessing has 0.5", ge=0, le=1)
    max_kl: float = setting(10.0, "kl: nats of a whole completion", gt=0)
    loss_steps: int = setting(100, "loss: of so many steps the mean is compared with that of as many before", ge=1)
    max_logp_drop: float = setting(0.5, "chosen_logps: nats per token since the first evaluation", gt=0)
    max_accuracy: float = setting(0.99, "saturated: training accuracy", ge=0, le=1)
    max_length_ratio: float = setting(2.0, "length: of sampled completions, longer or shorter than at first", gt=1)
    max_zero_spread: float = setting(0.9, "zero_spread: share of prompts whose completions have equal rewards", ge=0)
    max_truncated: float = setting(0.5, "truncated: share of sampled completions without an end", ge=0)


@dataclass(frozen=True)
class Samples:
    prompts: tuple[str, ...] = setting((), "prompts that the model answers before and after")
    from_eval: int = setting(0, "prompts taken from the held-out rows, evenly spread, beside those", ge=0)
    system: str | None = setting(None, "system turn for them; data.system if not given")
    max_new_tokens: int = setting(64, "longest answer", ge=1)
    temperature: float = setting(0.0, "0: greedy", ge=0)
    gather: bool = setting(
        True, "with engine.zero = 3: gather the weights on every rank to answer; false: in less memory, slowly"
    )


REVISE = (
    "Improve your last answer: correct what is wrong, add what is missing, keep what is good. "
    "Reply with the improved answer only."
)


@dataclass(frozen=True)
class Other:
    """A table of [[rollout.others]]: who else answers the prompts."""

    source: str = setting(
        REQUIRED,
        '"reference", a model with the policy\'s tokenizer as in model.path, or an address up to /chat/completions, '
        "e.g. http://127.0.0.1:8000/v1",
    )
    role: Literal["candidate", "chosen", "revision"] = setting(
        "candidate",
        "candidate: stands beside the policy's completions, and rewards decide; chosen: always better than the "
        "policy's; revision: sees the policy's completion, writes a better one, and is always better than that",
    )
    completions: int = setting(
        1, "for each prompt; of chosen and revision at most as many as rollout.completions", ge=1
    )
    temperature: float | None = setting(None, "of its sampling; 0: greedy; rollout.temperature if not given", ge=0)
    instruction: str = setting(REVISE, "revision: what it is told after the prompt and the policy's completion")
    model: str | None = setting(None, "of an address: the model's name there")
    api_key_env: str | None = setting(
        None, "of an address: name of the environment variable that holds the key; it is sent nowhere else"
    )
    concurrency: int = setting(8, "of an address: requests at the same time, on each rank", ge=1)
    retries: int = setting(3, "of an address: further tries of a request that failed in a way that may pass", ge=0)
    seconds: float = setting(60.0, "of an address: time for one request", gt=0)
    max_failures: float = setting(
        0.1, "stop the run where more of its completions failed, over the last 20 rounds; 1: never", ge=0, le=1
    )

    @property
    def remote(self) -> bool:
        return self.source.startswith(("http://", "https://"))


@dataclass(frozen=True)
class VLLM:
    mode: Literal["colocate", "server"] = setting(
        "colocate", "colocate: in the processes that train, on their GPUs; server: started apart, `trl vllm-serve`"
    )
    url: str = setting("http://127.0.0.1:8000", "server: where it is, without /v1")
    memory: float = setting(0.3, "colocate: share of each GPU's memory that vLLM takes", gt=0, le=1)
    tensor_parallel: int = setting(1, "colocate: GPUs that share one copy; divides the number of processes", ge=1)
    sleep: bool = setting(False, "colocate: give that memory back while the policy trains")


@dataclass(frozen=True)
class Rollout:
    completions: int = setting(8, "completions sampled for each prompt", ge=1)
    max_new_tokens: int = setting(
        256, "longest completion in tokens; prompts that leave no room for it are dropped", ge=1
    )
    temperature: float = setting(1.0, "of the sampling; log-probs are trained at temperature 1", gt=0)
    top_p: float = setting(1.0, "sample from the most probable tokens that reach this mass; 1: off", gt=0, le=1)
    top_k: int = setting(0, "sample from so many most probable tokens; 0: off", ge=0)
    min_p: float = setting(
        0.0, "sample from tokens at least so probable as this part of the most probable; 0: off", ge=0, le=1
    )
    refresh_every_steps: int = setting(
        1, "the prompts of so many steps are answered at once, by the policy as it is at the first of them", ge=1
    )
    iterations: int = setting(1, "how often these steps are gone through before new completions are sampled", ge=1)
    pairs_per_prompt: int = setting(1, "pairs: the best against the worst, the second best against ...", ge=1)
    min_gap: float = setting(0.0, "pairs: the rewards of the two differ by more than this", ge=0)
    threshold: float | None = setting(
        None, "labelled: desirable at this reward and above (0 if not given); demonstrations: the best one if it has it"
    )
    eval_completions: int | None = setting(
        None, "completions sampled for each held-out prompt; as many as in training if not given", ge=1
    )
    batch_tokens: int = setting(32768, "positions that are sampled at once: prompts and completions, padded", ge=1)
    keep: int = setting(8, "completions of each step that are written to completions.jsonl", ge=0)
    sampler: Literal["transformers", "vllm"] = setting(
        "transformers", "what draws the policy's completions: the model that trains, or vLLM (extra vllm)"
    )
    vllm: VLLM = setting(VLLM(), "where vLLM runs: a table [rollout.vllm]")
    others: tuple[Other, ...] = setting((), "who else answers the prompts: tables [[rollout.others]]")

    @property
    def directed(self) -> bool:
        """Whether another's completions are always better than the policy's, and no reward decides."""
        return any(other.role != "candidate" for other in self.others)


@dataclass(frozen=True)
class Log:
    every_steps: int = setting(1, "write a line of metrics every so many steps", ge=1)
    trackers: tuple[str, ...] = setting((), "accelerate's trackers, e.g. tensorboard, wandb (extra trackers)")
    run_name: str | None = setting(None, "name of the run; the recipe's and the time if not given")


@dataclass(frozen=True)
class Output:
    dir: str = setting("runs", "runs are made below it; relative to the working directory")
    merge: bool = setting(False, "under LoRA: save the merged model instead of the adapter")


@dataclass(frozen=True)
class RewardKeys:
    """What every table of [[rewards]] takes."""

    name: str = setting(REQUIRED, "one of those that `alignzoo rewards` lists")
    weight: float = setting(1.0, "what its values are multiplied by in the sum; 0: only logged")
    timeout: float = setting(120.0, "seconds that one call may take; then all its values failed", gt=0)
    max_failures: float = setting(
        0.1, "stop the run where more of its values failed, over the last 20 calls; 1: never", ge=0, le=1
    )


@dataclass(frozen=True)
class CallbackKeys:
    """What every table of [[callbacks]] takes."""

    name: str = setting(REQUIRED, "one of those that `alignzoo callbacks` lists")
    strict: bool = setting(False, "end the run after the step in which it failed; else that is told and counted")


SECTIONS: dict[str, type] = {
    "model": Model, "reference": Reference, "data": Data, "train": Train, "engine": Engine, "checkpoint": Checkpoint,
    "eval": Eval, "watch": Watch, "samples": Samples, "rollout": Rollout, "log": Log, "output": Output,
}  # fmt: skip
OPTIONAL = frozenset({"rollout"})  # sections that change what a run does by being there
