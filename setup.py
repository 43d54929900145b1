"""The C code, which is built where a compiler is at hand; everything else is in setup.cfg.

It includes no header of Python or torch, so one build serves all versions of both.
"""

import sys
from glob import glob

from setuptools import Extension, setup

kernels_cpu = Extension(
    "glm_hf.quantization._kernels_cpu",
    sources=["src/glm_hf/quantization/cpu/kernels.c"],
    depends=glob("src/glm_hf/quantization/cpu/*.h"),
    extra_compile_args=["-O3", "-fvisibility=hidden"],
    py_limited_api=True,
    optional=True,
)
training_data = Extension(
    "glm_hf.training.data._native",
    sources=["src/glm_hf/training/data/packing/packing.c", "src/glm_hf/training/data/tokenizing/unigram.c"],
    extra_compile_args=["-O3", "-fvisibility=hidden"],
    py_limited_api=True,
    optional=True,
)

setup(
    ext_modules=[] if sys.platform == "win32" else [kernels_cpu, training_data],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
