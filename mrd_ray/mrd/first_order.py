"""L = -g . delta for every sample of a batch: Delta to first order, from one Jacobian-vector product.

With delta = sigma z, L shares a draw's noise with Delta, and E|L| = sigma |g| sqrt(2/pi) is known. So |L| serves as a
control variate (see `scores.monte_carlo_score`). In forward mode, every value of a forward carries its derivative along
delta. That computes L at the cost of about four forwards, for any kind of layer.
"""

import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from mrd_ray.mrd.likelihood import LOGITS, MicroBatch, log_neg_log_prob, output_layer_is_plain

Weights = Mapping[str, torch.Tensor]
# computes L [B] from a batch, theta and a step; `FirstOrder` is one implementation
FirstOrders = Callable[[MicroBatch, Weights, Weights], torch.Tensor]
GROUPED_MM: Any = getattr(torch, "_grouped_mm", None)  # the function that multiplies experts


class FirstOrder:
    """Jacobian-vector products of sum_t log(-P_t) at weights theta, whatever weights the model holds at the moment.

    Args:
        model: a transformers causal language model in eval mode.
        selected: names of the parameters theta, as in `model.named_parameters()`.
    """

    def __init__(self, model: PreTrainedModel, selected: Collection[str]) -> None:
        self.model = model
        inner = model.base_model
        head = model.get_output_embeddings()
        if not output_layer_is_plain(model) or inner is model:
            inner, head = model, None  # only the model's own code can compute the logits, all at once
        self._inner, self._head = inner, head
        names = {id(parameter): name for name, parameter in model.named_parameters()}

        def theirs(module: torch.nn.Module) -> dict[str, str]:
            """The selected parameters in a module: name in the module -> name in the model."""
            own = {name: names[id(parameter)] for name, parameter in module.named_parameters()}
            return {name: of_model for name, of_model in own.items() if of_model in selected}

        self._of_inner, self._of_head = theirs(inner), {} if head is None else theirs(head)

    def __call__(self, batch: MicroBatch, theta: Weights, step: Weights) -> torch.Tensor:
        """L of each sample: float64 [B].

        Args:
            theta, step: the selected parameters, and delta, keyed by name.

        Raises:
            NotImplementedError: torch has no forward mode for one of the model's functions.
        """
        where = batch.scored

        def outputs(weights: Weights) -> Any:
            inputs = {"input_ids": batch.token_ids, "use_cache": False}
            found = torch.func.functional_call(self._inner, dict(weights), kwargs=inputs)
            return found.logits if self._head is None else found.last_hidden_state

        with torch.no_grad(), ForwardMode():
            out, slope = _along(
                outputs, *({own: of[name] for own, name in self._of_inner.items()} for of in (theta, step))
            )
            out, slope = (x[:, :-1][where.to(x.device)] for x in (out, slope))
            rows = max(1, LOGITS // (out.shape[-1] if self._head is None else self._head.out_features))
            targets = batch.token_ids[:, 1:][where]
            pieces = zip(out.split(rows), slope.split(rows), targets.split(rows), strict=True)
            slopes = [self._slopes(*piece, theta, step) for piece in pieces]
        found = torch.zeros(where.shape, dtype=torch.float64, device=where.device)
        found[where] = torch.cat(slopes).to(where.device) if slopes else 0.0
        return -found.sum(1)

    def _slopes(
        self, out: torch.Tensor, slope: torch.Tensor, targets: torch.Tensor, theta: Weights, step: Weights
    ) -> torch.Tensor:
        """Derivatives of log(-P_t) along the step: float64 [n], from [n, hidden], or from [n, V] without a head."""
        if self._head is not None:
            of_head = [{own: of[name] for own, name in self._of_head.items()} for of in (theta, step)]

            def logits_of(hidden: torch.Tensor, weights: Weights) -> Any:
                return torch.func.functional_call(self._head, dict(weights), (hidden,))

            found: Any = torch.func.jvp(logits_of, (out, of_head[0]), (slope, of_head[1]))
            out, slope = found
        targets = targets.to(out.device)[:, None]
        others = out.scatter(1, targets, -torch.inf)
        a = others.logsumexp(1).double() - out.gather(1, targets)[:, 0].double()
        of_a = (others.softmax(1) * slope).sum(1, dtype=torch.float64) - slope.gather(1, targets)[:, 0].double()
        return (torch.nn.functional.logsigmoid(a) - log_neg_log_prob(a)).exp() * of_a


def _along(function: Callable[[Weights], Any], theta: Weights, step: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    found: Any = torch.func.jvp(function, (dict(theta),), (dict(step),))
    return found


class ForwardMode(TorchFunctionMode):
    """Replaces functions for which torch 2.13 has no forward mode, and attention, for which it has only a slow one.

    Functions with a custom backward (BLOOM's gelu) have no forward mode either, but the operations in their forwards
    do, so those run instead.
    """

    def __enter__(self) -> "ForwardMode":
        self._apply = own = vars(torch.autograd.Function)["apply"]

        def apply(function: Any, *args: Any) -> Any:
            if function.setup_context is not torch.autograd.Function.setup_context:
                return own.__func__(function, *args)  # made for torch.func
            return function.forward(_Context(), *args)

        torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        torch.autograd.Function.apply = self._apply  # type: ignore[method-assign]

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func is GROUPED_MM and (kwargs or {}).get("bias") is None:
            return grouped_mm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Context:
    """The context of a function that needs no backward: ignores whatever its forward saves."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores = scores.masked_fill(later, -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


def grouped_mm(rows: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor, **_: None) -> torch.Tensor:
    """Multiply rows by experts: rows [n, in] up to offs[e] by the e-th of weight [E, in, out]. Returns [n, out]."""
    edges = [0, *offs.tolist()]
    pieces = [rows[a:b] @ expert for (a, b), expert in zip(itertools.pairwise(edges), weight, strict=True)]
    return torch.cat([*pieces, rows.new_zeros(len(rows) - edges[-1], weight.shape[2])])
