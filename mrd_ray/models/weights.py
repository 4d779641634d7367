"""Reads the tensors in weight files, and checks them against a model: none missing, none unused, all shapes equal."""

import math
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from mrd_ray.errors import UserError

Shape = tuple[int, ...]
_SHOWN = 3  # names in a message
_WHOLE = re.compile(r"[IU]\d|BOOL|q?u?int\d|bool")  # dtypes, as safetensors and torch call them
_NARROW = re.compile(r"F[468]_|float[48]_")
_SCALES = ("_scale", "_scale_inv")
_PREFIXES = {"_orig_mod.": "torch.compile", "module.": "DataParallel", "_fsdp_wrapped_module.": "FSDP"}
# what determines the parameters' names, and why a file may hold more of them
_OF_MODELS = (
    "its configuration",
    "config.json says the wrong thing (attention_bias: false for a model with biases, or too few layers). Correct "
    "config.json",
)
_OF_ADAPTERS = (
    "its configuration (adapter_config.json)",
    "adapter_config.json names fewer layers than were trained (target_modules, layers_to_transform or "
    "modules_to_save) or another base model. Correct adapter_config.json",
)


def shapes(files: Iterable[Path]) -> dict[str, Shape]:
    """The shape of every tensor in these files, by name. Raises UserError if a file cannot be read."""
    return {name: tuple(tensor.get_shape()) for file in files for name, tensor in _slices(file, "meta").items()}


def read(files: Iterable[Path], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors with these names that exist. Raises UserError if a file cannot be read."""
    wanted = set(names)
    return {name: tensor[...] for file in files for name, tensor in _slices(file, "cpu").items() if name in wanted}


def dtypes(files: Iterable[Path]) -> dict[str, str]:
    """The dtype of every tensor in these files, by name, in the format's terms. Raises UserError like `shapes`."""
    return {name: tensor.get_dtype() for file in files for name, tensor in _slices(file, "meta").items()}


class _Pickled:
    """A tensor with the methods of a safetensors slice."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_dtype(self) -> str:
        return str(self._tensor.dtype).removeprefix("torch.")

    def get_shape(self) -> Shape:
        return tuple(self._tensor.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index]


def _slices(file: Path, device: str) -> dict[str, Any]:
    try:
        if file.suffix == ".safetensors":
            opened = safe_open(file, framework="pt")
            return {name: opened.get_slice(name) for name in opened.offset_keys()}
        found = torch.load(file, map_location=device, weights_only=True)
        return {name: _Pickled(tensor) for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    except Exception as problem:  # safetensors, zip and pickle have their own exceptions
        raise UserError(f"model.path: cannot load {file}: {problem}; copy the file again") from problem


def refuse_empty(files: Iterable[Path]) -> None:
    """Raises UserError if a file holds tensors without elements."""
    for file in files:
        if empty := sorted(name for name, shape in shapes([file]).items() if math.prod(shape) == 0):
            raise UserError(
                f"model.path: {file} holds {len(empty)} empty tensor(s), first {empty[0]}. DeepSpeed's ZeRO-3 saves "
                "such files when the weights are not gathered first. Save the model again with "
                "stage3_gather_16bit_weights_on_model_save: true, or rebuild it from the training checkpoint with "
                "DeepSpeed's zero_to_fp32.py"
            )


def refuse_quantised(files: Iterable[Path], whole: Container[str] = ()) -> None:
    """Raises UserError if a file holds quantised values, which would have to be multiplied by scales first.

    Args:
        whole: names of tensors that may hold whole numbers.
    """
    for file in files:
        found = dtypes([file])
        scaled = {name for name in found for end in _SCALES if f"{name}{end}" in found}
        quantised = {name for name, dtype in found.items() if _WHOLE.match(dtype) and name not in whole}
        quantised |= {name for name, dtype in found.items() if _NARROW.match(dtype) and name in scaled}
        if quantised:
            first = min(quantised)
            raise UserError(
                f"model.path: {file} holds {len(quantised)} quantised tensor(s), first {first} ({found[first]}), but "
                "the configuration has no quantization_config, so their scales would be ignored. Quantised weights "
                "cannot have noise or gradients; give the model as it was before quantisation"
            )


def whole_numbers(model: PreTrainedModel, fit: "Fit", found: Mapping[str, Shape]) -> set[str]:
    """Names of tensors in files that may hold whole numbers: the model's integer tensors, and those it does not need.

    If weights are missing, they may be there quantised under other names, so no unused tensor counts as not needed.
    """
    known = model.state_dict()
    own = {name for name, tensor in known.items() if not tensor.is_floating_point()}
    own |= {name.removeprefix(f"{model.base_model_prefix}.") for name in own}
    for name, shape in found.items():
        if _derived(name, shape) or (name not in known and _ignored(model, name)):
            own.add(name)
    return own if fit.missing else own | fit.unused


def refuse_contradictions(files: Iterable[Path]) -> None:
    """Raises UserError if two files hold different values for one name: it is unclear which a loader takes."""
    holders: dict[str, Path] = {}
    for file in files:
        for name in shapes([file]):
            other = holders.setdefault(name, file)
            if other != file and not _equal(read([other], [name])[name], read([file], [name])[name]):
                raise UserError(
                    f"model.path: {other} and {file} both hold {name}, with different values, so which one is meant "
                    "cannot be told. One of the files is most likely left over from another save: copy or save the "
                    "model again, into an empty folder"
                )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@dataclass
class Fit:
    """How the tensors of files fit a model.

    missing: names without a value. unused: names that the model does not use. mismatched: (name, shape in the file,
    shape in the model).
    """

    missing: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)
    mismatched: set[tuple[str, Shape, Shape]] = field(default_factory=set)

    @classmethod
    def of(cls, loading: Mapping[str, Any]) -> "Fit":
        """The fit that transformers reported when it loaded a model."""
        mismatched = {(name, tuple(found), tuple(own)) for name, found, own in loading["mismatched_keys"]}
        return cls(set(loading["missing_keys"]), set(loading["unexpected_keys"]), mismatched)

    def refuse(self, path: Path, allow_unused: bool, of_adapter: bool = False) -> None:
        """Raises UserError, which names `path`, if anything does not fit; `allow_unused` permits unused tensors."""
        settings, causes = _OF_ADAPTERS if of_adapter else _OF_MODELS
        if self.mismatched:
            told = [
                f"{name} is {_shown(found)} in the file and {_shown(own)} in the model"
                for name, found, own in sorted(self.mismatched)[:_SHOWN]
            ]
            more = f" (and {len(self.mismatched) - _SHOWN} more)" if len(self.mismatched) > _SHOWN else ""
            raise UserError(
                f"model.path: cannot load {path}: {len(self.mismatched)} tensor(s) of its weights have a different "
                f"shape than in its configuration: {'; '.join(told)}{more}. Use weights and configuration of the same "
                "model"
            )
        unused = f"{len(self.unused)} tensor(s) that it does not use, first {', '.join(sorted(self.unused)[:_SHOWN])}"
        if self.missing:
            also = f", and hold {unused}{self._prefixed()}" if self.unused else ""
            raise UserError(
                f"model.path: the weights in {path} lack {len(self.missing)} parameter(s) of {settings}, "
                f"first {min(self.missing)}{also}"
            )
        if self.unused and not allow_unused:
            raise UserError(
                f"model.path: the weights in {path} hold {unused}. Scores would belong to a different model than "
                f"the file's if {causes}; if the model should not use these tensors, set "
                "model.allow_unused_weights: true"
            )

    def _prefixed(self) -> str:
        if all(".default.default." in name for name in self.unused):
            return (
                ". In the file their names contain .default., as in the state_dict() of a PEFT model; save the adapter "
                "with PEFT's save_pretrained, which removes that, or rename them"
            )
        for prefix, maker in _PREFIXES.items():
            if all(name.startswith(prefix) for name in self.unused):
                return f". Every name begins with {prefix}, which {maker} adds; save the model inside that wrapper"
        return ""


def _shown(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _square(shape: Shape) -> bool:
    return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]


def _one_number(shape: Shape) -> bool:
    return math.prod(shape) == 1


def _row(shape: Shape) -> bool:
    return len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)


# Tensors that earlier versions of transformers saved although they follow from the configuration: the end of the
# name, and the shape, since a layer may have a real parameter of the same name.
_DERIVED = [
    (re.compile(r"(^|\.)inv_freq$"), _row),
    (re.compile(r"(^|\.)rotary_emb\.(cos|sin)_cached$"), lambda shape: len(shape) in (2, 3, 4)),
    (re.compile(r"(^|\.)position_ids$"), _row),
    (re.compile(r"(^|\.)(attn|attention|crossattention|self_attn)\.bias$"), _square),  # a causal mask
    (re.compile(r"(^|\.)causal_mask$"), _square),
    (re.compile(r"(^|\.)masked_bias$"), _one_number),
]


def unused(model: PreTrainedModel, unexpected: Iterable[str], found: Mapping[str, Shape]) -> set[str]:
    """The tensors in files that the model does not use, without those that follow from its configuration.

    Args:
        unexpected: names that transformers reports. It does not report some, judging only by their names.
        found: the shapes of all tensors in the files.
    """
    known = model.state_dict()
    quiet = {
        name
        for name in found
        if _named_as_derived(name)
        and _ignored(model, name)
        and not {name, f"{model.base_model_prefix}.{name}"} & known.keys()
    }
    return {name for name in {*unexpected, *quiet} if name not in found or not _derived(name, found[name])}


def _named_as_derived(name: str) -> bool:
    return any(end.search(name) for end, _ in _DERIVED)


def _derived(name: str, shape: Shape) -> bool:
    return any(end.search(name) and is_one(shape) for end, is_one in _DERIVED)


def _ignored(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers does not report this tensor if a file has it but the model does not."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())


def set_aside(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """The tensors that the architecture declares as not used, for example heads that predict further tokens."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name for name in names if name not in tied and not _named_as_derived(name) and _ignored(model, name)}
