// Hopper's warpgroup products: asynchronous, 64 rows, 16 deep, operands of 16 bits, sums in fp32.
//
// Accumulators: thread t of the warpgroup holds row 16 (t / 32) + (t % 32) / 4 in d[4i] and d[4i +
// 1] and the row 8 below in d[4i + 2] and d[4i + 3], columns 8i + 2 (t % 4) and the next.
#pragma once

#include <cstdint>

#include "attention/cuda/ptx_mma.h"

namespace kvrelay::attention::cuda::ptx {

// Names a matrix in shared memory with the 128-byte swizzle: groups of 8 rows of 128 bytes.
// `stride` lies between groups of 8 rows (of 8 tokens for a transposed operand); `columns_stride`
// between blocks of 64 columns, which only a transposed operand steps over; `advance`: the same
// matrix further on. All in bytes.
__device__ __forceinline__ uint64_t Descriptor(uint32_t address, uint32_t stride,
                                               uint32_t columns_stride, uint32_t advance) {
  const uint32_t low = ((address & 0x3ffff) >> 4 | (columns_stride >> 4) << 16) + (advance >> 4);
  const uint32_t high = stride >> 4 | 1U << 30;
  return uint64_t{high} << 32 | low;
}

// Before the first product that uses registers written by other instructions.
__device__ __forceinline__ void WarpgroupFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void WarpgroupCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending groups are in flight.
template <int kPending>
__device__ __forceinline__ void WarpgroupWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accesses to `d` over this point.
template <int kCount>
__device__ __forceinline__ void Pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void Pin(uint32_t (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// The same number, of which the compiler knows nothing: what follows from it is computed again each
// time, instead of being kept in registers that a loop has not got.
__device__ __forceinline__ uint32_t Opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A use of registers that never happens (for address 0xffffffff only), but that the assembler has
// to respect. It moves the wait for products up over arithmetic, unless a result is used before;
// and a product reads its operand registers until it is waited for, but the assembler takes them as
// free once it is issued, unless they are used after the wait.
__device__ __forceinline__ void UseHere(uint32_t never, uint32_t a, uint32_t b, uint32_t c,
                                        uint32_t d) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.eq.u32 p, %0, 0xffffffff;\n"
      "@p st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n"
      "}" ::"r"(never),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

// d (64 x 128) = a (64 x 16) b^T (rows of b: 128 x 16), both in shared memory; += when `add`
template <typename T>
__device__ __forceinline__ void WarpgroupDot(float (&d)[64], uint64_t a, uint64_t b, bool add) {
#define KVRELAY_WGMMA(type)                                                                        \
  asm volatile(                                                                                    \
      "{\n"                                                                                        \
      ".reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                    \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                 \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, "                                                           \
      "%8, %9, %10, %11, %12, %13, %14, %15, "                                                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, "                                                   \
      "%24, %25, %26, %27, %28, %29, %30, %31, "                                                   \
      "%32, %33, %34, %35, %36, %37, %38, %39, "                                                   \
      "%40, %41, %42, %43, %44, %45, %46, %47, "                                                   \
      "%48, %49, %50, %51, %52, %53, %54, %55, "                                                   \
      "%56, %57, %58, %59, %60, %61, %62, %63"                                                     \
      "}, %64, %65, p, 1, 1, 0, 0;\n}"                                                             \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),        \
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),    \
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), \
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
        "+f"(d[63])                                                                                \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (kIsBf16<T>) {
    KVRELAY_WGMMA("bf16");
  } else {
    KVRELAY_WGMMA("f16");
  }
#undef KVRELAY_WGMMA
}

// d (64 x 128) = a (64 x 16, registers) b (16 x 128, shared memory, columns contiguous);
// += when `add`
template <typename T>
__device__ __forceinline__ void WarpgroupMma(float (&d)[64], const uint32_t* a, uint64_t b,
                                             bool add) {
#define KVRELAY_WGMMA(type)                                                                        \
  asm volatile(                                                                                    \
      "{\n"                                                                                        \
      ".reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                                    \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                 \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, "                                                           \
      "%8, %9, %10, %11, %12, %13, %14, %15, "                                                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, "                                                   \
      "%24, %25, %26, %27, %28, %29, %30, %31, "                                                   \
      "%32, %33, %34, %35, %36, %37, %38, %39, "                                                   \
      "%40, %41, %42, %43, %44, %45, %46, %47, "                                                   \
      "%48, %49, %50, %51, %52, %53, %54, %55, "                                                   \
      "%56, %57, %58, %59, %60, %61, %62, %63"                                                     \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"                                               \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),        \
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),    \
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), \
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
        "+f"(d[63])                                                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (kIsBf16<T>) {
    KVRELAY_WGMMA("bf16");
  } else {
    KVRELAY_WGMMA("f16");
  }
#undef KVRELAY_WGMMA
}

// d (64 x 64) = a (64 x 16, registers) b (16 x 64, shared memory, columns contiguous);
// += when `add`
template <typename T>
__device__ __forceinline__ void WarpgroupMma(float (&d)[32], const uint32_t* a, uint64_t b,
                                             bool add) {
#define KVRELAY_WGMMA(type)                                                                        \
  asm volatile(                                                                                    \
      "{\n"                                                                                        \
      ".reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                    \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                  \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, "                                                           \
      "%8, %9, %10, %11, %12, %13, %14, %15, "                                                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, "                                                   \
      "%24, %25, %26, %27, %28, %29, %30, %31"                                                     \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"                                               \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),        \
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),    \
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (kIsBf16<T>) {
    KVRELAY_WGMMA("bf16");
  } else {
    KVRELAY_WGMMA("f16");
  }
#undef KVRELAY_WGMMA
}

}  // namespace kvrelay::attention::cuda::ptx
