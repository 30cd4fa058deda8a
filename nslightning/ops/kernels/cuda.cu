// ReLU, piecewise linear operations and 2-d max pooling with a chosen derivative at ties, on a CUDA device.
//
// Compiled by NVRTC for the device at hand (cuda.py), launched by nodes.cpp. No header is needed but arguments.h. For the
// backward they keep what triton.py keeps: of ReLU one bit per entry, of a pooling window the bits of the entries that
// reach its maximum. No atomics and no contraction (--fmad=false): a product is rounded before it is added, so that every
// run returns the same bits, which are those of the composition of PyTorch's operations.
//
// A test compiles this file for a CPU, too: cuda_on_host.cpp defines what CUDA has built in.

#include "arguments.h"

namespace nslightning {

using byte = unsigned char;
using word = unsigned short;

// ------------------------------------------------------------------------------------------------------------ numbers

// Numbers of 16 bits, which are only kept: all arithmetic is float's.
struct BFloat16 {
  word bits;
};
struct Float16 {
  word bits;
};

template <typename T>
struct Wider {
  using type = float;
};
template <>
struct Wider<double> {
  using type = double;
};
// What a type's entries are computed in.
template <typename T>
using Wide = typename Wider<T>::type;

template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  union {
    From from;
    To to;
  } both = {from};
  return both.to;
}

float widened(float x) { return x; }
double widened(double x) { return x; }
float widened(BFloat16 x) { return same_bits<float>(static_cast<unsigned>(x.bits) << 16); }

void narrowed(float x, float& into) { into = x; }
void narrowed(double x, double& into) { into = x; }

// To the nearest, of two to the even one.
void narrowed(float x, BFloat16& into) {
  const unsigned bits = same_bits<unsigned>(x);
  into.bits = static_cast<word>(x != x ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

#ifdef __CUDA_ARCH__

float widened(Float16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

void narrowed(float x, Float16& into) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(into.bits) : "f"(x)); }

#endif  // else defined by the test

template <typename T>
T number(Wide<T> value) {
  T entry;
  narrowed(value, entry);
  return entry;
}

// ------------------------------------------------------------------------------------------- eight entries of a tensor

template <typename T>
struct alignas(16) Vector {
  static constexpr int SIZE = 16 / sizeof(T);
  T entries[SIZE];
};

// Entries GROUP * number and after it. They are read and written 16 bytes at a time where they can be.
template <typename T>
struct Group {
  static constexpr int SIZE = Vector<T>::SIZE;
  Vector<T> vectors[GROUP / SIZE];

  T& operator[](int k) { return vectors[k / SIZE].entries[k % SIZE]; }
};

// The entries that a thread takes.
struct Part {
  long long start;
  int size;  // not above 0 where there are none left

  explicit Part(long long n) : start((blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x) * GROUP) {
    size = n - start < GROUP ? static_cast<int>(n - start) : GROUP;
  }

  template <typename T>
  bool whole(const T* memory) const {
    return size == GROUP && reinterpret_cast<unsigned long long>(memory) % 16 == 0;
  }

  template <typename T>
  void read(const T* memory, Group<T>& into) const {
    if (whole(memory)) {
#pragma unroll
      for (int v = 0; v < GROUP / Group<T>::SIZE; ++v) {
        into.vectors[v] = reinterpret_cast<const Vector<T>*>(memory + start)[v];
      }
    } else {
#pragma unroll
      for (int k = 0; k < GROUP; ++k) {
        if (k < size) into[k] = memory[start + k];
        else narrowed(1, into[k]);
      }
    }
  }

  template <typename T>
  void write(Group<T>& from, T* memory) const {
    if (whole(memory)) {
#pragma unroll
      for (int v = 0; v < GROUP / Group<T>::SIZE; ++v) {
        reinterpret_cast<Vector<T>*>(memory + start)[v] = from.vectors[v];
      }
    } else {
#pragma unroll
      for (int k = 0; k < GROUP; ++k) {
        if (k < size) memory[start + k] = from[k];
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------- ReLU

template <typename T>
void relu_forward(const T* x, T* y, byte* bits, long long n) {
  const Part part(n);
  if (part.size <= 0) return;
  Group<T> entries;
  part.read(x, entries);
  unsigned ties = 0;
#pragma unroll
  for (int k = 0; k < GROUP; ++k) {
    const Wide<T> value = widened(entries[k]);
    ties |= static_cast<unsigned>(value == 0 && k < part.size) << k;
    if (value <= 0) narrowed(0, entries[k]);  // NaN stays as it is, and -0.0 becomes 0.0, as in stock
  }
  part.write(entries, y);
  bits[part.start / GROUP] = static_cast<byte>(ties);
}

template <typename T>
void relu_backward(const T* g, const T* y, const byte* bits, T* gradient, long long n, Wide<T> alpha, bool constant,
                   const Later& later) {
  const Part part(n);
  if (part.size <= 0) return;
  later.settle(alpha, constant);
  Group<T> incoming, output;
  part.read(g, incoming);
  part.read(y, output);
  const unsigned ties = bits[part.start / GROUP];
#pragma unroll
  for (int k = 0; k < GROUP; ++k) {
    if ((ties >> k) & 1) narrowed(constant ? alpha : widened(incoming[k]) * alpha, incoming[k]);
    else if (widened(output[k]) <= 0) narrowed(0, incoming[k]);
  }
  part.write(incoming, gradient);
}

// -------------------------------------------------------------- operations of one or two kinks, from their input itself

// The gradient of a piecewise linear operation. What is NaN compares as in stock's kernels.
template <typename T>
void linear_backward(const T* g, const T* x, T* gradient, long long n, Linear<Wide<T>> how, bool constant,
                     const Later& later) {
  const Part part(n);
  const bool leaky = how.slope == how.slope;
  if (part.size <= 0) return;
  later.settle(how, constant);
  Group<T> incoming, input;
  part.read(g, incoming);
  part.read(x, input);
#pragma unroll
  for (int k = 0; k < GROUP; ++k) {
    const Wide<T> value = widened(input[k]), above = widened(incoming[k]);
    const bool first = value == how.position[0], second = value == how.position[1];
    if (first || second) {
      const Wide<T> derivative = second ? how.derivative[1] : how.derivative[0];
      narrowed(constant ? derivative : above * derivative, incoming[k]);
    } else if (leaky) {
      if (!(value > how.low)) narrowed(above * how.slope, incoming[k]);
    } else if (value <= how.low || value >= how.high) {
      narrowed(0, incoming[k]);
    }
  }
  part.write(incoming, gradient);
}

// The derivative times the incoming gradient, written over the gradient of the entries at one of two positions.
template <typename T>
void replace(const T* g, const T* x, T* gradient, long long n, Linear<Wide<T>> how, const Later& later) {
  const Part part(n);
  bool constant = false;
  if (part.size <= 0) return;
  later.settle(how, constant);
  Group<T> input;
  part.read(x, input);
#pragma unroll
  for (int k = 0; k < GROUP; ++k) {
    const Wide<T> value = widened(input[k]);
    const bool first = value == how.position[0], second = value == how.position[1];
    if (k >= part.size || !(first || second)) continue;
    const long long at = part.start + k;
    narrowed(widened(g[at]) * (second ? how.derivative[1] : how.derivative[0]), gradient[at]);
  }
}

// --------------------------------------------------------------------------------------------------------- max pooling

int operator/(int n, const Divisor<int>& by) {
  return static_cast<int>((__umulhi(static_cast<unsigned>(n), by.factor) + static_cast<unsigned>(n)) >> by.shift);
}
long long operator/(long long n, const Divisor<long long>& by) { return n / by.value; }

// Divide; returns the rest.
template <typename I>
I split(I& n, const Divisor<I>& by) {
  const I whole = n / by, rest = n - whole * by.value;
  n = whole;
  return rest;
}

// An entry or a window: its plane, which is an image where the channels come last and else one of its channels; its
// place in there.
template <typename I>
struct Place {
  I plane, row, column, channel;

  Place(I at, const Divisor<I>& rows, const Divisor<I>& columns, const Geometry<I>& of)
      : channel(of.last ? split(at, of.channels) : 0) {
    column = split(at, columns);
    row = split(at, rows);
    plane = at;
  }

  // Where an entry or a window of the same plane and channel lies in memory.
  I memory(I row, I column, const Divisor<I>& rows, const Divisor<I>& columns, const Geometry<I>& of) const {
    const I inside = (plane * rows.value + row) * columns.value + column;
    return of.last ? inside * of.channels.value + channel : inside;
  }
};

template <typename I>
I thread() {
  return static_cast<I>(blockIdx.x) * static_cast<I>(blockDim.x) + static_cast<I>(threadIdx.x);
}

// One window. HEIGHT and WIDTH are its size, or 0 where that is not known when this is compiled.
template <int HEIGHT, int WIDTH, typename T, typename I>
void pool_window(const T* x, T* y, short* masks, I at, const Geometry<I>& of) {
  const int height = HEIGHT ? HEIGHT : static_cast<int>(of.kernel[0]);
  const int width = WIDTH ? WIDTH : static_cast<int>(of.kernel[1]);
  const Place<I> window(at, of.rows, of.columns, of);
  const I top = window.row * of.stride[0].value - of.padding[0];
  const I left = window.column * of.stride[1].value - of.padding[1];
  Wide<T> best = -static_cast<Wide<T>>(same_bits<float>(0x7F800000u));
  unsigned reached = 0;
#pragma unroll
  for (int i = 0; i < height; ++i) {
    const I h = top + i * of.dilation[0].value;
    if (h < 0 || h >= of.height.value) continue;
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const I w = left + j * of.dilation[1].value;
      if (w < 0 || w >= of.width.value) continue;
      const Wide<T> value = widened(x[window.memory(h, w, of.height, of.width, of)]);
      const unsigned bit = 1u << (i * width + j);
      if (value > best || value != value) {  // the last NaN wins, as in stock
        best = value;
        reached = bit;
      } else if (value == best) {
        reached |= bit;
      }
    }
  }
  narrowed(best, y[at]);
  masks[at] = static_cast<short>(reached);
}

template <typename T, typename I>
void pool_forward(const T* x, T* y, short* masks, long long n, const Geometry<I>& of) {
  const I at = thread<I>();
  if (at >= n) return;
  const bool square = of.kernel[0] == of.kernel[1];
  if (square && of.kernel[0] == 2) pool_window<2, 2>(x, y, masks, at, of);
  else if (square && of.kernel[0] == 3) pool_window<3, 3>(x, y, masks, at, of);
  else pool_window<0, 0>(x, y, masks, at, of);
}

// The first of the windows, counted along one dimension, that may hold an entry: `at` counts from the padding's start.
template <typename I>
I first_window(I at, I kernel, const Divisor<I>& stride, const Divisor<I>& dilation) {
  const I behind = at - (kernel - 1) * dilation.value;
  return behind <= 0 ? 0 : (behind + stride.value - 1) / stride;
}

// One entry: what the windows that hold it give, added up in their order in memory, as stock adds up.
template <typename T, typename I>
void pool_backward(const T* g, const short* masks, T* gradient, long long n, const Geometry<I>& of,
                   Shares<Wide<T>> shares) {
  const I at = thread<I>();
  if (at >= n) return;
  if (shares.memory) shares = shares_of<Wide<T>>(shares.memory, shares.disjoint);
  const Place<I> entry(at, of.height, of.width, of);
  const I down = entry.row + of.padding[0], across = entry.column + of.padding[1];
  I last_row = down / of.stride[0], last_column = across / of.stride[1];
  if (last_row >= of.rows.value) last_row = of.rows.value - 1;
  if (last_column >= of.columns.value) last_column = of.columns.value - 1;
  const I first_row = first_window(down, of.kernel[0], of.stride[0], of.dilation[0]);
  const I first_column = first_window(across, of.kernel[1], of.stride[1], of.dilation[1]);
  Wide<T> total = 0, more = 0;
  for (I row = first_row; row <= last_row; ++row) {
    I i = down - row * of.stride[0].value;
    if (split(i, of.dilation[0])) continue;
    for (I column = first_column; column <= last_column; ++column) {
      I j = across - column * of.stride[1].value;
      if (split(j, of.dilation[1])) continue;
      const I window = entry.memory(row, column, of.rows, of.columns, of);
      const unsigned reached = static_cast<word>(masks[window]);
      const int place = static_cast<int>(i * of.kernel[1] + j);
      if (!((reached >> place) & 1)) continue;
      const Wide<T> incoming = widened(g[window]);
      const int count = __popc(reached);
      const bool target = shares.last ? reached >> place == 1 : (reached & ((1u << place) - 1)) == 0;
      if (count == 1 || shares.vertex) {
        if (target) total += incoming;
        continue;
      }
      const Wide<T> rest = shares.share / static_cast<Wide<T>>(count) + shares.each;
      if (shares.apart) {
        if (target) total += incoming * shares.whole;
        more += incoming * rest;
      } else {
        total += incoming * (target ? rest + shares.whole : rest);
      }
    }
  }
  narrowed(total + more, gradient[at]);
}

}  // namespace nslightning

// The names end in the entries' dtype; `wide` counts entries in 64 bits.
#define KERNEL extern "C" __global__ void __launch_bounds__(nslightning::BLOCK)
#define ENTRIES(T, NAME)                                                                                              \
  KERNEL relu_forward_##NAME(const T* x, T* y, unsigned char* bits, long long n) {                                    \
    nslightning::relu_forward(x, y, bits, n);                                                                         \
  }                                                                                                                   \
  KERNEL relu_backward_##NAME(const T* g, const T* y, const unsigned char* bits, T* gradient, long long n,            \
                              nslightning::Wide<T> alpha, bool constant, nslightning::Later later) {                  \
    nslightning::relu_backward(g, y, bits, gradient, n, alpha, constant, later);                                      \
  }                                                                                                                   \
  KERNEL linear_backward_##NAME(const T* g, const T* x, T* gradient, long long n,                                     \
                                nslightning::Linear<nslightning::Wide<T>> how, bool constant,                         \
                                nslightning::Later later) {                                                           \
    nslightning::linear_backward(g, x, gradient, n, how, constant, later);                                            \
  }                                                                                                                   \
  KERNEL replace_##NAME(const T* g, const T* x, T* gradient, long long n,                                             \
                        nslightning::Linear<nslightning::Wide<T>> how, nslightning::Later later) {                    \
    nslightning::replace(g, x, gradient, n, how, later);                                                              \
  }                                                                                                                   \
  POOLING(T, NAME, int, )                                                                                             \
  POOLING(T, NAME, long long, wide_)
#define POOLING(T, NAME, I, WIDE)                                                                                     \
  KERNEL pool_forward_##WIDE##NAME(const T* x, T* y, short* masks, long long n, nslightning::Geometry<I> of) {        \
    nslightning::pool_forward(x, y, masks, n, of);                                                                    \
  }                                                                                                                   \
  KERNEL pool_backward_##WIDE##NAME(const T* g, const short* masks, T* gradient, long long n,                         \
                                    nslightning::Geometry<I> of, nslightning::Shares<nslightning::Wide<T>> shares) {  \
    nslightning::pool_backward(g, masks, gradient, n, of, shares);                                                    \
  }

ENTRIES(float, float32)
ENTRIES(double, float64)
ENTRIES(nslightning::BFloat16, bfloat16)
ENTRIES(nslightning::Float16, float16)
