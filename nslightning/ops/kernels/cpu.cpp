// ReLU and 2-d max pooling with a chosen derivative at ties, in one pass over the memory each way; and for all other
// pointwise operations, where the ties are, and what they receive.
//
// Plain C functions on raw memory, called by cpu.py: neither Python's nor PyTorch's headers are needed, so one
// build serves every version of both. They compute what triton.py computes on CUDA devices, and keep the same
// for the backward: of ReLU one bit per entry, of a pooling window the bits of the entries that reach its maximum.
// Every result is written by one thread, and sums run in the order of the windows in memory, as PyTorch's kernel adds
// them up: the same bits for any number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Loops are compiled twice where the linker can choose between the two when the library is loaded.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define VECTORISED __attribute__((flatten, target_clones("arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif

// There a processor may have instructions for float16.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#define BY_PROCESSOR __attribute__((target("avx,f16c")))
#endif

namespace {

using std::int16_t;
using std::int64_t;
using std::uint16_t;
using std::uint64_t;
using std::uint8_t;

constexpr int64_t BLOCK = 1024;        // entries of ReLU at a time, in the first-level cache
constexpr int64_t GRAIN = 1 << 15;     // entries below which a thread is not worth its start, as in PyTorch
constexpr int64_t ANY = -1;            // a stride not known when this is compiled
constexpr int COUNTS = 17;             // a window's tied entries are 0 to 16

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;  // as wide as T, so that loops vectorise

// Numbers of 16 bits, which are only kept: all arithmetic is float's.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What a type's entries are computed in, and templates for the one kind of types or the other.
template <typename T>
using Wide = std::conditional_t<sizeof(T) == 2, float, T>;
template <typename T>
using Half = std::enable_if_t<sizeof(T) == 2, int>;
template <typename T>
using Whole = std::enable_if_t<sizeof(T) != 2, int>;

// `a` where `first`, else `b`, without a branch: what is tied where cannot be predicted.
template <typename T>
T select(bool first, T a, T b) {
  Bits<T> one, other;
  std::memcpy(&one, &a, sizeof(T));
  std::memcpy(&other, &b, sizeof(T));
  const Bits<T> mask = -static_cast<Bits<T>>(first);
  one = (one & mask) | (other & ~mask);
  std::memcpy(&a, &one, sizeof(T));
  return a;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

float widened(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

float widened(Float16 x) {
  const uint32_t bits = x.bits, sign = (bits & 0x8000) << 16, rest = (bits & 0x7FFF) << 13;
  const uint32_t exponent = rest & 0x0F800000;
  const uint32_t normal = rest + (112u << 23), special = rest + (224u << 23);  // the other bias; infinity and NaN
  const uint32_t small = bits_of(float_of(rest + (113u << 23)) - float_of(113u << 23));  // a subnormal number
  return float_of(sign | (exponent == 0x0F800000 ? special : exponent == 0 ? small : normal));
}

// To the nearest, of two to the even one; NaN as PyTorch has it.
void narrowed(float x, BFloat16& into) {
  const uint32_t bits = bits_of(x);
  into.bits = static_cast<uint16_t>(x != x ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

void narrowed(float x, Float16& into) {
  const uint32_t all = bits_of(x), sign = (all >> 16) & 0x8000, bits = all & 0x7FFFFFFF;
  const uint32_t nan = 0x7E00 | ((bits >> 13) & 0x3FF), large = 0x7C00;
  const uint32_t small = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);  // whose last bit is the least number's
  const uint32_t normal = (bits - (112u << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13;
  const uint32_t number = bits >= 0x47800000 ? large : bits < (113u << 23) ? small : normal;
  into.bits = static_cast<uint16_t>(sign | (x != x ? nan : number));
}

// The nearest number of 16 bits, as a float: what `narrowed` and `widened` make of it.
float rounded(float x, BFloat16) {
  const uint32_t bits = bits_of(x);
  return float_of(x != x ? 0x7FC00000 : (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000);
}

float rounded(float x, Float16) {
  const uint32_t all = bits_of(x), sign = all & 0x80000000, bits = all & 0x7FFFFFFF;
  const uint32_t nan = (bits & ~0x1FFFu) | 0x400000, infinity = 0x7F800000;
  const uint32_t small = bits_of((float_of(bits) + 0.5f) - 0.5f);  // the sum's last bit is the least number's
  const uint32_t near = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFFu;
  const uint32_t number = bits < (113u << 23) ? small : near >= 0x47800000 ? infinity : near;
  return float_of(sign | (x != x ? nan : number));
}

// As stock compares: a subnormal bfloat16 is 0 where the processor is told to take it so, a subnormal float16 not.
bool is_zero(BFloat16 x) { return widened(x) == 0; }
bool is_zero(Float16 x) { return (x.bits & 0x7FFF) == 0; }
bool is_above_zero(BFloat16 x) { return !(widened(x) <= 0); }  // or NaN
bool is_above_zero(Float16 x) { return ((x.bits - 1) & 0xFFFF) < 0x7FFF || x.bits > 0xFC00; }

// The order of a type's numbers as that of whole numbers, 16 of which fit where 8 floats do. Both zeros have the same
// key; that of a NaN is beyond those of the infinities. `flushed` takes subnormal numbers for zeros.
constexpr int magnitude_of_infinity(BFloat16) { return 0x7F80; }
constexpr int magnitude_of_infinity(Float16) { return 0x7C00; }

template <typename H>
int16_t key_of(H x, int16_t flushed) {
  const auto all = static_cast<int16_t>(x.bits & 0x7FFF);
  const auto magnitude = static_cast<int16_t>(all & -static_cast<int16_t>(all >= flushed));
  const auto sign = static_cast<int16_t>(-(x.bits >> 15));
  return static_cast<int16_t>((magnitude ^ sign) - sign);
}

// The least magnitude that the processor does not take for 0, as stock's kernels compare floats: of float16 all are
// normal floats.
int16_t flushed(Float16) { return 0; }
int16_t flushed(BFloat16) {
  volatile uint16_t least = 1;
  return widened(BFloat16{least}) == 0 ? 0x80 : 0;
}

// Call call(data) on so many threads at once, the calling one among them.
void together(int64_t threads, void (*call)(void*), void* data) {
#if defined(__linux__)
  // PyTorch's own threads, which are awake already: its OpenMP library is loaded for all to see.
  using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (team) return team(call, data, static_cast<unsigned>(threads), 0);
#endif
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(call, data);
  call(data);
  for (auto& other : others) other.join();
}

// Call work(begin, end) on one part of [0, units) for each thread. Smaller parts would balance better, but threads that
// write close to each other wait for each other's new pages.
template <typename Work>
void share(int64_t units, int64_t entries, int64_t threads, Work work) {
  threads = std::max<int64_t>(1, std::min({threads, units, entries / GRAIN}));
  if (threads == 1) return work(0, units);
  std::atomic<int64_t> next{0};  // with fewer threads than asked for, one takes several parts
  auto take = [&] {
    for (int64_t part = next++; part < threads; part = next++) {
      work(units * part / threads, units * (part + 1) / threads);
    }
  };
  together(threads, [](void* given) { (*static_cast<decltype(take)*>(given))(); }, &take);
}

// ---------------------------------------------------------------------------------------------------------- comparing

// Of blocks of two tensors b and a = b + d, of which `given` is d if it was carried, else a: the sums of |d|, d^2, a^2
// and a b, and the largest |d|, in double; NaN where a difference is.
template <typename T, bool carried>
void sum_blocks(const T* given, const T* reference, int64_t n, int64_t block, double* found, int64_t first,
                    int64_t last) {
  for (int64_t number = first; number < last; ++number) {
    const int64_t begin = number * block, end = std::min(begin + block, n);
    double l1 = 0, dd = 0, aa = 0, ab = 0, most = 0;
#pragma omp simd reduction(+ : l1, dd, aa, ab) reduction(max : most)  // may add up in lanes
    for (int64_t i = begin; i < end; ++i) {
      const double x = given[i], b = reference[i], d = carried ? x : x - b, a = carried ? b + x : x;
      const double size = std::abs(d);
      l1 += size, dd += d * d, aa += a * a, ab += a * b;
      most = size > most ? size : most;
    }
    double* sums = found + 5 * number;
    sums[0] = l1, sums[1] = dd, sums[2] = std::isnan(l1) ? l1 : most, sums[3] = aa, sums[4] = ab;
  }
}

// ---------------------------------------------------------------------------------------------------------------- ReLU

// Whether an entry of some blocks is 0: up to the first that is, or until another thread has found one.
template <typename T>
bool any_zero_blocks(const T* x, int64_t n, const std::atomic<bool>& found, int64_t first, int64_t last) {
  for (int64_t block = first; block < last && !found.load(std::memory_order_relaxed); ++block) {
    const int64_t start = block * BLOCK, size = std::min(BLOCK, n - start);
    Bits<T> any = 0;
    for (int64_t i = 0; i < size; ++i) any |= x[start + i] == 0;
    if (any) return true;
  }
  return false;
}

// From a byte to a bit for each of a block's entries.
void pack(const uint8_t* tied, int64_t size, uint8_t* into) {
  for (int64_t k = 0; k < (size + 7) / 8; ++k) {
    for (int j = 0; j < 8; ++j) into[k] |= tied[8 * k + j] << j;
  }
}

template <typename T>
void relu_forward_blocks(const T* x, T* y, uint8_t* bits, int64_t n, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t start = block * BLOCK, size = std::min(BLOCK, n - start);
    const T* from = x + start;
    Bits<T> any = 0;
    for (int64_t i = 0; i < size; ++i) any |= from[i] == 0;
    uint8_t* into = bits + start / 8;
    std::fill(into, into + (size + 7) / 8, 0);
    if (any) {
      uint8_t tied[BLOCK] = {};
      for (int64_t i = 0; i < size; ++i) tied[i] = from[i] == 0;
      pack(tied, size, into);
    }
    for (int64_t i = 0; i < size; ++i) y[start + i] = from[i] < 0 ? T(0) : from[i];  // NaN and -0.0 stay, as in stock
  }
}

template <typename T>
void relu_backward_blocks(const T* g, const T* y, const uint8_t* bits, T* gradient, int64_t n, T alpha, bool constant,
                          int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t start = block * BLOCK, size = std::min(BLOCK, n - start);
    const T *incoming = g + start, *output = y + start;
    T* into = gradient + start;
    uint8_t any = 0;
    for (int64_t k = 0; k < (size + 7) / 8; ++k) any |= bits[start / 8 + k];
    if (!any) {
      for (int64_t i = 0; i < size; ++i) into[i] = output[i] <= 0 ? T(0) : incoming[i];
      continue;
    }
    uint8_t tied[BLOCK];
    for (int64_t k = 0; k < (size + 7) / 8; ++k) {
      for (int j = 0; j < 8; ++j) tied[8 * k + j] = (bits[start / 8 + k] >> j) & 1;
    }
    for (int64_t i = 0; i < size; ++i) {
      const T through = incoming[i], chosen = constant ? alpha : through * alpha, below = tied[i] ? chosen : T(0);
      into[i] = output[i] <= 0 ? below : through;
    }
  }
}

// ------------------------------------------------------------------------------------- ties of any pointwise operation

// Of blocks of `size` entries: which equal `position`, as in tie_bits.py: bit k of byte j is entry k * size / 8 + j
// of its block. A block without any is told in `met`, and its bits are left alone.
template <typename T>
void mark_blocks(const T* x, int64_t n, int64_t size, T position, uint8_t* bits, bool* met, int64_t first,
                 int64_t last) {
  const int64_t row = size / 8;
  for (int64_t block = first; block < last; ++block) {
    const int64_t start = block * size, end = std::min(n, start + size);
    Bits<T> any = 0;
    for (int64_t i = start; i < end; ++i) any |= x[i] == position;
    met[block] = any;
    if (!any) continue;
    uint8_t* into = bits + block * row;
    std::fill(into, into + row, 0);
    for (int k = 0; k < 8; ++k) {
      const int64_t begin = start + k * row, entries = std::min(row, end - begin);
      for (int64_t j = 0; j < entries; ++j) into[j] |= static_cast<uint8_t>(x[begin + j] == position) << k;
    }
  }
}

// What tied entries receive, written over their gradient, in the blocks numbers[first], ..., numbers[last - 1].
template <typename T>
void overwrite_blocks(T* gradient, const T* g, const int64_t* numbers, const uint8_t* bits, int64_t n, int64_t size,
                      T alpha, bool constant, int64_t first, int64_t last) {
  const int64_t row = size / 8;
  for (int64_t block = first; block < last; ++block) {
    const int64_t start = numbers[block] * size, end = std::min(n, start + size);
    for (int k = 0; k < 8; ++k) {
      const int64_t begin = start + k * row, entries = std::min(row, end - begin);
      const uint8_t* tied = bits + block * row;
      for (int64_t j = 0; j < entries; ++j) {
        const T chosen = constant ? alpha : g[begin + j] * alpha;
        gradient[begin + j] = select((tied[j] >> k) & 1, chosen, gradient[begin + j]);
      }
    }
  }
}

// -------------------------------------------------------------- operations of one or two kinks, from their input itself

// Where entries count as ties, and the derivatives there; a position that is NaN counts none. Between the bounds the
// derivative is 1. Elsewhere it is `slope`, and where that is NaN the gradient is 0, that of an infinite one, too. A bound
// that is NaN is absent.
struct Linear {
  double position[2], derivative[2], low, high, slope;
};

// Whether an entry of some blocks equals one of two numbers: up to the first that does, or until another thread has
// found one.
template <typename T>
bool any_equal_blocks(const T* x, int64_t n, T one, T other, const std::atomic<bool>& found, int64_t first,
                      int64_t last) {
  for (int64_t block = first; block < last && !found.load(std::memory_order_relaxed); ++block) {
    const int64_t start = block * BLOCK, size = std::min(BLOCK, n - start);
    Bits<T> any = 0;
    for (int64_t i = 0; i < size; ++i) any |= (x[start + i] == one) | (x[start + i] == other);
    if (any) return true;
  }
  return false;
}

// The gradient of a piecewise linear operation. Returns whether an entry is NaN: what stock makes of it depends on the place where it lies.
template <bool CONSTANT, typename T>
bool linear_backward_some(const T* __restrict g, const T* __restrict x, T* __restrict gradient, int64_t n,
                          const Linear& how) {
  const T low = static_cast<T>(how.low), high = static_cast<T>(how.high), slope = static_cast<T>(how.slope);
  const T first = static_cast<T>(how.position[0]), second = static_cast<T>(how.position[1]);
  const T at_first = static_cast<T>(how.derivative[0]), at_second = static_cast<T>(how.derivative[1]);
  const bool flat = slope != slope;
  Bits<T> nan = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T value = x[i], incoming = g[i];
    nan |= value != value;
    const bool inside = !(value <= low) & !(value >= high);
    const T outside = select(flat, T(0), incoming * slope);
    const T one = CONSTANT ? at_first : incoming * at_first, other = CONSTANT ? at_second : incoming * at_second;
    const bool at_one = value == first, at_other = value == second;
    gradient[i] = select(at_other, other, select(at_one, one, select(inside, incoming, outside)));
  }
  return nan;
}

// The derivative times the incoming gradient, written over the gradient of the entries at one of two positions.
template <typename T>
void replace_some(const T* __restrict g, const T* __restrict x, T* __restrict gradient, int64_t n,
                  const Linear& how) {
  const T first = static_cast<T>(how.position[0]), second = static_cast<T>(how.position[1]);
  const T at_first = static_cast<T>(how.derivative[0]), at_second = static_cast<T>(how.derivative[1]);
  for (int64_t i = 0; i < n; ++i) {
    const bool at_one = x[i] == first, at_other = x[i] == second;
    gradient[i] = select(at_other, g[i] * at_second, select(at_one, g[i] * at_first, gradient[i]));
  }
}

// The same for entries of 16 bits, whose keys are compared: where they count as ties, and the bounds.
struct Keys {
  int16_t position[2], low, high, flushed;
};

// Which of up to BLOCK entries are at the first and at the second position, as masks; whether any is.
template <typename H>
bool at_positions(const H* __restrict x, uint16_t* __restrict one, uint16_t* __restrict other, int64_t n,
                  const Keys& keys) {
  const int16_t first = keys.position[0], second = keys.position[1], least = keys.flushed;
  uint16_t any = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int16_t key = key_of(x[i], least);
    one[i] = static_cast<uint16_t>(-(key == first)), other[i] = static_cast<uint16_t>(-(key == second));
    any |= one[i] | other[i];
  }
  return any;
}

// Where the incoming gradient is left as it is, as masks. Whether an entry is NaN, and whether one lies outside.
template <typename H>
void inside_bounds(const H* __restrict x, uint16_t* __restrict inside, int64_t n, const Keys& keys, bool& nan,
                   bool& outside) {
  constexpr auto infinity = static_cast<int16_t>(magnitude_of_infinity(H()));
  const int16_t low = keys.low, high = keys.high, least = keys.flushed;
  uint16_t nans = 0, all = 0xFFFF;
  for (int64_t i = 0; i < n; ++i) {
    const int16_t key = key_of(x[i], least), magnitude = static_cast<int16_t>(x[i].bits & 0x7FFF);
    const auto is_nan = static_cast<uint16_t>(-(magnitude > infinity));
    const auto between = static_cast<uint16_t>(-((key > low) & (key < high)));
    inside[i] = between | is_nan;
    nans |= is_nan, all &= inside[i];
  }
  nan = nans, outside = all != 0xFFFF;
}

// The gradient times the derivative at each entry's position, or elsewhere times `slope`, rounded once.
template <bool CONSTANT, typename H>
void times(const H* __restrict g, const uint16_t* __restrict one, const uint16_t* __restrict other, H* __restrict into,
           int64_t n, float at_first, float at_second, float slope) {
  const uint32_t first = bits_of(at_first), second = bits_of(at_second), elsewhere = bits_of(slope);
  for (int64_t i = 0; i < n; ++i) {
    const auto is_one = static_cast<uint32_t>(static_cast<int16_t>(one[i]));
    const auto is_other = static_cast<uint32_t>(static_cast<int16_t>(other[i]));
    const float derivative = float_of((second & is_other) | (~is_other & ((first & is_one) | (elsewhere & ~is_one))));
    const float product = widened(g[i]) * derivative;
    narrowed(CONSTANT ? select((is_one | is_other) != 0, derivative, product) : product, into[i]);
  }
}

// Which of the entries of 16 bits of a block's row k are at a position; whether any is.
template <typename H>
bool mark_row(const H* __restrict x, uint8_t* __restrict bits, int k, int64_t n, int16_t position, int16_t least) {
  uint16_t any = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto at = static_cast<uint16_t>(key_of(x[i], least) == position);
    any |= at;
    bits[i] |= static_cast<uint8_t>(at << k);
  }
  return any;
}

// The gradient of a row's tied entries.
template <bool CONSTANT, typename H>
void overwrite_row(H* __restrict gradient, const H* __restrict g, const uint8_t* __restrict tied, int k, int64_t n,
                   float alpha) {
  for (int64_t i = 0; i < n; ++i) {
    H chosen;
    narrowed(CONSTANT ? alpha : widened(g[i]) * alpha, chosen);
    const auto mask = static_cast<uint16_t>(-((tied[i] >> k) & 1));
    gradient[i].bits = (chosen.bits & mask) | (gradient[i].bits & ~mask);
  }
}

// --------------------------------------------------------------------------------------------------------- max pooling

struct Geometry {
  int64_t images, channels, height, width, rows, columns;  // of the input; of the windows
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t last;  // whether the channels come last in memory

  // Whether windows are the pairs of two rows: 2 x 2 entries side by side, without padding.
  bool pairs() const {
    const auto are = [](const int64_t (&two)[2], int64_t value) { return two[0] == value && two[1] == value; };
    return !last && are(kernel, 2) && are(stride, 2) && are(padding, 0) && are(dilation, 1) && 2 * rows <= height &&
           2 * columns <= width;  // not those that are rounded up
  }

  // Whether no two windows share an entry.
  bool disjoint() const {
    return stride[0] > dilation[0] * (kernel[0] - 1) && stride[1] > dilation[1] * (kernel[1] - 1);
  }

  // How many of their rows are worked on at once: loops over short rows take longer than the copies that spare them.
  int64_t at_once() const { return std::max<int64_t>(1, BLOCK / 2 / columns); }

  // Where a row of windows begins in the input.
  int64_t corner(int64_t row) const { return row / rows * height * width + row % rows * 2 * width; }
};

// Take the entries of one place of the windows into account: bit `bit` of those that reach the maximum so far.
template <int64_t STRIDE, typename T>
void compare(const T* x, int64_t stride, int64_t n, Bits<T> bit, T* best, Bits<T>* reached) {
  if (STRIDE != ANY) stride = STRIDE;
  for (int64_t i = 0; i < n; ++i) {
    const T value = x[i * stride], old = best[i];
    const bool better = (value > old) | (value != value);  // the last NaN wins, as in stock
    const Bits<T> before = reached[i], with = before | bit;
    reached[i] = select(better, bit, select(value == old, with, before));
    best[i] = select(better, value, old);
  }
}

// n windows in a row that lie inside the input, of the most frequent kinds: KERNEL x KERNEL entries, not dilated.
template <int KERNEL, int STRIDE, typename T>
void windows_of(const T* x, int64_t width, int64_t n, T* best, Bits<T>* reached) {
  for (int64_t c = 0; c < n; ++c) {
    T most = -std::numeric_limits<T>::infinity();
    Bits<T> bits = 0;
    for (int i = 0; i < KERNEL; ++i) {
      for (int j = 0; j < KERNEL; ++j) {
        const T value = x[i * width + c * STRIDE + j];
        const Bits<T> bit = Bits<T>(1) << (i * KERNEL + j), with = bits | bit;
        const bool better = (value > most) | (value != value);
        bits = select(better, bit, select(value == most, with, bits));
        most = select(better, value, most);
      }
    }
    best[c] = most;
    reached[c] = bits;
  }
}

// Whether they were of such a kind.
template <typename T>
bool windows_inside(const Geometry& at, const T* x, int64_t n, T* best, Bits<T>* reached) {
  if (at.kernel[0] != at.kernel[1] || at.dilation[0] != 1 || at.dilation[1] != 1) return false;
  if (at.kernel[0] == 2 && at.stride[1] == 2) windows_of<2, 2>(x, at.width, n, best, reached);
  else if (at.kernel[0] == 3 && at.stride[1] == 2) windows_of<3, 2>(x, at.width, n, best, reached);
  else if (at.kernel[0] == 3 && at.stride[1] == 1) windows_of<3, 1>(x, at.width, n, best, reached);
  else return false;
  return true;
}

// Windows begin, ..., end - 1 of a row, which starts at height `top` of a plane: place by place, inside the input.
template <typename T>
void windows_at(const Geometry& at, const T* x, int64_t top, int64_t begin, int64_t end, T* best, Bits<T>* reached) {
  const int64_t inner = at.last ? at.channels : 1, stride = at.stride[1];
  std::fill(best + begin * inner, best + end * inner, -std::numeric_limits<T>::infinity());
  std::fill(reached + begin * inner, reached + end * inner, 0);
  for (int64_t i = 0; i < at.kernel[0]; ++i) {
    const int64_t h = top + i * at.dilation[0];
    if (h < 0 || h >= at.height) continue;
    const T* row = x + h * at.width * inner;
    const auto bit = [&](int64_t j) { return Bits<T>(1) << (i * at.kernel[1] + j); };
    const auto shift = [&](int64_t j) { return j * at.dilation[1] - at.padding[1]; };
    if (at.last) {
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t j = 0; j < at.kernel[1]; ++j) {
          const int64_t w = c * stride + shift(j);
          if (w < 0 || w >= at.width) continue;
          compare<1>(row + w * inner, 1, inner, bit(j), best + c * inner, reached + c * inner);
        }
      }
      continue;
    }
    for (int64_t j = 0; j < at.kernel[1]; ++j) {  // 0 <= c * stride + shift < width
      const int64_t low = std::max(begin, shift(j) < 0 ? (-shift(j) + stride - 1) / stride : 0);
      const int64_t high = std::min(end, (at.width - shift(j) + stride - 1) / stride);
      const T* from = row + low * stride + shift(j);
      if (stride == 1) compare<1>(from, stride, high - low, bit(j), best + low, reached + low);
      else if (stride == 2) compare<2>(from, stride, high - low, bit(j), best + low, reached + low);
      else compare<ANY>(from, stride, high - low, bit(j), best + low, reached + low);
    }
  }
}

// The masks of n windows; returns whether one is tied, of those whose maximum is 0 only if `zeros`.
template <typename T>
bool keep(const Bits<T>* reached, const T* best, int64_t n, bool zeros, uint16_t* masks) {
  Bits<T> several = 0;
  for (int64_t i = 0; i < n; ++i) {
    several |= reached[i] & (reached[i] - 1) & -Bits<T>(zeros | (best[i] != 0));
    masks[i] = static_cast<uint16_t>(reached[i]);
  }
  return several != 0;
}

// The same as below for pairs.
template <typename T>
bool pool_forward_pairs(const T* x, T* y, uint16_t* masks, const Geometry& at, bool zeros, int64_t begin, int64_t end) {
  const int64_t most = at.at_once(), line = 2 * at.columns;
  std::vector<T> both(2 * most * line);
  std::vector<Bits<T>> reached(most * at.columns);
  bool tied = false;
  for (int64_t row = begin; row < end; row += most) {
    const int64_t rows = std::min(most, end - row), n = rows * at.columns;
    for (int64_t k = 0; k < rows; ++k) {
      const T* from = x + at.corner(row + k);
      std::copy(from, from + line, both.data() + k * line);
      std::copy(from + at.width, from + at.width + line, both.data() + (most + k) * line);
    }
    T* best = y + row * at.columns;
    windows_of<2, 2>(both.data(), most * line, n, best, reached.data());
    tied |= keep(reached.data(), best, n, zeros, masks + row * at.columns);
  }
  return tied;
}

// Of [begin, end): rows of windows; returns whether a window is tied, of those whose maximum is 0 only if `zeros`.
template <typename T>
bool pool_forward_rows(const T* x, T* y, uint16_t* masks, const Geometry& at, bool zeros, int64_t begin, int64_t end) {
  if (at.pairs()) return pool_forward_pairs(x, y, masks, at, zeros, begin, end);
  const int64_t inner = at.last ? at.channels : 1, line = at.columns * inner, stride = at.stride[1];
  // The windows that lie inside a row of the input.
  const int64_t left = std::min(at.columns, (at.padding[1] + stride - 1) / stride);
  const int64_t space = at.width + at.padding[1] - (at.kernel[1] - 1) * at.dilation[1] - 1;
  const int64_t right = std::max(left, std::min(at.columns, space < 0 ? 0 : space / stride + 1));
  std::vector<Bits<T>> reached(line);
  bool tied = false;
  for (int64_t row = begin; row < end; ++row) {
    const T* plane = x + row / at.rows * at.height * at.width * inner;
    const int64_t top = row % at.rows * at.stride[0] - at.padding[0];
    T* best = y + row * line;
    Bits<T>* bits = reached.data();
    const bool inside = !at.last && top >= 0 && top + (at.kernel[0] - 1) * at.dilation[0] < at.height;
    const T* corner = plane + top * at.width + left * stride - at.padding[1];
    if (inside && windows_inside(at, corner, right - left, best + left, bits + left)) {
      windows_at(at, plane, top, 0, left, best, bits);
      windows_at(at, plane, top, right, at.columns, best, bits);
    } else {
      windows_at(at, plane, top, 0, at.columns, best, bits);
    }
    tied |= keep(bits, best, line, zeros, masks + row * line);
  }
  return tied;
}

int ones(uint16_t m) {
  m = m - ((m >> 1) & 0x5555);
  m = (m & 0x3333) + ((m >> 2) & 0x3333);
  m = (m + (m >> 4)) & 0x0F0F;
  return (m + (m >> 8)) & 0x1F;
}

// Many conversions at a time, and sums rounded in place.
#define CONVERSIONS(T)                                                              \
  VECTORISED void widen(const T* from, float* into, int64_t n) {                    \
    for (int64_t i = 0; i < n; ++i) into[i] = widened(from[i]);                     \
  }                                                                                 \
  VECTORISED void narrow(const float* from, T* into, int64_t n) {                   \
    for (int64_t i = 0; i < n; ++i) narrowed(from[i], into[i]);                     \
  }                                                                                 \
  VECTORISED void round_to(T, float* sums, int64_t n) {                             \
    for (int64_t i = 0; i < n; ++i) sums[i] = rounded(sums[i], T());                \
  }

CONVERSIONS(BFloat16)
#if !defined(BY_PROCESSOR)
CONVERSIONS(Float16)
#else
namespace written_out {
CONVERSIONS(Float16)
}

// Of these instructions' results only a signalling NaN differs, by the bit that the next operation sets.
BY_PROCESSOR void widen_eights(const Float16* from, float* into, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    _mm256_storeu_ps(into + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
}

BY_PROCESSOR void narrow_eights(const float* from, Float16* into, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(into + i), halves);
  }
}

BY_PROCESSOR void round_eights(float* sums, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(sums + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_ps(sums + i, _mm256_cvtph_ps(halves));
  }
}

// How many of n entries the processor's instructions take, eight at a time.
int64_t by_processor(int64_t n) {
  static const bool has = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
  return has ? n / 8 * 8 : 0;
}

void widen(const Float16* from, float* into, int64_t n) {
  const int64_t most = by_processor(n);
  if (most) widen_eights(from, into, most);
  written_out::widen(from + most, into + most, n - most);
}

void narrow(const float* from, Float16* into, int64_t n) {
  const int64_t most = by_processor(n);
  if (most) narrow_eights(from, into, most);
  written_out::narrow(from + most, into + most, n - most);
}

void round_to(Float16, float* sums, int64_t n) {
  const int64_t most = by_processor(n);
  if (most) round_eights(sums, most);
  written_out::round_to(Float16(), sums + most, n - most);
}
#endif
#undef CONVERSIONS

// How windows with 0 to 16 tied entries share their gradient. The target receives `target`, the others `rest`; or, if
// these are summed apart, all receive `rest` and the target `target` more.
template <typename T>
struct Weights {
  const T *rest, *target;
  bool last, apart;  // whether the target is the last tied entry, else the first
  bool vertex;       // whether the target receives all

  // Whether the target receives what the others do.
  bool even() const { return !apart && std::equal(rest, rest + COUNTS, target); }

  // Whether windows that are not tied give nothing: the weights are the difference of two choices'.
  bool difference() const { return !apart && target[1] == 0; }
};

// How sums are rounded: not at all, or as stock rounds each sum of entries of 16 bits.
struct Exact {
  template <typename T>
  static void round(T*, int64_t) {}
};
template <typename H>
struct As {
  static void round(float* sums, int64_t n) { round_to(H(), sums, n); }
};

// What the entries of one row of windows receive: all that reach the maximum `g`, unless some are `tied`, or `nothing`.
template <typename T, typename Rounded = Exact>
struct Shares {
  int64_t row = -1;
  bool tied = false, often = false, nothing = false;  // often: more than every eighth window
  const T* g = nullptr;
  const uint16_t* masks = nullptr;
  std::vector<T> rest, target;
  std::vector<uint16_t> which;  // of the entries is the target

  void form(int64_t number, const T* of, const uint16_t* reached, int64_t n, const Weights<T>& weights) {
    row = number, g = of, masks = reached;
    int several = 0;
    for (int64_t i = 0; i < n; ++i) several += (masks[i] & (masks[i] - 1)) != 0;
    tied = several != 0, often = several > n / 8;
    nothing = !tied && weights.difference();
    if (!tied) return;
    rest.resize(n);
    if (weights.even()) {
      multiply(weights.rest, n, weights.difference(), rest.data());
      g = rest.data(), tied = false;
      return;
    }
    which.resize(n);
    for (int64_t i = 0; i < n; ++i) {
      uint16_t m = masks[i];
      if (weights.last) {
        m |= m >> 1, m |= m >> 2, m |= m >> 4, m |= m >> 8;
        which[i] = m ^ (m >> 1);
      } else {
        which[i] = m & -m;
      }
    }
    if (weights.vertex) {  // as if the target were the only one
      masks = which.data(), tied = false;
      return;
    }
    target.resize(n);
    const bool clear = weights.difference() || weights.apart;
    multiply(weights.rest, n, clear, rest.data());
    multiply(weights.target, n, clear, target.data());
    Rounded::round(target.data(), n);
  }

  // The windows' gradients times the coefficients for their numbers of tied entries. With `clear`, nothing of an
  // infinite gradient is nothing.
  void multiply(const T* by_count, int64_t n, bool clear, T* __restrict products) const {
    const T* __restrict gradients = g;
    const auto product = [&](int64_t i, T by) { return select(clear & (by == 0), T(0), gradients[i] * by); };
    if (often) {
      for (int64_t i = 0; i < n; ++i) products[i] = product(i, by_count[ones(masks[i])]);
      return;
    }
    const T alone = by_count[1];
    for (int64_t i = 0; i < n; ++i) products[i] = product(i, alone);  // a loop without look-ups
    for (int64_t i = 0; i < n; ++i) {
      if (masks[i] & (masks[i] - 1)) products[i] = product(i, by_count[ones(masks[i])]);
    }
  }

  // Add to the entries at one place of the windows first, ..., first + n - 1.
  void give(uint16_t bit, int64_t first, int64_t n, T* into) const {
    if (!tied) return add(bit, masks + first, g + first, n, into);
    const T *others = rest.data() + first, *one = target.data() + first;
    const uint16_t *all = masks + first, *at = which.data() + first;
    for (int64_t i = 0; i < n; ++i) into[i] += select(at[i] & bit, one[i], select(all[i] & bit, others[i], T(0)));
    Rounded::round(into, n);
  }

  // Write a row of two entries, at the places `bit` and after it, of pairs first, ..., first + n - 1.
  void write_pairs(uint16_t bit, int64_t first, int64_t n, T* into) const {
    const uint16_t* all = masks + first;
    if (nothing) {
      std::fill(into, into + 2 * n, T(0));
      return;
    }
    if (!tied) {
      const T* one = g + first;
      for (int64_t c = 0; c < n; ++c) {
        into[2 * c] = T(0) + select(all[c] & bit, one[c], T(0));  // a sum as elsewhere: 0 + -0.0 is 0
        into[2 * c + 1] = T(0) + select(all[c] & (bit << 1), one[c], T(0));
      }
      return;
    }
    const T *others = rest.data() + first, *one = target.data() + first;
    const uint16_t* at = which.data() + first;
    for (int64_t c = 0; c < n; ++c) {
      const T left = select(all[c] & bit, others[c], T(0)), right = select(all[c] & (bit << 1), others[c], T(0));
      into[2 * c] = T(0) + select(at[c] & bit, one[c], left);
      into[2 * c + 1] = T(0) + select(at[c] & (bit << 1), one[c], right);
    }
  }

  // The same as `give` in two sums.
  void give(uint16_t bit, int64_t first, int64_t n, T* into, T* more) const {
    if (!tied) return add(bit, masks + first, g + first, n, into);
    add(bit, which.data() + first, target.data() + first, n, into);
    add<Exact>(bit, masks + first, rest.data() + first, n, more);
  }

  template <typename Round = Rounded>
  static void add(uint16_t bit, const uint16_t* where, const T* values, int64_t n, T* into) {
    for (int64_t i = 0; i < n; ++i) into[i] += select(where[i] & bit, values[i], T(0));
    Round::round(into, n);
  }
};

// Entry w of a row is entry (w + padding) / stride of phase (w + padding) % stride.
template <typename T>
void interleave(const T* phases, int64_t length, int64_t padding, int64_t stride, int64_t width, T* into) {
  const auto from = [&](int64_t w) { return phases + (w + padding) % stride * length + (w + padding) / stride; };
  if (stride == 1) {
    std::copy(from(0), from(0) + width, into);
  } else if (stride == 2) {
    const T *even = from(0), *odd = from(1);
    for (int64_t i = 0; i < width / 2; ++i) into[2 * i] = even[i], into[2 * i + 1] = odd[i];
    if (width % 2) into[width - 1] = even[width / 2];
  } else {
    for (int64_t w = 0; w < width; ++w) into[w] = *from(w);
  }
}

// Of [begin, end): rows of windows, of pairs.
template <typename T>
void pool_backward_pairs(const T* g, const uint16_t* masks, const Weights<T>& weights, T* gradient, const Geometry& at,
                         int64_t begin, int64_t end) {
  const int64_t most = at.at_once(), line = 2 * at.columns;
  Shares<T> shares;
  for (int64_t row = begin; row < end; row += most) {
    const int64_t rows = std::min(most, end - row), n = rows * at.columns, start = row * at.columns;
    shares.form(row, g + start, masks + start, n, weights);
    for (int64_t k = 0; k < rows; ++k) {
      T* into = gradient + at.corner(row + k);
      for (int64_t i = 0; i < 2; ++i) shares.write_pairs(1 << 2 * i, k * at.columns, at.columns, into + i * at.width);
      for (int64_t w = line; w < at.width; ++w) into[w] = into[at.width + w] = T(0);  // an odd column, like an odd row
      const int64_t left = (row + k + 1) % at.rows ? 0 : at.height - 2 * at.rows;
      if (left) std::fill(into + 2 * at.width, into + (2 + left) * at.width, T(0));
    }
  }
}

// Of [begin, end): rows of the input.
template <typename Rounded, typename T>
void pool_backward_rows(const T* g, const uint16_t* masks, const Weights<T>& weights, T* gradient, const Geometry& at,
                        int64_t begin, int64_t end) {
  const int64_t inner = at.last ? at.channels : 1, line = at.columns * inner, stride = at.stride[1];
  const int64_t reach = (at.kernel[0] - 1) * at.dilation[0];
  std::vector<Shares<T, Rounded>> ring(reach / at.stride[0] + 1);  // of the rows of windows that an entry may lie in
  // One row of windows gives to every stride-th entry of a row. So that these lie side by side, each such phase is
  // summed up by itself; where the channels come last, they lie side by side already.
  const int64_t length = std::max(at.columns, (at.width + 2 * at.padding[1]) / stride + 1) +
                         (at.kernel[1] - 1) * at.dilation[1] / stride + 1;
  const int64_t size = at.last ? at.width * inner : stride * length;
  std::vector<T> sums(size), more(weights.apart ? size : 0);
  int64_t plane = -1;
  for (int64_t number = begin; number < end; ++number) {
    if (number / at.height != plane) {
      plane = number / at.height;
      for (auto& shares : ring) shares.row = -1;
    }
    const int64_t h = number % at.height, from = h + at.padding[0] - reach;
    const int64_t first = from > 0 ? (from + at.stride[0] - 1) / at.stride[0] : 0;
    const int64_t final = std::min(at.rows - 1, (h + at.padding[0]) / at.stride[0]);
    T* out = gradient + number * at.width * inner;
    T* into = at.last ? out : sums.data();
    std::fill(into, into + size, T(0));
    bool tied = false;
    for (int64_t row = first; row <= final; ++row) {
      const int64_t below = h + at.padding[0] - row * at.stride[0], i = below / at.dilation[0];
      if (below % at.dilation[0]) continue;
      auto& shares = ring[row % ring.size()];
      const int64_t start = (plane * at.rows + row) * line;
      if (shares.row != row) shares.form(row, g + start, masks + start, line, weights);
      if (shares.nothing) continue;
      if (weights.apart && shares.tied && !tied) {
        tied = true;
        std::fill(more.begin(), more.end(), T(0));
      }
      const auto give = [&](int64_t j, int64_t begin, int64_t n, int64_t to) {
        const uint16_t bit = 1 << (i * at.kernel[1] + j);
        if (weights.apart) shares.give(bit, begin, n, into + to, more.data() + to);
        else shares.give(bit, begin, n, into + to);
      };
      if (!at.last) {
        for (int64_t j = at.kernel[1] - 1; j >= 0; --j) {  // the window to the left gives first
          const int64_t place = j * at.dilation[1];
          give(j, 0, line, place % stride * length + place / stride);
        }
        continue;
      }
      for (int64_t column = 0; column < at.columns; ++column) {
        for (int64_t j = 0; j < at.kernel[1]; ++j) {
          const int64_t w = column * stride - at.padding[1] + j * at.dilation[1];
          if (w >= 0 && w < at.width) give(j, column * inner, inner, w * inner);
        }
      }
    }
    if (tied) {
      for (int64_t k = 0; k < size; ++k) into[k] += more[k];
    }
    if (!at.last) interleave(into, length, at.padding[1], stride, at.width, out);
  }
}

// Each compiled for the processors that there are.
#define INSTANCES(T)                                                                                                   \
  VECTORISED void sums(const T* given, const T* b, int64_t n, int64_t block, bool carried, double* found,              \
                       int64_t begin, int64_t end) {                                                                   \
    if (carried) sum_blocks<T, true>(given, b, n, block, found, begin, end);                                           \
    else sum_blocks<T, false>(given, b, n, block, found, begin, end);                                                  \
  }                                                                                                                    \
  VECTORISED bool any_zero(const T* x, int64_t n, const std::atomic<bool>& found, int64_t begin, int64_t end) {        \
    return any_zero_blocks(x, n, found, begin, end);                                                                   \
  }                                                                                                                    \
  VECTORISED void relu_forward(const T* x, T* y, uint8_t* bits, int64_t n, int64_t begin, int64_t end) {               \
    relu_forward_blocks(x, y, bits, n, begin, end);                                                                    \
  }                                                                                                                    \
  VECTORISED void relu_backward(const T* g, const T* y, const uint8_t* bits, T* gradient, int64_t n, T alpha,          \
                                bool constant, int64_t begin, int64_t end) {                                           \
    relu_backward_blocks(g, y, bits, gradient, n, alpha, constant, begin, end);                                        \
  }                                                                                                                    \
  VECTORISED bool any_equal(const T* x, int64_t n, T one, T other, const std::atomic<bool>& found, int64_t begin,       \
                            int64_t end) {                                                                             \
    return any_equal_blocks(x, n, one, other, found, begin, end);                                                      \
  }                                                                                                                    \
  VECTORISED bool linear_backward(const T* g, const T* x, T* gradient, int64_t n, const Linear& how, bool constant) {  \
    if (constant) return linear_backward_some<true>(g, x, gradient, n, how);                                           \
    return linear_backward_some<false>(g, x, gradient, n, how);                                                        \
  }                                                                                                                    \
  VECTORISED void replace(const T* g, const T* x, T* gradient, int64_t n, const Linear& how) {                         \
    replace_some(g, x, gradient, n, how);                                                                              \
  }                                                                                                                    \
  VECTORISED void mark(const T* x, int64_t n, int64_t size, T position, uint8_t* bits, bool* met, int64_t begin,       \
                       int64_t end) {                                                                                  \
    mark_blocks(x, n, size, position, bits, met, begin, end);                                                          \
  }                                                                                                                    \
  VECTORISED void overwrite(T* gradient, const T* g, const int64_t* numbers, const uint8_t* bits, int64_t n,           \
                            int64_t size, T alpha, bool constant, int64_t begin, int64_t end) {                        \
    overwrite_blocks(gradient, g, numbers, bits, n, size, alpha, constant, begin, end);                                \
  }                                                                                                                    \
  VECTORISED bool pool_forward(const T* x, T* y, uint16_t* masks, const Geometry& at, bool zeros, int64_t begin,       \
                               int64_t end) {                                                                          \
    return pool_forward_rows(x, y, masks, at, zeros, begin, end);                                                      \
  }                                                                                                                    \
  VECTORISED void pool_backward(const T* g, const uint16_t* masks, const Weights<T>& weights, T* gradient,             \
                                const Geometry& at, int64_t begin, int64_t end) {                                      \
    if (at.pairs()) pool_backward_pairs(g, masks, weights, gradient, at, begin, end);                                  \
    else pool_backward_rows<Exact>(g, masks, weights, gradient, at, begin, end);                                       \
  }

INSTANCES(float)
INSTANCES(double)
#undef INSTANCES

#define HALVES(T)                                                                                             \
  VECTORISED bool which_are_zero(const T* x, uint8_t* zero, int64_t n) {                                      \
    uint16_t any = 0;                                                                                         \
    for (int64_t i = 0; i < n; ++i) any |= static_cast<uint16_t>(is_zero(x[i]));                              \
    if (any && zero) {                                                                                        \
      for (int64_t i = 0; i < n; ++i) zero[i] = is_zero(x[i]);                                                \
    }                                                                                                         \
    return any;                                                                                               \
  }                                                                                                           \
  VECTORISED bool positions(const T* x, uint16_t* one, uint16_t* other, int64_t n, const Keys& keys) {        \
    return at_positions(x, one, other, n, keys);                                                              \
  }                                                                                                           \
  VECTORISED bool any_position(const T* x, int64_t n, const Keys& keys) {                                     \
    const int16_t first = keys.position[0], second = keys.position[1], least = keys.flushed;                  \
    uint16_t any = 0;                                                                                         \
    for (int64_t i = 0; i < n; ++i) {                                                                         \
      const int16_t key = key_of(x[i], least);                                                                \
      any |= static_cast<uint16_t>((key == first) | (key == second));                                         \
    }                                                                                                         \
    return any;                                                                                               \
  }                                                                                                           \
  VECTORISED bool mark_some(const T* x, uint8_t* bits, int k, int64_t n, int16_t position, int16_t least) {   \
    return mark_row(x, bits, k, n, position, least);                                                          \
  }                                                                                                           \
  VECTORISED void within(const T* x, uint16_t* inside, int64_t n, const Keys& keys, bool& nan, bool& beyond) {\
    inside_bounds(x, inside, n, keys, nan, beyond);                                                           \
  }                                                                                                           \
  VECTORISED void product(const T* g, const uint16_t* one, const uint16_t* other, T* into, int64_t n,         \
                          float at_first, float at_second, float slope, bool constant) {                      \
    if (constant) times<true>(g, one, other, into, n, at_first, at_second, slope);                            \
    else times<false>(g, one, other, into, n, at_first, at_second, slope);                                    \
  }                                                                                                           \
  VECTORISED void gate(const T* g, const T* y, T* into, int64_t n) {                                          \
    for (int64_t i = 0; i < n; ++i) into[i].bits = g[i].bits & static_cast<uint16_t>(-is_above_zero(y[i]));   \
  }                                                                                                           \
  VECTORISED void overwrite_some(T* gradient, const T* g, const uint8_t* tied, int k, int64_t n, float alpha, \
                                 bool constant) {                                                             \
    if (constant) overwrite_row<true>(gradient, g, tied, k, n, alpha);                                        \
    else overwrite_row<false>(gradient, g, tied, k, n, alpha);                                                \
  }                                                                                                           \
  VECTORISED void pool_backward(As<T>, const float* g, const uint16_t* masks, const Weights<float>& weights,  \
                                float* gradient, const Geometry& at, int64_t begin, int64_t end) {            \
    pool_backward_rows<As<T>>(g, masks, weights, gradient, at, begin, end);                                   \
  }

HALVES(BFloat16)
HALVES(Float16)
#undef HALVES

// Over `threads` threads.
template <typename T, Whole<T> = 0>
void sums_all(const T* given, const T* b, int64_t n, int64_t block, bool carried, double* found, int64_t threads) {
  share((n + block - 1) / block, n, threads, [=](int64_t begin, int64_t end) {
    sums(given, b, n, block, carried, found, begin, end);
  });
}

template <typename T, Whole<T> = 0>
bool any_zero_all(const T* x, int64_t n, int64_t threads) {
  std::atomic<bool> found{false};
  share((n + BLOCK - 1) / BLOCK, n, threads, [&](int64_t begin, int64_t end) {
    if (any_zero(x, n, found, begin, end)) found = true;
  });
  return found;
}

template <typename T, Whole<T> = 0>
bool any_equal_all(const T* x, int64_t n, double one, double other, int64_t threads) {
  std::atomic<bool> found{false};
  share((n + BLOCK - 1) / BLOCK, n, threads, [&](int64_t begin, int64_t end) {
    if (any_equal(x, n, static_cast<T>(one), static_cast<T>(other), found, begin, end)) found = true;
  });
  return found;
}

template <typename T, Whole<T> = 0>
bool linear_backward_all(const T* g, const T* x, T* gradient, int64_t n, const Linear& how, bool constant,
                         int64_t threads) {
  std::atomic<bool> nan{false};
  share((n + BLOCK - 1) / BLOCK, n, threads, [&](int64_t begin, int64_t end) {
    const int64_t start = begin * BLOCK, size = std::min(n, end * BLOCK) - start;
    if (linear_backward(g + start, x + start, gradient + start, size, how, constant)) nan = true;
  });
  return nan;
}

template <typename T, Whole<T> = 0>
void replace_all(const T* g, const T* x, T* gradient, int64_t n, const Linear& how, int64_t threads) {
  share((n + BLOCK - 1) / BLOCK, n, threads, [&](int64_t begin, int64_t end) {
    const int64_t start = begin * BLOCK, size = std::min(n, end * BLOCK) - start;
    replace(g + start, x + start, gradient + start, size, how);
  });
}

template <typename T, Whole<T> = 0>
void relu_forward_all(const T* x, T* y, uint8_t* bits, int64_t n, int64_t threads) {
  share((n + BLOCK - 1) / BLOCK, n, threads, [=](int64_t begin, int64_t end) {
    relu_forward(x, y, bits, n, begin, end);
  });
}

template <typename T, Whole<T> = 0>
void relu_backward_all(const T* g, const T* y, const uint8_t* bits, T* gradient, int64_t n, double alpha, bool constant,
                       int64_t threads) {
  share((n + BLOCK - 1) / BLOCK, n, threads, [=](int64_t begin, int64_t end) {
    relu_backward(g, y, bits, gradient, n, static_cast<T>(alpha), constant, begin, end);
  });
}

template <typename T, Whole<T> = 0>
void mark_all(const T* x, int64_t n, int64_t size, double position, uint8_t* bits, bool* met, int64_t threads) {
  share((n + size - 1) / size, n, threads, [=](int64_t begin, int64_t end) {
    mark(x, n, size, static_cast<T>(position), bits, met, begin, end);
  });
}

template <typename T, Whole<T> = 0>
void overwrite_all(T* gradient, const T* g, const int64_t* numbers, const uint8_t* bits, int64_t blocks, int64_t n,
                   int64_t size, double alpha, bool constant, int64_t threads) {
  share(blocks, blocks * size, threads, [=](int64_t begin, int64_t end) {
    overwrite(gradient, g, numbers, bits, n, size, static_cast<T>(alpha), constant, begin, end);
  });
}

template <typename T, Whole<T> = 0>
bool pool_forward_all(const T* x, T* y, uint16_t* masks, const Geometry& at, bool zeros, int64_t threads) {
  std::atomic<bool> tied{false};
  const int64_t planes = at.images * (at.last ? 1 : at.channels);
  const int64_t entries = at.images * at.channels * at.height * at.width;
  share(planes * at.rows, entries, threads, [&](int64_t begin, int64_t end) {
    if (pool_forward(x, y, masks, at, zeros, begin, end)) tied = true;
  });
  return tied;
}

template <typename T, Whole<T> = 0>
void pool_backward_all(const T* g, const uint16_t* masks, const Weights<T>& weights, T* gradient, const Geometry& at,
                       int64_t threads) {
  const int64_t planes = at.images * (at.last ? 1 : at.channels);
  const int64_t entries = at.images * at.channels * at.height * at.width;
  share(planes * (at.pairs() ? at.rows : at.height), entries, threads, [&](int64_t begin, int64_t end) {
    pool_backward(g, masks, weights, gradient, at, begin, end);
  });
}

// ------------------------------------------------------------------------------------------------- entries of 16 bits
// A part at a time is widened, worked on as float, and rounded once.

// Call work(start, size) for every block of so many entries.
template <typename Work>
void over_blocks(int64_t n, int64_t block, int64_t threads, Work work) {
  share((n + block - 1) / block, n, threads, [=](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) work(number * block, std::min(block, n - number * block));
  });
}

template <typename H, Half<H> = 0>
void sums_all(const H* given, const H* b, int64_t n, int64_t block, bool carried, double* found, int64_t threads) {
  over_blocks(n, block, threads, [=](int64_t start, int64_t size) {
    std::vector<float> one(size), other(size);
    widen(given + start, one.data(), size);
    widen(b + start, other.data(), size);
    sums(one.data(), other.data(), size, size, carried, found + start / block * 5, 0, 1);
  });
}

template <typename H, Half<H> = 0>
bool any_zero_all(const H* x, int64_t n, int64_t threads) {
  std::atomic<bool> found{false};
  over_blocks(n, BLOCK, threads, [&](int64_t start, int64_t size) {
    if (!found.load(std::memory_order_relaxed) && which_are_zero(x + start, nullptr, size)) found = true;
  });
  return found;
}

// The key of a position, which counts as an entry of 16 bits has it, as a comparison with such a tensor does. No entry
// has that of NaN.
template <typename H>
int16_t position_key(double position, int16_t least) {
  H entry;
  narrowed(static_cast<float>(position), entry);
  return position == position ? key_of(entry, least) : std::numeric_limits<int16_t>::min();
}

// The key of the largest number that is not above a bound, or of the least that is not below it: stock compares an
// entry with the bound as a float.
template <typename H>
int16_t bound_key(double bound, int16_t least, bool lower) {
  if (bound != bound) return lower ? std::numeric_limits<int16_t>::min() : std::numeric_limits<int16_t>::max();
  const auto exact = static_cast<float>(bound);
  H entry;
  narrowed(exact, entry);
  const float nearest = widened(entry);
  const int16_t key = key_of(entry, least);
  return static_cast<int16_t>(key - (lower && nearest > exact) + (!lower && nearest < exact));
}

template <typename H>
Keys keys_of(const Linear& how) {
  const int16_t least = flushed(H());
  return {{position_key<H>(how.position[0], least), position_key<H>(how.position[1], least)},
          bound_key<H>(how.low, least, true), bound_key<H>(how.high, least, false), least};
}

template <typename H, Half<H> = 0>
bool any_equal_all(const H* x, int64_t n, double one, double other, int64_t threads) {
  const double absent = std::numeric_limits<double>::quiet_NaN();
  const Keys keys = keys_of<H>({{one, other}, {}, absent, absent, 0});
  std::atomic<bool> found{false};
  over_blocks(n, BLOCK, threads, [&](int64_t start, int64_t size) {
    if (!found.load(std::memory_order_relaxed) && any_position(x + start, size, keys)) found = true;
  });
  return found;
}

template <typename H, Half<H> = 0>
bool linear_backward_all(const H* g, const H* x, H* gradient, int64_t n, const Linear& how, bool constant,
                         int64_t threads) {
  const Keys keys = keys_of<H>(how);
  const bool flat = how.slope != how.slope;
  const auto at_first = static_cast<float>(how.derivative[0]), at_second = static_cast<float>(how.derivative[1]);
  const float slope = flat ? 0 : static_cast<float>(how.slope);
  std::atomic<bool> nan{false};
  over_blocks(n, BLOCK, threads, [&](int64_t start, int64_t size) {
    uint16_t inside[BLOCK], one[BLOCK], other[BLOCK];
    H chosen[BLOCK];
    bool is_nan, beyond;
    within(x + start, inside, size, keys, is_nan, beyond);
    if (is_nan) nan = true;
    const bool tied = positions(x + start, one, other, size, keys);
    H* into = gradient + start;
    const H* incoming = g + start;
    if (!tied && (flat || !beyond)) {
      for (int64_t i = 0; i < size; ++i) into[i].bits = incoming[i].bits & inside[i];
      return;
    }
    product(incoming, one, other, chosen, size, at_first, at_second, slope, constant);
    const uint16_t outside = flat ? 0 : 0xFFFF;
    for (int64_t i = 0; i < size; ++i) {  // the bits of a NaN are kept where the gradient is left as it is
      const uint16_t at = one[i] | other[i], through = inside[i] & ~at, by = at | (outside & ~inside[i]);
      into[i].bits = (incoming[i].bits & through) | (chosen[i].bits & by);
    }
  });
  return nan;
}

template <typename H, Half<H> = 0>
void replace_all(const H* g, const H* x, H* gradient, int64_t n, const Linear& how, int64_t threads) {
  const Keys keys = keys_of<H>(how);
  const auto at_first = static_cast<float>(how.derivative[0]), at_second = static_cast<float>(how.derivative[1]);
  over_blocks(n, BLOCK, threads, [&](int64_t start, int64_t size) {
    uint16_t one[BLOCK], other[BLOCK];
    H chosen[BLOCK];
    if (!positions(x + start, one, other, size, keys)) return;
    product(g + start, one, other, chosen, size, at_first, at_second, 0, false);
    for (int64_t i = 0; i < size; ++i) {
      const uint16_t at = one[i] | other[i];
      gradient[start + i].bits = (chosen[i].bits & at) | (gradient[start + i].bits & ~at);
    }
  });
}

// The output is left to stock: what it makes of a NaN depends on the place where that lies.
template <typename H, Half<H> = 0>
void relu_forward_all(const H* x, H*, uint8_t* bits, int64_t n, int64_t threads) {
  over_blocks(n, BLOCK, threads, [=](int64_t start, int64_t size) {
    uint8_t tied[BLOCK] = {};
    uint8_t* into = bits + start / 8;
    std::fill(into, into + (size + 7) / 8, 0);
    if (which_are_zero(x + start, tied, size)) pack(tied, size, into);
  });
}

template <typename H, Half<H> = 0>
void relu_backward_all(const H* g, const H* y, const uint8_t* bits, H* gradient, int64_t n, double alpha, bool constant,
                       int64_t threads) {
  over_blocks(n, BLOCK, threads, [=](int64_t start, int64_t size) {
    const uint8_t *ties = bits + start / 8, *end = ties + (size + 7) / 8;
    if (std::all_of(ties, end, [](uint8_t byte) { return byte == 0; })) {
      return gate(g + start, y + start, gradient + start, size);
    }
    float incoming[BLOCK], output[BLOCK], out[BLOCK];
    widen(g + start, incoming, size);
    widen(y + start, output, size);
    relu_backward(incoming, output, ties, out, size, static_cast<float>(alpha), constant, 0, 1);
    narrow(out, gradient + start, size);
  });
}

template <typename H, Half<H> = 0>
void mark_all(const H* x, int64_t n, int64_t size, double position, uint8_t* bits, bool* met, int64_t threads) {
  const int16_t least = flushed(H()), at = position_key<H>(position, least);
  const int64_t row = size / 8;
  over_blocks(n, size, threads, [=](int64_t start, int64_t entries) {
    uint8_t* into = bits + start / 8;
    std::fill(into, into + row, 0);
    bool any = false;
    for (int k = 0; k < 8 && k * row < entries; ++k) {
      any |= mark_some(x + start + k * row, into, k, std::min(row, entries - k * row), at, least);
    }
    met[start / size] = any;
  });
}

template <typename H, Half<H> = 0>
void overwrite_all(H* gradient, const H* g, const int64_t* numbers, const uint8_t* bits, int64_t blocks, int64_t n,
                   int64_t size, double alpha, bool constant, int64_t threads) {
  const int64_t row = size / 8;
  share(blocks, blocks * size, threads, [=](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (int k = 0; k < 8; ++k) {
        const int64_t start = numbers[block] * size + k * row, entries = std::min(row, n - start);
        const float chosen = static_cast<float>(alpha);
        overwrite_some(gradient + start, g + start, bits + block * row, k, entries, chosen, constant);
      }
    }
  });
}

// Call work(number, image) for every plane, or where the channels come last for every image: a geometry of its own.
template <typename Work>
void over_images(const Geometry& at, int64_t threads, Work work) {
  Geometry one = at;
  one.images = 1;
  if (!at.last) one.channels = 1;
  const int64_t entries = at.images * at.channels * at.height * at.width;
  if (!entries) return;
  share(at.images * at.channels / one.channels, entries, threads, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) work(number, one);
  });
}

template <typename H, Half<H> = 0>
bool pool_forward_all(const H* x, H* y, uint16_t* masks, const Geometry& at, bool zeros, int64_t threads) {
  std::atomic<bool> tied{false};
  over_images(at, threads, [&](int64_t number, const Geometry& one) {
    const int64_t size = one.channels * one.height * one.width, windows = one.channels * one.rows * one.columns;
    std::vector<float> in(size), out(windows);
    widen(x + number * size, in.data(), size);
    if (pool_forward(in.data(), out.data(), masks + number * windows, one, zeros, 0, one.rows)) tied = true;
    narrow(out.data(), y + number * windows, windows);
  });
  return tied;
}

template <typename H, Half<H> = 0>
void pool_backward_all(const H* g, const uint16_t* masks, const Weights<float>& weights, H* gradient,
                       const Geometry& at, int64_t threads) {
  over_images(at, threads, [&](int64_t number, const Geometry& one) {
    const int64_t size = one.channels * one.height * one.width, windows = one.channels * one.rows * one.columns;
    std::vector<float> in(windows), out(size);
    widen(g + number * windows, in.data(), windows);
    if (one.disjoint() || weights.difference()) {
      const int64_t units = one.pairs() ? one.rows : one.height;
      pool_backward(in.data(), masks + number * windows, weights, out.data(), one, 0, units);
    } else {
      pool_backward(As<H>(), in.data(), masks + number * windows, weights, out.data(), one, 0, one.height);
    }
    narrow(out.data(), gradient + number * size, size);
  });
}

}  // namespace

// Of the arguments below, as in cpu.py and nodes.cpp.
EXPORT const int64_t version = 9;

// The names end in the entries' dtype.
#define ENTRIES(T, NAME)                                                                                               \
  EXPORT void sums_##NAME(const T* given, const T* b, int64_t n, int64_t block, bool carried, double* found,           \
                              int64_t threads) {                                                                       \
    sums_all(given, b, n, block, carried, found, threads);                                                             \
  }                                                                                                                    \
  EXPORT bool any_zero_##NAME(const T* x, int64_t n, int64_t threads) { return any_zero_all(x, n, threads); }          \
  EXPORT bool any_equal_##NAME(const T* x, int64_t n, double one, double other, int64_t threads) {                     \
    return any_equal_all(x, n, one, other, threads);                                                                   \
  }                                                                                                                    \
  EXPORT bool linear_backward_##NAME(const T* g, const T* x, T* gradient, int64_t n, const Linear* how,                \
                                     bool constant, int64_t threads) {                                                 \
    return linear_backward_all(g, x, gradient, n, *how, constant, threads);                                            \
  }                                                                                                                    \
  EXPORT void replace_##NAME(const T* g, const T* x, T* gradient, int64_t n, const Linear* how, int64_t threads) {     \
    replace_all(g, x, gradient, n, *how, threads);                                                                     \
  }                                                                                                                    \
  EXPORT void relu_forward_##NAME(const T* x, T* y, uint8_t* bits, int64_t n, int64_t threads) {                       \
    relu_forward_all(x, y, bits, n, threads);                                                                          \
  }                                                                                                                    \
  EXPORT void relu_backward_##NAME(const T* g, const T* y, const uint8_t* bits, T* gradient, int64_t n,                \
                                    double alpha, bool constant, int64_t threads) {                                    \
    relu_backward_all(g, y, bits, gradient, n, alpha, constant, threads);                                              \
  }                                                                                                                    \
  EXPORT void mark_##NAME(const T* x, int64_t n, int64_t size, double position, uint8_t* bits, bool* met,              \
                           int64_t threads) {                                                                          \
    mark_all(x, n, size, position, bits, met, threads);                                                                \
  }                                                                                                                    \
  EXPORT void overwrite_##NAME(T* gradient, const T* g, const int64_t* numbers, const uint8_t* bits,                   \
                                int64_t blocks, int64_t n, int64_t size, double alpha, bool constant,                  \
                                int64_t threads) {                                                                     \
    overwrite_all(gradient, g, numbers, bits, blocks, n, size, alpha, constant, threads);                              \
  }                                                                                                                    \
  EXPORT bool pool_forward_##NAME(const T* x, T* y, uint16_t* masks, const Geometry* at, bool zeros,                   \
                                   int64_t threads) {                                                                  \
    return pool_forward_all(x, y, masks, *at, zeros, threads);                                                         \
  }                                                                                                                    \
  EXPORT void pool_backward_##NAME(const T* g, const uint16_t* masks, const Wide<T>* weights, T* gradient,             \
                                    const Geometry* at, bool last, bool apart, bool vertex, int64_t threads) {         \
    const Weights<Wide<T>> given{weights, weights + COUNTS, last, apart, vertex};                                      \
    pool_backward_all(g, masks, given, gradient, *at, threads);                                                        \
  }

ENTRIES(float, float32)
ENTRIES(double, float64)
ENTRIES(BFloat16, bfloat16)
ENTRIES(Float16, float16)
