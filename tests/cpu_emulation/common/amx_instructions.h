// Stand-in for csrc/common/amx_instructions.h: the same by emulated registers.

#define XRAY_TILE_CONFIGURE(from) emulated::configure(from)
#define XRAY_TILE_RELEASE() emulated::release()
#define XRAY_TILE_ZERO(tile) emulated::zero(tile)
#define XRAY_TILE_LOAD(tile, from) emulated::load(tile, from, 64)
#define XRAY_TILE_STORE(tile, to) emulated::store(tile, to, 64)
#define XRAY_TILE_MULTIPLY(sum, left, right) emulated::multiply(sum, left, right)
