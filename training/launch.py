"""A training run from its configuration: `glm-hf train config.yaml`."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from glm_hf.configuration_glm import GLMConfig
from glm_hf.conversion.formats.safetensors_reader import ModelFolder
from glm_hf.folders.records import facts_of_file, facts_of_files, is_complete, remember
from glm_hf.folders.validation import find_folder, load_tokenizer, read_config, reading
from glm_hf.modeling_glm import GLMForBlankInfilling
from glm_hf.tokenization_glm import GLMTokenizer
from glm_hf.training.arguments import GLMTrainingArguments
from glm_hf.training.checkpoints import alone
from glm_hf.training.data.collator import DataCollatorForBlankInfilling, sentence_ends
from glm_hf.training.data.corpora import CorpusSource, find_files, load_corpus
from glm_hf.training.data.dataset import BlankInfillingDataset
from glm_hf.training.data.token_file import FACTS_FILE
from glm_hf.training.divergence import DivergenceError
from glm_hf.training.run_config import DataSection, ModelSection, RunConfig, fields_of
from glm_hf.training.trainer import GLMTrainer
from glm_hf.training.trainer_3d import GLM3DTrainer, dtype_of

logger = logging.getLogger(__name__)


def train_run(run: RunConfig, *, resume: bool = False, output_dir: str | None = None, overwrite: bool = False) -> str:
    """
    Train as a configuration says, and save the model, or its adapter, in the output folder.

    Once that has been done, the same call does nothing.

    Args:
        run: Configuration of the run.
        resume: Whether to resume from the last checkpoint in the output folder, if there is one.
        output_dir: Output folder, instead of that of the configuration.
        overwrite: Whether to begin anew where the output folder holds checkpoints, which are removed.

    Returns:
        The output folder.

    Raises:
        FileExistsError: If the output folder holds checkpoints, and neither `resume` nor `overwrite` is set.
        ValueError: If the configuration is impossible, or training has stopped itself.
    """
    if output_dir is not None:
        run = replace(run, training={**run.training, "output_dir": output_dir})
    origin = origin_of(run)
    folder = str(run.training.get("output_dir") or "trainer_output")  # as transformers calls it
    if not overwrite and is_complete(Path(folder).resolve(), origin):
        logger.warning("%s is already complete", folder)
        return folder
    trainer = build_trainer(run)
    folder = trainer.args.output_dir
    if overwrite:
        remove_checkpoints(trainer)
    last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if last and not resume:
        raise FileExistsError(f"{folder} holds {Path(last).name} already; resume, or choose another folder")
    try:
        trainer.train(resume_from_checkpoint=last)
    except DivergenceError as error:
        raise ValueError(str(error)) from error
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        remember(Path(folder), Path(folder).resolve(), origin, pattern="*")
    return folder


def origin_of(run: RunConfig) -> dict[str, Any]:
    """Return what a run is made from, as JSON: its configuration, and the files that it reads."""
    folders = [Path(path) for path in (run.model.path, run.model.tokenizer) if path and Path(path).is_dir()]
    files = []
    for source in (*run.data.train, *run.data.eval):
        if (Path(source.path) / FACTS_FILE).is_file():  # tokenized before
            folders.append(Path(source.path))
        else:
            files += find_files(source.path)
    sources: dict[str, Any] = {str(folder): facts_of_files(folder, "*") for folder in folders}
    sources |= {str(file): facts_of_file(file) for file in files}
    return {"run": json.loads(json.dumps(asdict(run), default=_as_json)), "sources": sources}


def _as_json(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def remove_checkpoints(trainer: GLMTrainer) -> None:
    """Remove what an earlier run has saved in the output folder; OSError if that run has not ended."""
    run = Path(trainer.args.output_dir)
    with alone(run, trainer.accelerator, trainer.args.should_save):
        for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if trainer.args.should_save else ():
            shutil.rmtree(path)
        trainer.accelerator.wait_for_everyone()


def build_trainer(run: RunConfig) -> GLMTrainer:
    """Load model and data, and return a trainer that is ready to train."""
    given = run.training if run.parallel is None else {**run.training, "parallel": run.parallel}
    args = fields_of(GLMTrainingArguments, given, "keys of training")
    tokenizer = load_tokenizer(find_folder(run.model.tokenizer or run.model.path or ""))
    if run.parallel is not None:
        model, config = source_of_stages(run.model, tokenizer, args)
        trainer_class: Callable[..., GLMTrainer] = partial(GLM3DTrainer, config=config, peft_config=run.peft)
    else:
        model = load_model(run.model, tokenizer, args)
        if run.peft is not None:
            model = add_adapter(model, run.peft)
        config, trainer_class = model.config, GLMTrainer
    tokenizer.model_max_length = config.max_position_embeddings  # saved with the model
    recipe = run.data.recipe
    seed = args.seed if run.data.seed is None else run.data.seed
    sentence_end_ids = sentence_ends(tokenizer) if recipe.smask_probability else ()
    load = partial(load_dataset, section=run.data, tokenizer=tokenizer, config=config, seed=seed)
    return trainer_class(
        model,
        args,
        DataCollatorForBlankInfilling(config, recipe, seed, sentence_end_ids),
        train_dataset=load(run.data.train),
        eval_dataset=load(run.data.eval) if run.data.eval else None,
        processing_class=tokenizer,
    )


def load_model(section: ModelSection, tokenizer: GLMTokenizer, args: GLMTrainingArguments) -> Any:
    """Return the model of a configuration: loaded from `path`, or new with the sizes of `config`."""
    if section.path is None:
        torch.manual_seed(args.seed)
        return GLMForBlankInfilling(new_config(section, tokenizer))
    options = section.config_changes
    if section.quantization is not None:
        options = {**options, "quantization_config": section.quantization}
    folder = find_folder(section.path)
    ModelFolder(folder)  # which finds what is wrong with it
    with reading(folder, "cannot be loaded"):
        return GLMForBlankInfilling.from_pretrained(folder, dtype=section.dtype or "float32", **options)


def new_config(section: ModelSection, tokenizer: GLMTokenizer) -> GLMConfig:
    """Return the configuration of a new model, with the tokens of a tokenizer."""
    names = ("pad", "eos", "mask", "gmask", "smask", "eod", "sop", "eop")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    sizes = section.config or {}
    return GLMConfig(**{"vocab_size": len(tokenizer), **special, **sizes, **section.config_changes})


def source_of_stages(
    section: ModelSection, tokenizer: GLMTokenizer, args: GLMTrainingArguments
) -> tuple[str | GLMConfig, GLMConfig]:
    """
    Return what `GLM3DTrainer` makes its stages from, a folder or the configuration of a new model, and its config.

    Raises:
        ValueError: If the section asks for another dtype than the training arguments.
    """
    dtype = str(dtype_of(args)).removeprefix("torch.")
    if section.dtype not in (None, dtype):
        raise ValueError(f"under parallel, dtype follows from fp16 and bf16 of training: {dtype}; leave it out")
    if section.path is None:
        config = new_config(section, tokenizer)
        return config, config
    folder = find_folder(section.path)
    return str(folder), read_config(folder, **section.config_changes)


def add_adapter(model: GLMForBlankInfilling, config: Any) -> Any:
    """Return the model with an adapter of PEFT, of which alone the weights are trained."""
    import peft

    return peft.get_peft_model(model, config)


def load_dataset(
    sources: tuple[CorpusSource, ...], section: DataSection, tokenizer: GLMTokenizer, config: GLMConfig, seed: int
) -> BlankInfillingDataset:
    """Return the rows of some corpora, tokenized in the cache folder of the configuration."""
    longest = section.recipe.longest_instruction
    weights = [source.weight for source in sources if source.weight is not None]
    return BlankInfillingDataset(
        [load_corpus(source, tokenizer, config, section.cache, longest) for source in sources],
        section.recipe,
        weights=weights or None,
        join_documents=[source.join_documents for source in sources],
        instruction_share=section.instruction_share,
        seed=seed,
    )
