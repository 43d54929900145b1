"""What a run reports: losses by objective, corpus and row, norms of gradients, operations and the peak of a device.

Shapes: `B` rows, `L` length, `K` kinds of rows: `OBJECTIVES`, and one for rows whose objective is not known; `C`
corpora, and one more for rows whose corpus is not known; `G` groups of parameters.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch

from glm_hf.configuration_glm import GLMConfig
from glm_hf.training.data.blanks import IGNORED
from glm_hf.training.data.packing.rows import NO_CORPUS
from glm_hf.training.data.recipe import OBJECTIVES
from glm_hf.training.pipeline.micro_batches import NO_SAMPLE

NOT_KNOWN = len(OBJECTIVES)


class LossMeter:
    """
    Sum up losses between two logs, or over an evaluation, without waiting for the device.

    Args:
        device: Device of the losses.
        corpora: Names of the corpora whose losses are told apart.
    """

    def __init__(self, device: torch.device, corpora: tuple[str, ...] = ()) -> None:
        self.corpora = corpora
        num_sums = (len(OBJECTIVES) + 1) * (len(corpora) + 1)
        self.sums = torch.zeros(num_sums, dtype=torch.float64, device=device)  # (K * (C + 1),)
        self.counts = torch.zeros_like(self.sums)
        self.num_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the rows of the step before."""
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(
        self,
        losses: torch.Tensor,
        labels: torch.Tensor,
        segment_ids: torch.Tensor,
        objectives: torch.Tensor,
        corpora: torch.Tensor | None,
        sample_ids: torch.Tensor,
    ) -> None:
        """
        Add a piece of a step.

        Args:
            losses: `(targets,)` of the tokens that are predicted, row after row.
            labels: `(B, L)`.
            segment_ids: `(B, L)`, 0 on padding.
            objectives: `(B,)` indices into `OBJECTIVES`.
            corpora: `(B,)` numbers of their corpora, if they are known.
            sample_ids: `(B,)`.
        """
        rows = row_losses(losses, labels, objectives, corpora)
        self.add_rows(rows)
        self.num_tokens += (segment_ids > 0).sum()
        self.rows.append((sample_ids, rows[:, 0] / rows[:, 1]))

    def add_rows(self, rows: torch.Tensor) -> None:
        """Add rows `(B, 4)` as `row_losses` returns them."""
        columns = len(self.corpora) + 1
        places = rows[:, 2].long() * columns + rows[:, 3].long() % columns  # NO_CORPUS in the last column
        self.sums.index_add_(0, places, rows[:, 0])
        self.counts.index_add_(0, places, rows[:, 1])

    def losses_of_rows(self) -> list[tuple[int, float]]:
        """Return the sample and the mean loss of every row of the step at hand, without rows of padding."""
        pairs = [pair for ids, losses in self.rows for pair in zip(ids.tolist(), losses.tolist(), strict=True)]
        return [(sample, loss) for sample, loss in pairs if sample != NO_SAMPLE]

    def take(self) -> torch.Tensor:
        """Return sums and counts by kind and corpus, and the number of tokens, as one vector, and begin anew."""
        taken = torch.cat((self.sums, self.counts, self.num_tokens.double()[None]))
        for total in (self.sums, self.counts, self.num_tokens):
            total.zero_()
        return taken

    def describe(self, taken: torch.Tensor) -> dict[str, float]:
        """Return the mean losses of the objectives and corpora that occurred, from what `take` returned or a sum."""
        table = taken[:-1].reshape(2, len(OBJECTIVES) + 1, -1)  # (2, K, C + 1)
        kinds = zip(OBJECTIVES, *table.sum(2).tolist(), strict=False)  # what is not known comes last
        corpora = zip(self.corpora, *table.sum(1).tolist(), strict=False)
        losses = {f"loss_{name}": total / count for name, total, count in kinds if count}
        return losses | {f"loss/{name}": total / count for name, total, count in corpora if count}

    def describe_evaluation(self, taken: torch.Tensor, prefix: str) -> dict[str, float]:
        """Return the mean loss over all predicted tokens, and those of `describe`; nothing if nothing was added."""
        total, count = taken[:-1].reshape(2, -1).sum(1).tolist()
        if not count:
            return {}
        kinds = {f"{prefix}_{name}": loss for name, loss in self.describe(taken).items()}
        return {f"{prefix}_loss": total / count} | kinds


def row_losses(
    losses: torch.Tensor, labels: torch.Tensor, objectives: torch.Tensor | None, corpora: torch.Tensor | None
) -> torch.Tensor:
    """
    Return `(B, 4)` of every row the sum of its losses, the number of its predicted tokens, its kind and its corpus.

    Args:
        losses: `(targets,)` of the tokens that are predicted, row after row.
        labels: `(B, L)`.
        objectives: `(B,)` indices into `OBJECTIVES`, if they are known.
        corpora: `(B,)` numbers of their corpora, if they are known.
    """
    counts = (labels != IGNORED).sum(1)
    numbers = torch.arange(len(labels), device=labels.device)
    row = numbers.repeat_interleave(counts, output_size=len(losses))  # known, so that nothing has to wait
    sums = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    sums.index_add_(0, row, losses.detach().double())
    kinds = torch.full_like(counts, NOT_KNOWN) if objectives is None else objectives
    places = torch.full_like(counts, NO_CORPUS) if corpora is None else corpora
    return torch.stack((sums, counts.double(), kinds.double(), places.double()), dim=1)


MOST_LAYER_GROUPS = 8
EMBEDDING, OTHER = "embedding", "other"


class ParameterGroups:
    """
    The parameters of a model, or of a share of it, in groups whose gradients have norms of their own.

    Args:
        named_parameters: Parameters with their names in the model.
        embedding: Matrix of the embedding, a group of its own; None if it is elsewhere.
        num_layers: Number of layers of the whole model, in up to 8 groups of neighbours.

    Attributes:
        names: Name of every group: `embedding`, `layers_0-8` and so on, and `other`, such as the final norm.
        members: Trained parameters, each with the number of its group.
        has_embedding: Whether the embedding is trained, by whichever process.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        embedding: torch.Tensor | None,
        num_layers: int,
    ) -> None:
        count = min(num_layers, MOST_LAYER_GROUPS)
        group_of_layer = [layer * count // num_layers for layer in range(num_layers)]
        layers = [[layer for layer in range(num_layers) if group_of_layer[layer] == group] for group in range(count)]
        spans = [str(own[0]) if len(own) == 1 else f"{own[0]}-{own[-1]}" for own in layers]
        self.names = (EMBEDDING, *(f"layers_{span}" for span in spans), OTHER)
        self.members: list[tuple[torch.nn.Parameter, int]] = []
        for name, parameter in named_parameters:
            found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
            group = 1 + group_of_layer[int(found[1])] if found else 0 if parameter is embedding else count + 1
            if parameter.requires_grad:
                self.members.append((parameter, group))
        self.has_embedding = embedding is None or embedding.requires_grad

    def squared_norms(self, gradients: Iterable[torch.Tensor | None], device: torch.device) -> torch.Tensor:
        """
        Return `(G,)` the squared norms of the groups' gradients in fp32, without waiting for the device.

        Args:
            gradients: Gradient, or part of it, of every member; None if this process has none.
            device: Device of the result.
        """
        found = [(g, group) for g, (_, group) in zip(gradients, self.members, strict=True) if g is not None]
        total = torch.zeros(len(self.names), device=device)
        if not found:
            return total
        norms = torch.stack([_norm(g).to(device) for g, _ in found])
        return total.index_add_(0, torch.tensor([group for _, group in found], device=device), norms.square())

    def describe(self, norms: torch.Tensor) -> dict[str, float]:
        """Return what is logged of `(G,)` norms: those of groups that have a gradient, without the embedding's."""
        return {f"grad_norm/{name}": n for name, n in zip(self.names[1:], norms[1:].tolist(), strict=True) if n != 0}


# Dense matrix products in 16 bits with sums in 32, 10^12 operations per second, from the vendor's data sheets.
PEAK_TFLOPS = {"V100": 125, "A100": 312, "H100": 989, "H200": 989, "RTX 3090": 71, "RTX 4090": 165, "2080 Ti": 54}


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    """Return the norm in fp32 or more, without a copy of the gradient in it."""
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))


def flops_per_token(config: GLMConfig, num_parameters: float, num_trained: float, row_length: int) -> float:
    """
    Return the operations of forward and backward pass per token: 4 per parameter, 2 more for the gradient of one that
    is trained, and those of full attention.

    Args:
        config: Sizes of the model.
        num_parameters: Number of parameters of the model, a tied matrix counted once.
        num_trained: How many of them are trained.
        row_length: Number of tokens that attend to each other.
    """
    of_attention = 12 * config.num_hidden_layers * config.hidden_size * row_length
    return 4 * num_parameters + 2 * num_trained + of_attention


def count_parameters(model: Any, only_trainable: bool = False) -> int:
    """Return the parameters of a model of transformers, those included that ZeRO-3 holds elsewhere."""
    elsewhere = sum(
        parameter.ds_numel - parameter.numel()
        for parameter in model.parameters()
        if hasattr(parameter, "ds_numel") and (parameter.requires_grad or not only_trainable)
    )
    return model.num_parameters(only_trainable) + elsewhere


def layer_flops_per_token(config: GLMConfig, row_length: int) -> int:
    """Return the operations of a layer's forward pass per token, which recomputed activations take once more."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return 2 * (4 * hidden**2 + 3 * hidden * inner) + attention_flops_per_token(config, row_length)


def attention_flops_per_token(config: GLMConfig, row_length: int) -> int:
    """Return the operations of a layer's scores and of the sums weighted by them, forward and per token."""
    return 4 * config.hidden_size * row_length


def peak_tflops(device: torch.device) -> float | None:
    """Return the known peak of a device in 16 bits, None for others."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for part, peak in PEAK_TFLOPS.items() if part in name), None)
