"""Names of settings in other trainers and earlier versions -> their names here; used in errors about unknown keys."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

ALIASES: dict[str, str] = {
    "at_start": "previews (always before the first step)",
    "lr": "optimizer.learning_rate",
    "learning_rate": "optimizer.learning_rate",
    "train_learning_rate": "optimizer.learning_rate",
    "unet_lr": "optimizer.learning_rate",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.epsilon",
    "adam_weight_decay": "optimizer.weight_decay",
    "train_adam_beta1": "optimizer.beta1",
    "train_adam_beta2": "optimizer.beta2",
    "train_adam_epsilon": "optimizer.epsilon",
    "train_adam_weight_decay": "optimizer.weight_decay",
    "train_max_grad_norm": "optimizer.max_grad_norm",
    "grad_clip": "optimizer.max_grad_norm",
    "clip_grad_norm": "optimizer.max_grad_norm",
    "network_dim": "lora.rank",
    "network_alpha": "lora.alpha",
    "network_weights": "lora.init_from",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_r": "lora.rank",
    "r": "lora.rank",
    "dim": "lora.rank",
    "lora_target_modules": "lora.target_modules",
    "num_inference_steps": "sampling.steps",
    "sample_num_steps": "sampling.steps",
    "num_steps": "sampling.steps",
    "training.num_steps": "training.steps",
    "sampling_steps": "sampling.steps",
    "sd_steps": "sampling.steps",
    "cfg_scale": "sampling.guidance_scale",
    "cfg": "sampling.guidance_scale",
    "guidance": "sampling.guidance_scale",
    "sample_guidance_scale": "sampling.guidance_scale",
    "sd_guidance_scale": "sampling.guidance_scale",
    "sample_eta": "sampling.eta",
    "ddim_eta": "sampling.eta",
    "sampler": "sampling.scheduler",
    "noise_scheduler": "sampling.scheduler",
    "resolution": "sampling.width and sampling.height",
    "image_size": "sampling.width and sampling.height",
    "negative_prompts": "sampling.negative_prompt",
    "train_negative_prompts": "sampling.negative_prompt",
    "use_ema": "optimizer.ema_decay",
    "ema_decay": "optimizer.ema_decay",
    "kl_weight": "regularization.weight",
    "kl_coeff": "regularization.weight",
    "early_stopping_patience": "early_stopping.patience",
    "max_train_steps": "training.steps",
    "max_steps": "training.steps",
    "num_train_steps": "training.steps",
    "iterations": "training.steps",
    "num_epochs": "training.steps",
    "num_train_epochs": "training.steps",
    "max_train_epochs": "training.steps",
    "epochs": "training.steps",
    "train_batch_size": "training.batch_size",
    "per_device_train_batch_size": "training.batch_size",
    "sample_batch_size": "backprop.sample_batch_size",
    "train_gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "grad_accum": "training.gradient_accumulation_steps",
    "gradient_accumulation": "training.gradient_accumulation_steps",
    "precision": "training.mixed_precision",
    "dtype": "training.mixed_precision",
    "log_with": "training.trackers",
    "report_to": "training.trackers",
    "tracker": "training.trackers",
    "checkpointing_steps": "save.state_every",
    "save_freq": "save.every",
    "save_steps": "save.every",
    "save_every_n_steps": "save.every",
    "save_every_n_epochs": "save.every",
    "checkpoints_total_limit": "save.state_keep",
    "num_checkpoint_limit": "save.state_keep",
    "sample_every_n_steps": "previews.every",
    "validation_steps": "previews.every",
    "validation_prompts": "prompts.heldout",
    "validation_prompt": "prompts.heldout",
    "sample_prompts": "previews.prompts",
    "prompt_fn": "prompts.train",
    "prompt_file": "prompts.train",
    "eval_prompt_fn": "prompts.heldout",
    "train_data_dir": "prompts.train",
    "dataset": "prompts.train",
    "reward_fn": "rewards",
    "reward": "rewards",
    "rewards.0.reward": "name",
    "reward_weights": "rewards.0.weight",
    "pretrained_model": "model.base",
    "pretrained_model_name_or_path": "model.base",
    "sd_model": "model.base",
    "sd_model_id": "model.base",
    "model_id": "model.base",
    "base_model": "model.base",
    "vae_path": "model.vae",
    "pretrained_vae_model_name_or_path": "model.vae",
    "output_dir": "output",
    "logdir": "output",
    "log_dir": "output",
    "logging_dir": "output",
    "project_dir": "output",
    "run_name": "output",
    "output_name": "output",
    "truncated_backprop": "backprop.strategy",
    "truncated_backprop_timestep": "backprop.k with backprop.strategy: last_k",
    "truncated_backprop_minmax": "backprop.strategy: uniform",
    "truncated_rand_backprop_minmax": "backprop.strategy: uniform",
    "truncated_backprop_rand": "backprop.strategy: uniform",
    "trunc_backprop": "backprop.strategy",
    "backprop_strategy": "backprop.strategy",
    "backprop_kwargs": "backprop.mean and backprop.std",
    "draft_k": "backprop.k with backprop.strategy: last_k",
    "gradient_checkpointing": "backprop.checkpoint_steps",
    "grad_checkpoint": "backprop.checkpoint_steps",
    "train_use_8bit_adam": "optimizer (AdamW in full precision)",
    "use_8bit_adam": "optimizer (AdamW in full precision)",
    "optimizer_type": "optimizer (always AdamW)",
    "seed": "training.seed",
}
"""Keys of other trainers (TRL, AlignProp's own code, kohya's sd-scripts, diffusers' examples), and ours for each."""

_MOVED = {
    "lora.targets": "lora.target_modules",
    "lora.rank_stabilized": "lora.use_rslora",
    "training.checkpoint_every": "save.state_every",
    "training.keep_checkpoints": "save.state_keep",
    "samples.every": "previews.every",
    "guards.watch": "early_stopping.monitor",
    "guards.patience": "early_stopping.patience",
    "guards.keep_best": "early_stopping.restore_best",
    "guards.drift_limit": "early_stopping.max_drift",
    "guards.diversity_floor": "early_stopping.min_diversity",
    "guards.explosion": "optimizer.spike_threshold",
    "guards.max_dropped_steps": "optimizer.max_skipped_steps",
}

RENAMED: dict[str, str] = {
    **_MOVED,
    "samples": "previews",
    "guards": "early_stopping (and optimizer.spike_threshold)",
    "early_stopping.watch": "early_stopping.monitor",
    "early_stopping.lower_is_better": "early_stopping.mode: min",
    "early_stopping.keep_best": "early_stopping.restore_best",
    "early_stopping.drift_limit": "early_stopping.max_drift",
    "early_stopping.diversity_floor": "early_stopping.min_diversity",
    "early_stopping.explosion": "optimizer.spike_threshold",
    "early_stopping.max_dropped_steps": "optimizer.max_skipped_steps",
}
"""Earlier keys of this project, in the old or the renamed section -> today's keys."""


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """Return the resolved config of an old run folder with today's names; a newer config is unchanged."""
    if "samples" not in config or "guards" not in config:
        return config
    new = deepcopy(config)
    for old_key, new_key in _MOVED.items():
        (section, key), (target, name) = old_key.split("."), new_key.split(".")
        if key in new.get(section, {}):
            new.setdefault(target, {})[name] = new[section].pop(key)
    samples, guards = new.pop("samples"), new.pop("guards")
    if "seed" in samples:
        new.setdefault("previews", {})["seeds"] = [samples["seed"]]
    stopping = new.setdefault("early_stopping", {})
    stopping["mode"] = "min" if guards.get("lower_is_better") else "max"
    if stopping.get("monitor") == "reward":
        stopping["monitor"] = "total"
    return new
