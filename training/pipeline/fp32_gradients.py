"""DeepSpeed's pipeline engine whose gradients add up, and are averaged, in fp32, whatever the dtype of the weights.

`DeepSpeedZeroOptimizer` keeps such sums as `grad_accum` of each parameter and frees `grad`. DeepSpeed takes another
optimizer for bf16, which shards neither sums nor norms in this way, and its pipeline looks for sums of tied weights
in `grad`; both are changed here. With sequence parallelism, tensor-parallel ranks have gradients of whole parameters
for slices of the tokens, which add up over the ranks, and send these slices to the next stage, not parts of them.

Source: DeepSpeed 0.19, runtime/zero/stage_1_and_2.py and runtime/pipe/engine.py.
"""

from typing import Any, ClassVar

from deepspeed import comm
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import ZERO_OPTIMIZATION
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import Optimizer


class FP32GradientsEngine(PipelineEngine):
    """
    Train a pipeline under ZeRO-1.

    Args:
        pipeline: Layers of this stage.
        optimizer: Optimizer of its parameters.
        config: Configuration of DeepSpeed, as `deepspeed_3d_config` returns it.
    """

    def __init__(self, pipeline: Any, optimizer: Optimizer, config: dict[str, Any]) -> None:
        mpu = pipeline.mpu()
        config_class = DeepSpeedConfig(config, mpu)
        super().__init__(
            args=None, model=pipeline, optimizer=optimizer, mpu=mpu, config=config, config_class=config_class
        )
        if pipeline.ranks.sequence_parallel:  # or it would send a part of every slice, as if all ranks had the same
            self.is_pipe_partitioned = self.is_grad_partitioned = False

    def _do_optimizer_sanity_check(self, basic_optimizer: Optimizer) -> str:
        """Return the kind of optimizer that shards states."""
        super()._do_optimizer_sanity_check(basic_optimizer)
        return ZERO_OPTIMIZATION

    def _exec_reduce_tied_grads(self) -> None:
        """Add up the gradients of weights that several stages hold."""
        for weight, group in self.module.get_tied_weights_and_groups():
            if not weight.requires_grad:
                continue
            gradient = self.optimizer.get_param_gradient_attribute(weight)
            if gradient is not None:
                comm.all_reduce(gradient, group=group)
        if self.module.ranks.sequence_parallel:
            self._sum_gradients_of_slices()

    def _sum_gradients_of_slices(self) -> None:
        """Add up the gradients of parameters that all ranks of a layer hold, each for its slice of the tokens."""
        replicated = [p for p in self.module.parameters() if p.requires_grad and not p.tensor_model_parallel]
        gradients = [self.optimizer.get_param_gradient_attribute(parameter) for parameter in replicated]
        total = self.module.ranks.all_reduce(_flatten_dense_tensors(gradients))
        for gradient, of_all in zip(gradients, _unflatten_dense_tensors(total, gradients), strict=True):
            gradient.copy_(of_all)

    _INSTRUCTION_MAP: ClassVar[dict[Any, Any]] = {
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.ReduceTiedGrads: _exec_reduce_tied_grads,
    }
