"""Compiled kernels as machine code in files of their own, which are loaded and called without numba.

numba compiles a kernel when it is first called with arguments of some kind; the code is kept beside the sources, or in
the user's cache folder. Importing numba and letting it load what it compiled would cost each process half a second and
70 MB; llvmlite alone, which links the code, costs a tenth of that. All code has one stamp: the sources of all kernels,
the compilers' versions and the processor.

What is kept calls nothing but the C library. numba's arrays come from a heap of its own, whose functions that kernels
use are in `_HEAP`; there they count an array's owners without locking the bus, as no other thread knows of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import os
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np

_HERE = Path(__file__).parent
_FORMAT = 2
"""Another number whenever `_compile` makes other code of the same sources."""
_SOURCES = ("arguments", "compiled", "compiled_scores", "elementary", "tiles", "tiles_of_vectors")
_OUTSIDE = {"malloc", "free", "pread", "memcpy", "memmove", "memset"}
_HEAP = """
declare ptr @malloc(i64)
declare void @free(ptr)

define linkonce_odr ptr @NRT_MemInfo_alloc_aligned(i64 %size, i32 %alignment) {
  %with_header = add i64 %size, 128
  %header = call ptr @malloc(i64 %with_header)
  %failed = icmp eq ptr %header, null
  br i1 %failed, label %done, label %fill
fill:
  call void @llvm.memset.p0.i64(ptr %header, i8 0, i64 48, i1 false)
  store i64 1, ptr %header
  %begin = ptrtoint ptr %header to i64
  %behind = add i64 %begin, 111
  %aligned = and i64 %behind, -64
  %data = inttoptr i64 %aligned to ptr
  %data_field = getelementptr i8, ptr %header, i64 24
  store ptr %data, ptr %data_field
  %size_field = getelementptr i8, ptr %header, i64 32
  store i64 %size, ptr %size_field
  br label %done
done:
  ret ptr %header
}

define void @NRT_incref(ptr %header) alwaysinline {
  %none = icmp eq ptr %header, null
  br i1 %none, label %done, label %count
count:
  %before = load i64, ptr %header
  %after = add i64 %before, 1
  store i64 %after, ptr %header
  br label %done
done:
  ret void
}

define void @NRT_decref(ptr %header) alwaysinline {
  %none = icmp eq ptr %header, null
  br i1 %none, label %done, label %count
count:
  %before = load i64, ptr %header
  %after = add i64 %before, -1
  store i64 %after, ptr %header
  %unused = icmp eq i64 %after, 0
  br i1 %unused, label %release, label %done
release:
  call void @free(ptr %header)
  br label %done
done:
  ret void
}

declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
"""
_MADE = "made_by_numba"
_SEAL = 32
"""Bytes of the sha256 that a kept file begins with: a disk may lose a file's end in a crash."""
_SCALARS = {
    np.bool_: ("?", ctypes.c_uint8),
    bool: ("?", ctypes.c_uint8),
    int: ("i8", ctypes.c_int64),
    np.int64: ("i8", ctypes.c_int64),
    np.uint64: ("u8", ctypes.c_uint64),
    np.float32: ("f4", ctypes.c_float),
}
_LLVM_TYPES = {"?": "i8", "i8": "i64", "u8": "i64", "f4": "float"}
_lock = threading.Lock()


@functools.cache
def kernel(module: str, name: str) -> Kernel:
    """The kernel of that name in a module that numba compiles."""
    return Kernel(module, name)


class Kernel:
    """Calls a kernel with integers, float32 numbers, arrays and tuples of these."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name
        self._codes: dict[str, _Code] = {}

    def __call__(self, *arguments: Any) -> None:
        """Raises `MemoryError`, which is all that can go wrong in a kernel."""
        kinds: list[str] = []
        values: list[Any] = []
        _flatten(arguments, kinds, values)
        kind = ",".join(kinds)
        code = self._codes.get(kind) or self._load(kind, arguments)
        if code.call(*values):
            raise MemoryError(f"there is no space for {self.name}")

    def _load(self, kind: str, arguments: tuple[Any, ...]) -> _Code:
        with _lock:
            if kind not in self._codes:
                self._codes[kind] = _Code(self._compiled(kind, arguments), self._symbol(kind), kind)
            return self._codes[kind]

    def _compiled(self, kind: str, arguments: tuple[Any, ...]) -> bytes:
        file = f"{self._symbol(kind)}.o"
        for folder in folders():
            with contextlib.suppress(OSError):
                kept = (folder / file).read_bytes()
                seal, code = kept[:_SEAL], kept[_SEAL:]
                if seal == hashlib.sha256(code).digest():
                    return code
        made = _compile(self.module, self.name, arguments, self._symbol(kind))
        for folder in folders():
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                new = folder / f".{uuid.uuid4()}"
                new.write_bytes(hashlib.sha256(made).digest() + made)
                new.rename(folder / file)
                break
        return made

    def _symbol(self, kind: str) -> str:
        return f"{self.module.rpartition('.')[2]}_{self.name}_{hashlib.sha256(kind.encode()).hexdigest()[:16]}"


class _Code:
    """Machine code in memory, ready to be called."""

    def __init__(self, code: bytes, symbol: str, kind: str) -> None:
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self.call = ctypes.CFUNCTYPE(ctypes.c_int32, *_types(kind))(self._engine.get_function_address(symbol))


def _flatten(value: Any, kinds: list[str], values: list[Any]) -> None:
    """Append the kinds of the numbers and arrays in nested tuples, and what stands for them in a call: for an array
    its address and its shape.
    """
    if isinstance(value, tuple):
        for each in value:
            _flatten(each, kinds, values)
    elif isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise ValueError("kernels take arrays whose rows lie one after the other")
        kinds.append(f"{value.dtype.str[1:]}*{value.ndim}")
        address = value.__array_interface__["data"][0]
        values += (address, *value.shape)
    else:
        kinds.append(_SCALARS[type(value)][0])
        values.append(float(value) if type(value) is np.float32 else int(value))


def _types(kind: str) -> Iterator[Any]:
    by_kind = dict(_SCALARS.values())
    for each in kind.split(","):
        _, is_array, dimensions = each.partition("*")
        if is_array:
            yield from (ctypes.c_void_p, *[ctypes.c_int64] * int(dimensions))
        else:
            yield by_kind[each]


def _compile(module: str, name: str, arguments: tuple[Any, ...], symbol: str) -> bytes:
    """The machine code of a kernel for arguments of these kinds, as an object file."""
    with _without_scipy():
        numba = importlib.import_module("numba")
        function = getattr(importlib.import_module(module), name)
        signature = tuple(_numba_type(numba.types, argument) for argument in arguments)
        function.compile(signature)
    assembly = llvm.parse_assembly(function.inspect_llvm(signature))
    assembly.get_function(function.overloads[signature].fndesc.llvm_func_name).name = _MADE
    for ours in (_HEAP, _entry(symbol, arguments)):
        assembly.link_in(llvm.parse_assembly(ours))
    for each in assembly.functions:
        if not each.is_declaration and each.name != symbol:
            each.linkage = "internal"
    assembly.get_function(_MADE).add_function_attribute("alwaysinline")
    assembly.verify()
    builder = llvm.create_pass_builder(_machine(), llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(assembly, builder)
    wanted = {each.name for each in assembly.functions if each.is_declaration and not each.name.startswith("llvm.")}
    if wanted - _OUTSIDE:
        raise RuntimeError(
            f"{name} would call {', '.join(sorted(wanted - _OUTSIDE))}, which the C library does not have"
        )
    return _machine().emit_object(assembly)  # type: ignore[no-any-return]


def _entry(symbol: str, arguments: tuple[Any, ...]) -> str:
    """The function that is called, in LLVM's language: what it is given, completed to what numba's function wants.

    That has places for a result and an exception, and for an array two owners, elements, bytes of one, address, shape
    and strides. As no array of Python's has an owner here, the optimizer leaves out all that would count them.
    """
    kinds: list[str] = []
    _flatten(arguments, kinds, [])
    given, lines = list[str](), ["%result = alloca [8 x i64]", "%raised = alloca [8 x i64]"]
    wanted = ["ptr %result", "ptr %raised"]
    for number, each in enumerate(kinds):
        scalar, is_array, dimensions = each.partition("*")
        name = f"%a{number}"
        if not is_array:
            given.append(f"{_LLVM_TYPES[scalar]} {name}")
            wanted.append(given[-1])
            continue
        size, axes = int(scalar[1:]), range(int(dimensions))
        shape, strides = ([f"i64 {name}.{what}{axis}" for axis in axes] for what in ("length", "stride"))
        following = str(size)
        for axis in reversed(axes):
            lines.append(f"{name}.stride{axis} = add i64 {following}, 0")
            lines.append(f"{name}.bytes{axis} = mul i64 {name}.stride{axis}, {name}.length{axis}")
            following = f"{name}.bytes{axis}"
        lines.append(f"{name}.elements = udiv i64 {following}, {size}")
        given += [f"ptr {name}", *shape]
        wanted += ["ptr null", "ptr null", f"i64 {name}.elements", f"i64 {size}", f"ptr {name}", *shape, *strides]
    types = ", ".join(each.split()[0] for each in wanted)
    lines += [f"%failed = call i32 @{_MADE}({', '.join(wanted)})", "ret i32 %failed"]
    body = "\n".join(lines)
    return f"declare i32 @{_MADE}({types})\ndefine i32 @{symbol}({', '.join(given)}) {{\n{body}\n}}\n"


def _numba_type(types: Any, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return types.Array(importlib.import_module("numba").from_dtype(value.dtype), value.ndim, "C")
    if isinstance(value, tuple):
        return types.NamedTuple([_numba_type(types, each) for each in value], type(value))
    scalars = {"?": types.boolean, "i8": types.int64, "u8": types.uint64, "f4": types.float32}
    return scalars[_SCALARS[type(value)][0]]


@contextmanager
def _without_scipy() -> Iterator[None]:
    """numba imports scipy where it is installed, for linear algebra that no kernel has."""
    hidden = sys.modules.setdefault("scipy", None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if hidden is None:
            del sys.modules["scipy"]


def _machine() -> Any:
    """This processor; whoever is given it keeps it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=cpu, features=features, opt=3, codemodel="jitdefault", jit=True)


@functools.cache
def folders() -> tuple[Path, ...]:
    """Where machine code of these sources is kept, the first that can be written."""
    stamp = hashlib.sha256()
    for source in _SOURCES:
        stamp.update((_HERE / f"{source}.py").read_bytes())
    versions = [importlib.metadata.version(package) for package in ("numba", "llvmlite")]
    processor = llvm.get_host_cpu_name() + llvm.get_host_cpu_features().flatten()
    stamp.update(repr([_FORMAT, _HEAP, *versions, llvm.get_process_triple(), processor]).encode())
    places = [_HERE / "__pycache__"]
    with contextlib.suppress(RuntimeError):  # nobody's home is known
        places.append(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "weightsmith")
    return tuple(folder / f"kernels-{stamp.hexdigest()[:16]}" for folder in places)
