"""Log-probabilities or scores of completions, computed inside the module that accelerate wraps.

The hooks of ZeRO-3 and DDP fire when the wrapped module is called, so the decoder, the head and the log-softmax all run
in `Scorer.forward`. The head runs at completion positions only, some hundred at a time, through the model class's own
forward: whatever a class does after its decoder (bias, soft-capping, scaling, LoRA on the head) is done here too.

A model with a scalar head gives one score for each completion, read where transformers' sequence classifiers read it:
at the last token that is not the pad token. A pad token that is EOS too may end a completion, and is passed over.

Shapes: S sequences of L positions, N completions of T tokens, M completion tokens in all, V the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MoeModelOutputWithPast

from alignzoo.attention import tree_inputs
from alignzoo.batch import Layout
from alignzoo.errors import ModelError
from alignzoo.head import HEAD_CHUNK, Scores, is_linear, linear_scores, token_stats

SCORER = 1  # of the numbers: another one where the same tokens and weights get other log-probs than rounding explains
Inside = Callable[[Callable[[Any], Any]], Any]  # runs something with the model, see Engine.inside


class Scorer(nn.Module):
    """Owns a causal model; called with a layout it returns per-token log-probs, or scores where its head is scalar.

    `forward(layout, stats)` gives {"logps": (N, T) float32} and, for each name in `stats`, that field of LogProbs,
    detached; with router_loss also {"router_loss": ()}. Outside the layout's tokens the values are 0.
    With a scalar head it gives {"score": (N,) float32} and no more.
    """

    def __init__(self, model: Any, *, router_loss: bool = False) -> None:
        super().__init__()
        self.model = model
        self.router_loss = router_loss
        self.home: torch.device | None = None  # where it computes, if its weights lie elsewhere (offload)
        self.flex = False  # whether a GPU's flex_attention may compute packed rows, see attention.tree_inputs
        self.linear: bool | None = None  # whether the head is a matrix and no more; found at the first rows

    @property
    def causal_lm(self) -> Any:
        """The transformers model, under an adapter if there is one."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        return self.home or next(self.parameters()).device

    def forward(
        self, layout: Layout | None, stats: Collection[str] = (), *, run: Callable[[Any], Any] | None = None
    ) -> Any:
        """run: instead of a layout, what to do with the model where its weights are at hand (see Engine.inside)."""
        if run is not None:
            return run(self.model)
        assert layout is not None
        lm, device = self.causal_lm, self.device
        real = _tensor(layout.attention_mask, device)
        options: dict[str, Any] = {"attention_mask": real}
        if layout.nodes is not None:
            options = tree_inputs(layout, device, self.flex)
        if self.router_loss:
            options["output_router_logits"] = True
        outputs = _decoder(lm)(input_ids=_tensor(layout.input_ids, device), use_cache=False, **options)
        hidden = outputs[0].flatten(0, 1)  # (S * L, H)
        if is_scalar(lm):
            ends = hidden.index_select(0, _tensor(read_at(layout, pad_token(lm)), device))  # (N, H)
            return {"score": _exact(lm.score(ends)[:, 0])}
        rows = hidden.index_select(0, _tensor(layout.source, device))  # (M, H)
        columns = self._score_rows(lm, rows, _tensor(layout.target, device), stats, head_pieces(layout))
        place, shape = _tensor(layout.place, device), layout.mask.shape
        scores = {name: _spread(values, place, shape) for name, values in columns.items()}
        if self.router_loss:
            scores["router_loss"] = _router_loss(lm, outputs, real)
        return scores

    def _score_rows(self, lm: Any, rows: Tensor, target: Tensor, stats: Collection[str], pieces: int) -> Scores:
        head, matrix = _HeadOnly(lm), lm.get_output_embeddings()
        if self.linear is None:
            self.linear = is_linear(head, matrix, rows[:8])
        if self.linear:
            return linear_scores(rows, matrix, target, stats)
        parts = []
        for h, t in zip(_cut(rows, pieces), _cut(target, pieces), strict=True):
            if torch.is_grad_enabled():  # the logits are computed again in the backward pass, never kept
                parts.append(checkpoint(_chunk_scores, head, h, t, stats, use_reentrant=False))
            else:
                parts.append(_chunk_scores(head, h, t, stats))
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if len(rows) < pieces:  # the last ones were for company
            company = columns["logps"][len(rows) :].sum() * 0.0
            columns = {name: values[: len(rows)] for name, values in columns.items()}
            columns["logps"] = columns["logps"] + company
        return columns

    def without_adapter(self) -> AbstractContextManager[Any]:
        """The base model, for a reference that is the base; without an adapter it is the model itself."""
        return self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext()


def is_scalar(lm: Any) -> bool:
    """Is it a sequence classifier, which has the head `score`, and not a language model?"""
    return hasattr(lm, "score")


def pad_token(lm: Any) -> int | None:
    pad: int | None = lm.config.get_text_config().pad_token_id
    return pad


def read_at(layout: Layout, pad: int | None) -> np.ndarray[Any, Any]:
    """(N,) where the score of each completion is read: its last token but pad tokens, at most back to the prompt's end.

    Positions in the flattened (S * L).
    """
    if pad is None:
        return layout.ends
    ids, found = layout.input_ids.reshape(-1), layout.ends.copy()
    starts = np.searchsorted(layout.place, np.arange(len(found)) * layout.mask.shape[1])
    for n, before in enumerate(np.split(layout.source, starts[1:])):  # what predicts a token stands before it
        for position in before[::-1]:
            if ids[found[n]] != pad:
                break
            found[n] = position
    return found


def values_of(scores: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """What a Scorer found as a flat list: log-probs of the tokens, (M,), or scores, (N,)."""
    if "score" in scores:
        return scores["score"]
    return scores["logps"].flatten()[torch.from_numpy(layout.place).to(scores["logps"].device)]


def _exact(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _tensor(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _decoder(lm: Any) -> nn.Module:
    decoder = getattr(lm, lm.base_model_prefix, None)
    if decoder is None or decoder is lm:
        raise ModelError(
            f"{type(lm).__name__} is not a decoder with a language-model head",
            fix="use a model that AutoModelForCausalLM loads",
        )
    return decoder  # type: ignore[no-any-return]


def head_pieces(layout: Layout) -> int:
    """Into how many pieces the head cuts the completion tokens of a layout."""
    return max(layout.pieces, -(-len(layout.target) // HEAD_CHUNK))


def _cut(rows: Tensor, pieces: int) -> list[Tensor]:
    """So many pieces of like size; where there are fewer rows, the first row again, for company."""
    return [piece if len(piece) else rows[:1] for piece in rows.tensor_split(pieces)]


class _HeadOnly:
    """The causal language model with its decoder left out: hidden states in, the class's own logits out."""

    def __init__(self, lm: Any) -> None:
        self.lm = copy.copy(lm)  # shares all parameters and hooks; only the table of its children is new
        self.lm.__dict__["_modules"] = dict(lm._modules)
        self.lm._modules[lm.base_model_prefix] = _Passthrough(_decoder(lm))

    def __call__(self, rows: Tensor) -> Tensor:
        """Logits (M, V) of hidden states (M, H)."""
        return self.lm(inputs_embeds=rows.unsqueeze(0), use_cache=False, **self._no_router()).logits[0]  # type: ignore[no-any-return]

    def _no_router(self) -> dict[str, bool]:
        return {"output_router_logits": False} if is_mixture_of_experts(self.lm) else {}


class _HiddenOnly(MoeModelOutputWithPast):  # type: ignore[misc]
    """A decoder's output with nothing but hidden states (and router logits)."""

    cross_attentions = None


class _Passthrough(nn.Module):
    """Stands where the decoder was and returns what it is given as the last hidden state."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.__dict__["real"] = decoder  # not a child: its parameters are the real model's

    def forward(self, *_args: Any, inputs_embeds: Tensor, router_logits: Any = None, **_: Any) -> _HiddenOnly:
        return _HiddenOnly(last_hidden_state=inputs_embeds, router_logits=router_logits)

    def __getattr__(self, name: str) -> Any:
        # some classes (OPT) call base.decoder(...) instead of base(...)
        return self if name == "decoder" else getattr(self.__dict__["real"], name)


_TABLES = {"wpe", "embed_positions", "position_embeddings"}


def positions_of(model: nn.Module) -> int | None:
    """How many positions a model has a table for (GPT-2, OPT, GPT-J); None where any position can be computed."""
    named = [*model.named_modules(), *model.named_buffers()]
    tables = any(n.rpartition(".")[2] in _TABLES and isinstance(found, nn.Embedding | Tensor) for n, found in named)
    config: Any = model.config
    return int(config.get_text_config().max_position_embeddings) if tables else None


def is_mixture_of_experts(lm: Any) -> bool:
    return hasattr(lm.config.get_text_config(), "output_router_logits")


def _router_loss(lm: Any, outputs: Any, attention_mask: Tensor) -> Tensor:
    """The load-balancing loss as the model's class computes it, over the real positions."""
    head = _HeadOnly(lm).lm
    found = head(
        inputs_embeds=outputs[0][:1, :1], router_logits=outputs.router_logits, attention_mask=attention_mask,
        output_router_logits=True, use_cache=False,
    )  # fmt: skip
    return found.aux_loss  # type: ignore[no-any-return]


def _chunk_scores(head: _HeadOnly, rows: Tensor, target: Tensor, stats: Collection[str]) -> Scores:
    """Log-prob of each target, (m,), and the statistics asked for, from (m, H) hidden states."""
    logits = _exact(head(rows))  # (m, V)
    normaliser = logits.logsumexp(-1)  # (m,)
    scores = {"logps": logits.gather(-1, target.unsqueeze(-1)).squeeze(-1) - normaliser}
    return scores | token_stats(logits.detach(), normaliser.detach(), target, stats)


def _spread(values: Tensor, place: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(M,) values at their places in an (N, T) table of zeros."""
    table = values.new_zeros(shape[0] * shape[1])
    return table.index_copy(0, place, values).view(shape)


@torch.no_grad()
def check_scorer(scorer: Scorer, layout: Layout, inside: Inside | None = None) -> None:
    """Compares the scorer with the model's plain forward on one layout; a model whose head it misreads is refused.

    inside: Engine.inside, where the weights are at hand under ZeRO-3 and computed with in the precision of the run
    """
    was_training, lm = scorer.training, scorer.causal_lm

    def difference(_: Any) -> Tensor:
        plain, dtype = (_plain_scores if is_scalar(lm) else _plain_log_probs)(lm, layout, scorer.device)
        found.add(dtype)
        # not scorer.forward, which accelerate wraps: entered twice, its autocast would never be left
        worst: Tensor = (plain - values_of(Scorer.forward(scorer, layout), layout).float()).abs().max()
        return worst

    found: set[torch.dtype] = set()
    scorer.eval()
    try:
        worst = (inside or (lambda run: run(scorer.model)))(difference).item()
    finally:
        scorer.train(was_training)
    what = "scores" if is_scalar(lm) else "log-probs"
    tolerance = 1e-3 if found <= {torch.float32, torch.float64} else 0.1
    if not worst <= tolerance:
        raise ModelError(
            f"{type(lm).__name__}: {what} differ from the model's own logits by {worst:.2g}",
            why="this class computes its logits in a way that alignzoo does not know",
            fix="please report the model; it cannot be trained correctly as it is",
        )


def _plain_log_probs(lm: Any, layout: Layout, device: torch.device) -> tuple[Tensor, torch.dtype]:
    """(M,) of the model's own forward, and the type of its logits."""
    ids, mask = _tensor(layout.input_ids, device), _tensor(layout.attention_mask, device)
    logits = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
    rows = logits.reshape(-1, logits.shape[-1]).index_select(0, _tensor(layout.source, device))
    target = _tensor(layout.target, device).unsqueeze(-1)
    return rows.float().log_softmax(-1).gather(-1, target).squeeze(-1), logits.dtype


def _plain_scores(lm: Any, layout: Layout, device: torch.device) -> tuple[Tensor, torch.dtype]:
    """(N,) of the model's own forward, a row at a time: pad tokens are known by their id there."""
    lengths = layout.attention_mask.sum(-1).tolist()
    rows = [_tensor(row[None, :n], device) for row, n in zip(layout.input_ids, lengths, strict=True)]
    logits = torch.cat([lm(input_ids=row, use_cache=False).logits for row in rows])
    return logits[:, 0].float(), logits.dtype
