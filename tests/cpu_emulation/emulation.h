// The tile registers of AMX, one set for each thread, by the documented semantics of its instructions. What would be an
// exception or not defined on hardware ends the process with a message: a tile that is not configured or not of the
// shape that a product needs, a register that is read before it is written.
#pragma once

#include <cstdint>

namespace emulated {

void configure(const void* shapes);
void release();
void zero(int tile);
void load(int tile, const void* from, int64_t stride);
void store(int tile, void* to, int64_t stride);
void multiply(int sum, int left, int right);

}  // namespace emulated
