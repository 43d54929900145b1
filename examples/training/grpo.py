"""
Reward a kind of answer with TRL's `GRPOTrainer`: `python examples/training/grpo.py`, in the root of the repository.

Needs TRL (`pip install -e '.[trl]'`) and takes half a minute on a laptop. Completions end at `eop`, one of
the ends in the model's generation config.
"""

import sys
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import glm_hf
from glm_hf.training import to_conversation

MODEL = "examples/world_facts/model"
PROMPTS = ["[MASK] is a bird.", "[MASK] is a mammal.", "[MASK] is an insect.", "[MASK] lays eggs."]


def begins_with_every(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """Reward answers such as `Every rooster`."""
    return [float(turns[0]["content"].startswith("Every")) for turns in completions]


def main(output_dir: str = "runs/grpo") -> list[float]:
    """Train, save and return the mean reward at every fifth step."""
    rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * 25])
    model = glm_hf.GLMForBlankInfilling.from_pretrained(MODEL, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    args = GRPOConfig(
        output_dir,
        max_steps=20,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=12,
        learning_rate=1e-4,
        logging_steps=5,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    dataset = rows.map(to_conversation, remove_columns=rows.column_names)
    trainer = GRPOTrainer(model, begins_with_every, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    print("mean reward:", *(f"{reward:.2f}" for reward in main(*sys.argv[1:])))
