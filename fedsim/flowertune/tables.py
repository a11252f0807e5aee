"""What an app's keys, and the arguments in its code, are in fedsim's configuration.

Keys are written with `_` for `-` and without `static.`; an argument as `Callee.name`.
"""

from __future__ import annotations

from typing import Any

ARGS, LORA, BITS = "train.training_arguments.", "LoraConfig.", "BitsAndBytesConfig."
# Those that are keys of fedsim's.
RENAMED = {
    "model.name": "model.name", "model.gradient_checkpointing": "train.recompute",
    LORA + "r": "adapter.rank", LORA + "lora_alpha": "adapter.alpha",
    LORA + "lora_dropout": "adapter.dropout", LORA + "target_modules": "adapter.targets",
    LORA + "use_dora": "adapter.dora", LORA + "use_rslora": "adapter.rslora",
    BITS + "bnb_4bit_quant_type": "model.quantisation",
    BITS + "bnb_4bit_use_double_quant": "model.double_quantisation",
    "num_server_rounds": "server.rounds", "train.save_every_round": "server.export_every",
    "train.seq_length": "data.max_length", "SFTTrainer.max_seq_length": "data.max_length",
    "dataset.name": "data.train", "seed": "run.seed", ARGS + "seed": "run.seed",
    "train.learning_rate_max": "train.lr_max", "train.learning_rate_min": "train.lr_min",
    ARGS + "max_steps": "train.steps", ARGS + "per_device_train_batch_size": "train.batch",
    ARGS + "weight_decay": "train.weight_decay", ARGS + "max_grad_norm": "train.clip_norm",
    ARGS + "adam_beta1": "train.beta1", ARGS + "adam_beta2": "train.beta2",
    ARGS + "adam_epsilon": "train.eps", ARGS + "lr_scheduler_type": "train.schedule",
    "strategy.fraction_fit": "server.fraction", "strategy.fraction_train": "server.fraction",
}  # fmt: skip
REQUIRED = ("model.name", "model.quantization", "train.learning_rate_max", "num_server_rounds",
            "train.learning_rate_min", "train.seq_length", ARGS + "max_steps", "dataset.name",
            ARGS + "lr_scheduler_type", ARGS + "per_device_train_batch_size",
            "strategy.fraction_train")  # fmt: skip

# Names of transformers -> fedsim's, where they say the same.
SCHEDULES = {
    "constant": "constant", "constant_with_warmup": "constant_with_warmup", "linear": "linear",
    "cosine": "cosine", "cosine_with_restarts": "cosine", "inverse_sqrt": "inverse_sqrt",
}  # fmt: skip
_EIGHT = "moments rounded to 8 bits; computed as AdamW with moments in float32"
_PAGED = "AdamW whose moments may leave the GPU; computed as AdamW, which is the same"
# Optimisers that are torch's AdamW, or nearly -> what differs.
OPTIMISERS = {
    "adamw_torch": "", "adamw_torch_fused": "",
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw"), _PAGED),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), _EIGHT),
}  # fmt: skip
BFLOAT16 = (
    "computed with model.dtype = bfloat16: weights and activations in bfloat16, adapters and AdamW "
    "in float32 (autocast keeps norms and residuals in float32, too); for scores in float32, as "
    "the leaderboard's: fedsim eval RUN --set model.dtype=float32"
)
# Those that change how numbers are rounded and nothing else -> what is computed, where they are on.
ROUNDED = {
    ARGS + "fp16": "computed in float32, which fp16 rounds",
    ARGS + "tf32": "products of float32 numbers are not rounded to TF32",
}
# Transformers from here on takes the mean over all tokens of the micro-batches of a step.
ONE_MEAN = (4, 46)

# Those with values that hold without a key of fedsim's -> (these values, the key that answers
# another, why no other).
ONLY: dict[str, tuple[list[Any], str, str]] = {
    "model.quantization": ([0, 4], "model.quantisation", "only 4 bits are read, or 0 for none"),
    LORA + "bias": (["none"], "", 'no bias is trained; set it to "none"'),
    LORA + "init_lora_weights": ([True], "adapter.init", "only PEFT's default is read"),
    LORA + "modules_to_save": ([None, []], "", "only adapters are trained; delete it"),
    **dict.fromkeys((LORA + "loftq_config", LORA + "layers_to_transform", LORA + "rank_pattern",
                     LORA + "alpha_pattern"), ([None, [], {}], "", "not computed; delete it")),
    LORA + "inference_mode": ([False], "", "nothing would train; delete it"),
    "SFTTrainer.packing": ([False], "", "rows are not packed into sequences; set it to False"),
    "train.dynamic_data_seed": ([False], "", "every visit sees the same examples; set it to false"),
}  # fmt: skip
# Those, or whole tables, that change no result -> why.
HARMLESS = {
    "model.attn": "an implementation of the same attention",
    "model.trust_remote_code": "code from a hub is never executed",
    LORA + "task_type": "causal", BITS + "load_in_4bit": "model.quantization decides",
    BITS + "bnb_4bit_quant_storage": "memory only", BITS + "bnb_4bit_compute_dtype": "see `dtype`",
    LORA + "use_gradient_checkpointing": "memory only", LORA + "random_state": "a seed of its own",
    LORA + "model": "what it adapts", LORA + "max_seq_length": "train.seq-length decides",
    ARGS + "num_train_epochs": "overridden by max-steps, which must be positive",
    ARGS + "gradient_checkpointing": "memory only; model.gradient-checkpointing decides",
    "strategy.fraction_evaluate": "see `strategy`",
    "run_name": "logging",
    **dict.fromkeys((ARGS + "output_dir", ARGS + "learning_rate"), "the app overwrites it"),
    **dict.fromkeys((ARGS + n for n in ("save_steps", "save_total_limit", "save_strategy",
                                        "overwrite_output_dir")), "checkpoints in a visit"),
    **dict.fromkeys((ARGS + n for n in ("report_to", "logging_steps", "logging_dir", "run_name",
                                        "logging_strategy", "disable_tqdm")), "logging"),
    **dict.fromkeys((ARGS + n for n in ("dataloader_num_workers", "dataloader_pin_memory",
                                        "gradient_checkpointing_kwargs")), "speed and memory only"),
    **dict.fromkeys(("wandb", "use_wandb"), "logging"),
    **dict.fromkeys(("SFTTrainer." + n for n in (
        "model", "args", "tokenizer", "processing_class", "train_dataset", "eval_dataset",
        "formatting_func", "data_collator")), "what the templates pass"),
}  # fmt: skip
# Tables and keys by which code decides something that is read from the code itself.
FOLLOWED = ("model.lora", "strategy.name", "strategy.use_flexlora", "use_flexlora", "task.name",
            "strategy.proximal_mu")  # fmt: skip
# What PEFT and unsloth take where a call says nothing.
PEFT = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": None}
UNSLOTH = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": [
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}  # fmt: skip

# Arguments that the templates pass to FedAvg, and methods that they watch.
PASSED = {"fraction_fit", "fraction_train", "fraction_evaluate", "on_fit_config_fn", "evaluate_fn",
          "fit_metrics_aggregation_fn", "initial_parameters"}  # fmt: skip
WATCHED = {"__init__", "configure_fit", "aggregate_fit", "configure_train", "aggregate_train"}
# Earlier ids of the sets that the official apps now take from `flwrlabs`.
OLDER = {
    "vicgalle/alpaca-gpt4": "flwrlabs/alpaca-gpt4",
    "FinGPT/fingpt-sentiment-train": "flwrlabs/fingpt-sentiment-train",
    "medalpaca/medical_meadow_medical_flashcards": "flwrlabs/medical-meadow-medical-flashcards",
    "lucasmccabe-lmi/CodeAlpaca-20k": "flwrlabs/code-alpaca-20k",
}
# What of a row the instruction is, by the template's `llm_task` and by domain.
BY_TASK = {"generalnlp": "instruction", "medical": "input", "finance": "joined", "code": "joined"}
BY_DOMAIN = {"general": "instruction", "medical": "input", "finance": "joined", "coding": "joined"}
# The template's functions that are compared, without docstrings and comments.
COSINE = """cos_inner = math.pi * current_round / total_round
return lrate_min + 0.5 * (lrate_max - lrate_min) * (1 + math.cos(cos_inner))"""
JOINING = """dataset['instruction'] = dataset['instruction'] + ' ' + dataset['input']
return dataset"""
