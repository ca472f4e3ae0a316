"""Small trained video models with the true WAN and CogVideoX architectures, and their training."""
