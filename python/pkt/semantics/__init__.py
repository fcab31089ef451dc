"""Semantic bases of two output heads, and the linear maps between two residual streams.

Gu et al., "Beyond Neural Incompatibility: Cross-Scale Knowledge Transfer in Large Language Models
through Latent Semantic Alignment", arXiv 2510.24208; bases: Gu et al., arXiv 2401.16184.

=======================  ==========================================================
paper                    here
=======================  ==========================================================
head W (V × D)           `Rows`: read in chunks, the final norm folded in
basis s_i = W⁺ e_i       ``G⁻¹ w_i``, G = WᵀW: `Bases`, `treated`
decompose, recompose     `MAPS`: one matrix M (D_S × D_T) each
=======================  ==========================================================

A head is never in memory as a whole and never decomposed: all that is kept of it is D × D, f64.
"""

from pkt.semantics.bases import Bases, Treated, treated
from pkt.semantics.maps import DEFAULT_MAPS, MAPS, Evidence, MapKind
from pkt.semantics.norms import FinalNorm, final_norm, no_norm
from pkt.semantics.rows import HeadPair, Rows
from pkt.semantics.storage import load_map, save_map

__all__ = [
    "DEFAULT_MAPS",
    "MAPS",
    "Bases",
    "Evidence",
    "FinalNorm",
    "HeadPair",
    "MapKind",
    "Rows",
    "Treated",
    "final_norm",
    "load_map",
    "no_norm",
    "save_map",
    "treated",
]
