"""Loss functions: tensors in, `LossTerm(total, count)` out.

They know nothing of models, batches and ranks: sums over ranks, the division by the global count and the
weights of objectives are the trainer's.
"""

from losses.binary import binary
from losses.contrastive import NegativeWeights, adaptive_contrastive
from losses.distillation import distillation
from losses.listwise import list_mle, list_net
from losses.multi_class import multi_class, multi_class_vectors
from losses.pairwise import pairwise, soft_pairwise
from losses.term import LossTerm
from losses.views import info_nce

__all__ = [
    "LossTerm",
    "NegativeWeights",
    "adaptive_contrastive",
    "binary",
    "distillation",
    "info_nce",
    "list_mle",
    "list_net",
    "multi_class",
    "multi_class_vectors",
    "pairwise",
    "soft_pairwise",
]
