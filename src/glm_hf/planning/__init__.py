"""What fits where: plans of inference on devices and of training on clusters."""
