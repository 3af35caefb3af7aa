"""Triton and Gluon; or stand-ins with which this package can be imported: its references used where there is no Triton
(macOS), its other kernels where a Triton has no Gluon, or one of other names, for Gluon is experimental.

AVAILABLE and GLUON_AVAILABLE say which. Everything else in this package takes Triton from here.
"""


class _Absent:
    """Has every attribute and can be called with anything: enough for decorators and annotations."""

    def __getattr__(self, name):
        return self

    def __call__(self, *arguments, **options):
        return self


try:
    import triton
    import triton.language as tl
    from triton.compiler import ASTSource
    from triton.runtime import driver
    from triton.runtime.cache import triton_key

    AVAILABLE = True
except ModuleNotFoundError:
    triton = tl = ASTSource = driver = triton_key = _Absent()
    AVAILABLE = False

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    GLUON_AVAILABLE = True
except ImportError:
    gluon = gl = GluonASTSource = async_copy = _Absent()
    fence_async_shared = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = _Absent()
    GLUON_AVAILABLE = False
