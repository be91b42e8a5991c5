// The instructions of AMX: eight registers of up to 16 rows of 64 bytes, and the product of two of them in bfloat16.
// Registers are named by literal numbers. tests/cpu_emulation has a stand-in of this file for machines without AMX.
//
// They are written out: GCC 12's own macros do not say that a tile load reads memory, nor that a configuration is 64
// bytes, so that it may move or drop the stores before them.

// Shapes of all registers for this thread, at `from` as the instruction wants them; before any other.
#define XRAY_TILE_CONFIGURE(from) asm volatile("ldtilecfg (%0)" ::"r"((const void*)(from)) : "memory")
#define XRAY_TILE_RELEASE() asm volatile("tilerelease" ::)

#define XRAY_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile::)
// rows 64 bytes apart
#define XRAY_TILE_LOAD(tile, from) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"((const void*)(from)), "r"(int64_t{64}) : "memory")
#define XRAY_TILE_STORE(tile, to) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"((void*)(to)), "r"(int64_t{64}) : "memory")
// sum += left right in float32, to nearest even; denormals count as zero
#define XRAY_TILE_MULTIPLY(sum, left, right) asm volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum::)
