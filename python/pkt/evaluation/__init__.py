"""How good a model is: loss on texts, agreement with a teacher, benchmark tasks."""

from pkt.evaluation.agreement import Agreement, ExampleAgreement, agreement, mean_agreement
from pkt.evaluation.loss import ExampleLoss, cross_entropy, mean_loss

__all__ = [
    "Agreement",
    "ExampleAgreement",
    "ExampleLoss",
    "agreement",
    "cross_entropy",
    "mean_agreement",
    "mean_loss",
]
