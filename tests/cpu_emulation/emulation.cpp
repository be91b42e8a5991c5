// The emulated tile registers, the choice of an instruction set, and memory for scratch that is NaN before it is
// written and ends where the process does.

#include "emulation.h"

#include <sys/mman.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <unordered_map>

#include "common/capability.h"

namespace emulated {
namespace {

struct Shape {
  int rows, row_bytes;
};

struct Register {
  Shape shape;
  bool is_written;
  alignas(64) unsigned char row[16][64];
};

thread_local Register registers[8];
thread_local bool is_configured = false;
std::atomic<int64_t> products{0};

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "emulated AMX: %s\n", what);
  abort();
}

Register& at(int tile) {
  if (!is_configured) fail("tiles are not configured in this thread");
  if (tile < 0 || tile > 7) fail("there is no such tile");
  if (registers[tile].shape.rows == 0 || registers[tile].shape.row_bytes == 0) fail("this tile is not configured");
  return registers[tile];
}

Register& read(int tile) {
  if (!at(tile).is_written) fail("a tile is read before it is written");
  return registers[tile];
}

// The arithmetic of TDPBF16PS, while denormals are zero: even and odd terms are summed apart by fused multiply-add,
// then together, then to the destination.
using Row = float __attribute__((vector_size(64)));
using Bits = uint32_t __attribute__((vector_size(64)));

__attribute__((noinline)) void multiply_rows(Register& sum, const Register& left, const Register& right) {
  for (int m = 0; m < sum.shape.rows; ++m) {
    Row even{}, odd{};
    for (int k = 0; k < left.shape.row_bytes / 4; ++k) {
      uint32_t pair;
      memcpy(&pair, &left.row[m][4 * k], 4);
      const uint32_t low = pair << 16, high = pair & 0xffff0000;
      float first, second;
      memcpy(&first, &low, 4);
      memcpy(&second, &high, 4);
      Bits b;
      memcpy(&b, right.row[k], 64);
      even += first * (Row)(b << 16);
      odd += second * (Row)(b & 0xffff0000);
    }
    Row total;
    memcpy(&total, sum.row[m], 64);
    total += even + odd;
    memcpy(sum.row[m], &total, 64);
  }
}

}  // namespace

// Palette 1: a byte each for the palette and the first row, 14 of zeros, 16 x 2 for bytes a row, 16 for rows; the last
// eight of either are zero.
void configure(const void* shapes) {
  unsigned char bytes[64];
  memcpy(bytes, shapes, 64);
  if (bytes[0] != 1 || bytes[1] != 0) fail("the palette must be 1 and the first row 0");
  for (int i = 2; i < 16; ++i)
    if (bytes[i]) fail("reserved bytes of the configuration must be zero");
  for (int t = 0; t < 16; ++t) {
    const Shape shape = {bytes[48 + t], bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8};
    if (t < 8) registers[t] = {shape, false, {}};
    if (shape.rows > (t < 8 ? 16 : 0) || shape.row_bytes > (t < 8 ? 64 : 0) || shape.row_bytes % 4)
      fail("there are 8 tiles of at most 16 rows of 64 bytes");
  }
  is_configured = true;
}

void release() {
  if (!is_configured) fail("tiles that were never configured are given back");
  is_configured = false;
}

void zero(int tile) {
  memset(at(tile).row, 0, sizeof registers[tile].row);
  registers[tile].is_written = true;
}

void load(int tile, const void* from, int64_t stride) {
  Register& to = at(tile);
  memset(to.row, 0, sizeof to.row);
  to.is_written = true;
  for (int r = 0; r < to.shape.rows; ++r) memcpy(to.row[r], (const char*)from + r * stride, to.shape.row_bytes);
}

void store(int tile, void* to, int64_t stride) {
  const Register& from = read(tile);
  for (int r = 0; r < from.shape.rows; ++r) memcpy((char*)to + r * stride, from.row[r], from.shape.row_bytes);
}

void multiply(int sum, int left, int right) {
  Register &c = read(sum), &a = read(left), &b = read(right);
  if (sum == left || sum == right || left == right) fail("a product needs three tiles");
  if (c.shape.rows != a.shape.rows || a.shape.row_bytes != 4 * b.shape.rows || c.shape.row_bytes != b.shape.row_bytes)
    fail("the shapes of a product do not fit together");
  const unsigned control = _mm_getcsr();
  _mm_setcsr(0x1f80 | 0x8040);  // exceptions masked, nearest even, denormals are zero in and out
  multiply_rows(c, a, b);
  _mm_setcsr(control);
  ++products;
}

}  // namespace emulated

// ---- for Python ----

extern "C" __attribute__((visibility("default"))) void set_emulated_capability(int level) {
  xray::capability() = level;
}

extern "C" __attribute__((visibility("default"))) int64_t emulated_products() {
  return emulated::products;
}

// ---- scratch: new[] of this library, before a page that must not be touched ----

namespace {
std::mutex lock;
std::unordered_map<void*, std::pair<void*, size_t>> areas;
}  // namespace

void* operator new[](size_t size) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), whole = (size + page - 1) / page * page;
  void* area = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (area == MAP_FAILED) throw std::bad_alloc();
  mprotect((char*)area + whole, page, PROT_NONE);
  memset(area, 0xff, whole);
  void* data = (char*)area + whole - size;
  std::lock_guard<std::mutex> guard(lock);
  areas[data] = {area, whole + page};
  return data;
}

void operator delete[](void* data) noexcept {
  if (!data) return;
  std::lock_guard<std::mutex> guard(lock);
  const auto found = areas.find(data);
  munmap(found->second.first, found->second.second);
  areas.erase(found);
}

void operator delete[](void* data, size_t) noexcept {
  operator delete[](data);
}
