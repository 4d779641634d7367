"""Discrete choices inside a model, such as a router's experts: how close each one was, and how much a flip changes.

Where sigma flips a choice, Delta jumps. No gradient sees that, and a few draws can miss a rare flip. The gap of a
choice is how far the last chosen candidate is ahead of the next one. Each gap is compared with how far sigma moves it,
and the flips within reach are tried.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mrd_ray.errors import UserError

_TOP_K = {torch.topk, torch.Tensor.topk}
_LARGEST = {torch.argmax, torch.Tensor.argmax, torch.max, torch.Tensor.max}  # along a dimension
_COMPARED = {
    getattr(of, name)
    for of, names in (
        (torch, ("gt", "ge", "lt", "le")),
        (torch.Tensor, ("gt", "ge", "lt", "le", "__gt__", "__ge__", "__lt__", "__le__")),
    )
    for name in names
}
_REACH = 5.0  # in standard deviations of a gap's change under sigma; farther gaps flip in 3 of 10 million draws
_UNEVEN = 3.0  # some gaps move this many times farther than two draws and the median show
_MEDIAN = 0.6745  # median absolute value of a standard normal
_TRIED = 16  # flips tried per sample, one by one

Gaps = dict[int, torch.Tensor]  # keyed by the choice's turn: its place in the order of the forward's choices


class Choices(TorchFunctionMode):
    """Within this block, records every choice of the largest of some numbers, and comparisons of numbers.

    Args:
        flips: by the choice's turn, where to flip it: bool, in the shape of its gaps. A flip takes the next candidate
            instead of the last chosen one, or reverses the outcome of a comparison.
        positions: B T of the batch. Comparisons of that many numbers, or a multiple, are recorded; with 0, none are.
    """

    def __init__(self, flips: Mapping[int, torch.Tensor] | None = None, positions: int = 0) -> None:
        super().__init__()
        self._positions = positions
        self._flips = flips or {}
        self._gaps: list[torch.Tensor] = []
        self._indices: list[torch.Tensor] = []  # kept alive, so that no other object gets the same id()
        self._used: set[int] = set()

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {id(value) for value in (*args, *kwargs.values())}
        self._used |= {turn for turn, indices in enumerate(self._indices) if id(indices) in given}
        found = func(*args, **kwargs)
        if (func in _TOP_K or func in _LARGEST) and args[0].is_floating_point():
            return self._listen(func, found, *args, **kwargs)
        if func in _COMPARED and self._positions and found.numel() % self._positions == 0:
            x, y = (*args, *kwargs.values())[:2]
            return self._compare(found, x, y) if _is_number(x) or _is_number(y) else found
        return found

    def _compare(self, found: torch.Tensor, x: Any, y: Any) -> torch.Tensor:
        turn = len(self._gaps)
        if turn in self._flips:
            found = found ^ self._flips[turn].view(found.shape)
        self._indices.append(found)
        self._gaps.append(torch.as_tensor(x - y).abs().nan_to_num(nan=math.inf, posinf=math.inf).float())
        return found

    def _listen(self, func: Callable, found: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        settings = dict(zip(("k", "dim") if func in _TOP_K else ("dim",), args, strict=False)) | kwargs
        dim, k = settings.get("dim", -1 if func in _TOP_K else None), settings.get("k", 1)
        if not isinstance(dim, int) or not settings.get("largest", True):
            return found
        x = x.movedim(dim, -1)
        if len(self._gaps) in self._flips:
            found = _flipped(found, x.detach(), k, dim, self._flips[len(self._gaps)])
        self._indices.append(found if isinstance(found, torch.Tensor) else found[1])
        self._gaps.append(_gap(x, k))
        return found

    def gaps(self) -> Gaps:
        """Gaps of the choices whose indices or outcomes were used. Some models use only the values of the largest."""
        return {turn: self._gaps[turn] for turn in sorted(self._used)}


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _gap(x: torch.Tensor, k: int) -> torch.Tensor:
    """[..., n] -> float32 [...]; infinite where every candidate was chosen, or no other could be.

    Probabilities are converted to logits, whose gaps move by about the same amount at each position.
    """
    if k >= x.shape[-1]:
        return torch.full(x.shape[:-1], math.inf, device=x.device)
    best = x.topk(k + 1, -1).values[..., k - 1 :].double()
    if ((x > 0) & (x < 1)).all():
        best = best.logit()
    return (best[..., 0] - best[..., 1]).nan_to_num_(nan=math.inf, posinf=math.inf).float()


def _flipped(found: Any, x: torch.Tensor, k: int, dim: int, where: torch.Tensor) -> Any:
    """The result `found`, with the next candidate in place of the last chosen one where `where` is true."""
    best = x.topk(k + 1, -1)
    (last, other), value = best.indices[..., k - 1 :, None].unbind(-2), best.values[..., k:]
    if isinstance(found, torch.Tensor):
        return torch.where(where.view(found.shape), other.view(found.shape), found)
    if found[1].dim() < x.dim():  # the result of max
        values, indices = (part[..., None] for part in found)
    else:
        values, indices = (part.movedim(dim, -1) for part in found)
    here = where.view(*x.shape[:-1], 1) & (indices == last)
    parts = torch.where(here, value, values), torch.where(here, other, indices)
    if found[1].dim() < x.dim():
        return type(found)([part[..., 0] for part in parts])
    return type(found)([part.movedim(-1, dim) for part in parts])


class Reach:
    """How much the flips within sigma's reach add to the scores of a batch's samples.

    Args:
        scored: the batch's score mask, bool [B, T - 1].
        gaps: the gaps at theta.
    """

    def __init__(self, scored: torch.Tensor, gaps: Gaps) -> None:
        self._matters = torch.nn.functional.pad(scored.flip(1).cumsum(1).flip(1) > 0, (0, 1))  # to later targets
        self._gaps = {turn: self._by_position(gap) for turn, gap in gaps.items()}
        self._shapes = {turn: gap.shape for turn, gap in gaps.items()}
        self._moved: dict[int, list[float]] = {turn: [] for turn in gaps}  # median change of the gaps in each draw
        self._own = {turn: torch.zeros_like(gap) for turn, gap in self._gaps.items()}  # each gap's largest change

    def _by_position(self, gap: torch.Tensor) -> torch.Tensor:
        """[B, T n], infinite where the position does not affect a score.

        Raises UserError if the gaps cannot be assigned to samples.
        """
        samples, tokens = self._matters.shape
        if gap.numel() % (samples * tokens):
            raise UserError(
                f"scoring.verify_draws: this model makes a choice of shape {tuple(gap.shape)} for {samples} samples of "
                f"{tokens} tokens, which cannot be assigned to samples. Use monte_carlo, or set 0 to skip the check"
            )
        gap = gap.to(self._matters.device).reshape(samples, tokens, -1)
        return torch.where(self._matters[..., None], gap, math.inf).flatten(1)

    def draw(self, gaps: Gaps) -> None:
        """Record the gaps of the same choices at a draw."""
        for turn, at_theta in self._gaps.items():
            by = (self._by_position(gaps[turn]) - at_theta).abs().nan_to_num_(nan=0.0)
            torch.maximum(self._own[turn], by, out=self._own[turn])
            if len(known := by[at_theta.isfinite()]):
                self._moved[turn].append(float(known.median()))

    def effect(
        self,
        jumps: Callable[[dict[int, torch.Tensor]], torch.Tensor],
        deviations: Callable[[dict[int, torch.Tensor]], torch.Tensor] | None = None,
        whole: bool = True,
    ) -> torch.Tensor:
        """Moments of what flips add to Delta, sum_i P(flip i) |jump i|^n: float64 [B, 2], n = 1, 2.

        The first is an upper bound of what they add to E|Delta|. Infinite where it is not known.

        Args:
            jumps: returns Delta [B] of a forward with flips, in the form that `Choices` takes.
            deviations: returns the standard deviation [B] of how far sigma moves a gap, one gap per sample, selected in
                the same form. Without it the draws are used, which show half or less of some gaps' movement.
            whole: whether these deviations cover all parameters; if not, the larger of them and the draws' counts.
        """
        found = torch.zeros(len(self._matters), 2, dtype=torch.float64, device=self._matters.device)
        turns = [turn for turn, moved in self._moved.items() if moved]
        if not turns:
            return found
        gaps = torch.cat([self._gaps[turn] for turn in turns], 1)  # all choices of a sample
        far = torch.cat([self._far(turn) for turn in turns], 1)
        limit = _REACH * (_UNEVEN if deviations else 1.0)
        for _ in range(_TRIED):
            nearest, place = far.min(1)
            here = torch.zeros_like(far, dtype=torch.bool).scatter_(1, place[:, None], (nearest < limit)[:, None])
            if not here.any():
                return found
            far[here] = math.inf
            if deviations is not None:
                moved = deviations(self._told(turns, here)).to(gaps.device)
                exact = gaps.gather(1, place[:, None])[:, 0] / moved
                # zero where a model blocks gradients of a choice, as some sparse attention does: use the draws then
                nearest = torch.where(moved > 0, exact if whole else torch.minimum(exact, nearest), nearest)
                here &= (nearest < _REACH)[:, None]
            if here.any():
                jump = jumps(self._told(turns, here)).abs().to(found.device)[:, None]
                of_flip = torch.special.ndtr(-nearest.double())[:, None] * torch.cat([jump, jump.square()], 1)
                found += torch.where(here.any(1, keepdim=True), of_flip, 0.0)
        found[(far < _REACH).any(1)] = math.inf
        return found.nan_to_num_(nan=math.inf)

    def _told(self, turns: list[int], here: torch.Tensor) -> dict[int, torch.Tensor]:
        """Marked places among all choices of a sample, split by turn."""
        parts = zip(turns, here.split([self._gaps[turn].shape[1] for turn in turns], 1), strict=True)
        return {turn: part.reshape(self._shapes[turn]) for turn, part in parts if part.any()}

    def _far(self, turn: int) -> torch.Tensor:
        """Each gap in standard deviations of its change under sigma, estimated from the draws: [B, T n]."""
        moved = self._moved[turn]
        scale = math.sqrt(sum(one * one for one in moved) / len(moved)) / _MEDIAN
        return (self._gaps[turn] / self._own[turn].clamp(min=scale)).nan_to_num_(nan=math.inf)
