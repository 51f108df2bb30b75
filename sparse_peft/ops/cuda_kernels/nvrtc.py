"""Compilation of CUDA C++ source to machine code, with the NVRTC library of PyTorch's CUDA builds.

PyTorch's own ``torch.cuda._compile_kernel`` searches for the headers of a CUDA toolkit and fails without one; these
kernels have no headers and need no toolkit.
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
    """Compile for one architecture, such as ``"90"``.

    Raises:
        RuntimeError: the source does not compile; the message contains the compiler's log.
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
