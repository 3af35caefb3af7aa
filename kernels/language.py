"""Triton; or, where there is none (macOS), a stand-in with which this package can be imported and its references used.

AVAILABLE says which. Everything else in this package takes Triton from here.
"""

try:
    import triton
    import triton.language as tl
    from triton.compiler import ASTSource
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

    triton = tl = ASTSource = driver = triton_key = _Absent()
    AVAILABLE = False
