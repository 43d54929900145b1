"""
Teach new facts with TRL's `SFTTrainer`: `python examples/training/sft.py`, in the root of the repository.

Needs TRL (`pip install -e '.[trl]'`) and takes some seconds on a laptop. A converted GLM-130B takes the small model's
place, then with `peft_config`.
"""

import sys

from datasets import load_dataset
from transformers import AutoTokenizer, pipeline
from trl import SFTConfig, SFTTrainer

import glm_hf
from glm_hf.training import to_conversation

MODEL = "examples/world_facts/model"
QUESTIONS = ["The capital of Aurora is [MASK].", "[MASK] is the capital of Tarn.", "Linden is the capital of [MASK]."]


def main(output_dir: str = "runs/sft") -> list[str]:
    """Train, save and return the filled questions."""
    rows = load_dataset("json", data_files="examples/training/instructions.jsonl", split="train")
    model = glm_hf.GLMForBlankInfilling.from_pretrained(MODEL, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    args = SFTConfig(
        output_dir,
        max_steps=60,
        per_device_train_batch_size=9,
        learning_rate=1e-3,
        logging_steps=20,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    dataset = rows.map(to_conversation, remove_columns=rows.column_names)
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    fill = pipeline("fill-mask", model=model.eval(), tokenizer=tokenizer)
    return [answers[0]["sequence"] for answers in fill(QUESTIONS, top_k=1)]


if __name__ == "__main__":
    print("\n".join(main(*sys.argv[1:])))
