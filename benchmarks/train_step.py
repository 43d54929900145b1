"""Time of a training step of `GLMTrainer` over that of a loop in plain PyTorch, on the same batches.

The loops have the same model, loader, AdamW, clipping and learning rates, and log nothing. One makes the logits of
predicted tokens only, as the trainer does, the other those of all tokens. The trainer logs every step, watches for
divergence and saves nothing.

All take turns in one process: at the beginning of each of its steps, the trainer lets both loops make one of theirs. A
step of the trainer is what passes between two such stops, so that loading, logging and callbacks are in it, too.
Figures are medians over the steps, ratios of neighbours; before, the losses of all three are checked to be the same.
Run: make bench-train-step
"""

import argparse
import contextlib
import copy
import io
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from glm_hf import GLMConfig, GLMForBlankInfilling
from glm_hf.training import (
    BlankInfillingDataset,
    DataCollatorForBlankInfilling,
    GLMTrainer,
    GLMTrainingArguments,
    InfillingRecipe,
)
from glm_hf.training.data.blanks import IGNORED
from glm_hf.training.data.token_file import open_token_file, write_token_file
from glm_hf.training.schedules import LearningRateSchedule

VOCAB = 8192
SPECIAL = ("pad", "eos", "mask", "gmask", "smask", "eod", "sop", "eop")
WARM_UP = 3  # steps that are not timed; their losses are compared
TOLERANCE = 1e-4  # of losses of about 9: fp32 sums in another order
GOAL = 1.05
NAMES = ("GLMTrainer", "loop, logits of predicted tokens", "loop, logits of all tokens")


def build_model(hidden: int, layers: int, row_length: int) -> GLMForBlankInfilling:
    """Return a model with random weights; the last ids are special."""
    special = {f"{name}_token_id": VOCAB - len(SPECIAL) + index for index, name in enumerate(SPECIAL)}
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 8 // 3, "num_hidden_layers": layers}
    torch.manual_seed(0)
    return GLMForBlankInfilling(
        GLMConfig(
            vocab_size=VOCAB,
            num_attention_heads=hidden // 64,
            max_position_embeddings=row_length,
            **sizes,
            **special,
        )
    )


class PlainLoop:
    """
    A loop that trains a model and does nothing else.

    Args:
        model: What it trains.
        loader: Of batches.
        args: Numbers of the optimizer and the schedule.
        makes_all_logits: Whether logits of tokens that predict nothing are made, too.
    """

    def __init__(
        self, model: GLMForBlankInfilling, loader: DataLoader, args: GLMTrainingArguments, makes_all_logits: bool
    ) -> None:
        self.model, self.makes_all_logits = model.train(), makes_all_logits
        self.max_grad_norm = args.max_grad_norm
        decays = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        groups = [{"params": decays, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
        betas = (args.adam_beta1, args.adam_beta2)
        self.optimizer = torch.optim.AdamW(groups, args.learning_rate, betas, args.adam_epsilon, fused=True)
        batch, total = args.global_batch_size, args.max_steps * args.global_batch_size
        rate = LearningRateSchedule(
            args.initial_learning_rate, args.learning_rate, args.min_learning_rate, args.warmup_share * total, total
        )
        self.scheduler = LambdaLR(self.optimizer, lambda step: rate.at(step * batch) / args.learning_rate)
        self.batches: Iterator[dict[str, torch.Tensor]] = iter(loader)
        self.losses: list[torch.Tensor] = []

    def step(self) -> float:
        """Make one step and return its seconds."""
        start = time.perf_counter()
        batch = next(self.batches)
        if self.makes_all_logits:
            loss = self.model(**batch, use_cache=False).loss
        else:
            labels = batch.pop("shift_labels")
            is_target = labels != IGNORED
            logits = self.model(**batch, use_cache=False, logits_to_keep=is_target).logits
            loss = nn.functional.cross_entropy(logits, labels[is_target])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())
        return time.perf_counter() - start


class TurnTaking(TrainerCallback):
    """
    Let loops make a step at the beginning of each of the trainer's, and note the seconds of all.

    Args:
        loops: Whose turn it is.
    """

    def __init__(self, loops: list[PlainLoop]) -> None:
        self.loops = loops
        self.own: list[float] = []
        self.others: list[list[float]] = []
        self.resumed: float | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """End a step of the trainer, whose next batch is loaded, and begin another."""
        if self.resumed is not None:
            self.own.append(time.perf_counter() - self.resumed)
        self.others.append([loop.step() for loop in self.loops])
        self.resumed = time.perf_counter()


def build_trainer(
    model: GLMForBlankInfilling, options: argparse.Namespace, folder: Path
) -> tuple[GLMTrainer, TurnTaking]:
    """Return a trainer of `model` and the callback by which both loops take turns with it."""
    row_length = options.row_length
    recipe = InfillingRecipe(row_length=row_length, window_length=row_length // 2)
    steps = options.steps + WARM_UP + 1
    draws = np.random.default_rng(0).random(4 * steps * options.batch * row_length)
    ids = (draws**4 * (VOCAB - len(SPECIAL))).astype(np.int64)  # some are frequent, so there is a loss to lower
    write_token_file(folder / "corpus", [ids.reshape(-1, row_length).tolist()], {"kind": "text"}, VOCAB)
    dataset = BlankInfillingDataset([open_token_file(folder / "corpus")], recipe)
    collator = DataCollatorForBlankInfilling(model.config, recipe, with_labels=False)
    args = GLMTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    loops = [
        PlainLoop(
            copy.deepcopy(model), DataLoader(dataset, options.batch, collate_fn=collator), args, makes_all_logits
        )
        for makes_all_logits in (False, True)
    ]
    turns = TurnTaking(loops)
    return GLMTrainer(model, args, collator, train_dataset=dataset, callbacks=[turns]), turns


def check_losses(trainer: GLMTrainer, turns: TurnTaking) -> None:
    """Print the first losses of the trainer and the loops; raise AssertionError if they differ."""
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for name, losses in zip(NAMES, (logged, *(loop.losses for loop in turns.loops)), strict=True):
        first = [float(loss) for loss in losses[:WARM_UP]]
        print(f"{name:<34} first losses {', '.join(f'{loss:.5f}' for loss in first)}")
        assert all(abs(loss - other) < TOLERANCE for loss, other in zip(first, logged, strict=False)), "losses differ"


def print_table(turns: TurnTaking) -> None:
    """Print medians over the steps behind the first, and of ratios and differences between neighbours."""
    own = turns.own[WARM_UP:]
    columns = zip(*turns.others[WARM_UP:-1], strict=True)  # the trainer's last step has no end
    print(f"\n{f'median of {len(own)} steps':<34} {'ms':>8} {'trainer over it':>16} {'target':>8} {'ms more':>8}")
    print(f"{NAMES[0]:<34} {1e3 * statistics.median(own):>8.1f}")
    for name, times, goal in zip(NAMES[1:], columns, (GOAL, "-"), strict=True):
        ratio = statistics.median(first / second for first, second in zip(own, times, strict=True))
        more = 1e3 * statistics.median(first - second for first, second in zip(own, times, strict=True))
        print(f"{name:<34} {1e3 * statistics.median(times):>8.1f} {ratio:>16.3f} {goal:>8} {more:>8.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build_model(options.hidden, options.layers, options.row_length)
    with tempfile.TemporaryDirectory() as folder:
        trainer, turns = build_trainer(model, options, Path(folder))
        with contextlib.redirect_stdout(io.StringIO()):  # which the logs go to
            trainer.train()
    size = f"{options.layers} layers x {options.hidden}, {options.batch} rows of {options.row_length}"
    print(f"{date.today()}, {platform.machine()}, torch {torch.__version__}: {size}, fp32, {options.threads} threads")
    check_losses(trainer, turns)
    print_table(turns)
