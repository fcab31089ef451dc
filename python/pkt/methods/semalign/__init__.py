"""SEMALIGN: knowledge through activations, carried over by the semantic bases of two heads.

Gu et al., "Beyond Neural Incompatibility: Cross-Scale Knowledge Transfer in Large Language Models
through Latent Semantic Alignment", https://arxiv.org/abs/2510.24208.

=======================  ==========================================================
paper                    here
=======================  ==========================================================
semantic bases           `pkt.semantics`: D × D matrices, summed over the vocabulary
decompose, recompose     one map M for a pair of models: `pair_maps`
layer pairing            `pkt.pairing`: the floor rule
how good a pair is       `run_quality`
=======================  ==========================================================
"""

from pkt.methods.semalign.quality import run_quality
from pkt.methods.semalign.task import QualityTask

__all__ = ["QualityTask", "run_quality"]
