"""A training run from a file: `glm-hf train config.yaml`."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from glm_hf.configuration_glm import GLMConfig
from glm_hf.folders.model_folder import read_config
from glm_hf.modeling_glm import GLMForBlankInfilling
from glm_hf.tokenization_glm import GLMTokenizer
from glm_hf.training.arguments import GLMTrainingArguments
from glm_hf.training.data.collator import DataCollatorForBlankInfilling, sentence_ends
from glm_hf.training.data.corpora import CorpusSource, load_corpus
from glm_hf.training.data.dataset import DEFAULT_INSTRUCTION_SHARE, BlankInfillingDataset
from glm_hf.training.data.recipe import InfillingRecipe
from glm_hf.training.divergence import DivergenceError
from glm_hf.training.schedules import PiecewiseLinear
from glm_hf.training.trainer import GLMTrainer
from glm_hf.training.trainer_3d import GLM3DTrainer, dtype_of

SECTIONS = ("model", "data", "training", "parallel", "peft")
MODEL_KEYS = ("path", "tokenizer", "config", "quantization", "dtype", "overrides", "attn_implementation")
DATA_KEYS = ("train", "eval", "cache", "recipe", "instruction_share", "seed")


@dataclass(frozen=True)
class RunConfig:
    """
    The sections of a configuration file, see `examples/training`.

    Args:
        model: `path` of a model, or `config` (fields of `GLMConfig`) for a new one, with `tokenizer` where it is not
            in the same folder; `dtype`, `attn_implementation`, `quantization` (fields of `GLMQuantizationConfig`) and
            `overrides` of its config, such as `hidden_dropout`.
        data: `train` and `eval`, lists of `CorpusSource` fields; `cache`, a folder for tokenized corpora; `recipe`,
            fields of `InfillingRecipe`; `instruction_share`, a number or points `[sample, share]`; `seed`.
        training: Fields of `GLMTrainingArguments`.
        parallel: `tensor`, `pipeline` and `data`, whose product is the number of processes, and `partition`: see
            `Parallel`. Without any, every process has the whole model.
        peft: `type` and fields of a configuration of PEFT.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]
    parallel: dict[str, Any]
    peft: dict[str, Any]

    @classmethod
    def read(cls, file: str | Path) -> "RunConfig":
        """
        Read a YAML file.

        Raises:
            ValueError: If it is no YAML, or has unknown or missing sections or keys.
        """
        try:
            content = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is not YAML: {error}") from error
        if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
            raise ValueError(f"{file} must hold sections {', '.join(SECTIONS)}, each with keys and values")
        require_known(content, SECTIONS, f"sections of {file}")
        require_known(content.get("model", {}), MODEL_KEYS, "keys of model")
        require_known(content.get("data", {}), DATA_KEYS, "keys of data")
        model, data = content.get("model", {}), content.get("data", {})
        if not isinstance(data.get("train"), list) or not ("path" in model or {"config", "tokenizer"} <= model.keys()):
            raise ValueError(f"{file} needs data: train, a list, and model: path, or config and tokenizer")
        return cls(**{name: content.get(name, {}) for name in SECTIONS})


class _Loader(yaml.SafeLoader):
    """Reads `1e-4` as a number, as JSON and everybody does; YAML 1.1 takes it for text without a point."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def require_known(given: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    """Raise ValueError if there are unknown keys, naming the known ones."""
    if unknown := given.keys() - set(known):
        raise ValueError(f"{what} are {', '.join(known)}, got {', '.join(map(str, sorted(unknown)))}")


def fields_of(kind: type, given: dict[str, Any], what: str) -> Any:
    """Return a dataclass of the given fields; ValueError if one is unknown."""
    if not isinstance(given, dict):
        raise ValueError(f"{what} must stand with their values, got {given!r}")
    fields = {field.name: field.type for field in dataclasses.fields(kind) if field.init}
    require_known(given, tuple(fields), what)
    for name, value in given.items():
        if fields[name] in (int, float, "int", "float") and not isinstance(value, (int, float)):
            raise ValueError(f"{name} must be a number, got {value!r}")
    try:
        return kind(**given)
    except TypeError as error:  # of a field that is missing, or of another type
        raise ValueError(f"{what}: {error}") from error


def train_run(run: RunConfig, *, resume: bool = False, output_dir: str | None = None) -> str:
    """
    Train as a configuration says, and save the model, or its adapter, in the output folder.

    Args:
        run: The configuration.
        resume: Whether to go on from the last checkpoint in the output folder, if there is one.
        output_dir: Instead of that of the configuration.

    Returns:
        The output folder.

    Raises:
        FileExistsError: If the output folder holds checkpoints and `resume` is not set.
        ValueError: If the configuration is impossible, or training has stopped itself.
    """
    if output_dir is not None:
        run = replace(run, training={**run.training, "output_dir": output_dir})
    trainer = build_trainer(run)
    folder = trainer.args.output_dir
    last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if last and not resume:
        raise FileExistsError(f"{folder} holds {Path(last).name} already; resume, or choose another folder")
    try:
        trainer.train(resume_from_checkpoint=last)
    except DivergenceError as error:
        raise ValueError(str(error)) from error
    trainer.save_model()
    return folder


def build_trainer(run: RunConfig) -> GLMTrainer:
    """Load model and data, and return a trainer that is ready to train."""
    given = run.training | ({"parallel": run.parallel} if run.parallel else {})
    args = fields_of(GLMTrainingArguments, given, "keys of training")
    tokenizer = AutoTokenizer.from_pretrained(run.model.get("tokenizer", run.model.get("path")))
    if run.parallel:
        model, config = spread_model(run, tokenizer, args)
        trainer_class: Callable[..., GLMTrainer] = partial(GLM3DTrainer, config=config)
    else:
        trainer_class = GLMTrainer
        model = load_model(run.model, tokenizer, args)
        model = add_adapter(model, run.peft) if run.peft else model
        config = model.config
    tokenizer.model_max_length = config.max_position_embeddings  # saved with the model
    recipe = fields_of(InfillingRecipe, run.data.get("recipe", {}), "keys of recipe")
    seed = run.data.get("seed", args.seed)
    collator = DataCollatorForBlankInfilling(
        config, recipe, seed, sentence_ends(tokenizer) if recipe.smask_probability else ()
    )
    datasets = {
        part: load_dataset(run.data[part], run.data, recipe, tokenizer, config, seed)
        for part in ("train", "eval")
        if part in run.data
    }
    return trainer_class(
        model,
        args,
        collator,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        processing_class=tokenizer,
    )


def load_model(settings: dict[str, Any], tokenizer: GLMTokenizer, args: GLMTrainingArguments) -> Any:
    """Return the model of a configuration: loaded from `path`, or new with the sizes of `config`."""
    options = config_options(settings)
    if "path" not in settings:
        torch.manual_seed(args.seed)
        return GLMForBlankInfilling(new_config(settings, tokenizer))
    if "quantization" in settings:
        from glm_hf import GLMQuantizationConfig

        try:
            options["quantization_config"] = GLMQuantizationConfig(**settings["quantization"])
        except TypeError as error:
            raise ValueError(f"keys of quantization: {error}") from error
    return GLMForBlankInfilling.from_pretrained(settings["path"], dtype=settings.get("dtype", "float32"), **options)


def config_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be changed in the configuration of a model."""
    options = dict(settings.get("overrides", {}))
    require_known(options, tuple(GLMConfig().to_dict()), "keys of overrides")
    if "attn_implementation" in settings:
        options["attn_implementation"] = settings["attn_implementation"]
    return options


def new_config(settings: dict[str, Any], tokenizer: GLMTokenizer) -> GLMConfig:
    """Return the configuration of a new model, with the tokens of a tokenizer."""
    names = ("pad", "eos", "mask", "gmask", "smask", "eod", "sop", "eop")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    return GLMConfig(**{"vocab_size": len(tokenizer), **special, **settings["config"], **config_options(settings)})


def spread_model(run: RunConfig, tokenizer: GLMTokenizer, args: GLMTrainingArguments) -> tuple[Any, GLMConfig]:
    """
    Return the model of a configuration as `GLM3DTrainer` takes it, and the configuration of the model.

    Raises:
        ValueError: If it asks for what a pipeline cannot do.
    """
    if run.peft or "quantization" in run.model:
        raise ValueError("parallel trains all weights: leave peft and quantization out, or parallel")
    dtype = str(dtype_of(args)).removeprefix("torch.")
    if run.model.get("dtype", dtype) != dtype:
        raise ValueError(f"under parallel, dtype follows from fp16 and bf16 of training: {dtype}; leave it out")
    if "path" not in run.model:
        config = new_config(run.model, tokenizer)
        return config, config
    config = read_config(run.model["path"], **config_options(run.model))
    return run.model["path"], config


def add_adapter(model: GLMForBlankInfilling, settings: dict[str, Any]) -> Any:
    """Return the model with an adapter of PEFT, of which alone the weights are trained."""
    import peft

    settings = dict(settings)
    kind = str(settings.pop("type", "")).upper()
    kinds = {str(name.value): config for name, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in kinds:
        raise ValueError(f"peft: type must be one of {', '.join(sorted(kinds))}, got {kind or 'none'}")
    config = fields_of(kinds[kind], {"task_type": "CAUSAL_LM", **settings}, f"keys of peft {kind}")
    return peft.get_peft_model(model, config)


def load_dataset(
    sources: list[dict[str, Any]],
    settings: dict[str, Any],
    recipe: InfillingRecipe,
    tokenizer: GLMTokenizer,
    config: GLMConfig,
    seed: int,
) -> BlankInfillingDataset:
    """Return the rows of some corpora, tokenized in the cache folder of the configuration."""
    known = [fields_of(CorpusSource, source, "keys of a corpus") for source in sources]
    cache = Path(settings.get("cache", "tokenized"))
    corpora = [load_corpus(source, tokenizer, config, cache, recipe.longest_instruction) for source in known]
    weights = [source.weight for source in known]
    if len({weight is None for weight in weights}) > 1:
        raise ValueError("give every corpus a weight, or none")
    share = PiecewiseLinear.of(settings.get("instruction_share", DEFAULT_INSTRUCTION_SHARE))
    return BlankInfillingDataset(
        corpora,
        recipe,
        weights=None if None in weights else weights,
        join_documents=[source.join_documents for source in known],
        instruction_share=share,
        seed=seed,
    )
