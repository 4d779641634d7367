"""Puts adapters in PEFT's format on the model that they were trained on; unsupported kinds are refused."""

import contextlib
import copy
import importlib
import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mrd_ray.errors import UserError
from mrd_ray.models import weights
from mrd_ray.models.files import ADAPTER_CONFIG, SAFE_ADAPTER
from mrd_ray.models.weights import Fit, Shape

_PREFIX = "base_model.model."  # of tensor names in PEFT's files
_NAME = "default"
# in a layer that PEFT has wrapped: where the layer's own weight is
_WHOLE = r"base_layer\.|token_adapter\.base_layer\.|original_module\.|modules_to_save\."
_NUMBERS = re.compile(r"\blora_|\.(weight|bias)$")  # names of factors, weights and biases; other tensors may be indices
# values of init_lora_weights that move a part of the base model's weights into the adapter, also when PEFT loads it;
# and those for which PEFT would then move a different part
_SPLIT = ("pissa", "olora")
_ONCE = {"pissa_niter_": "at random", "corda": "by data", "lora_ga": "by data", "loftq": "by quantising them"}
MERGE = "merge it first (PEFT's merge_and_unload, then save_pretrained), and give the merged model"


def require_peft(setting: str) -> Any:
    """The peft library. Raises UserError, which names the setting that needs it, if it is not installed."""
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise UserError(f"{setting} needs peft: pip install 'mrd-ray[lora]'") from None


def settings(folder: Path) -> Any:
    """An adapter's peft.PeftConfig. Raises UserError if it cannot be read or is of an unsupported kind."""
    peft = require_peft("model.path, an adapter,")
    try:
        with _quiet():
            found = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as problem:  # each kind has its own exceptions
        raise UserError(
            f"model.path: PEFT {peft.__version__} cannot read {folder / ADAPTER_CONFIG}: {_said(problem)}. If the "
            "adapter was made with a newer PEFT, install that version"
        ) from problem
    kind = _kind(found)
    if found.is_prompt_learning or kind == "ADAPTION_PROMPT":
        raise UserError(
            f"model.path: {folder} holds a {kind} adapter. It puts virtual tokens before every text and changes no "
            "weights, so it is not supported; give a LoRA adapter or a whole model"
        )
    if getattr(found, "use_dora", False):
        raise UserError(f"model.path: {folder} holds a DoRA adapter, which is not supported; {MERGE}")
    _refuse_lost_beginning(folder, _beginning(found))
    return found


def _refuse_lost_beginning(folder: Path, began: str) -> None:
    """Raises UserError if training began by changing the base model in a way that cannot be repeated from the files."""
    for name, how in _ONCE.items():
        if began.startswith(name):
            raise UserError(
                f"model.path: {folder} holds an adapter with init_lora_weights: {began}, which changed the weights of "
                f"the base model {how} when training began. The adapter needs those changed weights, and they cannot "
                "be computed again. Save it again where it was trained: with PEFT's "
                "path_initial_model_for_weight_conversion if PEFT supports that for it, or merged (merge_and_unload, "
                "then save_pretrained)"
            )


def _beginning(adapter: Any) -> str:
    """The named method that initialised the adapter for training, in lower case, or "" if it has no name."""
    began = getattr(adapter, "init_lora_weights", None)
    return began.lower() if isinstance(began, str) else ""


def _without_values(adapter: Any) -> Any:
    """The settings for a model without values, which PEFT could not split. Names and shapes stay the same."""
    if _beginning(adapter) not in _SPLIT:
        return adapter
    found = copy.deepcopy(adapter)
    found.init_lora_weights = True
    return found


def more_than_factors(folder: Path) -> str | None:
    """What an adapter trains in addition to LoRA factors, by its settings; None if only LoRA factors."""
    found = settings(folder)
    if _kind(found) != "LORA":
        return f"peft_type: {_kind(found)}"
    for name in ("modules_to_save", "trainable_token_indices"):
        if value := getattr(found, name, None):
            return f"{name}: {_listed(value)}"
    return None if found.bias == "none" else f"bias: {found.bias}"


def _kind(found: Any) -> str:
    return str(getattr(found.peft_type, "value", found.peft_type))


def _listed(value: Any) -> str:
    return ", ".join(map(str, sorted(value))) if isinstance(value, list | set | tuple | dict) else str(value)


def shape(model: PreTrainedModel, folder: Path, found: Mapping[str, Shape]) -> None:
    """Add an adapter's layers to the model, without their values. found: shapes in its files. Raises UserError."""
    adapter = settings(folder)
    _resize(model, adapter, _stripped(found))
    try:
        with _quiet():
            model.add_adapter(_without_values(adapter))
    except Exception as problem:
        raise _does_not_fit(folder, adapter, problem) from problem
    _refuse_shared_factors(model, adapter, folder)
    _put_tokens_in(model)


def put_on(model: PreTrainedModel, folder: Path, files: list[Path]) -> Fit:
    """Put an adapter on the model, and return how its tensors fit. files: its weight files. Raises UserError.

    The vocabulary is resized first if the adapter was trained on a resized one.
    """
    adapter, found = settings(folder), _stripped(weights.shapes(files))
    weights.refuse_quantised(files, {name for name in weights.shapes(files) if not _NUMBERS.search(name)})
    inputs, outputs = _embedding(model, output=False), _embedding(model, output=True)
    before, tied = inputs.weight.shape[0], inputs.weight is outputs.weight
    rows = _resize(model, adapter, found)
    try:
        with _quiet():
            loading = model.load_adapter(
                str(folder),
                peft_config=_without_values(adapter) if inputs.weight.is_meta else adapter,
                use_safetensors=(folder / SAFE_ADAPTER).is_file(),
                ignore_mismatched_sizes=True,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        raise _does_not_fit(folder, adapter, problem) from problem
    _refuse_shared_factors(model, adapter, folder)
    fit = Fit.of(loading.to_dict())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in fit.missing}
    fit.missing = {name for name in fit.missing if name not in parameters or id(parameters[name]) not in loaded}
    fit.unused -= _repeated(fit.unused, found, files)
    if not fit.mismatched:
        given = _given(model, found)
        if tied:
            _tie_again(model, adapter, given)
        _refuse_random_rows(model, adapter, given, range(before, rows), folder)
        _put_tokens_in(model)
    return fit


def _does_not_fit(folder: Path, adapter: Any, problem: Exception) -> UserError:
    return UserError(
        f"model.path: the {_kind(adapter)} adapter in {folder} cannot be put on its model: {_said(problem)}. If its "
        f"base_model_name_or_path is right, {MERGE}"
    )


def _said(problem: Exception) -> str:
    """An exception's message in a form that can be part of a sentence."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0].rstrip(".")


def plain(name: str) -> str:
    """A tensor's name without the prefix that PEFT's files add."""
    return name.removeprefix(_PREFIX)


def _stripped(found: Mapping[str, Shape]) -> dict[str, Shape]:
    return {plain(name): shape for name, shape in found.items()}


def _resize(model: PreTrainedModel, adapter: Any, found: Mapping[str, Shape]) -> int:
    """Give the embeddings as many rows as they had when the adapter was trained, and return how many.

    New rows are zero until the adapter's values are written to them.
    """
    embeddings = _embeddings(model)
    own, width = _embedding(model, output=False).weight.shape
    whole = re.compile(rf"({'|'.join(map(re.escape, embeddings))})\.({_WHOLE})?weight")
    rows = {shape[0] for name, shape in found.items() if whole.fullmatch(name) and shape[1:] == (width,)}
    of_head = {f"{name}.lora_B.weight" for name, module in embeddings.items() if isinstance(module, torch.nn.Linear)}
    rows |= {shape[0] for name, shape in found.items() if name in of_head}
    rows |= {shape[1] for name, shape in found.items() if name.endswith(".lora_embedding_A") and len(shape) == 2}
    rows |= {index + 1 for index in _trained_tokens(adapter) if index >= own}
    wanted = max(rows, default=own)
    if wanted == own:
        return own
    with _quiet():
        model.resize_token_embeddings(wanted, mean_resizing=False)
    with torch.no_grad():
        for module in embeddings.values():
            module.weight[own:] = 0.0
    return wanted


def _embeddings(model: PreTrainedModel) -> dict[str, Any]:
    """The modules that turn tokens into vectors and back, by name."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: module for name, module in model.named_modules() if any(module is one for one in both)}


def _trained_tokens(adapter: Any) -> set[int]:
    """Tokens for which the adapter holds single rows of the embeddings."""
    indices = getattr(adapter, "trainable_token_indices", None) or getattr(adapter, "token_indices", None) or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return {int(index) for some in lists for index in some}


def _repeated(unused: set[str], found: Mapping[str, Shape], files: list[Path]) -> set[str]:
    """The unused tensors that equal another tensor in the files that is used: PEFT saves some twice."""
    doubtful = {name: found[name] for name in unused if name in found}
    if not doubtful:
        return set()
    others = [name for name, shape in found.items() if name not in unused and shape in doubtful.values()]
    held = weights.read(files, [prefix + name for name in (*doubtful, *others) for prefix in ("", _PREFIX)])
    held = {plain(name): tensor for name, tensor in held.items()}
    return {name for name in doubtful if any(torch.equal(held[name], held[other]) for other in others)}


def _given(model: PreTrainedModel, found: Mapping[str, Shape]) -> set[int]:
    """Ids of the parameters that the files hold completely, under any of the names that PEFT uses."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    saved = f".modules_to_save.{_NAME}.weight"
    names = {
        name
        for held in found
        for name in (held, held.replace(".modules_to_save.weight", saved), re.sub(r"\.weight$", saved, held))
    }
    return {id(parameters[name]) for name in names & parameters.keys()}


def _embedding(model: PreTrainedModel, output: bool) -> Any:
    """The layer, without PEFT's wrapper, that turns tokens into vectors, or with `output` vectors into tokens."""
    module: Any = model.get_output_embeddings() if output else model.get_input_embeddings()
    if hasattr(module, "modules_to_save"):
        return module.modules_to_save[_NAME]
    module = getattr(module, "token_adapter", module)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _tie_again(model: PreTrainedModel, adapter: Any, given: set[int]) -> None:
    """Make embedding and head one parameter again, as PEFT saved them, if loading made two with equal values.

    Two parameters would each get their own noise, and change differently in training. given: see `_given`.
    """
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    copies = [hasattr(module, "modules_to_save") for module in both]
    if any(copies) and not (all(copies) and getattr(adapter, "ensure_weight_tying", False)):
        return
    inputs, outputs = _embedding(model, output=False), _embedding(model, output=True)
    if id(outputs.weight) not in given:
        outputs.weight = inputs.weight
    elif id(inputs.weight) not in given:
        inputs.weight = outputs.weight
    elif inputs.weight.is_meta or torch.equal(inputs.weight, outputs.weight):
        outputs.weight = inputs.weight


def _refuse_shared_factors(model: PreTrainedModel, adapter: Any, folder: Path) -> None:
    """Raises UserError if embedding and head share a pair of factors, which PEFT keeps as parameters of both.

    Both would get noise, and the gradients of both would count, as if they were different parameters.
    """
    factors = hasattr(model.get_input_embeddings(), "lora_embedding_A") and hasattr(
        model.get_output_embeddings(), "lora_A"
    )
    if factors and getattr(adapter, "ensure_weight_tying", False):
        raise UserError(
            f"model.path: {folder} holds LoRA factors that embedding and head share (ensure_weight_tying), which is "
            f"not supported; {MERGE}"
        )


def _put_tokens_in(model: PreTrainedModel) -> None:
    """Write the rows that the adapter holds for single tokens into the embeddings, and remove the layers for them.

    Function and gradients stay the same, and `mrd.gradient_rules` has rules for the layers that remain.
    """
    for name, module in [(name, module) for name, module in model.named_modules() if hasattr(module, "token_adapter")]:
        layer = module.token_adapter
        with torch.no_grad():
            layer.base_layer.weight.data = layer.get_merged_weights(layer.active_adapters)
        model.set_submodule(name, layer.base_layer)


def _refuse_random_rows(model: PreTrainedModel, adapter: Any, given: set[int], new: range, folder: Path) -> None:
    """Raises UserError if the adapter lacks values for new rows of an embedding, which training began at random."""
    by_token = set(new) <= _trained_tokens(adapter)
    for output, module in enumerate((model.get_input_embeddings(), model.get_output_embeddings())):
        weight = _embedding(model, bool(output)).weight
        if new and id(weight) not in given and not (by_token and hasattr(module, "token_adapter")):
            name = next(name for name, parameter in model.named_parameters() if parameter is weight)
            raise UserError(
                f"model.path: the adapter in {folder} was trained with {new.stop} tokens and its base model has "
                f"{new.start}, but the adapter does not hold the rows of the {len(new)} new tokens in {name}. Save the "
                "adapter again with save_embedding_layers=True, or merge it where it was trained, and give the merged "
                "model"
            )


@contextlib.contextmanager
def _quiet() -> Any:
    """Suppresses the libraries' warnings: what matters in them is refused with an error."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
