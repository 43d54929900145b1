"""DeepSpeed's pipeline engine whose gradients add up, and are averaged, in fp32, whatever the dtype of the weights.

`DeepSpeedZeroOptimizer` keeps such sums as `grad_accum` of each parameter and frees `grad`. DeepSpeed takes another
optimizer for bf16, which shards neither sums nor norms in this way, and its pipeline looks for sums of tied weights
in `grad`; both are changed here.

Source: DeepSpeed 0.19, runtime/zero/stage_1_and_2.py and runtime/pipe/engine.py.
"""

from typing import Any, ClassVar

from deepspeed import comm
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import ZERO_OPTIMIZATION
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
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

    def _do_optimizer_sanity_check(self, basic_optimizer: Optimizer) -> str:
        """Return the kind of optimizer that shards states."""
        super()._do_optimizer_sanity_check(basic_optimizer)
        return ZERO_OPTIMIZATION

    def _exec_reduce_tied_grads(self) -> None:
        """Add up the gradients of weights that several stages hold."""
        for weight, group in self.module.get_tied_weights_and_groups():
            gradient = self.optimizer.get_param_gradient_attribute(weight) if weight.requires_grad else None
            if gradient is not None:
                comm.all_reduce(gradient, group=group)

    _INSTRUCTION_MAP: ClassVar[dict[Any, Any]] = {
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.ReduceTiedGrads: _exec_reduce_tied_grads,
    }
