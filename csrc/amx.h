// AMX, the matrix unit of x86-64: eight tile registers of 16 rows of 64 bytes, and products of tiles, accumulated in fp32
// or int32. Included when attention_kernel.h is compiled for AMX.
//
// The right operand of a product has elements of 2 bytes in pairs, and of 1 byte in fours: elements of consecutive rows
// lie side by side. Products of bfloat16 take subnormal numbers for zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.h"
// From here on, code is compiled for the instruction set: other headers must be included above.
#include "simd.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;
constexpr int kTileBytes = kTileRows * kTileRowBytes;
constexpr int kTileDepth = kTileRowBytes / 2;  // inner dimension of a product of bfloat16

// RAII guard for the tile registers of a thread, all of full size.
struct TileRegisters {
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } tiles;
    _tile_loadconfig(&tiles);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// The intrinsics take only literal numbers of tiles, and those of GCC do not tell the compiler that loads read memory.
template <int Number>
struct Tile {
  static SINKATTN_INLINE void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(Number)); }
  static SINKATTN_INLINE void load(const void* from, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(Number) : "memory");
  }
  static SINKATTN_INLINE void store(void* to, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(Number) : "memory");
  }
};

// Tile C += tile A x tile B.
template <int C, int A, int B>
SINKATTN_INLINE void add_product_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
SINKATTN_INLINE void add_product_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Two vectors, rounded to bfloat16.
SINKATTN_INLINE WideBits round_to_bf16(Vec<float> low, Vec<float> high) {
  return bit_cast<WideBits>(_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

// `count` elements as bfloat16 in a row of a tile, then zeros. Elements of 8 bits are exact in bfloat16.
SINKATTN_INLINE WideBits load_tile_row(const BFloat16* from, int64_t count) {
  if (count >= kTileDepth) return bit_cast<WideBits>(_mm512_loadu_si512(from));
  return bit_cast<WideBits>(_mm512_maskz_loadu_epi16((1u << count) - 1, from));
}
template <typename stored_t>
SINKATTN_INLINE WideBits load_tile_row(const stored_t* from, int64_t count) {
  stored_t padded[kTileDepth] = {};
  if (count < kTileDepth) {
    std::memcpy(padded, from, count * sizeof(stored_t));
    from = padded;
  }
  return round_to_bf16(load(from), load(from + kTileRows));
}

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
