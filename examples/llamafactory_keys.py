"""The keys of a LLaMA-Factory YAML as they are taken one by one, and why some have no equivalent in Manta."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from conf.schema import ConfigError

# Keys without an equivalent, by the reason why.
REASONS = {
    "the tokenizer's own chat template is used": "template tool_format enable_thinking",
    "models are not quantised": (
        "quantization_bit quantization_method quantization_type double_quantization quantization_device_map "
        "ref_model_quantization_bit reward_model_quantization_bit fp8 fp8_backend"
    ),
    "merge the adapter into its checkpoint and name that": "ref_model_adapters reward_model_adapters",
    "adapters are plain LoRA": (
        "use_dora pissa_init pissa_iter pissa_convert loraplus_lr_ratio loraplus_lr_embedding additional_target "
        "create_new_adapter"
    ),
    "has an effect with finetuning_type=lora alone": "lora_rank lora_alpha lora_target lora_dropout use_rslora",
    "the optimizer is AdamW": "use_galore use_apollo use_badam use_adam_mini use_muon optim_target_modules",
    "LLaMA-Factory's PPO does not pass it on either": "lr_scheduler_kwargs",
    "every step is recorded": "logging_steps logging_first_step logging_strategy",
    "curves.png is drawn after every run": "plot_loss",
    "rows are tokenised when the run starts": (
        "preprocessing_num_workers preprocessing_batch_size overwrite_cache tokenized_path dataloader_num_workers "
        "streaming buffer_size"
    ),
    "the results of another run are never overwritten": "overwrite_output_dir",
    "tracking.export_every exports the policy, and every export is kept": (
        "save_total_limit save_only_model save_strategy save_safetensors"
    ),
    "a run of LLaMA-Factory cannot be gone on with": "resume_from_checkpoint",
    "cluster.call_timeout_s and cluster.sync_timeout_s bound the waiting": "ddp_timeout",
    "DeepSpeed runs with ZeRO-3; learner.* sets it, for example learner.offload_optimizer=cpu": (
        "deepspeed fsdp fsdp_config ddp_find_unused_parameters"
    ),
    "LLaMA-Factory's PPO evaluates nothing; here data.eval_path and evaluation.* do": (
        "eval_dataset val_size do_eval do_predict eval_strategy evaluation_strategy eval_steps "
        "per_device_eval_batch_size predict_with_generate"
    ),
    "the response alone is bounded, by max_new_tokens": "max_length",
    "the learner has no log-probabilities of what would be sampled then": (
        "num_beams length_penalty repetition_penalty"
    ),
    "a response is scored without its special tokens": "skip_special_tokens",
    "attention and kernels are those of transformers and vLLM": (
        "use_unsloth use_unsloth_gc enable_liger_kernel use_reentrant_gc shift_attn infer_backend use_kv_cache"
    ),
    "the checkpoint and its tokenizer are taken as they are": (
        "rope_scaling resize_vocab add_tokens add_special_tokens use_fast_tokenizer split_special_tokens "
        "mixture_of_depths moe_aux_loss_coef upcast_layernorm upcast_lmhead_output low_cpu_mem_usage model_revision"
    ),
    "the Hugging Face libraries read it from their environment": "hf_hub_token cache_dir",
    "Ray is set by cluster.*": (
        "ray_run_name ray_storage_path ray_num_workers resources_per_worker placement_strategy ray_init_kwargs"
    ),
    "a run is named by its folder": "run_name logging_dir",
    "only Weights & Biases and TensorBoard are written": "use_swanlab swanlab_project swanlab_run_name swanlab_mode",
    "models and data are text": (
        "media_dir image_max_pixels image_min_pixels video_max_pixels freeze_vision_tower "
        "freeze_multi_modal_projector freeze_language_model"
    ),
    "belongs to another stage": (
        "pref_beta pref_ftx pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma packing "
        "neat_packing train_on_prompt mask_history compute_accuracy neftune_noise_alpha"
    ),
}
REASON_OF = {key: reason for reason, keys in REASONS.items() for key in keys.split()}


@dataclass
class Given:
    """The keys of a YAML. What is not taken is left over at the end, so that none is passed over in silence."""

    path: Path
    left: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def take(self, key: str, default: Any) -> Any:
        """The value of `key`, which must have the type of `default`; `default` where there is none."""
        value = self.left.pop(key, None)
        if value is None:
            return default
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise ConfigError(key, value, f"must be a value such as {default!r}")
        return value

    def text(self, key: str, *, needed: str | None = None) -> str | None:
        """The text of `key`. Raises ConfigError with `needed`, the remedy, if it is given and there is none."""
        value = self.take(key, "") or None
        if value is None and needed is not None:
            raise ConfigError(key, None, needed)
        return value

    def items(self, key: str) -> list[str]:
        """The values of `key`, a list or a text with commas."""
        value = self.left.pop(key, None) or []
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        return [str(part).strip() for part in parts]

    def note(self, key: str, reason: str) -> None:
        self.notes.append(f"{key}: {reason}")


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))  # as LLaMA-Factory reads it: 5e-5 is a number
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError("yaml", str(path), f"cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError("yaml", str(path), "is no mapping of keys to values")
    return {str(key): value for key, value in values.items()}
