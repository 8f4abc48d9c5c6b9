"""What adversarial rewards share: pairs of reference images and rollout images, losses, the learning step, diagnostics."""
