"""From CUDA C++ text to machine code, through the NVRTC library that comes with CUDA builds of PyTorch.

PyTorch's own ``torch.cuda._compile_kernel`` also looks for a CUDA toolkit's headers and fails where none is installed;
kernels without headers need no toolkit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

SUCCESS = 0


def _check(library: ctypes.CDLL, status: int, what: str) -> None:
    if status != SUCCESS:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC could not {what}: {library.nvrtcGetErrorString(status).decode()}")


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    """The program's log (``"ProgramLog"``) or machine code (``"CUBIN"``)."""
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"size the {what}")
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer), f"read the {what}")
    return buffer.raw


def compile_cubin(library: ctypes.CDLL, source: str, options: Sequence[str], architecture: str) -> bytes:
    """Compile for one architecture, as ``"90"``.

    Raises:
        RuntimeError: the source does not compile; the compiler's log is in the message.
    """
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    _check(library, created, "take the source")
    try:
        flags = [f"--gpu-architecture=sm_{architecture}", *options]
        array = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        if library.nvrtcCompileProgram(program, len(flags), array) != SUCCESS:
            log = _text(library, program, "ProgramLog").rstrip(b"\0").decode()
            raise RuntimeError(f"the CUDA source does not compile with {' '.join(flags)}:\n{log}")
        return _text(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
