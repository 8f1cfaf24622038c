"""PPO by TRL's own trainer, the contestant of benchmarks/iteration.py; runs in an environment of its own.

Prints one line of JSON: the seconds of each iteration, from the end of the one before, and what the responses were.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Ends(TrainerCallback):
    """Takes the time at the beginning of training and at the end of each iteration, and the metrics."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.metrics: dict[str, Any] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.at.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.at.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        self.metrics = logs


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--policy", "--reward", "--prompts", "--output"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--iterations", "--response-length", "--threads", "--forward-batch", "--mini-batches", "--epochs"):
        parser.add_argument(name, type=int, required=True)
    for name in ("--lr", "--kl-coef"):
        parser.add_argument(name, type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--accumulation", type=int, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    tokenizer = AutoTokenizer.from_pretrained(asked.policy)
    texts = [json.loads(line)["prompt"] for line in asked.prompts.read_text().splitlines()]
    rows = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])

    def model(kind: Any, path: Path) -> Any:
        return kind.from_pretrained(path, dtype=torch.float32)

    ends = Ends()
    config = PPOConfig(
        output_dir=str(asked.output),
        per_device_train_batch_size=len(texts) // asked.accumulation,
        gradient_accumulation_steps=asked.accumulation,
        num_mini_batches=asked.mini_batches,
        num_ppo_epochs=asked.epochs,
        total_episodes=len(texts) * asked.iterations,
        local_rollout_forward_batch_size=asked.forward_batch,
        response_length=asked.response_length,
        stop_token="eos",
        temperature=1.0,
        learning_rate=asked.lr,
        lr_scheduler_type="constant",
        kl_coef=asked.kl_coef,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=asked.seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=model(AutoModelForCausalLM, asked.policy),
        ref_model=model(AutoModelForCausalLM, asked.policy),
        reward_model=model(AutoModelForSequenceClassification, asked.reward),
        value_model=model(AutoModelForSequenceClassification, asked.reward),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[ends],
    )
    trainer.train()
    took = [end - start for start, end in zip(ends.at, ends.at[1:], strict=False)]
    print(json.dumps({"seconds": took, "metrics": ends.metrics}))


if __name__ == "__main__":
    main()
