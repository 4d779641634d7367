"""A model under DeepSpeed: its configuration, its weights (gathered or sharded), its checkpoints."""

import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mrd_ray.config import UnlearnConfig
from mrd_ray.config.credentials import secret_names
from mrd_ray.errors import UserError
from mrd_ray.models import saving
from mrd_ray.models.load import weights_digest
from mrd_ray.mrd.likelihood import MicroBatch
from mrd_ray.mrd.perturb import Shard
from mrd_ray.unlearning.batching import Batching
from mrd_ray.workers.ranks import Ranks

_TAG = "engine"
# Elements that DeepSpeed collects before it sends them. Its own default, ten times as many, needs a 2 GB buffer.
_BUCKET = 50_000_000
_BATCH = "unlearning.batch_size and unlearning.micro_batch_size set it"
# DeepSpeed's settings that ours decide: the value if `configuration` has none, and why. A user's JSON may repeat it.
_OURS: dict[str, tuple[object, str]] = {
    "train_batch_size": (None, _BATCH),
    "train_micro_batch_size_per_gpu": (None, _BATCH),
    "gradient_accumulation_steps": (None, _BATCH),
    "gradient_clipping": (None, "unlearning.max_grad_norm sets it"),
    "optimizer": (None, "it is AdamW with unlearning.learning_rate and unlearning.weight_decay"),
    "scheduler": (None, "unlearning.learning_rate is constant"),
    "fp16.enabled": (False, "model.dtype sets it"),
    "amp": (None, "DeepSpeed no longer supports it"),
    "torch_autocast": (None, "model.dtype decides the precision of forwards"),
    "bf16.enabled": (None, "model.dtype sets it"),
    "zero_allow_untested_optimizer": (None, "it must be true for torch's AdamW"),
    "zero_force_ds_cpu_optimizer": (None, "it must be false for torch's AdamW"),
    "zero_optimization.stage": (None, "deepspeed.zero_stage sets it"),
    "zero_optimization.offload_optimizer.device": ("none", "deepspeed.offload_optimizer sets it"),
    "zero_optimization.offload_param.device": ("none", "deepspeed.offload_parameters sets it"),
    "zero_optimization.cpu_offload": (False, "deepspeed.offload_optimizer sets it"),
    "zero_optimization.cpu_offload_param": (False, "deepspeed.offload_parameters sets it"),
    "zero_optimization.zero_quantized_weights": (False, "refreshes in place score the weights as they are"),
    "zero_optimization.zero_hpz_partition_size": (1, "refreshes in place need weights sharded over all workers"),
    "zero_optimization.mics_shard_size": (-1, "refreshes in place need weights sharded over all workers"),
    "zero_optimization.stage3_param_persistence_threshold": (0, "it must be 0 for refreshes in place"),
}


def configuration(config: UnlearnConfig, workers: int) -> dict[str, Any]:
    """The DeepSpeed configuration: ours, with the user's JSON merged in. Raises UserError if they contradict."""
    batching = Batching.of(config, workers)
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batching.micro_batch_size,
        "gradient_accumulation_steps": batching.passes,
        "gradient_clipping": config.unlearning.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.deepspeed.zero_stage,
            "reduce_bucket_size": _BUCKET,
            "allgather_bucket_size": _BUCKET,
        },
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
    }
    zero = ours["zero_optimization"]
    if config.deepspeed.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": config.deepspeed.offload_optimizer}
    if config.deepspeed.offload_parameters != "none":
        zero["offload_param"] = {"device": config.deepspeed.offload_parameters}
    if config.deepspeed.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # noise would silently miss a weight that stays gathered
    return _merged(ours, user_json(config.deepspeed.config), "")


def user_json(path: str | None) -> dict[str, object]:
    """The user's DeepSpeed JSON. Raises UserError."""
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("expected an object")
        if secrets := sorted(set(secret_names(content))):
            raise UserError(
                f"deepspeed.config: {path} holds a secret ({', '.join(secrets)}), which would be recorded with the "
                "run; leave it out, and set it in the environment"
            )
    except (OSError, RuntimeError) as problem:
        raise UserError(f"deepspeed.config: cannot read {path}: {problem}") from None
    except ValueError as problem:
        raise UserError(f"deepspeed.config: {path} is not a DeepSpeed JSON file: {problem}") from None
    return content


def _merged(ours: dict[str, Any], theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        name = f"{where}{key}"
        if name in _OURS:
            default, why = _OURS[name]
            if value not in ("auto", own := ours.get(key, default)):
                now = "" if own is None else f" (to {json.dumps(own)})" if why.endswith("sets it") else ""
                raise UserError(f"deepspeed.config: {name} is {json.dumps(value)} there, but {why}{now}; leave it out")
        elif isinstance(value, Mapping):
            merged[key] = _merged(ours.get(key, {}), value, f"{name}.")
        elif value == "auto" and key in ours and not isinstance(ours[key], dict):
            continue
        elif isinstance(ours.get(key), dict) or (any(other.startswith(f"{name}.") for other in _OURS) and value):
            raise UserError(
                f"deepspeed.config: {name} is {json.dumps(value)} there; expected an object, or leave it out"
            )
        else:
            merged[key] = value
    return merged


class Engine:
    """A model in training on several ranks. All ranks must call every method alike.

    Args:
        model: complete, in eval mode (dropout would depend on the number of ranks). The parameters to train require
            gradients. From now on, use it only through the engine.
        deepspeed: what `configuration` returns.
    """

    def __init__(self, model: PreTrainedModel, config: UnlearnConfig, deepspeed: dict[str, Any], ranks: Ranks) -> None:
        self.ranks = ranks
        self._source = config.model
        self.stage = config.deepspeed.zero_stage
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=config.unlearning.learning_rate,
            weight_decay=config.unlearning.weight_decay,
            fused=config.deepspeed.offload_optimizer == "none",
        )
        self._engine, *_ = _deepspeed(model.device).initialize(
            model=model, optimizer=optimizer, config=deepspeed, dist_init_required=False
        )
        if self.stage == 0 and config.model.dtype == "bfloat16":
            self._forget_first_step()

    def _forget_first_step(self) -> None:
        """Undo the step without gradients with which DeepSpeed's wrapper for this case makes the optimiser's states.

        That step would count in Adam's bias correction, and would decay the float32 masters.
        """
        wrapper = self._engine.optimizer
        wrapper.optimizer.state.clear()
        for masters, weights in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                master.data.copy_(weight.data)

    @property
    def model(self) -> PreTrainedModel:
        """The live model. Under ZeRO-3 each forward is a collective."""
        return self._engine.module

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """[B, T, V], differentiable. No attention mask: with padding on the right, the causal mask is exact."""
        return self._engine(input_ids=batch.token_ids, use_cache=False).logits

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of the losses' sum over ranks. After the last pass of a step, take the step."""
        # DeepSpeed takes the mean over ranks, and by default over passes
        self._engine.backward(loss * self.ranks.size, scale_wrt_gas=False)
        self._engine.step()

    @property
    def grad_norm(self) -> float | None:
        """The last step's gradient norm before clipping; None if DeepSpeed does not know it (stage 0 in float32)."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def shards(self) -> dict[str, Shard]:
        """This rank's parts of all parameters. Write to them only before the next forward (see `Replica`)."""
        parameters: dict[str, Any] = dict(self.model.named_parameters())
        if self.stage < 3:
            return {name: Shard(parameter.data, 0) for name, parameter in parameters.items()}
        # forwards leave weights gathered, and a write to their shards would not change those
        self._engine.optimizer.empty_partition_cache()
        shards = {}
        for name, parameter in parameters.items():
            if parameter.ds_status.name != "NOT_AVAILABLE":
                raise RuntimeError(f"{name} is still gathered; noise would not reach it")
            start = self.ranks.rank * parameter.ds_tensor.ds_numel
            count = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start)  # the last rank's end is padding
            if count > 0:
                shards[name] = Shard(parameter.ds_tensor.data.view(-1)[:count], start)
        return shards

    def settle(self) -> None:
        """Release gathered weights, before and after work that is not a training step."""
        self.shards()

    def digest(self) -> str:
        """Digest of this rank's parts of the weights."""
        return weights_digest({name: shard.tensor for name, shard in self.shards().items()})

    def save_model(self, folder: Path) -> None:
        """Write a Hugging Face directory, with only the adapter if there is one: see `saving.save`.

        Weights are gathered one by one.
        """
        adapter = any("lora_" in name for name, _ in self.model.named_parameters())
        weights: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if adapter and not parameter.requires_grad:
                continue
            with torch.no_grad(), self._gathered(parameter):
                if self.ranks.rank == 0:
                    weights[name] = parameter.detach().cpu().clone()
        if self.ranks.rank == 0:
            buffers = dict(self.model.named_buffers())
            weights |= {name: x for name, x in self.model.state_dict().items() if name in buffers}
            saving.save(self.model, weights, self._source, folder)
        self.settle()

    def _gathered(self, parameter: torch.nn.Parameter) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3)

    def save(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint: weights, masters, optimiser states."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint that the same number of ranks has written."""
        self._engine.load_checkpoint(str(folder), tag=_TAG)
        self.settle()


def _deepspeed(device: torch.device) -> Any:
    """The library, set to the CPU if we use no GPU."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # it would compile a shared-memory transport at first use, for minutes
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed
