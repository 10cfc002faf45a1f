"""What a schedule and a backend must know of the machine that a model is compiled for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .cuda_devices import DEVICES
from .errors import TargetError

PRECISIONS = ("f32", "tf32", "f16", "bf16")
"""What models may be computed in: f32; f32 in memory, whose products are of tf32 (GPUs only); f16 or bf16 in memory, as
the pass `precision` decides. Sums are f32 in all of them."""

CUDA_IMAGES = ("sm_80", "sm_86", "sm_89", "sm_90", "compute_80")
"""What "cuda" alone is compiled for ahead of time: the data centre's and the desktop's GPUs, and PTX for all others."""

_V1 = "sse sse2"
_V2 = f"{_V1} sse3 ssse3 sse4.1 sse4.2 popcnt"
_V3 = f"{_V2} avx avx2 bmi bmi2 f16c fma lzcnt movbe"
_V4 = f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl"
_VNNI = f"{_V4} avx512vnni"
_BF16 = f"{_VNNI} avx512bf16"
_NEON = "neon fp-armv8"
_DOT = f"{_NEON} dotprod fullfp16"
_V8_6 = f"{_DOT} i8mm bf16"

# Per CPU that LLVM knows by this name: its features, as far as this compiler asks for them, and the bytes of its caches
# in KiB (L1 data, L2, last level per core), after the vendors' optimisation manuals.
X86_CPUS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "x86-64": (_V1, (32, 256, 2048)),
    "x86-64-v2": (_V2, (32, 256, 2048)),
    "x86-64-v3": (_V3, (32, 256, 2048)),
    "x86-64-v4": (_V4, (32, 1024, 1408)),
    "nehalem": (_V2, (32, 256, 2048)),
    "sandybridge": (f"{_V2} avx", (32, 256, 2048)),
    "ivybridge": (f"{_V2} avx f16c", (32, 256, 2048)),
    "haswell": (_V3, (32, 256, 2048)),
    "broadwell": (_V3, (32, 256, 2048)),
    "skylake": (_V3, (32, 256, 2048)),
    "alderlake": (f"{_V3} avxvnni", (48, 1280, 3072)),
    "skylake-avx512": (_V4, (32, 1024, 1408)),
    "cascadelake": (_VNNI, (32, 1024, 1408)),
    "cooperlake": (_BF16, (32, 1024, 1408)),
    "icelake-client": (_VNNI, (48, 512, 2048)),
    "icelake-server": (_VNNI, (48, 1280, 1536)),
    "sapphirerapids": (f"{_BF16} avxvnni avx512fp16", (48, 2048, 1920)),
    "znver1": (_V3, (32, 512, 2048)),
    "znver2": (_V3, (32, 512, 4096)),
    "znver3": (_V3, (32, 512, 4096)),
    "znver4": (_BF16, (32, 1024, 4096)),
    "znver5": (f"{_BF16} avxvnni", (48, 1024, 4096)),
}
ARM_CPUS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "aarch64": (_NEON, (32, 512, 1024)),
    "cortex-a53": (_NEON, (32, 512, 0)),
    "cortex-a72": (_NEON, (32, 1024, 0)),
    "cortex-a76": (_DOT, (64, 512, 2048)),
    "neoverse-n1": (_DOT, (64, 1024, 1024)),
    "neoverse-n2": (_V8_6, (64, 1024, 1024)),
    "neoverse-v1": (_V8_6, (64, 1024, 1024)),
    "neoverse-v2": (_V8_6, (64, 1024, 1024)),
    "apple-m1": (_DOT, (128, 4096, 8192)),
}
# Multiply-adds of whole vectors a cycle where they are not two, after Fog's instruction tables and Arm's optimisation
# guides: 512-bit ones in two halves (Zen 4) or in one unit (clients), 256-bit ones in two halves (Zen 1).
_MULTIPLY_ADDS: dict[str, int] = {
    **dict.fromkeys(("znver4", "cannonlake", "icelake-client", "tigerlake", "rocketlake", "znver1", "cortex-a53"), 1),
    **dict.fromkeys(("neoverse-v1", "neoverse-v2", "neoverse-v3", "apple-m1", "apple-m2", "apple-m3", "apple-m4"), 4),
}
# Dot-product instructions that `scalars.Call` may name, and the features of which any one gives them.
_DOT_PRODUCTS: dict[str, tuple[str, ...]] = {
    "dot4_u8_i8": ("avx512vnni", "avxvnni", "i8mm"),
    "dot4_i8_i8": ("dotprod",),
    "dot4_u8_u8": ("dotprod",),
    "dot2_i16_i16": ("sse2",),
    "dot2_u7_i8": ("ssse3",),
    "dot2_bf16_bf16": ("avx512bf16",),
}


@dataclass(frozen=True)
class Target:
    """A machine: what LLVM must be told of it, and the facts that schedules are sized by.

    `kind` is "cpu" or "cuda". `features` is LLVM's flag text ("+avx2,-avx512f"), `enabled` the names of all features
    that are on, `threads` how many threads schedules should plan for. Caches are in bytes, the last level's share of
    one core. `multiply_adds` is how many vectors a core multiplies and adds in a cycle.

    Of a GPU, `cpu` is the architecture that schedules are sized for ("sm_90"), `features` names all that code is
    generated for ("sm_90,compute_90"); `multiprocessors` and `shared_bytes` (of one block) are its facts, `products` is
    the type that products of f32 may be computed in: "f32" or "tf32".

    `winograd` allows convolutions by minimal filtering, whose rounding errors are one to six times those of the
    definition. Without `subnormals` rounding to bf16 may make zeros of numbers below the least normal one, as
    VCVTNEPS2BF16 does.
    `strassen` is how many levels of Strassen's method products of matrices may use; their errors are some two times
    larger.
    """

    name: str
    kind: str
    triple: str
    cpu: str
    features: str
    enabled: frozenset[str]
    vector_bits: int
    vector_registers: int
    fma: bool
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    threads: int = 1
    multiprocessors: int = 0
    shared_bytes: int = 0
    products: str = "f32"
    winograd: bool = False
    strassen: int = 0
    subnormals: bool = True
    multiply_adds: int = 2

    def __str__(self) -> str:
        return self.name

    def has(self, feature: str) -> bool:
        """Whether the machine has the feature that LLVM calls so."""
        return feature in self.enabled

    @property
    def architecture(self) -> str:
        """ "x86_64", "aarch64" or "nvptx64"."""
        return self.triple.split("-")[0]

    @property
    def capability(self) -> int:
        """Of a GPU, what it can do: 90 for "sm_90"."""
        return DEVICES[self.cpu].capability if self.kind == "cuda" else 0

    @property
    def images(self) -> tuple[str, ...]:
        """Of a GPU, the architectures that code is generated for."""
        return tuple(self.features.split(",")) if self.kind == "cuda" else ()

    @property
    def dot_products(self) -> frozenset[str]:
        """The names of the integer and bf16 dot products that are one instruction here."""
        return frozenset(name for name, any_of in _DOT_PRODUCTS.items() if self.enabled.intersection(any_of))

    def lanes(self, bits: int) -> int:
        """Elements of `bits` bits in one vector register."""
        return self.vector_bits // bits

    @staticmethod
    def host() -> Target:
        """This machine. Raises TargetError where it is neither x86-64 nor AArch64."""
        from llvmlite import binding

        triple: str = binding.get_process_triple()
        flags: str = binding.get_host_cpu_features().flatten()
        enabled = {flag[1:] for flag in flags.split(",") if flag.startswith("+")}
        architecture = {"amd64": "x86_64", "arm64": "aarch64"}.get(triple.split("-")[0], triple.split("-")[0])
        if architecture not in ("x86_64", "aarch64"):
            raise TargetError(f"this machine is {triple}; onnxc compiles for x86-64 and AArch64")
        if architecture == "aarch64":
            enabled |= set(_NEON.split())
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        normal = "-".join([architecture, *triple.split("-")[1:]])
        return _target("host", normal, binding.get_host_cpu_name(), flags, enabled, _host_caches(), threads)

    @staticmethod
    def of_gpu(capability: tuple[int, int]) -> Target:
        """A GPU of this compute capability; one newer than this compiler knows is given PTX."""
        own = capability[0] * 10 + capability[1]
        known = max(
            (device for device in DEVICES.values() if device.capability <= own and not device.is_specific),
            key=lambda device: device.capability,
            default=None,
        )
        if known is None:
            least = min(device.capability for device in DEVICES.values())
            raise TargetError(
                f"GPUs of compute capability {own / 10} are not compiled for, only those from {least / 10}"
            )
        exact = known.capability == own
        return _cuda(f"cuda:{known.name if exact else known.name.replace('sm_', 'compute_')}")

    @staticmethod
    def parse(text: str) -> Target:
        """The target that a person names: "cpu" or "host" (this machine), a CPU as LLVM calls it or an x86-64 level,
        each with features appended: "x86-64-v3", "cpu:znver4", "skylake-avx512+avx512vnni", "aarch64+dotprod"... For
        NVIDIA's GPUs "cuda" (every architecture there is: machine code for the common ones, PTX for the rest) or those
        wanted: "cuda:sm_90", "cuda:sm_80,sm_90,compute_90".

        Raises TargetError for an unknown name, with those that are known.
        """
        wanted = text.strip()
        if wanted in ("cpu", "host"):
            return Target.host()
        if wanted == "cuda" or wanted.startswith("cuda:"):
            return _cuda(wanted)
        base, *extra = wanted.removeprefix("cpu:").split("+")
        if base in ("cpu", "host") and extra:
            host = Target.host()
            flags = ",".join([host.features, *(f"+{feature}" for feature in extra)])
            caches = host.l1_bytes, host.l2_bytes, host.l3_bytes
            return _target(wanted, host.triple, host.cpu, flags, set(host.enabled) | set(extra), caches, host.threads)
        for table, triple in ((X86_CPUS, "x86_64-unknown-linux-gnu"), (ARM_CPUS, "aarch64-unknown-linux-gnu")):
            if base in table:
                features, (l1, l2, l3) = table[base]
                cpu = "generic" if base == "aarch64" else base
                flags = ",".join(f"+{feature}" for feature in extra)
                caches = l1 << 10, l2 << 10, l3 << 10
                return _target(wanted, triple, cpu, flags, set(features.split()) | set(extra), caches, 1)
        raise TargetError(
            f"unknown target {text!r}; known are cpu, {', '.join([*X86_CPUS, *ARM_CPUS])}, each with +feature, "
            "and cuda or cuda:sm_90 and the like"
        )


def _cuda(text: str) -> Target:
    """A GPU; schedules are sized for the least of the architectures, so that what they use is there on all."""
    wanted = [name.strip() for name in text.removeprefix("cuda").removeprefix(":").split(",") if name.strip()]
    names = wanted or list(CUDA_IMAGES)
    devices = {name: DEVICES.get(name.replace("compute_", "sm_")) for name in names}
    unknown = [name for name, device in devices.items() if device is None]
    if unknown:
        raise TargetError(f"unknown GPU architecture {', '.join(unknown)}; known are {', '.join(DEVICES)}")
    least = min((device for device in devices.values() if device is not None), key=lambda device: device.capability)
    return Target(
        name=text,
        kind="cuda",
        triple="nvptx64-nvidia-cuda",
        cpu=least.name,
        features=",".join(names),
        enabled=frozenset(),
        vector_bits=128,
        vector_registers=255,
        fma=True,
        l1_bytes=least.shared_per_block,
        l2_bytes=least.l2_bytes,
        l3_bytes=0,
        multiprocessors=least.multiprocessors,
        shared_bytes=least.shared_per_block,
    )


def _target(
    name: str, triple: str, cpu: str, flags: str, enabled: set[str], caches: tuple[int, int, int], threads: int
) -> Target:
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= enabled
    vector_bits = 512 if wide else 256 if "avx" in enabled else 128
    if wide and "prefer-256-bit" not in flags:
        flags = ",".join([flags, "-prefer-256-bit"] if flags else ["-prefer-256-bit"])
    registers = 32 if wide or "neon" in enabled else 16
    fma = bool(enabled & {"fma", "avx512f", "neon"})
    # Where a product and a sum are two instructions, each has a unit of its own.
    rate = _MULTIPLY_ADDS.get(cpu, 2) if fma else 1
    given = frozenset(enabled), vector_bits, registers, fma
    return Target(name, "cpu", triple, cpu, flags, *given, *caches, threads=threads, multiply_adds=rate)


def _host_caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> tuple[int, int, int]:
    """Bytes of the data caches, of the last level one CPU's share; usual sizes where Linux tells none."""
    found = {1: 32 << 10, 2: 512 << 10, 3: 2 << 20}
    for entry in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((entry / name).read_text().strip() for name in ("level", "type", "size"))
            shared = (entry / "shared_cpu_list").read_text().strip()
        except OSError:
            continue
        if kind == "Instruction" or not size.endswith("K"):
            continue
        spans = [part.split("-") for part in shared.split(",")]
        sharers = sum(int(span[-1]) - int(span[0]) + 1 for span in spans)
        found[int(level)] = (int(size[:-1]) << 10) // (sharers if int(level) >= 3 else 1)
    return found[1], found[2], found[3]
