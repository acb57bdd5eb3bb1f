# SPDX-License-Identifier: Apache-2.0
"""The most that this processor's vector units can multiply, and what no implementation can beat because of it.

    python benchmarks/peak.py                # both peaks, and the most images/s of forward passes
    python benchmarks/peak.py --threads 4

Multiply-adds on registers alone (no memory, sixteen sums at a time) in fp32 (`vfmadd231ps`) and bf16 (`vdpbf16ps`), by
a small C program that is compiled here. A forward pass cannot take less time than its matrix products at that rate:
aims above it are out of reach on this processor, whoever writes the code. AMX is not measured.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

SOURCE = """
#include <immintrin.h>
#include <time.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }
#define SUMS 16
#define ROUNDS 2000
double fp32(double seconds, float *out) {
  __m512 s[SUMS], a = _mm512_set1_ps(out[0]), b = _mm512_set1_ps(out[1]);
  for (int k = 0; k < SUMS; k++) s[k] = _mm512_setzero_ps();
  double begin = now(), end; long calls = 0;
  do {
    for (int i = 0; i < ROUNDS; i++)
#pragma GCC unroll 16
      for (int k = 0; k < SUMS; k++) s[k] = _mm512_fmadd_ps(a, b, s[k]);
    calls += ROUNDS * SUMS; end = now();
  } while (end - begin < seconds);
  for (int k = 1; k < SUMS; k++) s[0] = _mm512_add_ps(s[0], s[k]);
  out[0] = _mm512_reduce_add_ps(s[0]);
  return 32.0 * calls / (end - begin);
}
#ifdef __AVX512BF16__
double bf16(double seconds, float *out) {
  __m512 s[SUMS]; __m512bh a = (__m512bh)_mm512_set1_epi16(0), b = (__m512bh)_mm512_set1_epi16((short)(int)out[0]);
  for (int k = 0; k < SUMS; k++) s[k] = _mm512_setzero_ps();
  double begin = now(), end; long calls = 0;
  do {
    for (int i = 0; i < ROUNDS; i++)
#pragma GCC unroll 16
      for (int k = 0; k < SUMS; k++) s[k] = _mm512_dpbf16_ps(s[k], a, b);
    calls += ROUNDS * SUMS; end = now();
  } while (end - begin < seconds);
  for (int k = 1; k < SUMS; k++) s[0] = _mm512_add_ps(s[0], s[k]);
  out[0] = _mm512_reduce_add_ps(s[0]);
  return 64.0 * calls / (end - begin);
}
#endif
"""
CASES = (("vits14", 224), ("vitb14", 224), ("vitl14", 224), ("vits14", 518), ("vitb14", 518))
SECONDS, ROUNDS = 0.5, 3


def compiled() -> ctypes.CDLL:
    """Compile the loops for this processor."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.c", Path(folder) / "peak.so"
        source.write_text(SOURCE)
        command = [os.environ.get("CC", "cc"), "-O3", "-march=native", "-fPIC", "-shared", "-o", library, source]
        subprocess.run([str(c) for c in command], check=True)
        return ctypes.CDLL(str(library))


def peak(library: ctypes.CDLL, name: str, threads: int) -> float:
    """Give FLOP/s of all threads together, the best of some rounds."""
    function = getattr(library, name)
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double, ctypes.c_void_p]
    best = 0.0
    for _ in range(ROUNDS):
        found = [0.0] * threads

        def work(i: int, found: list[float] = found) -> None:
            numbers = (ctypes.c_float * 2)(1.0, 1e-6)
            found[i] = function(SECONDS, numbers)

        running = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        best = max(best, sum(found))
    return best


def forward_flops(name: str, size: int) -> float:
    """Give the FLOPs of one image: patches, blocks, and of the last block all tokens."""
    from opendino.models.registry import get_config
    from opendino.pretrain.flops import block_flops, embed_flops

    config = get_config(name)
    patches = (size // config.patch_size) ** 2
    tokens = 1 + config.num_register_tokens + patches
    return config.depth * block_flops(config, tokens) + embed_flops(config, patches)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    library = compiled()
    if not hasattr(library, "bf16"):
        sys.exit("This processor has no AVX512-BF16: its bf16 runs at fp32's rate at best.")
    rates = {name: peak(library, name, args.threads) for name in ("fp32", "bf16")}
    for name, rate in rates.items():
        print(f"{name}: {rate / 1e9:.0f} GFLOP/s, {args.threads} threads")
    bounds = {}
    for arch, size in CASES:
        flops = forward_flops(arch, size)
        bounds[f"{arch} {size}"] = {k: rate / flops for k, rate in rates.items()}
        most = ", ".join(f"{v:.1f} images/s in {k}" for k, v in bounds[f"{arch} {size}"].items())
        print(f"{arch}, {size} px: {flops / 1e9:.1f} GFLOP an image, so at most {most}")
    if args.json:
        args.json.write_text(json.dumps({"rates": rates, "bounds": bounds}, indent=1))


if __name__ == "__main__":
    main()
