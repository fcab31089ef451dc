"""What a student has learned: losses, agreement with its teacher, and the field's benchmarks."""

from pkt.evaluation.loss import ExampleLoss, cross_entropy, mean_loss

__all__ = ["ExampleLoss", "cross_entropy", "mean_loss"]
