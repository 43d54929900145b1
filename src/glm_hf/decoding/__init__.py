"""Decoding of many requests at once: each in a slot of its own, one token of all slots in a step."""

from glm_hf.decoding.decoder import Decoder
from glm_hf.decoding.engine import Engine
from glm_hf.decoding.fill import fill_texts
from glm_hf.decoding.requests import Answer, Layout, Request, Sampling

__all__ = ["Answer", "Decoder", "Engine", "Layout", "Request", "Sampling", "fill_texts"]
