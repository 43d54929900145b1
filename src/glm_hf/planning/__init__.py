"""What fits where: plans of inference on devices and of training on clusters."""

from glm_hf.planning.devices import Device, parse_devices, parse_size
from glm_hf.planning.inference import Plan, plan_devices

__all__ = ["Device", "Plan", "parse_devices", "parse_size", "plan_devices"]
