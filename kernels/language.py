"""Triton and Gluon; or, where there are none (macOS), a stand-in with which this package can be imported and its
references used.

AVAILABLE says which. Everything else in this package takes Triton from here.
"""

try:
    import triton
    import triton.language as tl
    from triton.compiler import ASTSource
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.runtime import driver
    from triton.runtime.cache import triton_key

    AVAILABLE = True
except ModuleNotFoundError:

    class _Absent:
        """Has every attribute and can be called with anything: enough for decorators and annotations."""

        def __getattr__(self, name):
            return self

        def __call__(self, *arguments, **options):
            return self

    gluon = gl = async_copy = fence_async_shared = mbarrier = warpgroup_mma = warpgroup_mma_wait = _Absent()
    triton = tl = ASTSource = GluonASTSource = driver = triton_key = _Absent()
    AVAILABLE = False
