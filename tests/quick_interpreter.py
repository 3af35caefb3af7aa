"""Triton's interpreter without work whose results it throws away or has already: what kernels compute is the same to
the last bit."""

import functools
import inspect
from dataclasses import replace

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """For the rest of the process."""
    interpreter._patch_lang = patched_once(interpreter._patch_lang)
    interpreter._patch_builtin = of_known_names
    interpreter._get_np_dtype = once_for_each_name(interpreter._get_np_dtype)
    tl.core.block_type.__init__ = with_known_shapes(tl.core.block_type.__init__)
    tl.core.tensor.__init__ = of_known_shapes(tl.core.tensor.__init__)
    # Each sum and product of integers is computed again in 64 bits, for an assert that it fits in fewer. The assert is
    # skipped unless the interpreter debugs, which it cannot be told to.
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def patched_once(patch_lang):
    """The interpreter's `_patch_lang`, which looks through all of Triton's language for what to replace: not again for
    each function that a kernel calls."""
    done, known = set(), {}

    def patch(function):
        languages = known.get(function)
        if languages is None:
            values = function.__globals__.values()
            languages = known[function] = frozenset(id(value) for value in values if value is tl or value is tl.core)
        if languages in done:
            return None
        is_kernel = not done
        done.add(languages)
        scope = patch_lang(function)
        restore = scope.restore

        def restored():
            done.clear()
            restore()

        if is_kernel:
            scope.restore = restored
        return scope

    return patch


@functools.lru_cache
def builtins_of(package) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def of_known_names(package, builder, scope) -> None:
    """The interpreter's `_patch_builtin`, which looks through all members of a package: not again for each launch."""
    for name in builtins_of(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # and not replaced already
            interpreter._patch_attr(package, name, member, builder, scope)


def once_for_each_name(get_np_dtype):
    """The interpreter's `_get_np_dtype`, which makes a table of all types whenever it looks one up."""
    found = {}

    def get(dtype):
        scalar = dtype.scalar
        if scalar.name not in found:
            found[scalar.name] = get_np_dtype(scalar)
        return found[scalar.name]

    return get


def with_known_shapes(initialise):
    """The constructor of types of blocks, which checks a shape and writes it out: once for each type."""
    found = {}

    def __init__(self, element_ty, shape):
        key = element_ty.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        if key not in found:
            initialise(self, element_ty, shape)
            found[key] = dict(self.__dict__)
        self.__dict__.update(found[key])

    return __init__


def of_known_shapes(initialise):
    """The constructor of tensors, which makes constants of the sizes: once for each shape."""
    found = {}

    def __init__(self, handle, type):
        key = (*type.shape,) if type.is_block() else ()
        if key not in found:
            initialise(self, handle, type)
            found[key] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = found[key]

    return __init__
