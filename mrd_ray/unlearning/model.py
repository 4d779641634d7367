"""The model to train, on this worker: its weights, new LoRA factors, and which parameters to train."""

import torch
from transformers import PreTrainedModel

from mrd_ray.config import UnlearnConfig
from mrd_ray.errors import UserError
from mrd_ray.models import adapters
from mrd_ray.models.files import parts
from mrd_ray.models.load import load_model


def load(config: UnlearnConfig, device: torch.device) -> PreTrainedModel:
    """Load the model, the same on every rank. Raises UserError."""
    refuse(config)
    model = load_model(config.model, device)
    if config.lora.rank:
        add_lora(model, config)
    if config.lora.rank or parts(config.model).adapter is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    return model.eval()


def refuse(config: UnlearnConfig) -> None:
    """Raises UserError if model.path is an adapter that cannot be trained. Reads only its settings."""
    if (adapter := parts(config.model).adapter) is None:
        return
    if config.lora.rank:
        raise UserError(
            f"lora.rank: model.path {adapter} holds an adapter already; set lora.rank: 0 to train that adapter"
        )
    if (more := adapters.more_than_factors(adapter)) is not None:
        raise UserError(
            f"model.path: the adapter in {adapter} changes more than LoRA factors ({more}), and unlearning trains "
            f"only those; {adapters.MERGE}"
        )


def add_lora(model: PreTrainedModel, config: UnlearnConfig) -> None:
    """Add new LoRA factors. Raises UserError."""
    peft = adapters.require_peft("lora.rank")
    torch.manual_seed(config.unlearning.seed)  # for the factors, so that all ranks draw the same
    try:
        model.add_adapter(
            peft.LoraConfig(
                r=config.lora.rank,
                lora_alpha=config.lora.alpha,
                lora_dropout=0.0,
                target_modules=config.lora.target_modules,
                base_model_name_or_path=config.model.path,
                revision=config.model.revision,
                task_type="CAUSAL_LM",
            )
        )
    except ValueError as problem:
        raise UserError(f"lora.target_modules: {config.lora.target_modules}: {problem}") from None
    for parameter in model.parameters():  # new factors are float32
        parameter.data = parameter.data.to(model.dtype)
