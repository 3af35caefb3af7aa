"""Triton's interpreter without work whose results it throws away or has already: what kernels compute is the same to
the last bit, but for numbers of bf16 below the normal ones, which it gets wrong."""

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
    tl.core._unwrap_if_constexpr = tl._unwrap_if_constexpr = without_search(tl.core._unwrap_if_constexpr)
    interpreter._patch_attr = with_semantic_alone
    interpreter._validate_np_data_size = by_name(interpreter._validate_np_data_size)
    interpreter._convert_float = widening_at_once(interpreter._convert_float)
    semantic = interpreter.interpreter_semantic
    semantic.binary_op_type_checking_impl = found_once(semantic.binary_op_type_checking_impl, semantic)
    semantic.broadcast_impl_value = where_shapes_differ(semantic.broadcast_impl_value)
    semantic.cast = to_another_type(semantic.cast)
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


def without_search(unwrap):
    """`_unwrap_if_constexpr`, which most of the time is given what is neither a constant nor holds some."""

    def unwrapped(x):
        if isinstance(x, tl.constexpr):
            return x.value
        return unwrap(x) if isinstance(x, (list, tuple, tl.tuple)) else x

    return unwrapped


@tl.core.builtin
def some_builtin(_semantic=None):
    pass


@functools.cache
def interpreted(member):
    # What `builtin` wraps around a function refuses calls without what they are given here.
    inner = member.__wrapped__ if member.__code__ is some_builtin.__code__ else member
    semantic = interpreter.interpreter_semantic

    def call(*arguments, **options):
        options["_semantic"] = semantic
        return inner(*arguments, **options)

    return call


def with_semantic_alone(package, name, member, _builder, scope) -> None:
    """The interpreter's `_patch_attr`, which makes a function anew for each launch, and that an option list for each
    call."""
    scope.set_attr(package, name, interpreted(member))


SIZES = {
    **dict.fromkeys(("int1", "int8", "uint8"), 1),
    **dict.fromkeys(("int16", "uint16", "fp16", "bf16"), 2),
    **dict.fromkeys(("int32", "uint32", "fp32"), 4),
    **dict.fromkeys(("int64", "uint64", "fp64"), 8),
}


def by_name(fits):
    """The interpreter's `_validate_np_data_size`."""

    def fits_by_name(array, dtype):
        size = SIZES.get(dtype.name)
        return fits(array, dtype) if size is None else array.itemsize <= size

    return fits_by_name


def widening_at_once(convert):
    """The interpreter's `_convert_float`, which takes numbers apart; those of bf16 are the upper halves of others."""

    def converted(values, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.astype("uint32") << 16
        return convert(values, source, target, rounding)

    return converted


def found_once(check, semantic):
    """`binary_op_type_checking_impl`, which finds out the types and the shape of a result and makes a tensor of every
    number: once for each pair of types, and for each number beside a tensor of one type and shape."""
    types, numbers = {}, {}

    def checked(lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        options = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        if isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor):
            key = lhs.dtype.name, rhs.dtype.name, options
            if key not in types:
                results = check(lhs, rhs, *options)
                types[key] = [x.dtype if x.dtype.name in SIZES else None for x in results]  # None: a pointer
                return results
            results = (
                x if type is None else semantic.cast(x, type) for x, type in zip((lhs, rhs), types[key], strict=True)
            )
            return semantic.broadcast_impl_value(*results)
        if not (isinstance(lhs, tl.tensor) or isinstance(rhs, tl.tensor)):
            return check(lhs, rhs, *options)
        tensor, number = (lhs, rhs) if isinstance(lhs, tl.tensor) else (rhs, lhs)
        shape = tensor.type.shape if tensor.type.is_block() else ()
        # 0.0 is not -0.0, but equal to it.
        key = tensor.dtype.name, shape, type(number), repr(number), lhs is tensor, options
        if key not in numbers:
            results = check(lhs, rhs, *options)
            same, made = results if lhs is tensor else reversed(results)
            if same is not tensor:
                return results
            made.handle.data.setflags(write=False)
            numbers[key] = made
        return (lhs, numbers[key]) if lhs is tensor else (numbers[key], rhs)

    return checked


def where_shapes_differ(broadcast):
    """`broadcast_impl_value`."""

    def broadcasted(lhs, rhs):
        if lhs.shape is rhs.shape:
            return lhs, rhs
        if lhs.type.is_block() and not rhs.type.is_block():
            return lhs, splat(rhs, lhs.type.shape)
        if rhs.type.is_block() and not lhs.type.is_block():
            return splat(lhs, rhs.type.shape), rhs
        return broadcast(lhs, rhs)

    return broadcasted


def splat(scalar, shape):
    blocks = tl.block_type(scalar.dtype, shape)
    return tl.tensor(interpreter.interpreter_builder.create_splat(blocks, scalar.handle), blocks)


def to_another_type(cast):
    """`cast`."""

    def casted(value, dtype, *rounding):
        return value if value.dtype is dtype.scalar else cast(value, dtype, *rounding)

    return casted
