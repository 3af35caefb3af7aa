"""Triton's interpreter without work whose results it throws away or has already: what kernels compute is the same to
the last bit, but for numbers of bf16 below the normal ones, which it gets wrong."""

import functools
from dataclasses import replace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """For the rest of the process."""
    interpreter._patch_lang = patched_for_good(interpreter._patch_lang)
    interpreter._get_np_dtype = once_for_each_name(interpreter._get_np_dtype)
    tl.core.block_type.__init__ = with_known_shapes(tl.core.block_type.__init__)
    tl.core.tensor.__init__ = of_known_shapes(tl.core.tensor.__init__)
    tl.core._unwrap_if_constexpr = tl._unwrap_if_constexpr = without_search(tl.core._unwrap_if_constexpr)
    interpreter._patch_attr = with_semantic_alone
    tl.tensor.__getitem__ = unsqueezed(interpreted(tl.tensor.__getitem__))
    for name, *work in operators():
        setattr(tl.tensor, name, at_once(interpreted(getattr(tl.tensor, name)), *work))
    tl.tensor.__add__ = to_pointers(tl.tensor.__add__)
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


def patched_for_good(patch_lang):
    """The interpreter's `_patch_lang`, which looks through all of Triton's language for what to replace, at each launch
    and each call of another function, and puts it back at the end: here once, and never back."""
    known, done = set(), set()
    nothing = interpreter._LangPatchScope()

    def patch(function):
        if function not in known:
            known.add(function)
            languages = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
            if not languages <= done:
                done.update(languages)
                patch_lang(function)
        return nothing

    return patch


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
    """The constructor of types of blocks, which checks a shape and writes it out: once for each type, all instances of
    which have their attributes in common. `sizes` is the shape in numbers."""
    found = {}

    def __init__(self, element_ty, shape):
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        key = element_ty.name, sizes
        if key not in found:
            initialise(self, element_ty, [*sizes])
            self.sizes = sizes
            found[key] = self.__dict__
        self.__dict__ = found[key]

    return __init__


def of_known_shapes(initialise):
    """The constructor of tensors, which makes constants of the sizes: once for each shape, and looked up once for each
    type."""
    found = {}

    def __init__(self, handle, type):
        try:
            self.dtype, self.numel, self.shape = type.of_tensors
        except AttributeError:
            initialise(self, handle, type)
            sizes = type.sizes if type.is_block() else ()
            type.of_tensors = self.dtype, *found.setdefault(sizes, (self.numel, self.shape))
            self.numel, self.shape = found[sizes]
        self.handle, self.type = handle, type

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
    """The interpreter's `_patch_attr`, whose functions make a list of options in each call."""
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
    """`binary_op_type_checking_impl`, which finds out the types of a result: once for each pair of types."""
    types = {}

    def checked(lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        options = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        if not (isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor)):
            return check(lhs, rhs, *options)
        key = lhs.dtype.name, rhs.dtype.name, options
        if key not in types:
            results = check(lhs, rhs, *options)
            types[key] = [x.dtype if x.dtype.name in SIZES else None for x in results]  # None: a pointer
            return results
        both = zip((lhs, rhs), types[key], strict=True)
        return semantic.broadcast_impl_value(*(x if type is None else semantic.cast(x, type) for x, type in both))

    return checked


def where_shapes_differ(broadcast):
    """`broadcast_impl_value`, which compares two shapes size by size: once for each two."""
    common = {}

    def broadcasted(lhs, rhs):
        if lhs.shape is rhs.shape:
            return lhs, rhs
        if not rhs.type.is_block():
            return lhs, splat(rhs, lhs.type.sizes)
        if not lhs.type.is_block():
            return splat(lhs, rhs.type.sizes), rhs
        both = lhs.type.sizes, rhs.type.sizes
        if both not in common:
            common[both] = broadcast(lhs, rhs)[0].type.sizes
        return spread(lhs, common[both]), spread(rhs, common[both])

    return broadcasted


def spread(block, sizes):
    if block.type.sizes == sizes:
        return block
    handle = interpreter.interpreter_builder.create_broadcast(block.handle, sizes)
    return tl.tensor(handle, tl.block_type(block.dtype, sizes))


def splat(scalar, shape):
    blocks = tl.block_type(scalar.dtype, shape)
    return tl.tensor(interpreter.interpreter_builder.create_splat(blocks, scalar.handle), blocks)


def to_another_type(cast):
    """`cast`."""

    def casted(value, dtype, *rounding):
        return value if value.dtype is dtype.scalar else cast(value, dtype, *rounding)

    return casted


def unsqueezed(get):
    """`tensor.__getitem__`, which takes nothing but None and full slices, as numpy does."""

    def __getitem__(self, places):
        if not self.type.is_block() or any(place is not None and place != slice(None) for place in places):
            return get(self, places)
        data = self.handle.data[places]
        return tl.tensor(interpreter.TensorHandle(data, self.dtype), tl.block_type(self.dtype, data.shape))

    return __getitem__


# The types that an operator takes, with the numbers that are of such a type beside a tensor of it.
FLOATS = {"fp32": (float, int)}
INTEGERS = {"int32": (int,), "int64": (int,)}
ARITHMETIC = {
    "__add__": (np.add, FLOATS | INTEGERS),
    "__sub__": (np.subtract, FLOATS | INTEGERS),
    "__mul__": (np.multiply, FLOATS | INTEGERS),
    "__truediv__": (np.divide, FLOATS),
    "__and__": (np.bitwise_and, INTEGERS | {"int1": ()}),
}
COMPARISONS = {
    "__lt__": np.less,
    "__le__": np.less_equal,
    "__gt__": np.greater,
    "__ge__": np.greater_equal,
    "__eq__": np.equal,
    "__ne__": np.not_equal,
}


def operators():
    """Name, `work`, `types` and `result` of those that `at_once` is for."""
    for name, (work, types) in ARITHMETIC.items():
        yield name, work, types, None
        yield name.replace("__", "__r", 1), lambda x, y, work=work: work(y, x), types, None
    for name, work in COMPARISONS.items():
        yield name, work, FLOATS | INTEGERS, tl.int1


def at_once(operate, work, types, result):
    """An operator of tensors: where both are of one of `types`, or one a number, `work` of numpy alone, which needs no
    blocks of one shape. result: the type of what comes out, None for that of the operands."""

    def operated(self, other):
        if isinstance(other, tl.constexpr):
            other = other.value
        dtype, kind = self.dtype, self.type
        if isinstance(other, tl.tensor):
            if dtype.name not in types or other.dtype.name != dtype.name:
                return operate(self, other)
            data = work(self.handle.data, other.handle.data)
            kind = kind if kind.is_block() else other.type
        elif type(other) in types.get(dtype.name, ()):
            data = work(self.handle.data, other)
        else:
            return operate(self, other)
        return tl.tensor(interpreter.TensorHandle(data, dtype), of_shape(kind, result or dtype, data.shape))

    return operated


def of_shape(type, dtype, shape):
    """The type of `dtype` where a block of `type` came to have another shape; a scalar has none."""
    if not type.is_block():
        return dtype
    return type if type.scalar is dtype and type.sizes == shape else tl.block_type(dtype, shape)


def to_pointers(add):
    """`tensor.__add__`, which makes blocks of one shape of a pointer and its offsets; their sum has that anyway."""

    def added(self, other):
        if not (self.dtype.is_ptr() and isinstance(other, tl.tensor) and other.dtype.name in INTEGERS):
            return add(self, other)
        handle = interpreter.interpreter_builder.create_addptr(self.handle, other.handle)
        blocks = self.type if self.type.is_block() else other.type
        return tl.tensor(handle, of_shape(blocks, self.dtype, handle.data.shape))

    return added
