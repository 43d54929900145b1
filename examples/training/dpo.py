"""
Prefer short answers with TRL's `DPOTrainer`: `python examples/training/dpo.py`, in the root of the repository.

Needs TRL (`pip install -e '.[trl]'`) and takes some seconds on a laptop. The reference model is loaded anew from the
folder of the model; with `peft_config`, the model without its adapter is the reference.
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

import glm_hf
from glm_hf.training import to_conversation

MODEL = "examples/world_facts/model"
PROMPT = "The capital of"
FACTS = [
    ("Guinea is Conakry", "Guinean franc"),
    ("Hungary is Budapest", "Hungarian forint"),
    ("Kenya is Nairobi", "Kenyan shilling"),
    ("Peru is Lima", "Peruvian sol"),
    ("Syria is Damascus", "Syrian pound"),
    ("Zambia is Lusaka", "Zambian kwacha"),
]


def mean_length(model: glm_hf.GLMForBlankInfilling, tokenizer: glm_hf.GLMTokenizer) -> float:
    """Return the mean number of tokens of 64 sampled answers."""
    torch.manual_seed(0)
    answers = model.eval().fill_blanks(tokenizer([PROMPT] * 64)["input_ids"], do_sample=True, max_new_tokens=32).blanks
    return sum(len(blanks[0]) for blanks in answers) / len(answers)


def main(output_dir: str = "runs/dpo") -> tuple[float, float]:
    """Train, save and return the mean length of answers before and after."""
    rows = Dataset.from_list(
        [
            {"prompt": PROMPT, "chosen": f"{fact}.", "rejected": f"{fact} and its currency is the {currency}."}
            for fact, currency in FACTS
        ]
    )
    model = glm_hf.GLMForBlankInfilling.from_pretrained(MODEL, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    before = mean_length(model, tokenizer)
    args = DPOConfig(
        output_dir,
        max_steps=20,
        per_device_train_batch_size=6,
        learning_rate=5e-5,
        logging_steps=10,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    dataset = rows.map(to_conversation, remove_columns=rows.column_names)
    trainer = DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return before, mean_length(model, tokenizer)


if __name__ == "__main__":
    print("{:.1f} tokens before, {:.1f} after".format(*main(*sys.argv[1:])))
