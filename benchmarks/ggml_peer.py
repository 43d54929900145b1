"""llama.cpp's matrix product as a peer of benchmarks/int4_linear.py, called through its shared libraries.

Build them with: cmake -B build -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON && cmake --build build --target ggml
"""

import ctypes
from pathlib import Path

import torch

TYPES = {"Q4_0": (2, 18 / 32), "Q4_K": (12, 144 / 256)}  # ggml's number, bytes per weight
FLOAT32, CPU_DEVICE = 0, 0
LIBRARIES = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
RETURNS_POINTER = (
    *("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph", "ggml_get_data", "ggml_backend_cpu_init"),
    *("ggml_backend_cpu_buffer_type", "ggml_backend_alloc_ctx_tensors_from_buft", "ggml_backend_dev_by_type"),
    *("ggml_backend_dev_backend_reg", "ggml_backend_reg_get_proc_address"),
)


class InitParameters(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class GgmlLinear:
    """
    `x @ weight.T` by ggml.

    Args:
        folder: Where the shared libraries are.
        weight: fp32 `(rows, K)`; the matrix is this, `copies` times.
        copies: How often.
        kind: `"Q4_0"` or `"Q4_K"`.
        repacked: Whether to let ggml keep the weight in its layout for this CPU, which is what llama.cpp does.
    """

    def __init__(self, folder: Path, weight: torch.Tensor, copies: int, kind: str, repacked: bool) -> None:
        self.functions = _functions(folder)
        number, bytes_per_weight = TYPES[kind]
        rows, columns = weight.shape
        data = torch.empty(int(rows * columns * bytes_per_weight), dtype=torch.uint8)
        call = self.functions
        call["ggml_quantize_chunk"](
            *(number, ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(data.data_ptr())),
            *(ctypes.c_int64(size) for size in (0, rows, columns)),
            None,
        )
        self.type, self.shape = number, (rows * copies, columns)
        self.context = ctypes.c_void_p(call["ggml_init"](InitParameters(2**16, None, True)))
        self.weight = self._new_tensor(number, columns, rows * copies)
        kind_of_buffer = self._repacking_buffer() if repacked else call["ggml_backend_cpu_buffer_type"]()
        if not call["ggml_backend_alloc_ctx_tensors_from_buft"](self.context, ctypes.c_void_p(kind_of_buffer)):
            raise MemoryError("ggml could not allocate the weight")
        data = data.repeat(copies)
        call["ggml_backend_tensor_set"](
            self.weight, ctypes.c_void_p(data.data_ptr()), ctypes.c_size_t(0), ctypes.c_size_t(len(data))
        )
        self.backend = ctypes.c_void_p(call["ggml_backend_cpu_init"]())

    def prepare(self, x: torch.Tensor) -> None:
        """Make the graph for fp32 `x` `(M, K)`."""
        call = self.functions
        self.graph_context = ctypes.c_void_p(call["ggml_init"](InitParameters(2**20, None, True)))
        context, self.context = self.context, self.graph_context
        x_tensor = self._new_tensor(FLOAT32, x.shape[1], x.shape[0])
        self.context = context
        self.out = ctypes.c_void_p(call["ggml_mul_mat"](self.graph_context, self.weight, x_tensor))
        self.graph = ctypes.c_void_p(call["ggml_new_graph"](self.graph_context))
        call["ggml_build_forward_expand"](self.graph, self.out)
        buffer_type = ctypes.c_void_p(call["ggml_backend_cpu_buffer_type"]())
        call["ggml_backend_alloc_ctx_tensors_from_buft"](self.graph_context, buffer_type)
        call["ggml_backend_tensor_set"](
            x_tensor, ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t(0), ctypes.c_size_t(x.nbytes)
        )
        self.num_tokens = len(x)

    def run(self) -> None:
        """Compute the product."""
        call = self.functions
        call["ggml_backend_cpu_set_n_threads"](self.backend, torch.get_num_threads())
        if call["ggml_backend_graph_compute"](self.backend, self.graph):
            raise RuntimeError("ggml failed")

    def result(self) -> torch.Tensor:
        """Return the product `(M, N)` in fp32."""
        out = torch.empty(self.num_tokens, self.shape[0])
        self.functions["ggml_backend_tensor_get"](
            self.out, ctypes.c_void_p(out.data_ptr()), ctypes.c_size_t(0), ctypes.c_size_t(out.nbytes)
        )
        return out

    def _new_tensor(self, number: int, columns: int, rows: int) -> ctypes.c_void_p:
        new = self.functions["ggml_new_tensor_2d"]
        return ctypes.c_void_p(new(self.context, number, ctypes.c_int64(columns), ctypes.c_int64(rows)))

    def _repacking_buffer(self) -> int:
        """Return ggml's own kind of buffer for this CPU."""
        call = self.functions
        device = ctypes.c_void_p(call["ggml_backend_dev_by_type"](CPU_DEVICE))
        registry = ctypes.c_void_p(call["ggml_backend_dev_backend_reg"](device))
        address = call["ggml_backend_reg_get_proc_address"](registry, b"ggml_backend_dev_get_extra_bufts")
        list_types = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
        first = list_types(device)[0]
        assert first is not None
        return first


def _functions(folder: Path) -> dict:
    """Return ggml's functions by name."""
    libraries = [ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES]

    class Functions(dict):
        def __missing__(self, name: str) -> object:
            function = next(getattr(library, name) for library in libraries if hasattr(library, name))
            if name in RETURNS_POINTER:
                function.restype = ctypes.c_void_p
            self[name] = function
            return function

    return Functions()
