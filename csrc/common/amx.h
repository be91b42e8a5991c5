// Tiles in memory and registers, and conversions to bfloat16. Included by variants.h inside namespace amx, hence no
// include guard.

#include "common/amx_instructions.h"

// A tile in memory: 16 rows of 64 bytes, one after another. As left operand a row is 32 bfloat16 of one row of the
// matrix; as right operand, 16 columns of two rows of the matrix, in pairs; as sum, 16 floats.
struct alignas(64) Tile {
  char row[16][64];
};

// Makes all eight registers whole tiles, for this thread; needed before any other use.
static void configure_tiles() {
  struct alignas(64) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } shapes = {};
  static_assert(sizeof shapes == 64, "as the instruction wants it");
  shapes.palette = 1;
  for (int t = 0; t < 8; ++t) {
    shapes.row_bytes[t] = 64;
    shapes.rows[t] = 16;
  }
  XRAY_TILE_CONFIGURE(&shapes);
}

// Gives them back: without tiles in use a context switch saves none.
static void release_tiles() {
  XRAY_TILE_RELEASE();
}

// Sixteen floats as bfloat16: to nearest even, denormals to zero.
XRAY_INLINE Bits16 to_bfloat16(Float value) {
  return (Bits16)_mm512_cvtneps_pbh((__m512)value);
}

// Two vectors as bfloat16 in pairs, the first in the lower halves.
XRAY_INLINE Bits to_bfloat16_pairs(Float first, Float second) {
  using Halves = uint16_t __attribute__((vector_size(64)));
  const Halves order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (Bits)_mm512_permutexvar_epi16((__m512i)order, both);
}
