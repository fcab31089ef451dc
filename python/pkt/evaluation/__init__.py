"""How good a model is: loss on texts, agreement with a teacher, benchmark tasks."""

from pkt.evaluation.loss import ExampleLoss, cross_entropy, mean_loss

__all__ = ["ExampleLoss", "cross_entropy", "mean_loss"]
