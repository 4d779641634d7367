"""The model to train, on this worker: whole weights, LoRA factors put in, and what is to change marked."""

import torch
from transformers import PreTrainedModel

from mrd_ray import model_files, models
from mrd_ray.config import UnlearnConfig
from mrd_ray.errors import UserError


def load(config: UnlearnConfig, device: torch.device) -> PreTrainedModel:
    """The same on every rank. Raises UserError."""
    path = model_files.directory(config.model)
    model = models.load_model(config.model, device)
    adapter = model_files.base_directory(path) != path
    if config.lora.rank:
        if adapter:
            raise UserError(f"lora.rank: model.path {path} holds an adapter already, which is trained with rank: 0")
        add_lora(model, config)
    if adapter or config.lora.rank:
        names = [name for name, _ in model.named_parameters()]
        if more := [name for name in names if "modules_to_save" in name]:
            raise UserError(f"model.path: the adapter in {path} trains whole layers too ({more[0]}); merge it first")
        if not any("lora_" in name for name in names):
            raise UserError(f"model.path: the adapter in {path} has no LoRA factors; merge it first")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    return model.eval()


def add_lora(model: PreTrainedModel, config: UnlearnConfig) -> None:
    """Put new factors in. Raises UserError."""
    peft = models.require_peft("lora.rank")
    torch.manual_seed(config.unlearning.seed)  # of the factors; all ranks draw the same
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
    for parameter in model.parameters():  # factors come in float32
        parameter.data = parameter.data.to(model.dtype)
