"""The configuration of a training run: a YAML file, parsed and checked once.

`HfArgumentParser.parse_dict` is not used, as it takes a text for a number and does not tell which keys there are.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from glm_hf.configuration_glm import GLMConfig
from glm_hf.folders.validation import read_text, reading, shortened
from glm_hf.quantization import GLMQuantizationConfig
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.training.data.corpora import CorpusSource
from glm_hf.training.data.dataset import DEFAULT_INSTRUCTION_SHARE
from glm_hf.training.data.recipe import InfillingRecipe
from glm_hf.training.pipeline.lora import require_lora
from glm_hf.training.schedules import PiecewiseLinear

MOST_BYTES = 2**20
MOST_VALUES = 10**5
SECTIONS = ("model", "data", "training", "parallel", "peft")
DATA_KEYS = ("train", "eval", "cache", "recipe", "instruction_share", "seed")
WORDS = {str: "a text", int: "a number", float: "a number", bool: "true or false", dict: "keys with values"}
WORDS |= {list: "a list", type(None): "nothing"}
"""Types of fields in words; a field of another type checks its value itself."""
Fields = TypeVar("Fields")


@dataclass(frozen=True)
class ModelSection:
    """
    Section `model`: which model is trained.

    Args:
        path: Folder or Hub name of a model; None for a new one.
        tokenizer: Folder or Hub name of the tokenizer, where it is not that of the model.
        config: Fields of `GLMConfig` of a new model.
        quantization: Quantization of the weights while they are loaded.
        dtype: Name of the dtype of the weights, `"float32"` by default.
        overrides: Fields of `GLMConfig` that replace those of the model.
        attn_implementation: Attention implementation, transformers' default by default.
    """

    path: str | None = None
    tokenizer: str | None = None
    config: dict[str, Any] | None = None
    quantization: GLMQuantizationConfig | None = None
    dtype: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    attn_implementation: str | None = None

    @classmethod
    def parse(cls, given: dict[str, Any]) -> "ModelSection":
        """Return the section of a file; ValueError if keys are unknown or missing."""
        if not ("path" in given or {"config", "tokenizer"} <= given.keys()):
            raise ValueError("model needs a path, or config and tokenizer")
        section = fields_of(cls, given, "keys of model")
        require_known(section.overrides, tuple(GLMConfig().to_dict()), "keys of overrides")
        if section.quantization is None:
            return section
        if not isinstance(section.quantization, dict):
            raise ValueError(f"quantization must be keys with values, got {shortened(repr(section.quantization))}")
        try:
            return dataclasses.replace(section, quantization=GLMQuantizationConfig(**section.quantization))
        except TypeError as error:
            raise ValueError(f"keys of quantization: {error}") from error

    @property
    def config_changes(self) -> dict[str, Any]:
        """Fields to be changed in the configuration of the model."""
        if self.attn_implementation is None:
            return self.overrides
        return {**self.overrides, "attn_implementation": self.attn_implementation}


@dataclass(frozen=True)
class DataSection:
    """
    Section `data`: what the model is trained on.

    Args:
        train: Corpora of the training rows.
        eval: Corpora of the evaluation rows; none for no evaluation.
        cache: Folder of the tokenized corpora.
        recipe: Recipe by which blanks are drawn.
        instruction_share: Share of the instructions among the rows, by the number of the sample.
        seed: Seed of the order and of the blanks; that of the training arguments by default.
    """

    train: tuple[CorpusSource, ...]
    eval: tuple[CorpusSource, ...]
    cache: Path
    recipe: InfillingRecipe
    instruction_share: PiecewiseLinear
    seed: int | None

    @classmethod
    def parse(cls, given: dict[str, Any]) -> "DataSection":
        """Return the section of a file; ValueError if keys are unknown or missing, or values impossible."""
        require_known(given, DATA_KEYS, "keys of data")
        for part in ("train", "eval") if "eval" in given else ("train",):
            if not isinstance(given.get(part), list):
                raise ValueError(f"the file needs data: {part}, a list of corpora")
        cache = given.get("cache", "tokenized")
        if not isinstance(cache, str):
            raise ValueError(f"cache must be a folder, got {shortened(repr(cache))}")
        section = {
            **{part: cls._corpora(given.get(part, [])) for part in ("train", "eval")},
            "cache": Path(cache),
            "recipe": fields_of(InfillingRecipe, given.get("recipe", {}), "keys of recipe"),
            "instruction_share": PiecewiseLinear.of(given.get("instruction_share", DEFAULT_INSTRUCTION_SHARE)),
            "seed": given.get("seed"),
        }
        return fields_of(cls, section, "keys of data")

    @staticmethod
    def _corpora(given: list[dict[str, Any]]) -> tuple[CorpusSource, ...]:
        """Return the corpora of a list, of which all have weights or none."""
        sources = tuple(fields_of(CorpusSource, source, "keys of a corpus") for source in given)
        if len({source.weight is None for source in sources}) > 1:
            raise ValueError("give every corpus a weight, or none")
        return sources


@dataclass(frozen=True)
class RunConfig:
    """
    A configuration file of `glm-hf train`; see `examples/training`.

    Args:
        model: Section of that name.
        data: Section of that name.
        training: Fields of `GLMTrainingArguments`, which start the process group and so are made by the run itself.
        parallel: Degrees of 3D parallelism; None for a whole model in every process.
        peft: Configuration of an adapter of PEFT, under `parallel` of type LORA; None to train all weights.

    Raises:
        ValueError: If the sections do not go together.
    """

    model: ModelSection
    data: DataSection
    training: dict[str, Any]
    parallel: ParallelDegrees | None = None
    peft: Any = None

    def __post_init__(self) -> None:
        """Check that the sections go together."""
        if self.parallel is not None and self.model.quantization is not None:
            raise ValueError("parallel takes weights that are not quantized: leave quantization out, or parallel")
        if self.parallel is not None and self.peft is not None:
            require_lora(self.peft)

    @classmethod
    def read(cls, file: str | Path) -> "RunConfig":
        """
        Read a YAML file.

        Raises:
            ValueError: If it is no YAML, has unknown or missing sections or keys, or impossible values.
        """
        text = read_text(Path(file), MOST_BYTES, may_be_pipe=True)
        with reading(file, "is not YAML"):
            content = yaml.load(text, Loader=_Loader)  # a SafeLoader
        _require_small(content, file)
        if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
            raise ValueError(f"{file} must hold sections {', '.join(SECTIONS)}, each with keys and values")
        require_known(content, SECTIONS, f"sections of {file}")
        return cls(
            model=ModelSection.parse(content.get("model", {})),
            data=DataSection.parse(content.get("data", {})),
            training=content.get("training", {}),
            parallel=ParallelDegrees.of(content["parallel"]) if content.get("parallel") else None,
            peft=peft_config(content["peft"]) if content.get("peft") else None,
        )


def _require_small(content: Any, file: str | Path) -> None:
    """Raise ValueError if a file has more values than anybody writes, as references to references make them."""
    values, num_values = [content], 0
    while values:
        value = values.pop()
        num_values += 1
        if num_values > MOST_VALUES:
            raise ValueError(f"{file} has more than {MOST_VALUES:,} values; expected a configuration")
        if isinstance(value, (dict, list)):
            values += [*value, *value.values()] if isinstance(value, dict) else value


class _Loader(yaml.SafeLoader):
    """Reads `1e-4` as a number, as JSON and everybody does; YAML 1.1 takes it for text without a point."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def require_known(given: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    """Raise ValueError if there are unknown keys, naming the known ones."""
    if unknown := given.keys() - set(known):
        raise ValueError(f"{what} are {', '.join(known)}, got {', '.join(map(str, sorted(unknown)))}")


def fields_of(kind: type[Fields], given: dict[str, Any], what: str) -> Fields:
    """Return a dataclass of the given fields; ValueError if one is unknown, missing, or a text instead of a number."""
    if not isinstance(given, dict):
        raise ValueError(f"{what} must stand with their values, got {shortened(given)}")
    require_known(given, tuple(each.name for each in dataclasses.fields(kind) if each.init), what)  # type: ignore[arg-type]
    types = get_type_hints(kind)
    for name, value in given.items():
        union = get_origin(types[name]) in (Union, UnionType)
        kinds = [get_origin(kind) or kind for kind in (get_args(types[name]) if union else (types[name],))]
        taken = tuple(kinds) + ((int,) if float in kinds else ())
        if WORDS.keys() >= set(kinds) and not isinstance(value, taken):
            wanted = " or ".join(dict.fromkeys(WORDS[kind] for kind in kinds))
            raise ValueError(f"{name} must be {wanted}, got {shortened(repr(value))}")
    try:
        return kind(**given)
    except TypeError as error:  # of a field that is missing, or of another type
        raise ValueError(f"{what}: {error}") from error


def peft_config(given: dict[str, Any]) -> Any:
    """Return the configuration of PEFT of a section with its `type` and fields; ValueError if there is none."""
    import peft

    fields = dict(given)
    kind = str(fields.pop("type", "")).upper()
    kinds = {str(name.value): config for name, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in kinds:
        raise ValueError(f"peft: type must be one of {', '.join(sorted(kinds))}, got {kind or 'none'}")
    return fields_of(kinds[kind], {"task_type": "CAUSAL_LM", **fields}, f"keys of peft {kind}")
