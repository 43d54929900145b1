"""Walk the main road once: a checkpoint in the released format, its conversion, and blanks filled in two languages.

The model is tiny and learns a few capitals by heart in some seconds, so that its answers mean something. Each result
lies in `demo/` afterwards: `glm-hf fill demo/model "Your text with a [MASK]."`.
"""

import shlex
import shutil
import time
from pathlib import Path

import torch
from sentencepiece import SentencePieceTrainer

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMTokenizer
from glm_hf.cli import main
from glm_hf.infilling_glm import prepare_context

FOLDER = Path("demo")
STEPS = 200
BATCH = 32
LEARNING_RATE = 3e-3
CAPITALS = {
    ("France", "法国"): ("Paris", "巴黎"),
    ("China", "中国"): ("Beijing", "北京"),
    ("Germany", "德国"): ("Berlin", "柏林"),
    ("Japan", "日本"): ("Tokyo", "东京"),
    ("Egypt", "埃及"): ("Cairo", "开罗"),
    ("Russia", "俄罗斯"): ("Moscow", "莫斯科"),
    ("Thailand", "泰国"): ("Bangkok", "曼谷"),
    ("Cuba", "古巴"): ("Havana", "哈瓦那"),
}
ENGLISH = ("The capital of {0} is {1}.", "{1} is the capital of {0}.")
CHINESE = ("{0}的首都是{1}。", "{1}是{0}的首都。")


def write_facts() -> list[tuple[str, str, str]]:
    """Return a phrasing, a country and its capital for every country, language and phrasing."""
    return [
        (phrasing, country, capital)
        for countries, capitals in CAPITALS.items()
        for phrasings, country, capital in zip((ENGLISH, CHINESE), countries, capitals, strict=True)
        for phrasing in phrasings
    ]


def train_sentencepiece(lines: list[str], path: Path) -> None:
    """Train a BPE model on `lines`."""
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            model_type="bpe",
            vocab_size=200,
            hard_vocab_limit=False,
            character_coverage=1.0,
            user_defined_symbols=["<n>"],
            minloglevel=2,
        )


def make_config(tokenizer: GLMTokenizer) -> GLMConfig:
    """Return a tiny configuration for the vocabulary of `tokenizer`."""
    special = ("pad", "eos", "mask", "gmask", "smask", "eod", "sop", "eop")
    return GLMConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,  # the released embedding has spare rows, too
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=320,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in special},
    )


def write_blanks(facts: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """Return texts with a blank, and what belongs in it: country, capital, or the rest of the line."""
    blanks = []
    for phrasing, country, capital in facts:
        line = phrasing.format(country, capital)
        start = line.partition(capital)[0]
        blanks += [(phrasing.format(country, "[MASK]"), capital), (phrasing.format("[MASK]", capital), country)]
        blanks += [(start, line.removeprefix(start))] if start else []
    return blanks


def train(model: GLMForBlankInfilling, tokenizer: GLMTokenizer, blanks: list[tuple[str, str]]) -> float:
    """Teach the model to fill in the blanks, and return its last loss."""
    rows, targets = [], []
    for text, answer in blanks:
        context, blank = (tokenizer(part)["input_ids"] for part in (text, answer))
        targets.append([*blank, tokenizer.eop_token_id])
        rows.append({"input_ids": [*prepare_context(context, model.config), tokenizer.sop_token_id, *targets[-1]]})
    batch = tokenizer.pad(rows, return_tensors="pt")  # on the left, so that the targets end every row
    longest = max(map(len, targets))
    labels = torch.tensor([[-100] * (longest - len(target)) + target for target in targets])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    for _ in range(STEPS):
        some = torch.randperm(len(rows))[:BATCH]
        ids, mask = batch["input_ids"][some], batch["attention_mask"][some]
        logits = model(ids, mask, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]  # (B, longest, V)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def run(command: str) -> None:
    """Print a `glm-hf` command and run it."""
    print(f"\n$ glm-hf {command}", flush=True)
    if code := main(shlex.split(command)):
        raise SystemExit(code)


def list_files(folder: Path) -> None:
    """Print all files in `folder` with their sizes."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"   {path.stat().st_size:>9,} bytes  {path}")


def demo() -> None:
    """Run all steps."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    facts = write_facts()
    lines = [phrasing.format(country, capital) for phrasing, country, capital in facts]
    train_sentencepiece(lines, FOLDER / "text.model")
    print(f"1. Train a SentencePiece model on {len(lines)} generated lines: demo/text.model")

    tokenizer = GLMTokenizer.from_sentencepiece(FOLDER / "text.model")
    torch.manual_seed(20221005)
    model = GLMForBlankInfilling(make_config(tokenizer))
    print(f"2. Train a model of {model.num_parameters():,} parameters on their blanks: ", end="", flush=True)
    start = time.perf_counter()
    loss = train(model, tokenizer, write_blanks(facts))
    print(f"loss {loss:.3f} after {STEPS} steps in {time.perf_counter() - start:.0f} s")
    model.half().save_pretrained(FOLDER / "trained")

    print("3. Write it as GLM-130B was released:")
    run("export-sat demo/trained demo/sat --tp-size 2")
    list_files(FOLDER / "sat")

    print("4. Convert it, with special ids that are not GLM-130B's, and compare both:")
    run("convert demo/sat demo/model --tokenizer demo/text.model --config demo/trained/config.json")
    list_files(FOLDER / "model")
    run("verify demo/sat demo/model")

    print("5. Fill blanks:")
    run('fill demo/model "The capital of France is [MASK]." "法国的首都是[MASK]。" "The capital of Egypt is"')
    run('fill demo/model "The capital of Japan is [MASK]." --top-k 3')
    run('fill demo/model "[MASK]是[MASK]的首都。" --json')


if __name__ == "__main__":
    demo()
