"""The closed form of E|Delta|: one forward and one backward yield every sample's exact gradient norm.

For small sigma, Delta ~ Normal(mu, s^2) with s = sigma |g|, g = grad_theta sum_t log(-P_t), and mu of order sigma^2. So
E|Delta| is the mean of a folded normal, s sqrt(2/pi) as mu/s -> 0, without Monte Carlo error.

This never computes the gradient of a parameter, neither for the batch nor for a sample. Instead, each layer type has a
rule in `gradient_rules` that computes per-sample squared norms from the layer's input and the gradient at its output.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from mrd_ray.mrd.autograd import square_norms
from mrd_ray.mrd.choices import Choices
from mrd_ray.mrd.coverage import coverage
from mrd_ray.mrd.expert_rules import (
    Measure,
    experts_forward,
    is_experts,
    measured_inside,
    router_forward,
    sinks_forward,
)
from mrd_ray.mrd.gradient_rules import GramCache, Squares, by_sample, embedding_overlap, is_router, rule_of, square_sum
from mrd_ray.mrd.likelihood import LOGITS, LogNegLogProb, MicroBatch, TokenMeasures, output_layer_is_plain
from mrd_ray.mrd.recompute import recomputing


class GradientNorms:
    """Per-sample |grad_theta sum_t log(-P_t)| for a batch, under the model's current weights.

    Args:
        model: a transformers causal language model in eval mode. Each call restores its parameters' requires_grad, and
            writes no gradient to them.
        selected: names of the parameters theta; all if None.
        activations: bytes that layers may keep for a backward; the rest is recomputed (see `recomputing`).
    """

    def __init__(
        self, model: PreTrainedModel, selected: Collection[str] | None = None, activations: float = math.inf
    ) -> None:
        self.model = model
        everything = dict(model.named_parameters())
        self.parameters = everything if selected is None else {name: everything[name] for name in selected}
        self.coverage = coverage(model, self.parameters)
        self._activations = activations
        self._by_groups = output_layer_is_plain(model)

    def give_up_rules(self, names: Collection[str]) -> None:
        """Use autograd for these parameters, because their rules do not hold (see `autograd_check`)."""
        self.coverage = coverage(self.model, self.parameters, names)

    def __call__(
        self, batch: MicroBatch, measures: TokenMeasures | None = None, of_log_prob: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log(-P_t) (float64 [B, T - 1], meaningless where not scored) and |g|^2 (float64 [B]).

        Args:
            measures: receives the logits.
            of_log_prob: use the gradient of the log-likelihood sum_t P_t itself, instead of g.
        """
        theta, squares = self.by_parameter(batch, measures, of_log_prob)
        return theta, torch.stack(list(squares.values())).sum(0).clamp_(min=0.0)  # rounding can turn 0 negative

    def by_parameter(
        self, batch: MicroBatch, measures: TokenMeasures | None = None, of_log_prob: bool = False
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """log(-P_t), and each parameter's share of |g|^2: float64 [B], keyed by name."""
        with self._frozen(), recomputing(self.model, self._activations):
            taps = _Taps(self, batch)
            with taps.attached():
                theta = self._forward_and_backward(batch, taps, measures, of_log_prob)
            squares = taps.squares
            if slow := self._slow(batch, of_log_prob):
                device = batch.token_ids.device
                squares |= {name: torch.tensor(values, dtype=torch.float64).to(device) for name, values in slow.items()}
        return theta, squares

    def of_gaps(self, batch: MicroBatch, where: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """|gradient| of the gap of one choice per sample, over the parameters with a rule: float64 [B].

        Args:
            where: marks that choice, by its turn (see `choices`). The result is 0 for a sample without a mark.
        """
        with self._frozen(), recomputing(self.model, self._activations):
            taps = _Taps(self, batch)
            with taps.attached():
                with Choices(positions=batch.token_ids.numel()) as heard:
                    self.model.base_model(batch.token_ids, use_cache=False)
                gaps = heard.gaps()
                total = torch.stack([gaps[turn][here].sum() for turn, here in where.items()]).sum()
                if total.requires_grad:  # some indexers of sparse attention have no gradient
                    torch.autograd.grad(total, taps.leaves, allow_unused=True)
        return torch.stack(list(taps.squares.values())).sum(0).clamp_(min=0.0).sqrt()

    def _forward_and_backward(
        self, batch: MicroBatch, taps: "_Taps", measures: TokenMeasures | None, of_log_prob: bool
    ) -> torch.Tensor:
        inputs, targets = {"input_ids": batch.token_ids, "use_cache": False}, batch.token_ids[:, 1:]

        def token_values(where: tuple[slice, torch.Tensor | slice], logits: torch.Tensor, overwrite: bool) -> Any:
            of_logits = targets[where].to(logits.device)
            if measures is not None:
                measures.observe(where, logits, of_logits)
            values = LogNegLogProb.apply(logits, of_logits, overwrite)
            theta[where] = values.detach().to(theta.device)
            return values, _slope(values, batch.scored[where].to(values.device), of_log_prob)

        theta = torch.zeros(batch.scored.shape, dtype=torch.float64, device=batch.scored.device)
        if not self._by_groups:
            logits = self.model(**inputs).logits[:, :-1]
            values, slope = token_values((slice(None), slice(None)), logits, False)
            torch.autograd.grad(values, taps.leaves, slope)
            return theta
        hidden = self.model.base_model(**inputs).last_hidden_state
        leaf = hidden.detach().requires_grad_()
        gradient = torch.zeros_like(hidden)
        head = self.model.get_output_embeddings()
        samples = max(1, LOGITS // (head.out_features * targets.shape[1]))
        for start in range(0, len(targets), samples):
            taps.rows = slice(start, start + samples)
            used = batch.scored[taps.rows].any(0)  # columns without a scored target need no logits
            logits = head(leaf[taps.rows, :-1][:, used.to(leaf.device)])
            values, slope = token_values((taps.rows, used), logits, True)
            gradient += torch.autograd.grad(values, leaf, slope)[0]
        taps.rows = slice(None)
        torch.autograd.grad(hidden, taps.leaves, gradient)
        return theta

    def _slow(self, batch: MicroBatch, of_log_prob: bool) -> dict[str, list[float]]:
        """Shares of |g|^2 for the parameters without a rule, computed sample by sample."""
        slow = {name: self.parameters[name] for name in self.coverage.slow}
        squares: dict[str, list[float]] = {name: [] for name in slow}
        for row in range(len(batch.token_ids) if slow else 0):
            alone = MicroBatch(batch.token_ids[row : row + 1], batch.scored[row : row + 1])
            of_row = square_norms(self.model, slow, functools.partial(self.objective, alone, of_log_prob))
            for name, square in of_row.items():
                squares[name].append(square)
        return squares

    def objective(self, batch: MicroBatch, of_log_prob: bool = False) -> torch.Tensor:
        """sum_t log(-P_t), or sum_t P_t, summed over all samples; differentiable."""
        logits = self.model(batch.token_ids, use_cache=False).logits[:, :-1]
        values = LogNegLogProb.apply(logits, batch.token_ids[:, 1:], False)
        return (values * _slope(values, batch.scored, of_log_prob)).sum()

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """Within this block no parameter requires a gradient; afterwards the same ones do as before."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            with torch.enable_grad():
                yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


class _Taps:
    """Records every layer's input and output gradient for one batch, and adds up what the rules compute from them.

    leaves: outputs of the embeddings, where the backward ends. rows: samples whose output layer is running just now.
    """

    def __init__(self, norms: GradientNorms, batch: MicroBatch) -> None:
        self.leaves: list[torch.Tensor] = []
        self.rows = slice(None)
        self._coverage = norms.coverage
        self._shape = tuple(batch.token_ids.shape)
        self._token_ids = batch.token_ids
        self._embeddings = [module for module in norms.model.modules() if isinstance(module, torch.nn.Embedding)]
        names = {id(parameter): name for name, parameter in norms.model.named_parameters()}
        self._names = {
            id(module): {local: names[id(parameter)] for local, parameter in module.named_parameters(recurse=False)}
            for module in self._coverage.layers
        }
        self.squares = {  # in the model's order, so that every process sums in the same order
            name: torch.zeros(len(batch.token_ids), dtype=torch.float64, device=batch.token_ids.device)
            for name in norms.parameters
            if name not in norms.coverage.slow
        }
        self._grams = GramCache()
        # for a tied output layer: samples, its inputs h_s, and the gradients at the logits of the samples' own tokens
        self._heads: list[tuple[slice, torch.Tensor, torch.Tensor]] = []

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        hooks = [module.register_forward_hook(self._leaf) for module in self._embeddings]
        own = {module: vars(module).get("forward") for module in self._coverage.layers if measured_inside(module)}
        outside = [module for module in self._coverage.layers if module not in own]
        hooks += [module.register_forward_hook(self._tap, with_kwargs=True) for module in outside]
        for module in own:
            module.forward = self._forward_inside(module)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, forward in own.items():
                del module.forward
                if forward is not None:
                    module.forward = forward

    def _forward_inside(self, module: torch.nn.Module) -> Callable[..., Any]:
        """A forward with taps inside the layer, on what cannot be seen from outside."""
        if is_router(module):
            tap = functools.partial(_Tap.apply, functools.partial(self.measure, module))
            return functools.partial(router_forward, module, module.forward, tap)
        add = functools.partial(self._add, module)
        if is_experts(module):
            return functools.partial(experts_forward, module, self._shape[0], _Tap.apply, add)

        def copies(sinks: torch.Tensor) -> torch.Tensor:
            leaf = self._leaf_of(sinks.expand(self._shape[0], *sinks.shape[1:]))
            leaf.register_hook(lambda gradient: add({"sinks": square_sum(gradient)}))
            return leaf

        return functools.partial(sinks_forward, module, module.forward, copies)

    def _leaf(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return _unseen_view(self._leaf_of(self._of_each_sample(output, 2)))

    def _leaf_of(self, output: torch.Tensor) -> torch.Tensor:
        self.leaves.append(output.detach().requires_grad_())
        return self.leaves[-1]

    def _of_each_sample(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """Expand a single row of positions, or of their embeddings, [T, ...] or [1, T, ...], to one row per sample.

        Otherwise all samples would share the row, and the gradient at its embedding. width: dimensions of [T, ...].
        """
        samples, tokens = self._shape
        if samples == 1 or x.dim() not in (width, width + 1) or x.shape[-width] != tokens:
            return x
        return x.expand(samples, *x.shape[-width:]) if x.dim() == width or x.shape[0] == 1 else x

    def _tap(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        # learned positions may be passed by name, next to a mask
        layer_input = kwargs["position_ids"] if kwargs.get("position_ids") is not None else (*args, *kwargs.values())[0]
        if not isinstance(layer_input, torch.Tensor) or not isinstance(output, torch.Tensor):
            return output  # nothing is added then, and `disagreements` reports it
        layer_input = layer_input.to(output.device)  # if the model spans several GPUs, it may come from another one
        if isinstance(module, torch.nn.Embedding):
            layer_input = self._of_each_sample(layer_input, 1)
        return _Tap.apply(functools.partial(self.measure, module), output, layer_input)

    def measure(self, module: torch.nn.Module, layer_input: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add the shares of this layer's parameters; `gradient` is the gradient at its output."""
        names = self._names[id(module)]
        rule = rule_of(module)
        assert rule is not None
        rows = self._shape[0] if self.rows == slice(None) else len(range(*self.rows.indices(self._shape[0])))
        layer_input = layer_input if layer_input.is_floating_point() else layer_input[..., None]
        try:
            layer_input, gradient = (by_sample(x, rows, self._shape[1]) for x in (layer_input, gradient))
        except ValueError:  # then no rule holds for it
            nothing = torch.full((rows,), torch.nan, dtype=torch.float64)
            self._add(module, dict.fromkeys(names, nothing))
            return
        self._add(module, rule(module, layer_input, gradient, self._grams))
        if names.get("weight") in self._coverage.tied:
            self._tie(module, names["weight"], layer_input, gradient)

    def _add(self, module: torch.nn.Module, squares: Squares) -> None:
        for local, square in squares.items():
            if (name := self._names[id(module)][local]) in self.squares:
                self.squares[name][self.rows] += square.to(self._token_ids.device)

    def _tie(self, module: torch.nn.Module, name: str, layer_input: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add 2 <g_embed, g_head>; the head's part is kept until the embedding's backward, which comes last."""
        if isinstance(module, torch.nn.Embedding):
            for rows, hidden, own in self._heads:
                overlap = embedding_overlap(module, gradient[rows], hidden, own)
                self.squares[name][rows] += 2 * overlap.to(self._token_ids.device)
            self._heads.clear()
        else:
            tokens = self._token_ids[self.rows, None, :].expand(-1, gradient.shape[1], -1).to(gradient.device)
            self._heads.append((self.rows, layer_input, gradient.gather(2, tokens)))


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward calls `measure` with the layer's input and the gradient there.

    The input is saved the way autograd saves tensors, so that checkpointing recomputes it and memory is shared.
    """

    @staticmethod
    def forward(ctx: Any, measure: Measure, output: torch.Tensor, layer_input: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(layer_input)
        ctx.measure = measure
        return _unseen_view(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        ctx.measure(*ctx.saved_tensors, gradient)
        return None, gradient, None


def _unseen_view(output: torch.Tensor) -> torch.Tensor:
    """The same memory, as a tensor that a model may write to in place; no layer with a rule needs its own output.

    (Autograd refuses such writes to leaves, and to views made by a custom function.)
    """
    return torch.ops.aten._unsafe_view(output, output.shape)


def _slope(values: torch.Tensor, scored: torch.Tensor, of_log_prob: bool) -> torch.Tensor:
    """d objective / d log(-P_t); the objective is the sum over scored t of log(-P_t), or of P_t = -exp(log(-P_t))."""
    return torch.where(scored, -values.detach().exp() if of_log_prob else 1.0, 0.0)
