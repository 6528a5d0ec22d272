"""Compile the kernels for a kind of card without having one: a script, because the interpreter must be off.

Usage: python compile_kernels.py CAPABILITY FORMAT ..; prints JSON: kernel -> its instructions of products.
"""

import json
import sys

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from lowbit.formats import FORMATS
from lowbit.kernels.triton import attention, launch, order, products
from lowbit.quantize import quantize_array

POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
    torch.int64: "*i64", torch.uint8: "*u8", torch.int8: "*i8",
}  # fmt: skip


class Compiled:
    """In the place of a kernel: a launch compiles it for these arguments, as Triton would specialise them."""

    def __init__(self, kernel, capability, found):
        self.kernel, self.capability, self.found = kernel, capability, found

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **constants):
        signature, fixed, attributes = {name: "constexpr" for name in constants}, dict(constants), {}
        for index, (name, value) in enumerate(zip(self.kernel.arg_names, args)):
            if isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1:
                signature[name], fixed[name] = "constexpr", 1
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constexprs=fixed, attrs=attributes)
        ptx = compile(source, target=GPUTarget("cuda", self.capability, 32)).asm["ptx"]
        used = [name for name in ("wgmma", "mma.sync") if name in ptx]
        self.found.setdefault(self.kernel.__name__, []).append(used[0] if used else "")


def main(capability, names):
    found = {}
    for module, name in [
        (products, n) for n in ("codes_product", "floats_product", "segments_product", "reduce",
                                "entries_product", "codes_rows")
    ] + [(attention, "paged_attention"), (attention, "store_pages")]:  # fmt: skip
        setattr(module, name, Compiled(getattr(module, name), capability, found))
    for name in names:
        weight = np.random.default_rng(0).standard_normal((64, 1024), dtype=np.float32)
        matrix = quantize_array(weight, FORMATS[name], search="minmax")
        term = order.to_device(matrix, "cpu").terms[0]
        for batch in (2, 100):
            launch.multiply(term, torch.zeros(batch, 1024, dtype=torch.float16), 64)
        if FORMATS[name].float_type is None:
            launch.multiply_segments(term, *launch.quantize_int8(torch.zeros(2, 1024)), 64)
            launch.decoded_rows(term, torch.tensor([1, 2]), 1024)
    entries = order.DeviceEntries(torch.zeros(65, dtype=torch.int32), torch.zeros(2, dtype=torch.int32),
                                  torch.zeros(2, dtype=torch.float16), 2)  # fmt: skip
    launch.multiply_entries(entries, torch.zeros(2, 1024, dtype=torch.float16), 64)
    for dtype in (torch.float16, torch.bfloat16):
        q, pages = torch.zeros(2, 8, 80, dtype=dtype), torch.zeros(32, 2, 80, dtype=dtype)
        at = torch.zeros(2, dtype=torch.int32)
        attention.write(q[:, :2], q[:, :2], pages, pages, torch.tensor([1, 2]))
        for capped, sinks in ((0.0, None), (30.0, q[0, :, 0].contiguous())):
            attention.attend(
                q, pages, pages, torch.zeros(1, 2, dtype=torch.int32), at, at, 1.0, 7, capped, sinks
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
