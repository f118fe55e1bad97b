"""The machine code of the variants for Arm processors, compiled on any machine; and how such a processor is recognised.

What the code computes is tested by the kernels' own tests on an Arm processor, real or emulated: see docs/testing.md.
"""

import ctypes
import re

import pytest
from llvmlite import binding, ir

from flashlm_numba.kernels import _arm_features, _neon, _ternary_tiles
from flashlm_numba.kernels._llvm import allow_features, build_while

TRIPLE = "aarch64-unknown-linux-gnu"
PROCESSORS = {"neon": "cortex-a72", "dotprod": "cortex-a76", "i8mm": "neoverse-n2"}
INSTRUCTIONS = {"smlal": "neon", "sdot": "dotprod", "smmla": "i8mm"}  # and the variant that it belongs to


@pytest.fixture(scope="module")
def target():
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        return binding.Target.from_triple(TRIPLE)
    except RuntimeError:
        pytest.skip("this llvmlite cannot compile for Arm")


def assembly(target, processor, arguments, build, features=""):
    """Machine code for this processor of a function of so many int64, whose body build(builder, arguments) builds."""
    module = ir.Module("module")
    module.triple = TRIPLE
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * arguments)
    function = ir.Function(module, kind, "tile")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    build(builder, list(function.args))
    builder.ret_void()
    machine = target.create_target_machine(cpu=processor, features=features, opt=3)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return machine.emit_assembly(parsed)


def inner_loops(code):
    """The names of the instructions of every loop without another inside, and whether it uses the stack."""
    lines = [line.split("//")[0].strip() for line in code.splitlines()]
    label, found = "", []
    for number, line in enumerate(lines):
        if line.startswith(".LBB") and line.endswith(":"):
            label, first = line[:-1], number
        elif label and re.search(rf"^(b\.\w+|cbn?z|tbn?z)\s.*{re.escape(label)}$", line):
            body = [part for part in lines[first + 1 : number + 1] if part]
            found.append(([part.split()[0] for part in body], any("[sp" in part for part in body)))
    return found


def check_loops(code, variant):
    own, *others = sorted(INSTRUCTIONS, key=lambda name: INSTRUCTIONS[name] != variant)
    loops = [(names, stack) for names, stack in inner_loops(code) if own in names]
    assert loops, code
    assert not any(stack for _, stack in loops), code  # the sums stay in registers
    assert not any(other in names for names, _ in loops for other in others), code
    return loops


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (1, 1)])
@pytest.mark.parametrize("variant", ["neon", "dotprod"])
def test_packed_products_use_the_instruction_of_their_variant(target, variant, shape):
    code = assembly(target, PROCESSORS[variant], 7, lambda b, args: _neon.build_dots(b, variant, *shape, args))
    ((names, _),) = check_loops(code, variant)
    products = shape[0] * shape[1] * 16  # of four registers of codes in each quarter of a block
    assert sum(name in ("sdot", "smlal", "smlal2") for name in names) == products * (2 if variant == "neon" else 1)


@pytest.mark.parametrize("variant", ["neon", "dotprod", "i8mm"])
def test_tiles_of_many_rows_use_the_instruction_of_their_variant(target, variant):
    _, registers, rows = _ternary_tiles.TILES[variant]
    code = assembly(target, PROCESSORS[variant], 10, lambda b, args: _ternary_tiles._build_tile(b, variant, rows, args))
    ((names, _),) = check_loops(code, variant)
    count = sum(name in ("sdot", "smlal", "smlal2", "smmla") for name in names)
    assert count == rows * registers * (2 if variant == "neon" else 1)  # smmla: half as many, for twice the inputs


def test_a_processor_without_a_name_gets_the_instruction_by_an_attribute(target):
    """As in a virtual machine on an Apple processor, where LLVM sees neither a name nor this feature."""

    def build(builder, args):
        allow_features(builder, "+neon", _neon.FEATURES["i8mm"])
        _ternary_tiles._build_tile(builder, "i8mm", 2, args)

    assert "smmla" in assembly(target, "generic", 10, build, "+neon")


def test_build_while_makes_no_turn_for_a_count_of_zero():
    module = ir.Module("module")
    int64 = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(int64, [int64]), "total")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    zero = ir.Constant(int64, 0)
    (total,) = build_while(builder, function.args[0], [zero], lambda i, sums: [builder.add(sums[0], builder.add(i, i))])
    builder.ret(total)
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    with binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine) as engine:
        engine.finalize_object()
        call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(engine.get_function_address("total"))
        assert [call(n) for n in (0, 1, 5)] == [0, 0, 20]


class Linux:
    """A C library with getauxval, as far as _arm_features uses it."""

    def __init__(self, values):
        def getauxval(entry):
            return values[entry]

        self.getauxval = getauxval


class MacOS:
    """A C library with sysctlbyname, as far as _arm_features uses it."""

    def __init__(self, values):
        self.values = values

    def sysctlbyname(self, key, value, size, new, new_size):
        if key not in self.values:
            return -1
        ctypes.cast(value, ctypes.POINTER(ctypes.c_int))[0] = self.values[key]
        return 0


@pytest.mark.parametrize(
    ("hwcap", "hwcap2", "features"),
    [
        (0x8FB, 0, {"+neon"}),
        (0x119FFB, 0, {"+neon", "+dotprod"}),
        (0xECFFFFFB, 0x7F877FFF, {"+neon", "+dotprod", "+i8mm"}),
    ],
    ids=["Cortex-A72", "Cortex-A76", "everything"],
)
def test_linux_reports_the_features(monkeypatch, hwcap, hwcap2, features):
    monkeypatch.setattr(_arm_features, "IS_ARM", True)
    monkeypatch.setattr(_arm_features.sys, "platform", "linux")
    monkeypatch.setattr(_arm_features.ctypes, "CDLL", lambda name: Linux({16: hwcap, 26: hwcap2}))
    assert _arm_features.arm_features() == features


def test_macos_reports_the_features(monkeypatch):
    keys = {b"hw.optional.arm.FEAT_DotProd": 1, b"hw.optional.arm.FEAT_I8MM": 0}
    monkeypatch.setattr(_arm_features, "IS_ARM", True)
    monkeypatch.setattr(_arm_features.sys, "platform", "darwin")
    monkeypatch.setattr(_arm_features.ctypes, "CDLL", lambda name: MacOS(keys))
    assert _arm_features.arm_features() == {"+neon", "+dotprod"}
    keys.clear()  # an older macOS
    assert _arm_features.arm_features() == {"+neon"}


def test_a_system_that_reports_nothing_has_neon(monkeypatch):
    monkeypatch.setattr(_arm_features, "IS_ARM", True)
    monkeypatch.setattr(_arm_features.sys, "platform", "linux")
    monkeypatch.setattr(_arm_features.ctypes, "CDLL", lambda name: object())
    assert _arm_features.arm_features() == {"+neon"}
    monkeypatch.setattr(_arm_features.sys, "platform", "win32")
    assert _arm_features.arm_features() == {"+neon"}
