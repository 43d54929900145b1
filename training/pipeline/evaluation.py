"""Evaluation and prediction on the last stage of a pipeline: losses, and logits in every process in dataset order.

Each tensor-parallel rank of the last stage has the logits of its own tokens. The first of them joins those of one
micro-batch, and moves what metrics are to see of them to host memory before it takes the next.

Shapes: `B` rows, `L` length, `D` hidden, `V` vocabulary, `n` tensor-parallel ranks.
"""

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import send_to_device
from torch import distributed as dist
from torch.utils.data import DataLoader
from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.trainer_utils import EvalLoopOutput, denumpify_detensorize

from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.training.data.blanks import IGNORED
from glm_hf.training.data.sampler import loader_options
from glm_hf.training.measurements import LossMeter
from glm_hf.training.pipeline.engine import summed
from glm_hf.training.pipeline.micro_batches import Batch, empty_batch, require_names
from glm_hf.training.token_loss import names_of_corpora
from glm_hf.training.trainer import GLMTrainer

EVAL_ROUNDS = 4  # micro-batches per stage that are evaluated in one go, so that stages rarely wait


class PipelineEvaluationTrainer(GLMTrainer):
    """
    `GLMTrainer` that evaluates and predicts with a pipeline, of which `GLM3DTrainer` adds the training.

    Attributes:
        parallel: Degrees of parallelism.
        engine: Engine of the pipeline, after `make_engine`.
        make_engine: Returns the engine, made when it is first needed.
        _prepared: Returns the micro-batches of some pieces, batches with their factors, as the engine takes them.
    """

    parallel: ParallelDegrees
    engine: Any
    make_engine: Callable[[], Any]
    _prepared: Callable[[Sequence[tuple[Batch, float]]], Any]
    control: Any

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return a loader of this replica's share of the batches, in turns."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None or not hasattr(dataset, "__len__") or not len(dataset):
            raise ValueError("evaluation needs an eval_dataset with a length of at least 1")
        size, number = self.args.per_device_eval_batch_size, len(dataset)
        starts = range(0, number, size)[self.data_rank :: self.data_size]
        batches: list[Any] = [range(start, min(start + size, number)) for start in starts]
        if self.args.dataloader_drop_last:
            batches = [batch for batch in batches if len(batch) == size]
        return DataLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator, **loader_options(self.args))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return a loader of this replica's share of the batches, in turns."""
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as `GLMTrainer` does: every process gets all metrics, predictions and label ids."""
        args = self.args
        self.make_engine()
        self.callback_handler.eval_dataloader = dataloader
        self.eval_meter = LossMeter(args.device, names_of_corpora(dataloader.dataset))
        number, size = len(cast(Sized, dataloader.dataset)), args.per_device_eval_batch_size
        num_batches = number // size if args.dataloader_drop_last else -(-number // size)
        loss_only = args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        predictions = Predictions(self, 0 if loss_only else num_batches, keeps=description == "Prediction")
        rounds = -(-num_batches // self.data_size)  # of the replica that has the most batches
        at_once = min(rounds, EVAL_ROUNDS * self.parallel.pp_size)
        batches, nothing = iter(dataloader), empty_batch(self.model.config.pad_token_id)
        for _ in range(0, rounds, at_once or 1):
            pieces = [next(batches, nothing) for _ in range(at_once)]
            for piece in pieces:
                require_names(piece)
            self.eval_meter.begin_step()
            with nullcontext() if loss_only else predictions.collecting(pieces):
                self.engine.eval_batch(
                    self._prepared([(piece, 1.0) for piece in pieces]),
                    reduce_output=None,
                    bcast_loss=False,
                    num_micro_batches=at_once,
                )
            for _ in range(sum(piece is not nothing for piece in pieces)):
                self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        metrics = predictions.metrics(metric_key_prefix)
        taken = torch.tensor(summed(list(self.eval_meter.take())))
        metrics |= self.eval_meter.describe_evaluation(taken, metric_key_prefix)
        return EvalLoopOutput(predictions.logits.get_arrays(), predictions.labels.get_arrays(), metrics, number)


class BatchOutput(NamedTuple):
    """
    What metrics see of one batch, in host memory.

    Args:
        logits: `(B, L, V)` in fp32, or what `preprocess_logits_for_metrics` has made of them.
        labels: `(B, L)` what every token is to predict.
        losses: `(B,)` the mean loss of the batch, for each of its rows.
        inputs: Input ids `(B, L)`, or the whole batch where metrics are computed batch by batch, if asked for.
    """

    logits: Any
    labels: torch.Tensor
    losses: torch.Tensor
    inputs: Any


class Predictions:
    """
    The predictions of an evaluation, and the metrics that are computed from them in every process.

    Args:
        trainer: Trainer whose arguments and functions tell what is computed.
        num_batches: Number of batches of all replicas together.
        keeps: Whether predictions are returned, also where metrics are computed batch by batch.

    Attributes:
        logits: Predictions so far.
        labels: Label ids so far.
    """

    def __init__(self, trainer: PipelineEvaluationTrainer, num_batches: int, *, keeps: bool) -> None:
        args = trainer.args
        self.trainer, self.num_batches, self.num_added = trainer, num_batches, 0
        self.is_by_batch = args.batch_eval_metrics
        self.keeps = keeps or not args.batch_eval_metrics
        self.logits, self.labels, self.losses, self.inputs = (
            EvalLoopContainer(args.eval_do_concat_batches, padding_index=IGNORED) for _ in range(4)
        )
        self.found: dict[str, Any] = {}

    @contextmanager
    def collecting(self, pieces: Sequence[Batch]) -> Iterator[None]:
        """
        Collect the predictions of the micro-batches that are evaluated, and share them between all processes.

        Args:
            pieces: Micro-batches of this replica, in their order.

        Raises:
            ValueError: If `preprocess_logits_for_metrics` has failed, on all processes.
        """
        self.pieces, self.outputs = iter(pieces), list[BatchOutput | str]()
        self.trainer.model.collect = self._collect
        try:
            yield
        finally:
            self.trainer.model.collect = None
        first, dp_size = self.num_added, self.trainer.parallel.dp_size
        for number in range(first, min(first + len(pieces) * dp_size, self.num_batches)):
            turn, data_rank = divmod(number - first, dp_size)
            self._add(self._shared(turn, data_rank))

    def _collect(self, hidden_states: torch.Tensor, losses: torch.Tensor) -> None:
        """Keep what metrics see of a micro-batch, from its normed hidden states and the losses of its targets."""
        piece = next(self.pieces)
        labels = piece["shift_labels"].to(hidden_states.device)
        rows, length = labels.shape
        head = self.trainer.model.forward_funcs[-1]
        parts = head.ranks.gather(head.logits(hidden_states[:rows, :length]))  # of (B, L, V/n)
        if not parts:
            return
        logits: Any = torch.cat(parts, dim=-1).float()
        preprocess = self.trainer.preprocess_logits_for_metrics
        if preprocess is not None:
            try:
                logits = preprocess(logits, labels)
            except Exception as error:  # which the other processes would wait for
                self.outputs.append(f"preprocess_logits_for_metrics has failed: {error!r}")
                return
        inputs = None
        if "inputs" in self.trainer.args.include_for_metrics:
            inputs = piece if self.is_by_batch else piece["input_ids"]
        self.outputs.append(send_to_device(BatchOutput(logits, labels, losses.mean().repeat(rows), inputs), "cpu"))

    def _shared(self, turn: int, data_rank: int) -> BatchOutput:
        """Return what the first rank of a replica's last stage has of its micro-batch number `turn`."""
        degrees = self.trainer.parallel
        source = ((degrees.pp_size - 1) * degrees.dp_size + data_rank) * degrees.tp_size
        box = [self.outputs[turn] if dist.get_rank() == source else None]
        dist.broadcast_object_list(box, source)
        if isinstance(box[0], str):
            raise ValueError(box[0])
        return cast(BatchOutput, box[0])

    def _add(self, output: BatchOutput) -> None:
        """Take the next batch of the dataset."""
        self.num_added += 1
        compute, included = self.trainer.compute_metrics, self.trainer.args.include_for_metrics
        losses = output.losses if "loss" in included else None
        if self.is_by_batch and compute is not None:
            prediction = EvalPrediction(output.logits, output.labels, output.inputs, losses)
            self.found = compute(prediction, compute_result=self.num_added == self.num_batches)
        if self.keeps:
            self.logits.add(output.logits)
            self.labels.add(output.labels)
        if not self.is_by_batch and losses is not None:
            self.losses.add(losses)
        if not self.is_by_batch and output.inputs is not None:
            self.inputs.add(output.inputs)

    def metrics(self, prefix: str) -> dict[str, Any]:
        """Return what `compute_metrics` has found, each name with the prefix."""
        compute = self.trainer.compute_metrics
        if compute is not None and self.num_added and not self.is_by_batch:
            arrays = (part.get_arrays() for part in (self.logits, self.labels, self.inputs, self.losses))
            self.found = compute(EvalPrediction(*arrays))
        found = denumpify_detensorize(self.found)
        return {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in found.items()}
