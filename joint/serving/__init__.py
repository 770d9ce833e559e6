"""Recommending from an exported folder: numpy, onnxruntime and (for large catalogues) faiss; torch is never loaded."""

from joint.serving.recommender import Recommendation, Recommender

__all__ = ["Recommendation", "Recommender"]
