"""Attention libraries of others, each behind an adapter that says what it takes and needs."""

from .backend import DenseBackend
from .constraints import Constraints
from .dense import DENSE_BACKENDS, available
from .routing import attention_forward, backend_from_environment, find_backend

__all__ = [
    "DENSE_BACKENDS",
    "Constraints",
    "DenseBackend",
    "attention_forward",
    "available",
    "backend_from_environment",
    "find_backend",
]
