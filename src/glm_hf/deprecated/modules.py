"""Modules that have moved: importing one by its old name gives the module of the new name, and a warning."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

RENAMED = {
    "glm_hf.cache_glm": "glm_hf.positions_glm",
    "glm_hf.conversion.analysis_plots": "glm_hf.conversion.analysis.plots",
    "glm_hf.conversion.model_folder": "glm_hf.conversion.formats.safetensors_reader",
    "glm_hf.conversion.model_tensors": "glm_hf.conversion.formats.model_tensors",
    "glm_hf.conversion.name_map": "glm_hf.conversion.formats.names",
    "glm_hf.conversion.partial_folder": "glm_hf.conversion.streaming.segments",
    "glm_hf.conversion.rank_file": "glm_hf.conversion.formats.rank_file",
    "glm_hf.conversion.rank_writer": "glm_hf.conversion.formats.rank_writer",
    "glm_hf.conversion.safetensors_writer": "glm_hf.conversion.formats.safetensors_writer",
    "glm_hf.conversion.sat_checkpoint": "glm_hf.conversion.formats.sat_checkpoint",
    "glm_hf.conversion.shard_rules": "glm_hf.sharding.rules",
    "glm_hf.conversion.stored_tensor": "glm_hf.conversion.streaming.stored_tensor",
    "glm_hf.conversion.streams": "glm_hf.conversion.streaming.blocks",
    "glm_hf.conversion.tensor_analysis": "glm_hf.conversion.analysis.tensor",
    "glm_hf.conversion.torch_zip": "glm_hf.conversion.formats.torch_zip",
    "glm_hf.devices": "glm_hf.planning.devices",
    "glm_hf.hub_glm": "glm_hf.hub.export",
    "glm_hf.memory": "glm_hf.planning.memory",
    "glm_hf.model_files": "glm_hf.folders.model_folder",
    "glm_hf.new_folder": "glm_hf.folders.atomic",
    "glm_hf.parallel_glm": "glm_hf.versions_glm",
    "glm_hf.pipeline_glm": "glm_hf.pipelines.fill_mask",
    "glm_hf.placement": "glm_hf.planning.placement",
    "glm_hf.prompts_glm": "glm_hf.infilling_glm",
    "glm_hf.rows_glm": "glm_hf.filling_glm",
    "glm_hf.training.batches": "glm_hf.training.data.sampler",
    "glm_hf.training.blanks": "glm_hf.training.data.blanks",
    "glm_hf.training.checkpoint_3d": "glm_hf.training.pipeline.checkpoint",
    "glm_hf.training.conversations": "glm_hf.training.data.conversations",
    "glm_hf.training.corpora": "glm_hf.training.data.corpora",
    "glm_hf.training.data_collator": "glm_hf.training.data.collator",
    "glm_hf.training.document_spans": "glm_hf.training.data.document_spans",
    "glm_hf.training.draws": "glm_hf.training.data.random_numbers",
    "glm_hf.training.engine_3d": "glm_hf.training.pipeline.engine",
    "glm_hf.training.heartbeat": "glm_hf.training.pipeline.heartbeat",
    "glm_hf.training.meters": "glm_hf.training.measurements",
    "glm_hf.training.micro_batches": "glm_hf.training.pipeline.micro_batches",
    "glm_hf.training.mixture": "glm_hf.training.data.dataset",
    "glm_hf.training.packing": "glm_hf.training.data.packing",
    "glm_hf.training.parallel": "glm_hf.sharding.degrees",
    "glm_hf.training.pipeline_model": "glm_hf.training.pipeline.model",
    "glm_hf.training.pipeline_schedule": "glm_hf.planning.schedule",
    "glm_hf.training.plan_3d": "glm_hf.planning.training",
    "glm_hf.training.plan_memory_3d": "glm_hf.planning.training_memory",
    "glm_hf.training.plan_time_3d": "glm_hf.planning.training_time",
    "glm_hf.training.plan_zero_3d": "glm_hf.planning.training_zero",
    "glm_hf.training.recipe": "glm_hf.training.data.recipe",
    "glm_hf.training.refusals": "glm_hf.training.arguments",
    "glm_hf.training.run": "glm_hf.training.launch",
    "glm_hf.training.stage_folder": "glm_hf.training.pipeline.weights",
    "glm_hf.training.stage_weights": "glm_hf.training.pipeline.weights",
    "glm_hf.training.tensor_parallel": "glm_hf.training.pipeline.tensor_parallel",
    "glm_hf.training.throughput": "glm_hf.training.measurements",
    "glm_hf.training.timeline_plot": "glm_hf.planning.timeline",
    "glm_hf.training.token_file": "glm_hf.training.data.token_file",
    "glm_hf.training.token_metrics": "glm_hf.training.token_loss",
    "glm_hf.training.zero": "glm_hf.training.deepspeed_zero",
}
"""New names of modules by their old ones."""


class RenamedModuleFinder(MetaPathFinder, Loader):
    """Find a module that has moved by its old name."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for the old name of a module, None for all other names."""
        return ModuleSpec(name, self) if name in RENAMED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module of the new name, which keeps its own spec."""
        new = RENAMED[spec.name]
        warnings.warn(f"{spec.name} is {new} now; the old name goes with glm_hf 0.3", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module, which has been executed under its new name, its own spec back."""
        module.__spec__ = module.__spec__.loader_state if module.__spec__ else None


def find_renamed_modules() -> None:
    """Let imports find what has moved; harmless when repeated."""
    if not any(isinstance(finder, RenamedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(RenamedModuleFinder())
